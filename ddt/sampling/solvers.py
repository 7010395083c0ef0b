"""Solvers: functions that walk a time grid with a velocity function, without network or guidance.

`velocity_fn(x_t, t, step)` takes x_t (B, ...), the time, a float (`adaptive`: a tensor (B,), a time
for each image), and the step's index, by which a shared encoder runs; it returns a float32 velocity
(B, ...). A new solver is a function here and an entry of `SOLVERS`. Source: method.md 4.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import itertools
import math
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

from ddt.errors import UserError
from ddt.flow import score

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

VelocityFn = Callable[["Tensor", Any, int], "Tensor"]
DiffusionName = Literal["sigma", "constant", "decreasing", "increasing_decreasing"]


def euler(velocity_fn: VelocityFn, x: Tensor, grid: Sequence[float]) -> Tensor:
    """Integrate x (B, ...) by `x ← x + v·(t_next − t)`; order 1, one call per step."""
    for step, (t, t_next) in enumerate(itertools.pairwise(grid)):
        x = x + velocity_fn(x, t, step) * (t_next - t)
    return x


def heun(velocity_fn: VelocityFn, x: Tensor, grid: Sequence[float]) -> Tensor:
    """Integrate by Heun's method; order 2, two calls per step, but the last step is Euler's.

    So the network is not called at t = 1, where it was not trained (EDM, arXiv 2206.00364, alg. 1).
    """
    for step, (t, t_next) in enumerate(itertools.pairwise(grid)):
        dt = t_next - t
        v = velocity_fn(x, t, step)
        if step < len(grid) - 2:
            v = (v + velocity_fn(x + v * dt, t_next, step)) / 2  # the mean of both ends of the Euler step
        x = x + v * dt
    return x


def midpoint(velocity_fn: VelocityFn, x: Tensor, grid: Sequence[float]) -> Tensor:
    """Integrate by the midpoint rule; order 2, two calls per step."""
    for step, (t, t_next) in enumerate(itertools.pairwise(grid)):
        half = x + velocity_fn(x, t, step) * ((t_next - t) / 2)
        x = x + velocity_fn(half, (t + t_next) / 2, step) * (t_next - t)
    return x


def adams_weights(times: Sequence[float], t_next: float) -> np.ndarray:
    """Integrate the Lagrange polynomials through `times`, oldest first, over [times[-1], t_next].

    Returns the velocities' weights (len(times),) in units of that step, which add up to 1.
    """
    import numpy as np  # settings are parsed without

    dt = t_next - times[-1]
    nodes = (np.array(times, dtype=np.float64) - times[-1]) / dt  # the step becomes [0, 1]
    weights = []
    for i, node in enumerate(nodes):
        others = np.delete(nodes, i)
        polynomial = np.polynomial.Polynomial.fromroots(others) if len(others) else np.polynomial.Polynomial([1.0])
        weights.append(polynomial.integ()(1.0) / np.prod(node - others))
    return np.array(weights)


def adams(velocity_fn: VelocityFn, x: Tensor, grid: Sequence[float], order: int) -> Tensor:
    """Integrate by Adams–Bashforth of order 1..4 on the real grid, one call per step.

    The order grows from 1 with the steps taken: where x is not flat at the start, these first steps
    bound the order of the whole to 2.
    """
    velocities: deque[Tensor] = deque(maxlen=order)
    for step, (t, t_next) in enumerate(itertools.pairwise(grid)):
        velocities.append(velocity_fn(x, t, step))
        weights = adams_weights(grid[step + 1 - len(velocities) : step + 1], t_next)
        v = sum(float(weight) * past for weight, past in zip(weights, velocities, strict=True))
        x = x + v * (t_next - t)
    return x


DIFFUSIONS: dict[str, Callable[[float], float]] = {
    "sigma": lambda t: 1 - t,
    "constant": lambda t: 1.0,
    "decreasing": lambda t: (1 + math.cos(math.pi * t)) ** 2 / 4,
    "increasing_decreasing": lambda t: math.sin(math.pi * t) ** 2,
}


def sde(
    velocity_fn: VelocityFn,
    x: Tensor,
    grid: Sequence[float],
    noise: Callable[[int], Tensor],
    diffusion: DiffusionName = "sigma",
    last: Literal["mean", "euler"] = "mean",
    strength: float = 1.0,
) -> Tensor:
    """Integrate the reverse SDE by Euler–Maruyama: `x ← x + v·dt + c·s·w·dt + sqrt(2c·w·dt)·n`.

    One call per step; s is `flow.score` of v.

    Args:
        noise: step → n, standard normal (B, ...), float32; not called in the last step.
        diffusion: w(t) by name in `DIFFUSIONS`: "sigma" as published, the others of SiT, arXiv
            2401.08740, section 3.4.
        last: the last step has no noise: "mean" is `x + v·dt + s·w·dt`, "euler" `x + v·dt`.
        strength: c, 1 for `sde` and ½ for `sde_preserve`.
    """
    for step, (t, t_next) in enumerate(itertools.pairwise(grid)):
        dt, w = t_next - t, DIFFUSIONS[diffusion](t)
        v = velocity_fn(x, t, step)
        drift = score(v, x, t) * w
        if step < len(grid) - 2:
            x = x + v * dt + strength * drift * dt + math.sqrt(2 * strength * w * dt) * noise(step)
        else:
            x = x + v * dt + (drift * dt if last == "mean" else 0)
    return x


def adaptive(
    velocity_fn: VelocityFn, x: Tensor, grid: Sequence[float], tolerance: float = 1e-3, max_steps: int = 250
) -> Tensor:
    """Integrate by torchode's Tsitouras 5(4), order 5, each image with its own step size.

    So no image depends on its batch. tolerance: absolute and relative error of a step; max_steps:
    bound on an image's steps. Raises UserError at that bound.
    """
    # no statement: diffusers imports, and misses, whatever a pipeline's file imports anywhere
    torchode = importlib.import_module("torchode")

    def flat_velocity(t: Tensor, flat: Tensor) -> Tensor:
        return velocity_fn(flat.view_as(x), t, 0).flatten(1)

    term = torchode.ODETerm(flat_velocity)
    controller = torchode.IntegralController(atol=tolerance, rtol=tolerance, term=term)
    solver = torchode.AutoDiffAdjoint(torchode.Tsit5(term), controller, max_steps=max_steps)
    start, end = (x.new_full((len(x),), t) for t in (grid[0], grid[-1]))
    solution = solver.solve(torchode.InitialValueProblem(y0=x.flatten(1), t_start=start, t_end=end))
    if bool((solution.status != torchode.Status.SUCCESS.value).any()):
        raise UserError(
            f"solver=adaptive: t = {grid[-1]:g} was not reached in num_steps={max_steps} steps; raise num_steps or "
            "tolerance"
        )
    return solution.ys[:, -1].view_as(x)


@dataclasses.dataclass(frozen=True)
class Solver:
    """A solver and its properties.

    integrate: called as `integrate(velocity_fn, x, grid, **options)`; returns x at grid[-1].
    calls: (t, t_next, is_last) → the times of a step's velocity calls.
    """

    integrate: Callable[..., Tensor]
    calls: Callable[[float, float, bool], tuple[float, ...]] = lambda t, t_next, is_last: (t,)
    options: dict[str, str] = dataclasses.field(default_factory=dict)  # setting of its own → argument
    stochastic: bool = False  # `integrate` takes `noise` too
    adaptive: bool = False  # chooses its own steps: the grid is its two ends, and it takes `max_steps`
    packages: tuple[str, ...] = ()  # that it needs


SDE_OPTIONS = {"sde_diffusion": "diffusion", "sde_last": "last"}
SOLVERS = {
    "euler": Solver(euler),
    "heun": Solver(heun, calls=lambda t, t_next, is_last: (t,) if is_last else (t, t_next)),
    "midpoint": Solver(midpoint, calls=lambda t, t_next, is_last: (t, (t + t_next) / 2)),
    "adams2": Solver(functools.partial(adams, order=2)),
    "adams3": Solver(functools.partial(adams, order=3)),
    "adams4": Solver(functools.partial(adams, order=4)),
    "sde": Solver(sde, options=SDE_OPTIONS, stochastic=True),
    "sde_preserve": Solver(functools.partial(sde, strength=0.5), options=SDE_OPTIONS, stochastic=True),
    "adaptive": Solver(adaptive, options={"tolerance": "tolerance"}, adaptive=True, packages=("torchode",)),
}


def option_users() -> dict[str, list[str]]:
    """Return, for each sampler setting that only some solvers have, their names."""
    options = dict.fromkeys(key for solver in SOLVERS.values() for key in solver.options)
    return {key: [name for name, solver in SOLVERS.items() if key in solver.options] for key in options}


def call_times(solver: Solver, grid: Sequence[float]) -> list[tuple[float, ...]]:
    """Return, for each step of the grid, the times at which a solver calls velocity_fn."""
    return [solver.calls(t, t_next, step == len(grid) - 2) for step, (t, t_next) in enumerate(itertools.pairwise(grid))]
