"""The controls of the page: their values, initial values, and the request that they make."""

import dataclasses
import hashlib
import shlex
from collections import Counter
from typing import Any

from ddt.class_names import readable
from ddt.config import parse, shown
from ddt.errors import collect_errors, require
from ddt.generation.image_set import MAX_SEED, ImageSet
from ddt.generation.settings import SampleSettings
from ddt.model import network_class
from ddt.sampling.schedules import parse_schedule
from ddt.sampling.settings import SamplerSettings
from ddt.sampling.solvers import SOLVERS
from scripts.app.settings import AppSettings

SOLVER_CHOICES = [name for name, solver in SOLVERS.items() if not solver.adaptive]  # it has no grid
SHARING_CHOICES = ["off", "uniform", "dp"]


@dataclasses.dataclass(frozen=True)
class Controls:
    """The values of the controls.

    sharing: "off"; "uniform", the encoder at every `every`-th step; "dp", at `budget` steps fitted
    to the model; "checkpoint", at the steps or by the file stored with the checkpoint.
    """

    classes: list[int]
    num_images: int  # of each class
    seed: int  # of the first image of each class; the next ones follow
    solver: str
    num_steps: int
    cfg_scale: float
    limit_guidance: bool  # to the times between cfg_from and cfg_to
    cfg_from: float
    cfg_to: float
    timeshift: float
    last_step: float | None
    sharing: str = "off"
    every: int = 5
    budget: int = 10
    forecast_order: int = 0
    internal_scale: float = 1.0
    limit_internal: bool = False  # to the times from internal_from to internal_to
    internal_from: float = 0.0
    internal_to: float = 1.0
    compare: bool = False  # with the same images without sharing

    def check_limits(self, settings: AppSettings) -> None:
        """Raise UserError for values above the app's limits."""
        number, steps, total = self.num_images, self.num_steps, self.num_images * len(self.classes)
        require(len(self.classes) > 0, "classes: none is chosen; choose at least one")
        require(number >= 1, f"num_images={number}: must be at least 1")
        require(
            total <= settings.max_images,
            f"num_images={number}: with {len(self.classes)} classes {total} images, and this app samples at most "
            f"{settings.max_images}; choose fewer, or start it with another max_images=",
        )
        require(
            steps <= settings.max_steps,
            f"num_steps={steps}: this app takes at most {settings.max_steps}; choose fewer, or start it with another "
            "max_steps=",
        )
        last = MAX_SEED - number
        require(0 <= self.seed <= last, f"seed={self.seed}: must lie in 0..{last}, so that {number} seeds follow")

    def sample_settings(self, settings: AppSettings, shares_encoder: bool, has_base_head: bool) -> SampleSettings:
        """Return the settings of sample.py for the same set; of the checkpoint where the network
        has no such part.
        """
        internal = (self.internal_from, self.internal_to) if self.limit_internal else None
        recompute = {"off": None, "uniform": f"uniform:{self.every}", "dp": f"dp:{self.budget}"}
        return SampleSettings(
            **{key: getattr(settings, key) for key in ("ckpt", "weights", "autoencoder", "dtype", "batch_size")},
            guide=None if self.cfg_scale == 1 else settings.guide,  # not used where nothing is guided
            classes=list(self.classes),
            seeds=f"{self.seed}-{self.seed + self.num_images - 1}",
            sampler=self.solver,
            num_steps=self.num_steps,
            cfg_scale=self.cfg_scale,
            cfg_interval=(self.cfg_from, self.cfg_to) if self.limit_guidance else None,
            last_step=self.last_step,
            timeshift=self.timeshift,
            recompute=recompute.get(self.sharing, "checkpoint") if shares_encoder else "checkpoint",
            forecast_order="checkpoint" if self.sharing == "off" else self.forecast_order,
            internal_scale=self.internal_scale if has_base_head else "checkpoint",
            internal_interval=internal if has_base_head and self.internal_scale != 1 else "checkpoint",
        )


@dataclasses.dataclass(frozen=True)
class Request:
    """A sampler, images, and the command for the same set."""

    sampler: SamplerSettings
    images: ImageSet
    command: str


def class_choices(class_names: list[str]) -> list[tuple[str, int]]:
    """Return name and label of each class; equal names get their label appended."""
    names = readable(class_names)
    count = Counter(names)
    return [(f"{name} ({label})" if count[name] > 1 else name, label) for label, name in enumerate(names)]


def has_base_head(stored: dict[str, Any]) -> bool:
    """Return whether a checkpoint's network has a base head, for internal guidance."""
    return stored["network"].get("base_depth") is not None


def sharing_choices(stored: dict[str, Any]) -> list[str]:
    """Return the choices of `Controls.sharing` for a checkpoint, none without an encoder."""
    if not network_class(stored["network"]).shares_encoder:
        return []
    sampler = stored["sampler"]
    kind = parse_schedule(sampler.get("recompute"), sampler.get("num_steps", SamplerSettings.num_steps)).kind
    return [*SHARING_CHOICES, "checkpoint"] if kind in ("steps", "file") else SHARING_CHOICES


def initial_controls(stored: dict[str, Any], settings: AppSettings) -> Controls:
    """Return the checkpoint's sampler, within the limits, and a few classes spread over all."""
    sampler = stored["sampler"]
    if sampler.get("solver") == "adaptive":
        kept = ("cfg_scale", "cfg_interval", "last_step", "t_end", "internal_scale", "internal_interval")
        sampler = {key: sampler[key] for key in kept if key in sampler}
    own = SamplerSettings(**sampler)
    num_classes = stored["network"]["num_classes"]
    count = min(num_classes if num_classes <= 10 else 4, settings.max_images)
    steps = min(own.num_steps, settings.max_steps)
    kind, number = own.parsed_recompute.kind, own.parsed_recompute.number
    cfg_from, cfg_to = own.cfg_interval or (0.3, 1.0)
    internal_from, internal_to = own.internal_interval or (0.0, 1.0)
    same = ("solver", "cfg_scale", "timeshift", "last_step", "forecast_order", "internal_scale")
    return Controls(
        **{key: getattr(own, key) for key in same},
        classes=[k * num_classes // count for k in range(count)],
        num_images=max(1, min(2, settings.max_images // count)),
        seed=0,
        num_steps=steps,
        limit_guidance=own.cfg_interval is not None,
        cfg_from=cfg_from,
        cfg_to=cfg_to,
        limit_internal=own.internal_interval is not None,
        internal_from=internal_from,
        internal_to=internal_to,
        sharing={"all": "off", "steps": "checkpoint", "file": "checkpoint"}.get(kind, kind),
        every=min(number, steps) if kind == "uniform" else 5,
        budget=min(number, steps) if kind == "dp" else max(1, steps // 5),
    )


def make_requests(values: dict[str, Any], stored: dict[str, Any], settings: AppSettings) -> list[Request]:
    """Return the request of the controls' values, and the same without sharing for a comparison.

    values: by the names of `Controls`; an empty text is null. stored: the checkpoint's config.
    Raises UserError with a line for each wrong value.
    """
    controls = parse(Controls, {key: None if value == "" else value for key, value in values.items()})
    controls.check_limits(settings)
    compared = controls.compare and controls.sharing != "off"
    both = [controls, dataclasses.replace(controls, sharing="off")] if compared else [controls]
    shares_encoder = network_class(stored["network"]).shares_encoder

    def request(one: Controls) -> Request:
        sample = one.sample_settings(settings, shares_encoder, has_base_head(stored))
        sampler, images = collect_errors(
            lambda: sample.resolve(stored["sampler"], shares_encoder, stored["network"].get("base_depth")),
            lambda: sample.image_set(stored["network"]["num_classes"]),
        )
        return Request(sampler, images, as_command(sample))

    return [request(one) for one in both]


def as_command(settings: SampleSettings) -> str:
    """Return the command of these settings; its folder is named by their hash."""
    words = [f"{field.name}={shown(getattr(settings, field.name))}" for field in dataclasses.fields(settings)
             if getattr(settings, field.name) != field.default]  # fmt: skip
    words.sort(key=lambda word: not word.startswith("ckpt="))
    name = hashlib.sha256("\n".join(words).encode()).hexdigest()[:8]
    return shlex.join(["python", "sample.py", *words, f"out=outputs/{name}"])
