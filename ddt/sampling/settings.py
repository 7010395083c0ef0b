"""`SamplerSettings`: how to sample, parsed once and passed on to `ddt.sampling.sample`."""

import dataclasses
import functools
import importlib.util
from collections.abc import Sequence
from typing import Any, Literal

from ddt.errors import require
from ddt.flow import check_grid, time_grid
from ddt.sampling.guidance import Guidance
from ddt.sampling.schedules import FIT, Schedule, content_of, parse_schedule
from ddt.sampling.solvers import DIFFUSIONS, SOLVERS, DiffusionName, call_times, option_users

LastStep = Literal["mean", "euler"]
MAX_FORECAST_ORDER = 2


@dataclasses.dataclass(frozen=True)
class SamplerSettings:
    """How latents are sampled from noise, by the argument names of `ddt.sample`.

    timeshift: None is that of the latents, until they are known. recompute: as written
    (`ddt.sampling.schedules`); `fitting.resolve_recompute` makes a list of "dp:50" and of files.
    Raises UserError for impossible values, or without effect.
    """

    solver: str = "euler"
    num_steps: int = 250
    cfg_scale: float = 2.0
    cfg_interval: tuple[float, float] | None = (0.3, 1.0)
    cfg_steps: Sequence[int] | None = None
    last_step: float | None = 0.04
    timeshift: float | None = 1.0
    recompute: str | Sequence[int] | None = None
    forecast_order: int = 0
    sde_diffusion: DiffusionName = "sigma"
    sde_last: LastStep = "mean"
    tolerance: float = 1e-3
    t_end: float = 1.0
    internal_scale: float = 1.0
    internal_interval: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        require(self.solver in SOLVERS, f"solver={self.solver}: unknown solver, choose from {', '.join(SOLVERS)}")
        timeshift = 1.0 if self.timeshift is None else self.timeshift
        check_grid(self.num_steps, self.last_step, timeshift, self.t_end)
        self.guidance()
        self.internal()
        require(
            self.internal_interval is None or self.internal_scale != 1,
            f"internal_interval={self.internal_interval}: has no effect with internal_scale=1; leave it out",
        )
        wrong = [step for step in self.cfg_steps or () if not 0 <= step < self.num_steps]
        require(not wrong, f"cfg_steps={wrong[:3]}: steps are 0..{self.num_steps - 1}")
        require(self.cfg_steps is None or len(self.cfg_steps) > 0, "cfg_steps=[]: names no step; give cfg_scale=1")
        require(
            self.sde_diffusion in DIFFUSIONS,
            f"sde_diffusion={self.sde_diffusion}: unknown schedule, choose from {', '.join(DIFFUSIONS)}",
        )
        require(self.sde_last in ("mean", "euler"), f"sde_last={self.sde_last}: choose mean or euler")
        require(self.tolerance > 0, f"tolerance={self.tolerance}: must be above 0")
        for key, users in option_users().items():
            value, default = getattr(self, key), type(self).__dataclass_fields__[key].default
            require(
                value == default or self.solver in users,
                f"{key}={value}: has no effect with solver={self.solver}; leave it out, or use {' or '.join(users)}",
            )
        if self.adaptive:
            for key in ("recompute", "cfg_steps"):
                value = getattr(self, key)
                require(value is None, f"{key}={value}: solver=adaptive chooses its own steps; give {key}=null")
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
            self.forecast_order == 0 or not SOLVERS[self.solver].stochastic,
            f"forecast_order={self.forecast_order}: the noise of solver={self.solver} makes z jump, and its forecast "
            "worse than the last z; give forecast_order=0",
        )
        self.parsed_recompute  # noqa: B018  # raises UserError

    def check_packages(self) -> None:
        """Raise UserError where a package that the solver needs is missing; whoever only reads a
        checkpoint needs none.
        """
        for package in SOLVERS[self.solver].packages:
            found = importlib.util.find_spec(package) is not None
            require(found, f"solver={self.solver}: needs the package {package}; run pip install {package}")

    @functools.cached_property
    def parsed_recompute(self) -> Schedule:
        """The recompute schedule, parsed."""
        return parse_schedule(self.recompute, self.num_steps)

    @property
    def adaptive(self) -> bool:
        """Whether the solver chooses its own steps."""
        return SOLVERS[self.solver].adaptive

    def grid(self) -> list[float]:
        """Return the num_steps + 1 times of the run; of an adaptive solver, the ends."""
        require(self.timeshift is not None, "timeshift=null: is of latents that are not known here; give a number")
        assert self.timeshift is not None
        if self.adaptive:
            return time_grid(1, None, self.timeshift, self.t_end)
        return time_grid(self.num_steps, self.last_step, self.timeshift, self.t_end)

    def call_times(self) -> list[tuple[float, ...]]:
        """Return, for each step, the times at which the solver calls the velocity."""
        return call_times(SOLVERS[self.solver], self.grid())

    def guidance(self) -> Guidance:
        """Return when and how strongly the velocity is guided."""
        return Guidance(
            self.cfg_scale, self.cfg_interval, None if self.cfg_steps is None else frozenset(self.cfg_steps)
        )

    def internal(self) -> Guidance:
        """Return when and how strongly the velocity is guided away from the base head's."""
        return Guidance(self.internal_scale, self.internal_interval, name="internal", closed=True)

    def schedule(self) -> list[int] | None:
        """Return the steps at which the encoder runs, or None for every step.

        Raises UserError for a fitted schedule, which `fitting.resolve_recompute` makes a list.
        """
        require(
            self.parsed_recompute.kind not in ("dp", "file"),
            f"recompute={self.recompute}: is fitted to a trained model, in sample.py; here give uniform:5, a list "
            "of steps [0,5,10], or null",
        )
        return self.parsed_recompute.steps

    def unshared(self) -> "SamplerSettings":
        """Return the same sampler with the encoder at every step."""
        return dataclasses.replace(self, recompute=None, forecast_order=0)

    def as_receipt(self) -> dict[str, Any]:
        """Return the settings as plain values, a schedule file as its steps."""
        return {**dataclasses.asdict(self), "recompute": content_of(self.recompute)}


def check_base_head(settings: SamplerSettings, base_depth: int | None) -> None:
    """Raise UserError for internal guidance of a network without base head."""
    require(
        settings.internal_scale == 1 or base_depth is not None,
        f"internal_scale={settings.internal_scale}: this model has no base head; train with objective.base_depth=, or "
        "give 1",
    )


def guidance_of(settings: SamplerSettings) -> dict[str, Any]:
    """Return the guidance settings as written in a schedule file."""
    interval, steps = settings.cfg_interval, settings.cfg_steps
    return {
        "cfg_scale": settings.cfg_scale,
        "cfg_interval": None if interval is None else list(interval),
        "cfg_steps": None if steps is None else list(steps),
        "internal_scale": settings.internal_scale,
        "internal_interval": None if settings.internal_interval is None else list(settings.internal_interval),
    }


def check_fitted(content: dict[str, Any], settings: SamplerSettings, ema_sha256: str | None) -> list[str]:
    """Return warnings of what else a schedule was fitted to; UserError for another time grid."""
    name, grid = settings.recompute, settings.grid()
    require(
        content["time_grid"] == grid,
        f"recompute={name}: was fitted to another time grid ({len(content['time_grid']) - 1} steps up to "
        f"t = {content['time_grid'][-2]:.3f}, here {len(grid) - 1} up to {grid[-2]:.3f}): fit one to this sampler with "
        f"{FIT}",
    )
    ours = {"solver": settings.solver, "guidance": guidance_of(settings), "ema_sha256": ema_sha256}
    names = {"ema_sha256": "checkpoint"}
    differing = [names.get(key, key) for key, value in ours.items() if content.get(key) != value]
    return [f"recompute={name}: was fitted to another {what}" for what in differing]
