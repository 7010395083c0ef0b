"""`SampleSettings` of sample.py, and `SamplerOverrides` of a checkpoint's sampler."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from ddt.checkpoint.models import check_exist
from ddt.config import parse, shown
from ddt.errors import UserError, require, require_count
from ddt.generation.image_set import SEED_STRIDE, ImageSet, Numbers, image_set
from ddt.precision import Dtype
from ddt.sampling.schedules import read_schedule
from ddt.sampling.settings import LastStep, SamplerSettings, check_base_head, check_fitted
from ddt.sampling.solvers import SOLVERS, DiffusionName, option_users

Stored = Literal["checkpoint"]  # takes the value stored with the checkpoint


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplerOverrides:
    """Settings that replace those of a checkpoint's sampler unless "checkpoint"; null is a value.

    `sampler` is `SamplerSettings.solver`; the others have the same names.
    """

    sampler: str = "checkpoint"
    num_steps: int | Stored = "checkpoint"
    cfg_scale: float | Stored = "checkpoint"
    cfg_interval: tuple[float, float] | Stored | None = "checkpoint"
    cfg_steps: Sequence[int] | Stored | None = "checkpoint"
    last_step: float | Stored | None = "checkpoint"
    timeshift: float | Stored = "checkpoint"
    recompute: str | Sequence[int] | None = "checkpoint"
    forecast_order: int | Stored = "checkpoint"
    sde_diffusion: DiffusionName | Stored = "checkpoint"
    sde_last: LastStep | Stored = "checkpoint"
    tolerance: float | Stored = "checkpoint"
    t_end: float | Stored = "checkpoint"
    internal_scale: float | Stored = "checkpoint"
    internal_interval: tuple[float, float] | Stored | None = "checkpoint"

    def resolve(self, stored: dict[str, Any], shares_encoder: bool, base_depth: int | None = None) -> SamplerSettings:
        """Return a checkpoint's sampler, `stored`, with these settings for its network.

        base_depth: of the network's base head, None: it has none.
        Raises UserError with a line for each setting that is impossible or has no effect.
        """
        values = {key: getattr(self, key) for key in SAMPLER_KEYS} | {"solver": self.sampler}
        chosen = {key: value for key, value in values.items() if value != "checkpoint"}
        try:
            return resolve_sampler(
                stored, chosen, shares_encoder, base_depth, functools.partial(parse, SamplerSettings)
            )
        except UserError as error:
            raise UserError(str(error).replace("solver=", "sampler=")) from error


SAMPLER_KEYS = [key for key in SamplerSettings.__dataclass_fields__ if key != "solver"]


def resolve_sampler(
    stored: dict[str, Any],
    chosen: dict[str, Any],
    shares_encoder: bool,
    base_depth: int | None,
    make: Callable[[dict[str, Any]], SamplerSettings] = lambda values: SamplerSettings(**values),
) -> SamplerSettings:
    """Return a network's sampler, `stored`, with chosen settings in place of its own; arguments of
    `SamplerSettings`, which `make` builds.

    Raises UserError for settings that are impossible or have no effect.
    """
    settings = make(without_unused(stored | chosen, chosen))
    check_chosen(settings, chosen, shares_encoder)
    check_base_head(settings, base_depth)
    settings.grid()
    settings.check_packages()
    return settings


def without_unused(values: dict[str, Any], chosen: dict[str, Any]) -> dict[str, Any]:
    """Return a sampler's settings without stored ones that have no effect beside chosen ones."""
    if chosen.get("t_end", 1) != 1 and "last_step" not in chosen:
        values = {**values, "last_step": None}
    solver = SOLVERS.get(values.get("solver", SamplerSettings.solver))
    unused = set(option_users()) - set(solver.options if solver else ())
    if solver is not None and solver.adaptive:
        unused |= {"recompute", "cfg_steps", "forecast_order"}
    if values.get("recompute") is None:
        unused.add("forecast_order")
    if values.get("internal_scale", 1) == 1:
        unused.add("internal_interval")
    return {key: value for key, value in values.items() if key in chosen or key not in unused}


def check_chosen(settings: SamplerSettings, chosen: dict[str, Any], shares_encoder: bool) -> None:
    """Raise UserError where a chosen setting does not suit the network, or has no effect."""
    for key in ("last_step", "timeshift") if settings.t_end == 1 else ("last_step",):
        require(
            not settings.adaptive or key not in chosen,
            f"{key}={chosen.get(key)}: solver=adaptive chooses its own steps; leave it out",
        )
    require(
        settings.recompute is None or shares_encoder,
        f"recompute={settings.recompute}: this model has no encoder to share; give null",
    )
    if settings.parsed_recompute.kind == "file":
        check_fitted(read_schedule(Path(str(settings.recompute))), settings, None)
    kinds = ((settings.guidance(), ("cfg_interval", "cfg_steps")), (settings.internal(), ("internal_interval",)))
    for guidance, keys in kinds:
        guiding = [key for key in keys if chosen.get(key) is not None]
        if not guiding or guidance.scale == 1 or settings.adaptive:
            continue
        times = settings.call_times()
        require(
            any(guidance.active(t, step) for step, calls in enumerate(times) for t in calls),
            f"{guiding[0]}={shown(chosen[guiding[0]])}: guides none of the {settings.num_steps} steps, whose times are "
            f"{', '.join(f'{calls[0]:.3f}' for calls in times[:3])}, …; choose others, or {guidance.name}_scale=1",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleSettings(SamplerOverrides):
    """See conf/sample/sample.yaml."""

    ckpt: str
    weights: str = "ema"
    out: str | None = None
    num_samples: int | None = None
    classes: Numbers | None = None
    seeds: Numbers | None = None
    seed: int = 0
    guide: str | None = None
    autoencoder: str = "checkpoint"
    dtype: Dtype | None = None
    compile: bool | None = None
    batch_size: int = 64
    num_processes: int | None = None
    cache_gib: float = 4
    png: int | Literal["all"] = 0

    def __post_init__(self) -> None:
        require_count("batch_size", self.batch_size, 1, SEED_STRIDE)
        require_count("cache_gib", self.cache_gib, 0, hint=" (0 keeps no modulations)")
        require(self.png == "all" or self.png >= 0, f"png={self.png}: give a number of images, or all")
        check_exist(self.ckpt, self.guide)

    def image_set(self, num_classes: int, class_names: Sequence[str] = ()) -> ImageSet:
        """Return the images of the set, of a model with num_classes classes of these names."""
        return image_set(num_classes, self.num_samples, self.classes, self.seeds, self.seed, class_names)
