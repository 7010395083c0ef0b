"""Mean losses between two log rows, also by training time t. Shapes: B batch."""

from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

T_BINS = 10
BY_T = "fm_loss_by_t"
T_NAMES = [f"{BY_T}/{k / T_BINS:.1f}-{(k + 1) / T_BINS:.1f}" for k in range(T_BINS)]


class Meter:
    """Means between two log rows, summed on the device; reading is the loop's only device sync.

    state: from a checkpoint, one entry per process; another number of processes resumes from their
    mean.
    """

    def __init__(self, device: torch.device, rank: int = 0, num_processes: int = 1, state: Any = None) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, Tensor] = {}
        self.step: list[tuple[str, Tensor, Tensor]] = []  # of the current step
        for key, (sums, counts) in (state or {}).items():
            if len(sums) == num_processes:
                mine = sums[rank], counts[rank]
            else:  # each process counts its steps, but its own samples
                parts = num_processes if key == BY_T else len(sums)
                mine = sums.sum(0) / parts, counts.sum(0) / parts
            self.sums[key], self.counts[key] = (value.to(device) for value in mine)

    def add(self, losses: dict[str, Tensor], weight: float) -> None:
        """Add the losses of a micro-batch that is `weight` of a step; with times `t`, `errors` by
        t.
        """
        for key, value in losses.items():
            if key not in ("t", "errors"):
                value = weight * value.detach().float()
                self.step.append((key, value, torch.full_like(value, weight)))
        if "t" not in losses:
            return
        bins = torch.arange(T_BINS, device=losses["t"].device)
        # a matrix product: adding at indices is not deterministic on a GPU
        inside = ((losses["t"] * T_BINS).long().clamp(max=T_BINS - 1)[:, None] == bins).float()
        self.step.append((BY_T, losses["errors"] @ inside, inside.sum(0)))

    def end_step(self, norm: Tensor, clip_norm: float | None, skipped: Tensor) -> None:
        """Add the gradient norm before clipping and whether it was clipped; end the step.

        Its values enter the means unless it was skipped (1.0).
        """
        self.step.append(("grad_norm", norm, torch.ones_like(norm)))
        if clip_norm is not None:
            self.step.append(("clipped", (norm > clip_norm).float(), torch.ones_like(norm)))
        for key, value, count in self.step:
            for totals, new in ((self.sums, value), (self.counts, count)):
                new = torch.where(skipped > 0, 0, new)
                totals[key] = totals[key] + new if key in totals else new
        self.step = []

    def state(self, accelerator: Accelerator) -> dict[str, tuple[Tensor, Tensor]]:
        """Return the state for a checkpoint. All processes call it together."""
        everyone = {
            key: accelerator.gather(torch.stack([self.sums[key], self.counts[key]])[None]).cpu() for key in self.sums
        }
        return {key: (values[:, 0].contiguous(), values[:, 1].contiguous()) for key, values in everyone.items()}

    def means(self, accelerator: Accelerator) -> dict[str, float]:
        """Return the means over steps and processes, without empty ones. All call it together."""
        flat = torch.cat([torch.stack([self.sums[key], self.counts[key]]).reshape(2, -1) for key in self.sums], dim=1)
        sums, counts = accelerator.reduce(flat, reduction="sum").tolist()
        names = [name for key in self.sums for name in (T_NAMES if key == BY_T else [key])]
        return {name: s / n for name, s, n in zip(names, sums, counts, strict=True) if n > 0}

    def reset(self) -> None:
        """Clear the means."""
        self.sums, self.counts = {}, {}
