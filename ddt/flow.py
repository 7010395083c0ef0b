"""The path between noise and data: interpolation, velocity, score, training times, sampling grids.

t = 0 is noise, t = 1 is data. Shapes: B batch. Source: method.md 1 and 4.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from ddt.errors import require

if TYPE_CHECKING:
    from torch import Tensor

MAX_STEPS = 100_000  # so that a typo does not fill the memory
SHIFT_BASE = 4096  # numbers of latents up to which there is no time shift
TimeDistribution = Literal["lognorm", "uniform"]
Prediction = Literal["v", "x"]  # what a network's output is: the velocity, or the clean latent
LEAST_NOISE = 0.05  # below this share 1 − t of noise, the distance to a clean latent is divided by it


def per_sample(t: Tensor, like: Tensor) -> Tensor:
    """Reshape times (B,) so that they broadcast against `like` (B, ...)."""
    return t.reshape(-1, *([1] * (like.ndim - 1)))


def interpolate(x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """Return `x_t = t·x + (1 − t)·noise` for x, noise (B, ...) and t (B,). Source: method.md 1."""
    t = per_sample(t, x)
    return t * x + (1 - t) * noise


def velocity(x: Tensor, noise: Tensor) -> Tensor:
    """Return the target velocity `v_t = x − noise`, d/dt of `interpolate`. Source: method.md 1."""
    return x - noise


def velocity_of(output: Tensor, x_t: Tensor, t: Tensor, prediction: Prediction) -> Tensor:
    """Return the velocity (B, ...) that a network's output means at x_t (B, ...) and t (B,).

    "v": the output itself; "x": `(output − x_t) / max(1 − t, 0.05)`, of an output that is a clean
    latent. Raises UserError for another prediction. Source: docs/method.md 1.
    """
    require(prediction in ("v", "x"), f"prediction={prediction}: give v or x")
    if prediction == "v":
        return output
    return (output - x_t) / per_sample((1 - t).clamp(min=LEAST_NOISE), x_t)


def score(v: Tensor, x_t: Tensor, t: float) -> Tensor:
    """Return the score `s = (t·v − x_t)/(1 − t)` of a velocity v, t < 1. Source: method.md 1."""
    return (t * v - x_t) / (1 - t)


def clean(v: Tensor, x_t: Tensor, t: float) -> Tensor:
    """Return the clean latent `x_t + (1 − t)·v` predicted by a velocity v. Source: method.md 1."""
    return x_t + (1 - t) * v


def shift_time(t: Tensor, timeshift: float) -> Tensor:
    """Return `t / (t + (1 − t)·timeshift)`; 1/timeshift undoes it. Source: method.md 4."""
    return t / (t + (1 - t) * timeshift)


@dataclasses.dataclass(frozen=True)
class TrainingTimes:
    """The distribution of training times: of standard normal samples n (B,) times t (B,).

    distribution: "lognorm", sigmoid(n), as published; "uniform", Φ(n), the ablation's baseline,
    from the same n, so that runs with either see the same noise. t_min: the distribution is
    truncated to t ≥ t_min; DiT^DH 0.001. timeshift: applied to the truncated times; above 1, more
    of them near the noise. Raises UserError for impossible ones. Source: method.md 1.
    """

    distribution: TimeDistribution = "lognorm"
    t_min: float = 0.0
    timeshift: float = 1.0

    def __post_init__(self) -> None:
        require(0 <= self.t_min < 1, f"objective.t_min={self.t_min}: must lie in 0..1, below 1 (DiT^DH: 0.001)")
        require(0 < self.timeshift < math.inf, f"objective.timeshift={self.timeshift}: must be above 0")

    def of(self, normal: Tensor) -> Tensor:
        """Return the times (B,) in (0, 1) of standard normal samples (B,)."""
        import torch

        if self.distribution == "uniform":
            t = self.t_min + (1 - self.t_min) * torch.special.ndtr(normal)
        elif self.t_min == 0:
            t = torch.sigmoid(normal)
        else:  # of the noise's share 1 − t, which is truncated above: its normal sample is −n
            share = torch.special.ndtr(-normal) * self._kept(normal)
            t = torch.sigmoid(-torch.special.ndtri(share)).clamp(min=self.t_min)
        return t if self.timeshift == 1 else shift_time(t, self.timeshift)

    def normals(self, t: Tensor) -> Tensor:
        """Return the standard normal samples of which `of` makes times t (B,) in (t_min, 1)."""
        import torch

        t = t if self.timeshift == 1 else shift_time(t, 1 / self.timeshift)
        if self.distribution == "uniform":
            return torch.special.ndtri((t - self.t_min) / (1 - self.t_min))
        if self.t_min == 0:
            return torch.logit(t)
        return -torch.special.ndtri(torch.special.ndtr(-torch.logit(t)) / self._kept(t))

    def _kept(self, like: Tensor) -> Tensor:
        """Return the probability of t ≥ t_min before the truncation."""
        import torch

        return torch.special.ndtr(-torch.logit(torch.tensor(self.t_min, dtype=like.dtype, device=like.device)))


def dimension_timeshift(latent_shape: Sequence[int]) -> float:
    """Return the time shift for latents (C, H, W): √(C·H·W / 4096), at least 1, for training times
    and grids. Source: arXiv 2510.11690, section 4.3.
    """
    return math.sqrt(max(math.prod(latent_shape) / SHIFT_BASE, 1.0))


def check_grid(num_steps: int, last_step: float | None, timeshift: float, t_end: float) -> None:
    """Raise UserError for numbers of which `time_grid` makes no grid; it finds equal times."""
    require(1 <= num_steps <= MAX_STEPS, f"num_steps={num_steps}: must lie in 1..{MAX_STEPS}")
    require(0 < t_end <= 1, f"t_end={t_end}: must lie above 0, and be at most 1 (DiT^DH: 0.999)")
    require(
        t_end == 1 or last_step is None,
        f"last_step={last_step}: has no effect with t_end={t_end}, where no step follows; give last_step=null, or "
        "t_end=1",
    )
    last = 1 / num_steps if last_step is None else last_step
    require(
        0 < last < 1 or (num_steps == 1 and last == 1),
        f"last_step={last}: must lie between 0 and 1 (published: 0.04), or be null for 1/num_steps",
    )
    require(timeshift > 0, f"timeshift={timeshift}: must be above 0 (published: 1.0)")


def time_grid(
    num_steps: int, last_step: float | None = None, timeshift: float = 1.0, t_end: float = 1.0
) -> list[float]:
    """Return a solver's num_steps + 1 times: `linspace(0, 1 − last_step, num_steps)`, then 1; with
    t_end < 1 `linspace(0, t_end, num_steps + 1)`.

    last_step: length of the last step before the shift; None means 1/num_steps, and is all that
    t_end < 1 knows. timeshift: `t ← t / (t + (1 − t)·timeshift)`; above 1, more steps near the
    noise. Computed in float32 on the CPU, returned as floats of exactly those values. Raises
    UserError. Source: method.md 4.
    """
    import torch

    check_grid(num_steps, last_step, timeshift, t_end)
    last = 1 / num_steps if last_step is None else last_step
    if t_end < 1:
        t = torch.linspace(0.0, t_end, num_steps + 1, dtype=torch.float32, device="cpu")
    else:
        t = torch.linspace(0.0, 1.0 - last, num_steps, dtype=torch.float32, device="cpu")
        t = torch.cat([t, torch.ones(1, device="cpu")])
    t = shift_time(t, timeshift)
    end = f"last_step={last}" if t_end == 1 else f"t_end={t_end}"
    require(
        bool((t.diff() > 0).all()),
        f"{end}, timeshift={timeshift}: two of the {num_steps + 1} times are equal in float32; choose others",
    )
    return t.tolist()
