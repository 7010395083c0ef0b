"""Everything that a training step changes, and so everything that a checkpoint holds."""

import copy
import functools
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ddt.checkpoint import format as ckpt
from ddt.distributed.prepare import load_weights, local_part, shard_like
from ddt.objective import Objective
from ddt.objective.reconstruction import Reconstruction
from ddt.training.ema import EMA
from ddt.training.meter import Meter
from ddt.training.stopping import Skips


def local_parts(tree: Any) -> Any:
    """Return a nested state with this process's part of each sharded tensor in its place."""
    if isinstance(tree, dict):
        return {key: local_parts(value) for key, value in tree.items()}
    return local_part(tree) if isinstance(tree, Tensor) else tree


@torch.no_grad()
def on_host(tree: Any) -> Any:
    """Return a copy of a nested state in host memory, which later steps do not change; a device
    sync. What comes from a GPU lies in pinned memory, which torch keeps for the next copy.
    """
    tensors = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
    copies = {
        id(tensor): torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda).copy_(tensor, non_blocking=True)
        for tensor in tensors
    }
    if any(tensor.is_cuda for tensor in tensors):
        torch.cuda.synchronize()
    return copy.deepcopy(tree, copies)  # of all else too, such as the attributes of a state dict


class TrainingState:
    """Weights, EMAs, optimizer, meters and counts of a run, after `step` steps.

    emas: by the name of their weights in a checkpoint; previews and evaluations sample with "ema".
    mixed_precision: of the trainer. `scaler` scales the loss, so that gradients in fp16 do not
    vanish; in other precisions it does nothing.
    """

    def __init__(
        self,
        objective: Objective | Reconstruction,
        optimizer: torch.optim.Optimizer,
        emas: dict[str, EMA[Any]],
        accelerator: Accelerator,
        mixed_precision: str = "fp32",
    ) -> None:
        self.objective, self.optimizer, self.emas, self.accelerator = objective, optimizer, emas, accelerator
        self.meter, self.skips = Meter(accelerator.device), Skips(accelerator.device)
        self.scaler = torch.amp.GradScaler(accelerator.device.type, enabled=mixed_precision == "fp16")
        self.step = 0
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]

    @functools.cached_property
    def parameters(self) -> list[nn.Parameter]:
        """All that is trained; a list, as in `EMA.parameters`."""
        return list(self.objective.parameters())

    @functools.cached_property
    def network_parameters(self) -> list[nn.Parameter]:
        """The weights that the EMAs follow."""
        return list(self.objective.network.parameters())

    @property
    def ema(self) -> EMA[Any]:
        """The EMA that previews and evaluations sample with."""
        return self.emas["ema"]

    @property
    def skipped_in_a_row(self) -> Tensor:
        """Steps until now that were skipped in a row, on the device."""
        return self.skips.in_a_row

    def load(self, folder: Path) -> dict[str, Any]:
        """Resume from a checkpoint that training wrote; return its train state."""
        config, state = ckpt.read_training(folder), ckpt.read_train_state(folder)
        load_weights(self.objective.network, ckpt.read_weights(folder, "model"))
        for name, ema in self.emas.items():
            load_weights(ema.model, ckpt.read_weights(folder, name))
        if self.objective.alignment is not None:
            load_weights(self.objective.alignment, state["alignment"])
        for index, values in state["optimizer"]["state"].items():
            for key, value in values.items():
                if value.ndim:
                    values[key] = shard_like(value, self.parameters[index])
        self.optimizer.load_state_dict(state["optimizer"])
        if state.get("scaler"):  # of a checkpoint in fp16
            self.scaler.load_state_dict(state["scaler"])
        accelerator = self.accelerator
        self.meter = Meter(accelerator.device, accelerator.process_index, accelerator.num_processes, state["meter"])
        self.skips, self.step = Skips(accelerator.device, state["skips"]), config["step"]
        return state

    def weights(self) -> dict[str, dict[str, Tensor]]:
        """Return the state dicts of a checkpoint by name, of this process's parts where they are
        sharded.
        """
        emas = {name: ema.model.state_dict() for name, ema in self.emas.items()}
        return local_parts({**emas, "model": self.objective.network.state_dict()})

    def train_state(self) -> dict[str, Any]:
        """Return the rest of a checkpoint, in the same parts. All processes call it together."""
        state = {
            "optimizer": self.optimizer.state_dict(),
            "meter": self.meter.state(self.accelerator),
            "skips": self.skips.state(),
            "scaler": self.scaler.state_dict(),
        }
        if self.objective.alignment is not None:
            state["alignment"] = self.objective.alignment.state_dict()
        return local_parts(state)

    def tensors(self) -> list[Tensor]:
        """Return all weights and EMAs, of this process's parts where they are sharded."""
        return [local_part(parameter) for module in self.modules() for parameter in module.parameters()]

    def modules(self) -> list[nn.Module]:
        """Return all that holds weights or EMAs."""
        return [self.objective, *(ema.model for ema in self.emas.values())]

    def finite(self) -> bool:
        """Return whether all weights and EMAs are finite. All processes call it together."""
        finite = torch.stack([tensor.isfinite().all() for tensor in self.tensors()]).all()
        return self.accelerator.reduce((~finite).float(), reduction="sum").item() == 0

    def check_agreement(self) -> None:
        """Raise RuntimeError where processes that each hold all weights do not hold the same: a
        fault of hardware, or of this code, that no later step mends. All processes call it
        together.
        """
        if self.accelerator.num_processes == 1 or self.ema.outline is not None:
            return
        # of the bits, as integers, whose sum does not depend on the order
        sums = torch.stack([tensor.view(torch.int32).sum() for tensor in self.tensors()])
        everyone = self.accelerator.gather(sums[None])
        if not torch.equal(everyone, everyone[:1].expand_as(everyone)):
            raise RuntimeError(f"step {self.step}: the processes hold different weights; nothing is saved")

    def row(self) -> dict[str, float]:
        """Return a row of the log: means since the last one, and how far the EMA is from the
        weights. All processes call it together; a device sync.
        """
        row = self.meter.means(self.accelerator)
        alignment = self.objective.alignment
        if alignment is not None and alignment.name in row:  # it may have ended
            row |= alignment.readings(row[alignment.name])
        distances = self.ema.distance(self.network_parameters)
        if self.ema.outline is not None:  # each process knows its parts
            distances = self.accelerator.reduce(distances, reduction="sum")
        apart, norm = distances.sqrt().tolist()
        row["ema_distance"] = apart / norm
        row["skipped_steps"] = self.skips.total.item()
        if self.scaler.is_enabled():
            row["loss_scale"] = self.scaler.get_scale()
        row["lr"] = self.optimizer.param_groups[0]["lr"]
        return row

    def bytes(self) -> int:
        """Return how many bytes this process writes in a checkpoint: weights, EMAs, and two moments
        per weight.
        """
        num_weights = sum(local_part(p).numel() for p in self.parameters)
        num_ema = sum(local_part(p).numel() for ema in self.emas.values() for p in ema.model.parameters())
        return 4 * (3 * num_weights + num_ema)
