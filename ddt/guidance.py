"""Classifier-free guidance inside an interval: when a step is guided, and how the halves are combined.

Source: method.md 4.
"""

import dataclasses

import torch
from torch import Tensor

from ddt.errors import require


def as_float32(value: float) -> float:
    """Round to float32, as the interval's bounds are before they are compared with the grid (method.md 4)."""
    return torch.tensor(value, dtype=torch.float32, device="cpu").item()


@dataclasses.dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance of strength `scale` where lo < t < hi (strict), at every step with interval None.

    Outside the interval, and everywhere with scale 1, the conditional velocity alone is used, so the unconditional
    half of the network need not run. Raises UserError for a scale below 0 or an interval that is none.
    """

    scale: float = 1.0
    interval: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        require(self.scale >= 0, f"cfg_scale={self.scale}: must be at least 0 (1 means no guidance)")
        if self.interval is not None:
            lo, hi = self.interval
            require(
                0 <= lo < hi <= 1,
                f"cfg_interval=[{lo},{hi}]: needs 0 <= lo < hi <= 1, as in cfg_interval=[0.3,1.0]; null guides always",
            )

    def active(self, t: float) -> bool:
        """Tell whether the step that starts at time t is guided."""
        if self.scale == 1:
            return False
        if self.interval is None:
            return True
        lo, hi = self.interval
        return as_float32(lo) < t < as_float32(hi)

    def combine(self, v: Tensor) -> Tensor:
        """Return `v_uncond + scale·(v_cond − v_uncond)`, (B, ...), for v (2B, ...) with the conditional half first."""
        v_cond, v_uncond = v.chunk(2)
        return v_uncond + self.scale * (v_cond - v_uncond)
