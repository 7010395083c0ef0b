"""Solvers: free functions that walk a time grid with a velocity function. They know no networks and
no guidance.

A velocity function is called as `velocity_fn(x_t, t, step)` with x_t (B, ...), the time as a Python
float (`adaptive`: a tensor (B,), every image at its own time), and the index of the step, which
tells a shared encoder whether to run; it returns a float32 velocity (B, ...).

A new solver is a function here and an entry of `SOLVERS`.
"""

import dataclasses
import functools
import itertools
import math
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ddt.errors import UserError
from ddt.flow import score

VelocityFn = Callable[[Tensor, Any, int], Tensor]
DiffusionName = Literal["sigma", "constant", "decreasing", "increasing_decreasing"]


def euler(velocity_fn: VelocityFn, x: Tensor, grid: Sequence[float]) -> Tensor:
    """Integrate from grid[0] to grid[-1] by `x ← x + v·(t_next − t)`; return x at the end, (B,
    ...).

    One call of velocity_fn a step, order 1. Source: method.md 4.
    """
    for step, (t, t_next) in enumerate(itertools.pairwise(grid)):
        x = x + velocity_fn(x, t, step) * (t_next - t)
    return x


def heun(velocity_fn: VelocityFn, x: Tensor, grid: Sequence[float]) -> Tensor:
    """Integrate by Heun's method, two calls a step and order 2; the last step is Euler's, with one
    call.

    So the network is not asked for t = 1, where it was not trained (as in EDM, arXiv 2206.00364,
    algorithm 1).
    """
    for step, (t, t_next) in enumerate(itertools.pairwise(grid)):
        dt = t_next - t
        v = velocity_fn(x, t, step)
        if step < len(grid) - 2:
            v = (v + velocity_fn(x + v * dt, t_next, step)) / 2
        x = x + v * dt
    return x


def midpoint(velocity_fn: VelocityFn, x: Tensor, grid: Sequence[float]) -> Tensor:
    """Integrate by the midpoint rule, two calls a step and order 2."""
    for step, (t, t_next) in enumerate(itertools.pairwise(grid)):
        half = x + velocity_fn(x, t, step) * ((t_next - t) / 2)
        x = x + velocity_fn(half, (t + t_next) / 2, step) * (t_next - t)
    return x


def adams_weights(times: Sequence[float], t_next: float) -> np.ndarray:
    """Integrate the Lagrange polynomials through `times` (oldest first) exactly over [times[-1],
    t_next].

    Returns the weights (len(times),) of the velocities, in units of the step t_next − times[-1], so
    they add up to 1.
    Source: method.md 4.
    """
    dt = t_next - times[-1]
    nodes = (np.array(times, dtype=np.float64) - times[-1]) / dt  # the step becomes [0, 1]
    weights = []
    for i, node in enumerate(nodes):
        others = np.delete(nodes, i)
        polynomial = np.polynomial.Polynomial.fromroots(others) if len(others) else np.polynomial.Polynomial([1.0])
        weights.append(polynomial.integ()(1.0) / np.prod(node - others))
    return np.array(weights)


def adams(velocity_fn: VelocityFn, x: Tensor, grid: Sequence[float], order: int) -> Tensor:
    """Integrate by Adams–Bashforth of order 1..4 on the real grid, one call a step.

    The order grows with the steps taken until it is reached, so on fields that are not flat at the
    start the first steps bound the order of the whole to 2. Source: method.md 4.
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
    draw: Callable[[int], Tensor],
    diffusion: DiffusionName = "sigma",
    last: Literal["mean", "euler"] = "mean",
    strength: float = 1.0,
) -> Tensor:
    """Integrate the reverse SDE by Euler–Maruyama, one call a step: `x + v·dt + c·s·w·dt +
    sqrt(2c·w·dt)·n`.

    Args:
        draw: step → n, standard normal (B, ...), float32; not called in the last step.
        diffusion: the schedule of the weight w: "sigma" is 1 − t as published, "constant" 1,
            "decreasing" (1 + cos πt)²/4, "increasing_decreasing" sin² πt (the choices of SiT, arXiv
            2401.08740, section 3.4).
        last: the last step has no noise: "mean" is `x + v·dt + s·w·dt`, "euler" `x + v·dt`.
        strength: c, 1 for `sde` and ½ for `sde_preserve`.

    The score s follows from the velocity (`flow.score`). Source: method.md 4.
    """
    for step, (t, t_next) in enumerate(itertools.pairwise(grid)):
        dt, w = t_next - t, DIFFUSIONS[diffusion](t)
        v = velocity_fn(x, t, step)
        drift = score(v, x, t) * w
        if step < len(grid) - 2:
            x = x + v * dt + strength * drift * dt + math.sqrt(2 * strength * w * dt) * draw(step)
        else:
            x = x + v * dt + (drift * dt if last == "mean" else 0)
    return x


def adaptive(
    velocity_fn: VelocityFn, x: Tensor, grid: Sequence[float], tolerance: float = 1e-3, max_steps: int = 250
) -> Tensor:
    """Integrate from grid[0] to grid[-1] by torchode's Tsitouras 5(4), each image with a step size
    of its own.

    So no image depends on its batch, as it would with one step size for all. tolerance: absolute
    and relative error of a step; max_steps: bound on an image's steps. Order 5.

    Raises UserError where the bound is met, or torchode is not installed.
    """
    try:
        import torchode
    except ImportError as error:
        raise UserError("solver=adaptive: needs torchode; install it with pip install torchode") from error

    def flat_velocity(t: Tensor, flat: Tensor) -> Tensor:
        return velocity_fn(flat.view_as(x), t, 0).flatten(1)

    term = torchode.ODETerm(flat_velocity)
    controller = torchode.IntegralController(atol=tolerance, rtol=tolerance, term=term)
    solver = torchode.AutoDiffAdjoint(torchode.Tsit5(term), controller, max_steps=max_steps)
    start, end = (torch.full((len(x),), t, dtype=x.dtype, device=x.device) for t in (grid[0], grid[-1]))
    solution = solver.solve(torchode.InitialValueProblem(y0=x.flatten(1), t_start=start, t_end=end))
    if bool((solution.status != torchode.Status.SUCCESS.value).any()):
        raise UserError(
            f"solver=adaptive: t = 1 was not reached in num_steps={max_steps} steps; raise num_steps or tolerance"
        )
    return solution.ys[:, -1].view_as(x)


@dataclasses.dataclass(frozen=True)
class Solver:
    """A solver and what the rest of sampling has to know of it.

    integrate: called as `integrate(velocity_fn, x, grid, **options)`. calls: (t, t_next, is_last) →
    the times of a step's velocity calls. options: keyword arguments of integrate by the names of
    the sampler settings they come from. stochastic: integrate takes `draw` too. adaptive: it
    chooses its own steps, so that its grid is only [0, 1] and nothing goes by the step.
    """

    integrate: Callable[..., Tensor]
    calls: Callable[[float, float, bool], tuple[float, ...]] = lambda t, t_next, is_last: (t,)
    options: dict[str, str] = dataclasses.field(default_factory=dict)  # setting -> argument
    stochastic: bool = False
    adaptive: bool = False


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
    "adaptive": Solver(adaptive, options={"tolerance": "tolerance", "num_steps": "max_steps"}, adaptive=True),
}


def call_times(solver: Solver, grid: Sequence[float]) -> list[tuple[float, ...]]:
    """Return, for each step of the grid, the times at which a solver calls the velocity."""
    return [solver.calls(t, t_next, step == len(grid) - 2) for step, (t, t_next) in enumerate(itertools.pairwise(grid))]
