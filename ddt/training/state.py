"""Everything that a training step changes, and so everything that a checkpoint holds."""

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from ddt.checkpoint import folder as ckpt
from ddt.distributed.prepare import clip, gradient_norm, like, load, local
from ddt.model import Denoiser
from ddt.objective import FlowMatching
from ddt.training.ema import EMA
from ddt.training.monitoring import Meter
from ddt.training.stopping import Skips

TRAIN_FORMAT = 2  # of what `TrainingState` keeps beside the weights


def pieces(tree: Any) -> Any:
    """Return a nested state with this process's part of each sharded tensor in its place."""
    if isinstance(tree, dict):
        return {key: pieces(value) for key, value in tree.items()}
    return local(tree) if isinstance(tree, Tensor) else tree


class TrainingState:
    """Weights, averages, optimizer, meters and counts of a run, after `step` steps.

    averages: by the name of their weights in a checkpoint; "ema" is what previews and evaluations
    draw with.
    """

    def __init__(
        self,
        objective: FlowMatching,
        optimizer: torch.optim.Optimizer,
        averages: dict[str, EMA[Denoiser]],
        accelerator: Accelerator,
    ) -> None:
        self.objective, self.optimizer, self.averages, self.accelerator = objective, optimizer, averages, accelerator
        self.meter, self.skips = Meter(accelerator.device), Skips(accelerator.device)
        self.step = 0
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]

    @property
    def ema(self) -> EMA[Denoiser]:
        """The average that samples are drawn with."""
        return self.averages["ema"]

    def load(self, folder: Path) -> None:
        """Go on from a checkpoint that training wrote."""
        config, state = ckpt.read_config(folder), ckpt.read_train_state(folder)
        load(self.objective.denoiser, ckpt.read_weights(folder, "model"))
        for name, average in self.averages.items():
            load(average.model, ckpt.read_weights(folder, name))
        if self.objective.alignment is not None:
            load(self.objective.alignment, state["alignment"])
        parameters = list(self.objective.parameters())
        for index, values in state["optimizer"]["state"].items():
            for key, value in values.items():
                if value.ndim:
                    values[key] = like(value, parameters[index])
        self.optimizer.load_state_dict(state["optimizer"])
        accelerator = self.accelerator
        self.meter = Meter(accelerator.device, accelerator.process_index, accelerator.num_processes, state["meter"])
        self.skips, self.step = Skips(accelerator.device, state["skips"]), config["step"]

    def update(self, clip_norm: float | None) -> None:
        """Take the optimizer step of the gradients that lie ready, and move the averages. Gradients
        of a norm above `clip_norm` are scaled down to it; those that are no finite numbers change
        nothing but the counts. Nobody waits for the device.
        """
        parameters = list(self.objective.parameters())
        norm = gradient_norm(parameters)
        skipped = self.skips.check(norm)  # 1 where a gradient is no finite number: the step changes nothing
        if clip_norm is not None:
            clip(parameters, norm, clip_norm)
        self.optimizer.found_inf = skipped  # type: ignore[attr-defined]  # what GradScaler tells a fused optimizer
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        for average in self.averages.values():
            average.update(self.objective.denoiser, self.step, skipped)
        self.meter.add_step(norm, clip_norm)
        self.meter.end_step(skipped)

    def weights(self) -> dict[str, dict[str, Tensor]]:
        """Return the state dicts of a checkpoint by name, of this process's parts where they are
        sharded.
        """
        averages = {name: average.model.state_dict() for name, average in self.averages.items()}
        return pieces({**averages, "model": self.objective.denoiser.state_dict()})

    def train_state(self) -> dict[str, Any]:
        """Return the rest of a checkpoint, in the same parts. All processes call it together."""
        state = {
            "optimizer": self.optimizer.state_dict(),
            "meter": self.meter.state(self.accelerator),
            "skips": self.skips.state(),
        }
        if self.objective.alignment is not None:
            state["alignment"] = self.objective.alignment.state_dict()
        return pieces(state)

    def tensors(self) -> list[Tensor]:
        """Return all weights and averages, of this process's parts where they are sharded."""
        modules = [self.objective, *(average.model for average in self.averages.values())]
        return [local(parameter) for module in modules for parameter in module.parameters()]

    def finite(self) -> bool:
        """Tell whether all weights and averages are finite numbers. All processes call it together."""
        sound = torch.stack([tensor.isfinite().all() for tensor in self.tensors()]).all()
        return self.accelerator.reduce((~sound).float(), reduction="sum").item() == 0

    def check_agreement(self) -> None:
        """Raise RuntimeError where processes that each hold all weights do not hold the same: a
        fault of hardware, or of this code, that no later step mends. All processes call it
        together.
        """
        if self.accelerator.num_processes == 1 or self.ema.outline is not None:
            return
        # of bits, as whole numbers: the same in any order of adding
        sums = torch.stack([tensor.view(torch.int32).sum() for tensor in self.tensors()])
        everyone = self.accelerator.gather(sums[None])
        if not torch.equal(everyone, everyone[:1].expand_as(everyone)):
            raise RuntimeError(f"step {self.step}: the processes hold different weights; nothing is saved")

    def row(self) -> dict[str, float]:
        """Return a row of the log: means since the last one, and how far the average is from the
        weights. All processes call it together; it waits for the device.
        """
        row = self.meter.means(self.accelerator)
        if "repa_loss" in row:
            row["alignment_cosine"] = 1 - row["repa_loss"]
        distances = self.ema.distance(self.objective.denoiser)
        if self.ema.outline is not None:  # each process knows its parts
            distances = self.accelerator.reduce(distances, reduction="sum")
        apart, norm = distances.sqrt().tolist()
        row["ema_distance"] = apart / norm
        row["skipped_steps"] = self.skips.total.item()
        row["lr"] = self.optimizer.param_groups[0]["lr"]
        return row

    def bytes(self) -> int:
        """Return how many bytes this process writes in a checkpoint: weights, averages, and two
        moments a weight.
        """
        numbers = sum(local(p).numel() for p in self.objective.parameters())
        averaged = sum(local(p).numel() for average in self.averages.values() for p in average.model.parameters())
        return 4 * (3 * numbers + averaged)
