"""Everything that a step of a decoder's training changes: that of the main loop, and the
discriminator.
"""

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ddt.objective.reconstruction import Discrimination, Reconstruction
from ddt.training.ema import EMA
from ddt.training.state import TrainingState
from ddt.training.stopping import Skips


class DecoderState(TrainingState):
    """Weights, EMAs, optimizers, meters and counts of decoder and discriminator.

    discrimination: the discriminator with its loss, None without a GAN. `discriminator`: the same,
    prepared for many processes.
    """

    def __init__(
        self,
        objective: Reconstruction,
        optimizer: torch.optim.Optimizer,
        emas: dict[str, EMA[Any]],
        accelerator: Accelerator,
        discrimination: Discrimination | None = None,
        discriminator: nn.Module | None = None,
        discriminator_optimizer: torch.optim.Optimizer | None = None,
    ) -> None:
        super().__init__(objective, optimizer, emas, accelerator)
        self.discrimination, self.discriminator = discrimination, discriminator
        self.discriminator_optimizer = discriminator_optimizer
        self.discriminator_skips = Skips(accelerator.device)
        self.discriminator_steps = 0  # its updates, which its schedule counts
        if discriminator_optimizer is not None:
            for group in discriminator_optimizer.param_groups:
                group["initial_lr"] = group["lr"]

    @property
    def skipped_in_a_row(self) -> Tensor:
        """Steps until now that decoder or discriminator skipped in a row, on the device."""
        return torch.maximum(self.skips.in_a_row, self.discriminator_skips.in_a_row)

    def modules(self) -> list[nn.Module]:
        return [*super().modules(), *([] if self.discrimination is None else [self.discrimination])]

    def load(self, folder: Path) -> dict[str, Any]:
        state = super().load(folder)
        if self.discrimination is not None and self.discriminator_optimizer is not None:
            own = state["discriminator"]
            self.discrimination.load_state_dict(own["weights"])  # with the vectors of its spectral norms
            self.discriminator_optimizer.load_state_dict(own["optimizer"])
            self.discriminator_skips = Skips(self.accelerator.device, own["skips"])
            self.discriminator_steps = own["steps"]
        return state

    def train_state(self) -> dict[str, Any]:
        state = super().train_state()
        if self.discrimination is not None and self.discriminator_optimizer is not None:
            state["discriminator"] = {
                "weights": self.discrimination.state_dict(),
                "optimizer": self.discriminator_optimizer.state_dict(),
                "skips": self.discriminator_skips.state(),
                "steps": self.discriminator_steps,
            }
        return state

    def row(self) -> dict[str, float]:
        row = super().row()
        if self.discriminator_optimizer is not None and self.discriminator_steps:
            row["discriminator_lr"] = self.discriminator_optimizer.param_groups[0]["lr"]
        return row

    def bytes(self) -> int:
        own = [] if self.discrimination is None else self.discrimination.parameters()
        return super().bytes() + 4 * 3 * sum(parameter.numel() for parameter in own)
