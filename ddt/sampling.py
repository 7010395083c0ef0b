"""From noise to latents: `sample` puts grid, guidance, sharing and solver together.

Shapes: B batch, C channels, H W latent size.
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from ddt.errors import UserError, require
from ddt.flow import time_grid
from ddt.guidance import Guidance
from ddt.model import Denoiser
from ddt.sharing import GuidedVelocity, check_schedule, uniform_schedule
from ddt.solvers import SOLVERS

SolverName = Literal["euler"]


@dataclasses.dataclass(frozen=True)
class SamplerSettings:
    """How latents are drawn from noise; the same names as the arguments of `sample`.

    recompute: None (the encoder at every step), "uniform:5" (every 5th step), or the list of step indices.
    Raises UserError for values that make no sampler. Source: method.md 4.
    """

    solver: SolverName = "euler"
    num_steps: int = 250
    cfg_scale: float = 2.0
    cfg_interval: tuple[float, float] | None = (0.3, 1.0)
    last_step: float | None = 0.04
    timeshift: float = 1.0
    recompute: str | list[int] | None = None

    def __post_init__(self) -> None:
        require(self.solver in SOLVERS, f"sampler={self.solver}: unknown solver, choose from {', '.join(SOLVERS)}")
        self.grid()
        Guidance(self.cfg_scale, self.cfg_interval)
        self.schedule()

    def grid(self) -> list[float]:
        """Return the times of the run, num_steps + 1 floats."""
        return time_grid(self.num_steps, self.last_step, self.timeshift)

    def schedule(self) -> list[int] | None:
        """Return the steps at which the encoder runs, or None for every step."""
        if isinstance(self.recompute, str):
            kind, _, every = self.recompute.partition(":")
            if kind != "uniform" or not every.isdecimal():
                raise UserError(f"recompute={self.recompute}: write uniform:5, a list of steps [0,5,10], or null")
            return uniform_schedule(self.num_steps, int(every))
        return None if self.recompute is None else check_schedule(self.recompute, self.num_steps)

    def arguments(self) -> dict:
        """Return the keyword arguments for `sample`."""
        return {**dataclasses.asdict(self), "recompute": self.schedule()}


def check_inputs(model: Denoiser, noise: Tensor, y: Tensor) -> None:
    """Raise UserError unless noise (B, C, H, W) suits the network and y (B,) holds a class for each row.

    On a GPU the values of y are not looked at: that would make the device wait.
    """
    require(
        noise.ndim == 4 and noise.shape[1] == model.in_channels,
        f"noise has shape {tuple(noise.shape)}: expected (B, {model.in_channels}, H, W)",
    )
    require(
        y.ndim == 1 and not y.is_floating_point(),
        f"y has shape {tuple(y.shape)} and dtype {y.dtype}: expected (B,) int64",
    )
    require(
        y.device.type != "cpu" or len(y) == 0 or bool((y >= 0).all() and (y <= model.num_classes).all()),
        f"y={y.tolist() if y.device.type == 'cpu' else '…'}: classes must lie in 0..{model.num_classes - 1}",
    )
    require(len(noise) == len(y), f"noise has {len(noise)} rows and y has {len(y)}: give one class for each")


@torch.no_grad()
def sample(
    model: Denoiser,
    noise: Tensor,
    y: Tensor,
    solver: SolverName = "euler",
    num_steps: int = 250,
    cfg_scale: float = 2.0,
    cfg_interval: tuple[float, float] | None = (0.3, 1.0),
    last_step: float | None = 0.04,
    timeshift: float = 1.0,
    recompute: Sequence[int] | None = None,
    step_noise: Tensor | None = None,
    calls: dict[str, int] | None = None,
) -> Tensor:
    """Draw latents from noise; return float32 (B, C, H, W).

    Args:
        model: DDT, or with `recompute=None` also the undivided DiT.
        noise: (B, C, H, W) float32, standard normal.
        y: classes (B,) int64 on the same device.
        solver: "euler". num_steps, last_step (None: 1/num_steps), timeshift: the time grid (`flow.time_grid`).
        cfg_scale: strength of guidance, 1 is none. cfg_interval: times between which it acts, None is always.
        recompute: step indices at which the encoder runs, 0 among them; None is every step.
        step_noise: draws (steps, B, C, H, W) of a stochastic solver; Euler takes none.
        calls: a dict to which the network calls an image are added, as `encoder` and `decoder`.

    Deterministic; draws nothing, so the global random state stays; keeps the model's mode and gradients. Runs under the
    caller's autocast; the solver's arithmetic stays float32. The defaults are the published sampler at 256 px.
    Raises UserError for settings that make no sampler. Source: method.md 4.
    """
    require(solver in SOLVERS, f"sampler={solver}: unknown solver, choose from {', '.join(SOLVERS)}")
    require(step_noise is None, f"step_noise: the solver {solver} draws no noise; leave it out")
    require(
        not isinstance(recompute, str), f"recompute={recompute}: give the list of steps, as ddt.uniform_schedule does"
    )
    check_inputs(model, noise, y)
    grid = time_grid(num_steps, last_step, timeshift)
    velocity = GuidedVelocity(model, y, grid, Guidance(cfg_scale, cfg_interval), recompute)
    latents = SOLVERS[solver](velocity, noise.float(), grid)
    if calls is not None:
        calls["encoder"] = calls.get("encoder", 0) + velocity.encoder_calls
        calls["decoder"] = calls.get("decoder", 0) + velocity.decoder_calls
    return latents
