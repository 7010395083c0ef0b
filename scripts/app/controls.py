"""The controls of the app: their values, what they mean as settings of sample.py, and which ones a
checkpoint has.
"""

import dataclasses
import hashlib
import shlex
from collections import Counter
from pathlib import Path
from typing import Any

from ddt.config import check_arguments, parse, shown
from ddt.errors import collected, require
from ddt.generation.image_set import MAX_SEED, ImageSet, image_set
from ddt.generation.settings import SamplerOverrides
from ddt.model import network_class
from ddt.pictures import readable
from ddt.sampling.schedules import parse_schedule
from ddt.sampling.settings import SamplerSettings
from ddt.sampling.solvers import SOLVERS

SOLVER_CHOICES = [name for name in SOLVERS if name != "adaptive"]  # it has no steps to choose or to share
SHARING_CHOICES = ["off", "uniform", "dp"]
NUM_CLASSES = 10  # chosen at the start, at most


@dataclasses.dataclass(frozen=True)
class Controls:
    """The values of the controls. sharing: "off"; "uniform", where the encoder runs at every
    `every`-th step; "dp", where it runs at `budget` steps, fitted to the model; "checkpoint", the
    list or file stored with the checkpoint.
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
    compare: bool = False  # with the same images without sharing


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a request may ask for. Raises UserError for limits that allow nothing."""

    max_images: int
    max_steps: int

    def __post_init__(self) -> None:
        for key in ("max_images", "max_steps"):
            require(getattr(self, key) >= 1, f"{key}={getattr(self, key)}: must be at least 1")


@dataclasses.dataclass(frozen=True)
class Request:
    """What a user asks for: a sampler, images, the same as a command; and the same without sharing,
    to draw too.
    """

    settings: SamplerSettings
    images: ImageSet
    command: str
    plain: "Request | None" = None


@dataclasses.dataclass(frozen=True)
class Source:
    """Where the weights come from, as sample.py is told."""

    folder: Path
    weights: str = "ema"
    autoencoder: str = "checkpoint"
    dtype: str | None = None
    batch_size: int = 64


def class_choices(class_names: list[str]) -> list[tuple[str, int]]:
    """Return name and label of each class for a list to choose from; classes of one name carry
    their label.
    """
    names = readable(class_names)
    count = Counter(names)
    return [(f"{name} ({label})" if count[name] > 1 else name, label) for label, name in enumerate(names)]


def sharing_choices(stored: dict[str, Any]) -> list[str]:
    """Return the ways of sharing that a checkpoint has: none for a model without an encoder; its
    own schedule, where a list or file is stored.
    """
    if not network_class(stored["network"]).shares_encoder:
        return []
    own = stored["sampler"].get("recompute")
    kind = parse_schedule(own, own_steps(stored)).kind
    return [*SHARING_CHOICES, "checkpoint"] if kind in ("steps", "file") else SHARING_CHOICES


def own_steps(stored: dict[str, Any]) -> int:
    """Return the number of steps of a checkpoint's sampler."""
    return int(stored["sampler"].get("num_steps", SamplerSettings.num_steps))


def defaults_of(stored: dict[str, Any], limits: Limits) -> Controls:
    """Return the values that the controls begin with: the checkpoint's sampler, within the limits,
    and a few classes spread over all.
    """
    sampler = stored["sampler"]
    if sampler.get("solver") == "adaptive":
        sampler = {"cfg_scale": sampler["cfg_scale"], "cfg_interval": sampler["cfg_interval"]}
    own = SamplerSettings(**sampler)
    num_classes = stored["network"]["num_classes"]
    shown = min(num_classes, NUM_CLASSES if num_classes <= NUM_CLASSES else 4, limits.max_images)
    steps = min(own.num_steps, limits.max_steps)
    kind, number = own.parsed_recompute.kind, own.parsed_recompute.number
    return Controls(
        classes=[k * num_classes // shown for k in range(shown)],
        num_images=max(1, min(2, limits.max_images // shown)),
        seed=0,
        solver=own.solver,
        num_steps=steps,
        cfg_scale=own.cfg_scale,
        limit_guidance=own.cfg_interval is not None,
        cfg_from=own.cfg_interval[0] if own.cfg_interval else 0.3,
        cfg_to=own.cfg_interval[1] if own.cfg_interval else 1.0,
        timeshift=own.timeshift,
        last_step=own.last_step,
        sharing={"all": "off", "steps": "checkpoint", "file": "checkpoint"}.get(kind, kind),
        every=min(number, steps) if kind == "uniform" else 5,
        budget=min(number, steps) if kind == "dp" else max(1, steps // 5),
        forecast_order=own.forecast_order,
    )


def settings_for(controls: Controls, shareable: bool) -> dict[str, Any]:
    """Return the controls as settings of sample.py, under its names."""
    interval = [controls.cfg_from, controls.cfg_to] if controls.limit_guidance else None
    settings = {
        "classes": controls.classes,
        "seeds": f"{controls.seed}-{controls.seed + controls.num_images - 1}",
        "sampler": controls.solver,
        "num_steps": controls.num_steps,
        "cfg_scale": controls.cfg_scale,
        "cfg_interval": interval,
        "last_step": controls.last_step,
        "timeshift": controls.timeshift,
    }
    if not shareable:
        return settings
    forms = {"off": None, "uniform": f"uniform:{controls.every}", "dp": f"dp:{controls.budget}"}
    if controls.sharing in forms:
        settings["recompute"] = forms[controls.sharing]
    if controls.sharing != "off":
        settings["forecast_order"] = controls.forecast_order
    return settings


def as_command(settings: dict[str, Any], source: Source) -> str:
    """Return the line of a shell that draws the same set; its folder is named after what it will
    hold.
    """
    given = {"weights": source.weights, "autoencoder": source.autoencoder, "dtype": source.dtype}
    usual = Source(source.folder)
    given = {key: value for key, value in given.items() if value != getattr(usual, key)}
    values = {"ckpt": source.folder, **given, **settings, "batch_size": source.batch_size}
    words = [f"{key}={shown(value)}" for key, value in values.items()]
    name = hashlib.sha256("\n".join(words).encode()).hexdigest()[:8]
    return shlex.join(["python", "sample.py", *words, f"out=outputs/{name}"])


def check_limits(controls: Controls, limits: Limits, choices: list[str]) -> None:
    """Raise UserError for what sample.py would draw and this app does not."""
    number, steps = controls.num_images, controls.num_steps
    require(len(controls.classes) > 0, "classes: none is chosen; choose at least one")
    require(number >= 1, f"num_images={number}: must be at least 1")
    total = number * len(controls.classes)
    require(
        total <= limits.max_images,
        f"num_images={number}: with {len(controls.classes)} classes {total} pictures, and this app draws at most "
        f"{limits.max_images}; choose fewer, or start it with another max_images=",
    )
    require(
        0 <= controls.seed <= MAX_SEED - number,
        f"seed={controls.seed}: must lie in 0..{MAX_SEED - number}, so that {number} seeds follow from it",
    )
    require(
        steps <= limits.max_steps,
        f"num_steps={steps}: this app takes at most {limits.max_steps}; choose fewer, or start it with another "
        "max_steps=",
    )
    require(
        controls.solver in SOLVER_CHOICES,
        f"sampler={controls.solver}: not offered here; choose from {', '.join(SOLVER_CHOICES)}, or use sample.py",
    )
    require(
        controls.sharing in (choices or ["off"]),
        f"sharing={controls.sharing}: "
        + (f"choose from {', '.join(choices)}" if choices else "this model has no encoder to share; leave it out"),
    )


def request_of(values: dict[str, Any], stored: dict[str, Any], limits: Limits, source: Source) -> Request:
    """Return what the values of the controls, by their names, ask for; an empty text is null.

    Raises UserError with a line for each that cannot be.
    """
    converted, problems = check_arguments(Controls, {k: None if v == "" else v for k, v in values.items()}, "")
    require(not problems, "\n".join(problems))
    controls, choices = Controls(**converted), sharing_choices(stored)
    check_limits(controls, limits, choices)
    settings = settings_for(controls, bool(choices))
    chosen = {key: value for key, value in settings.items() if key not in ("classes", "seeds")}
    sampler, images = collected(
        lambda: parse(SamplerOverrides, chosen).resolve(stored["sampler"], bool(choices)),
        lambda: image_set(stored["network"]["num_classes"], classes=settings["classes"], seeds=settings["seeds"]),
    )
    plain = None
    if controls.compare and sampler.recompute is not None:
        unshared = {**settings, "recompute": None, "forecast_order": 0}
        alone = sampler.unshared()
        plain = Request(alone, images, as_command(unshared, source))
    return Request(sampler, images, as_command(settings, source), plain)
