"""How to sample: `SamplerSettings`, parsed once and walked by `ddt.sampling.sample`."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

from ddt.errors import require
from ddt.flow import time_grid
from ddt.sampling.guidance import Guidance
from ddt.sampling.schedules import check_schedule, parse_schedule, uniform_schedule
from ddt.sampling.sharing import MAX_FORECAST_ORDER
from ddt.sampling.solvers import DIFFUSIONS, SOLVERS, STOCHASTIC, DiffusionName, call_times

SolverName = Literal["euler", "heun", "midpoint", "adams2", "adams3", "adams4", "sde", "sde_preserve", "adaptive"]
LastStep = Literal["mean", "euler"]


@dataclasses.dataclass(frozen=True)
class SamplerSettings:
    """How latents are drawn from noise; the same names as the arguments of `sample`.

    recompute: None (the encoder at every step), "uniform:5" (every 5th step), the list of step
    indices, or, where a model is at hand to fit it to, "dp:50" and the JSON file of a fitted
    schedule. Raises UserError for values that make no sampler. Source: method.md 4.
    """

    solver: SolverName = "euler"
    num_steps: int = 250
    cfg_scale: float = 2.0
    cfg_interval: tuple[float, float] | None = (0.3, 1.0)
    cfg_steps: Sequence[int] | None = None
    last_step: float | None = 0.04
    timeshift: float = 1.0
    recompute: str | Sequence[int] | None = None
    forecast_order: int = 0
    sde_diffusion: DiffusionName = "sigma"
    sde_last: LastStep = "mean"
    tolerance: float = 1e-3

    def __post_init__(self) -> None:
        require(self.solver in SOLVERS, f"sampler={self.solver}: unknown solver, choose from {', '.join(SOLVERS)}")
        time_grid(self.num_steps, self.last_step, self.timeshift)
        self.guidance()
        wrong = [step for step in self.cfg_steps or () if not 0 <= step < self.num_steps]
        require(not wrong, f"cfg_steps={wrong[:3]}: steps are 0..{self.num_steps - 1}")
        require(self.cfg_steps is None or len(self.cfg_steps) > 0, "cfg_steps=[]: names no step; give cfg_scale=1")
        require(
            self.sde_diffusion in DIFFUSIONS,
            f"sde_diffusion={self.sde_diffusion}: unknown schedule, choose from {', '.join(DIFFUSIONS)}",
        )
        require(self.sde_last in ("mean", "euler"), f"sde_last={self.sde_last}: choose mean or euler")
        require(self.tolerance > 0, f"tolerance={self.tolerance}: must be above 0")
        for key, users in (("sde_diffusion", STOCHASTIC), ("sde_last", STOCHASTIC), ("tolerance", ("adaptive",))):
            value, default = getattr(self, key), type(self).__dataclass_fields__[key].default
            require(
                value == default or self.solver in users,
                f"{key}={value}: has no effect with sampler={self.solver}; leave it out, or use {' or '.join(users)}",
            )
        if self.solver == "adaptive":
            for key in ("recompute", "cfg_steps"):
                value = getattr(self, key)
                require(value is None, f"{key}={value}: sampler=adaptive chooses its own steps; give {key}=null")
        orders = range(MAX_FORECAST_ORDER + 1)
        require(
            self.forecast_order in orders,
            f"forecast_order={self.forecast_order}: choose from {', '.join(map(str, orders))}",
        )
        require(
            self.forecast_order == 0 or self.recompute is not None,
            f"forecast_order={self.forecast_order}: has no effect without recompute=, as in recompute=uniform:5",
        )
        require(
            self.forecast_order == 0 or self.solver not in STOCHASTIC,
            f"forecast_order={self.forecast_order}: the noise of sampler={self.solver} makes z jump, and its forecast "
            "worse than the last z; give forecast_order=0",
        )
        if isinstance(self.recompute, str):
            parse_schedule(self.recompute, self.num_steps)
        elif self.recompute is not None:
            check_schedule(self.recompute, self.num_steps)

    def grid(self) -> list[float]:
        """Return the times of the run, num_steps + 1 floats; of the adaptive solver only the ends."""
        if self.solver == "adaptive":
            return [0.0, 1.0]
        return time_grid(self.num_steps, self.last_step, self.timeshift)

    def call_times(self) -> list[tuple[float, ...]]:
        """Return, for each step, the times at which the solver calls the velocity."""
        return call_times(self.solver, self.grid())

    def guidance(self) -> Guidance:
        """Return when and how strongly the velocity is guided."""
        return Guidance(
            self.cfg_scale, self.cfg_interval, None if self.cfg_steps is None else frozenset(self.cfg_steps)
        )

    def schedule(self) -> list[int] | None:
        """Return the steps at which the encoder runs, or None for every step.

        Raises UserError for a schedule that is fitted to a model or read from a file
        (`fitting.resolve_schedule`).
        """
        if isinstance(self.recompute, str):
            kind, number = parse_schedule(self.recompute, self.num_steps)
            require(
                kind == "uniform",
                f"recompute={self.recompute}: is fitted to a trained model, in sample.py; here give uniform:5, a list "
                "of steps [0,5,10], or null",
            )
            return uniform_schedule(self.num_steps, number)
        return None if self.recompute is None else check_schedule(self.recompute, self.num_steps)

    def arguments(self) -> dict[str, Any]:
        """Return the keyword arguments for `sample`."""
        return {**dataclasses.asdict(self), "recompute": self.schedule()}
