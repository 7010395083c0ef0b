"""The controls of the page: their names and initial values, and the request that they make."""

import dataclasses
import hashlib
import re
import shlex
from collections import Counter
from typing import Any

from ddt.class_names import readable
from ddt.config import parse, shown
from ddt.errors import collect_errors, require
from ddt.generation.image_set import ImageSet
from ddt.generation.settings import SampleSettings
from ddt.model import network_class
from ddt.sampling.schedules import parse_schedule
from ddt.sampling.settings import SamplerSettings
from ddt.sampling.solvers import SOLVERS
from scripts.app.settings import AppSettings

SOLVER_CHOICES = [name for name, solver in SOLVERS.items() if not solver.adaptive]  # it has no grid
SHARING_CHOICES = ["off", "uniform", "dp"]
FORECASTS = ["the last z", "a line", "a parabola"]  # by `forecast_order`
LABELS = {  # what the page calls the fields of `Controls`, and settings of sample.py
    "classes": "Classes",
    "num_images": "Images per class",
    "seed": "Seed",
    "seeds": "Seed",
    "num_steps": "Steps",
    "cfg_scale": "Guidance",
    "sharing": "Encoder sharing",
    "recompute": "Encoder sharing",
    "every": "k",
    "budget": "Encoder runs",
    "forecast": "Between two runs",
    "forecast_order": "Between two runs",
    "compare": "Side by side with sharing off",
    "solver": "Solver",
    "sampler": "Solver",
    "cfg_from": "Guide from t",
    "cfg_to": "Guide to t",
    "cfg_interval": "Guide from t, to t",
    "timeshift": "Time shift",
    "last_step": "Last step",
    "internal_scale": "Internal guidance",
    "internal_from": "Guide internally from t",
    "internal_to": "Guide internally to t",
    "internal_interval": "Guide internally from t, to t",
}


def interval(lo: float, hi: float) -> tuple[float, float] | None:
    """Return the setting for the times between lo and hi, null for all."""
    return None if (lo, hi) == (0, 1) else (lo, hi)


@dataclasses.dataclass(frozen=True)
class Controls:
    """The values of the controls.

    sharing: "off"; "uniform", the encoder at every `every`-th step; "dp", at `budget` steps fitted
    to the model; "checkpoint", at the steps or by the file stored with the checkpoint.
    """

    classes: list[str]  # names of `class_choices`
    num_images: int  # of each class
    seed: int  # of the first image of each class; the next ones follow
    num_steps: int
    cfg_scale: float
    solver: str
    cfg_from: float  # guided between these times
    cfg_to: float
    timeshift: float
    last_step: float | None
    sharing: str = "off"
    every: int = 5
    budget: int = 10
    forecast: str = FORECASTS[0]
    compare: bool = False  # with the same images without sharing
    internal_scale: float = 1.0
    internal_from: float = 0.0
    internal_to: float = 1.0

    def check_limits(self, settings: AppSettings) -> None:
        """Raise UserError for values that are impossible together."""
        total = self.num_images * len(self.classes)
        require(len(self.classes) > 0, "classes: none is chosen; choose at least one")
        require(
            total <= settings.max_images,
            f"num_images={self.num_images}: with {len(self.classes)} classes {total} images, and this app samples at "
            f"most {settings.max_images}; choose fewer",
        )
        name = {"uniform": "every", "dp": "budget"}.get(self.sharing)
        require(
            name is None or 1 <= getattr(self, name) <= self.num_steps,
            f"{name}={getattr(self, name or 'every')}: must lie in 1..{self.num_steps}, the number of steps",
        )

    def sample_settings(
        self, settings: AppSettings, labels: dict[str, int], shares_encoder: bool, has_base_head: bool
    ) -> SampleSettings:
        """Return the settings of sample.py for the same set; of the checkpoint where the network
        has no such part. labels: of the classes' names.
        """
        recompute = {"off": None, "uniform": f"uniform:{self.every}", "dp": f"dp:{self.budget}"}
        internal = interval(self.internal_from, self.internal_to)
        return SampleSettings(
            **{key: getattr(settings, key) for key in ("ckpt", "weights", "autoencoder", "dtype", "batch_size")},
            guide=None if self.cfg_scale == 1 else settings.guide,  # not used where nothing is guided
            classes=[labels[name] for name in self.classes],
            seeds=f"{self.seed}-{self.seed + self.num_images - 1}",
            sampler=self.solver,
            num_steps=self.num_steps,
            cfg_scale=self.cfg_scale,
            cfg_interval=interval(self.cfg_from, self.cfg_to),
            last_step=self.last_step,
            timeshift=self.timeshift,
            recompute=recompute.get(self.sharing, "checkpoint") if shares_encoder else "checkpoint",
            forecast_order="checkpoint" if self.sharing == "off" else FORECASTS.index(self.forecast),
            internal_scale=self.internal_scale if has_base_head else "checkpoint",
            internal_interval=internal if has_base_head and self.internal_scale != 1 else "checkpoint",
        )


@dataclasses.dataclass(frozen=True)
class Request:
    """A sampler, images, and the command for the same set."""

    sampler: SamplerSettings
    images: ImageSet
    command: str


def class_choices(class_names: list[str]) -> list[str]:
    """Return the name of each class, by label; equal names get their label appended."""
    names = readable(class_names)
    count = Counter(names)
    return [f"{name} ({label})" if count[name] > 1 else name for label, name in enumerate(names)]


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
    names = class_choices(stored["class_names"])
    count = min(len(names) if len(names) <= 10 else 4, settings.max_images)
    steps = min(own.num_steps, settings.max_steps)
    kind, number = own.parsed_recompute.kind, own.parsed_recompute.number
    cfg_from, cfg_to = own.cfg_interval or (0.0, 1.0)
    internal_from, internal_to = own.internal_interval or (0.0, 1.0)
    same = ("solver", "cfg_scale", "timeshift", "last_step", "internal_scale")
    return Controls(
        **{key: getattr(own, key) for key in same},
        classes=[names[k * len(names) // count] for k in range(count)],
        num_images=max(1, min(2, settings.max_images // count)),
        seed=0,
        num_steps=steps,
        cfg_from=cfg_from,
        cfg_to=cfg_to,
        internal_from=internal_from,
        internal_to=internal_to,
        sharing={"all": "off", "steps": "checkpoint", "file": "checkpoint"}.get(kind, kind),
        every=min(number if kind == "uniform" else 5, steps),
        budget=min(number, steps) if kind == "dp" else max(1, steps // 5),
        forecast=FORECASTS[own.forecast_order],
    )


def make_requests(values: dict[str, Any], stored: dict[str, Any], settings: AppSettings) -> list[Request]:
    """Return the request of the controls' values, and the same without sharing for a comparison.

    values: by the names of `Controls`; an empty text is null. stored: the checkpoint's config.
    Raises UserError with a line for each wrong value, by the names of settings: `in_page_words`.
    """
    shares_encoder = network_class(stored["network"]).shares_encoder
    labels = {name: label for label, name in enumerate(class_choices(stored["class_names"]))}

    def request(one: Controls) -> Request:
        sample = one.sample_settings(settings, labels, shares_encoder, has_base_head(stored))
        sampler, images = collect_errors(
            lambda: sample.resolve(stored["sampler"], shares_encoder, stored["network"].get("base_depth")),
            lambda: sample.image_set(len(labels)),
        )
        return Request(sampler, images, as_command(sample))

    controls = parse(Controls, {key: None if value == "" else value for key, value in values.items()})
    controls.check_limits(settings)
    compared = controls.compare and controls.sharing != "off"
    return [request(one) for one in (controls, *([dataclasses.replace(controls, sharing="off")] * compared))]


def in_page_words(text: str) -> str:
    """Return a message with the page's names of settings: "Steps = 0" for "num_steps=0"."""

    def in_page_word(match: re.Match[str]) -> str:
        name, sign = match.groups()
        is_word = sign == "" and "_" not in name  # "classes" may be just that
        return match[0] if is_word else LABELS[name] + sign.replace("=", " = ")

    return re.sub(rf"\b({'|'.join(LABELS)})\b(=|: |)", in_page_word, text)


def as_command(settings: SampleSettings) -> str:
    """Return the command of these settings; its folder is named by their hash."""
    words = [f"{field.name}={shown(getattr(settings, field.name))}" for field in dataclasses.fields(settings)
             if getattr(settings, field.name) != field.default]  # fmt: skip
    words.sort(key=lambda word: not word.startswith("ckpt="))
    name = hashlib.sha256("\n".join(words).encode()).hexdigest()[:8]
    return shlex.join(["python", "sample.py", *words, f"out=outputs/{name}"])
