"""Solvers: free functions that walk a time grid with a velocity function. They know no networks and no guidance.

A velocity function is called as `velocity_fn(x_t, t, step)` with x_t (B, ...), the time as a Python float, and the
index of the step, which tells a shared encoder whether to run; it returns a float32 velocity (B, ...).
"""

import itertools
from collections.abc import Callable, Sequence

from torch import Tensor

VelocityFn = Callable[[Tensor, float, int], Tensor]


def euler(velocity_fn: VelocityFn, x: Tensor, grid: Sequence[float]) -> Tensor:
    """Integrate from grid[0] to grid[-1] by `x ← x + v·(t_next − t)`; return x at the end, (B, ...).

    One call of velocity_fn a step, order 1. Source: method.md 4.
    """
    for step, (t, t_next) in enumerate(itertools.pairwise(grid)):
        x = x + velocity_fn(x, t, step) * (t_next - t)
    return x


SOLVERS: dict[str, Callable[[VelocityFn, Tensor, Sequence[float]], Tensor]] = {"euler": euler}
