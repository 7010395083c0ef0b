"""Guidance: when a velocity is guided, and how the two velocities combine. Source: method.md 4."""

from __future__ import annotations

import ctypes
import dataclasses
import math
from typing import TYPE_CHECKING

from ddt.errors import require

if TYPE_CHECKING:
    from torch import Tensor


def as_float32(value: float) -> float:
    """Round to float32: times and the interval's bounds are compared so (method.md 4)."""
    return ctypes.c_float(value).value


@dataclasses.dataclass(frozen=True)
class Guidance:
    """Guidance of strength `scale` at times lo < t < hi (strict) and at `steps`; None is no bound.

    Elsewhere, and everywhere with scale 1, the velocity to guide alone is computed. Raises
    UserError. Source: method.md 4; interval: Kynkäänniemi et al., arXiv 2404.07724.

    name: of the settings, before `_scale` and `_interval`. closed: lo and hi are guided, too.
    """

    scale: float = 1.0
    interval: tuple[float, float] | None = None
    steps: frozenset[int] | None = None
    name: str = "cfg"
    closed: bool = False

    def __post_init__(self) -> None:
        require(
            0 <= self.scale < math.inf,
            f"{self.name}_scale={self.scale}: must be a finite number of at least 0 (1 means no guidance)",
        )
        if self.interval is not None:
            lo, hi = self.interval
            require(
                0 <= lo < hi <= 1,
                f"{self.name}_interval=[{lo},{hi}]: needs 0 <= lo < hi <= 1, as in {self.name}_interval=[0.3,1.0]; "
                "null guides always",
            )

    def active(self, t: float, step: int = 0) -> bool:
        """Return whether the velocity at time t in a step is guided."""
        if self.scale == 1 or (self.steps is not None and step not in self.steps):
            return False
        if self.interval is None:
            return True
        lo, hi, t = (as_float32(each) for each in (*self.interval, t))
        return lo <= t <= hi if self.closed else lo < t < hi

    def mask(self, t: Tensor) -> Tensor:
        """Return `active` (B,) for times t (B,), one for each image; ignores `steps`."""
        lo, hi = (-1.0, 2.0) if self.interval is None else self.interval
        t, lo, hi = t.float(), as_float32(lo), as_float32(hi)
        inside = (t >= lo) & (t <= hi) if self.closed else (t > lo) & (t < hi)
        return inside & (self.scale != 1)

    def combine(self, v: Tensor, v_guide: Tensor) -> Tensor:
        """Return `v_guide + scale·(v − v_guide)`, (B, ...); v_guide is unconditional (CFG, arXiv
        2207.12598), a weaker model's (autoguidance, arXiv 2406.02507) or the base head's (internal
        guidance, arXiv 2512.24176).
        """
        return v_guide + self.scale * (v - v_guide)


def check_guided(scale: float) -> None:
    """Raise UserError where a guide has no effect."""
    require(scale != 1, "guide: has no effect with cfg_scale=1; choose another scale, or leave the guide out")
