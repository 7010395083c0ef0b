"""The settings of a guidance search: axes, checkpoints, and points, every combination of them."""

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ddt.checkpoint.models import check_exist
from ddt.errors import require, require_count
from ddt.files import sha256
from ddt.generation.image_set import SEED_STRIDE
from ddt.generation.settings import SAMPLER_KEYS, SamplerOverrides, Stored
from ddt.metrics.settings import FeatureSettings, PrDtype, check_features
from ddt.precision import Dtype
from ddt.sampling.schedules import content_of
from ddt.sampling.settings import SamplerSettings
from scripts.studies.study import MAX_REPEATS, check_counts

Interval = tuple[float, float] | None
Recompute = list[int] | str | None
SAMPLER_AXES = ("recompute", "timeshift", "cfg_scale", "cfg_interval")


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A checkpoint of a search. name: in labels and tables. stored: its config."""

    name: str
    folder: Path
    stored: dict[str, Any]

    def hashes(self) -> dict[str, str]:
        """Return the SHA-256 of its weights by name, from its manifest."""
        from ddt.checkpoint import format as ckpt

        return {name: ckpt.weights_sha256(self.folder, name) for name in ckpt.weights_names(self.folder)}


@dataclasses.dataclass(frozen=True)
class Point:
    """A combination. label: the name of its folder."""

    label: str
    checkpoint: Checkpoint
    weights: str
    settings: SamplerSettings

    def row(self) -> dict[str, Any]:
        """Return its label and axes as plain values."""
        axes = {name: getattr(self.settings, name) for name in SAMPLER_AXES}
        return {"label": self.label, "checkpoint": self.checkpoint.name, "weights": self.weights, **axes}


@dataclasses.dataclass(frozen=True, kw_only=True)
class GuidanceSettings(SamplerOverrides):
    """See conf/study/guidance.yaml. The axes are lists, or one value. Raises UserError."""

    ckpt: list[str] | str
    weights: list[str] | str
    recompute: list[Recompute] | Recompute  # type: ignore[assignment]
    timeshift: list[float | Stored] | float | Stored  # type: ignore[assignment]
    cfg_scale: list[float | Stored] | float | Stored  # type: ignore[assignment]
    cfg_interval: list[Interval | Stored] | Interval | Stored  # type: ignore[assignment]
    reference: str
    out: str
    features: FeatureSettings | None
    num_samples: int
    metric: str | None
    top: int
    final_samples: int
    repeats: int
    keep_samples: bool
    autoencoder: str
    dtype: Dtype | None
    batch_size: int
    num_processes: int | None
    cache_gib: float
    inception_weights: str | None
    pr_dtype: PrDtype

    def __post_init__(self) -> None:
        for key in ("ckpt", "weights", *SAMPLER_AXES):
            values = self.axis(key)
            require(len(values) > 0, f"{key}=[]: name at least one")
            twice = [value for n, value in enumerate(values) if value in values[:n]]
            require(not twice, f"{key}: names {twice[:1]} twice; name each value once")
        check_counts(self, top=SEED_STRIDE, repeats=MAX_REPEATS, batch_size=SEED_STRIDE)
        for key in ("num_samples", "final_samples"):
            count = getattr(self, key)
            require(
                2 <= count <= SEED_STRIDE, f"{key}={count}: must lie in 2..{SEED_STRIDE}; statistics need at least 2"
            )
        require_count("cache_gib", self.cache_gib, 0, hint=" (0 keeps no modulations)")
        check_features(self.features, self.reference, self.inception_weights)
        check_exist(*self.axis("ckpt"))

    def axis(self, key: str) -> list[Any]:
        """Return the values of an axis; a single one (2, [0.3,1], the steps [0,5,10]) as a list."""
        value = getattr(self, key)
        if not isinstance(value, list):
            return [value]
        is_schedule = key == "recompute" and bool(value) and all(isinstance(step, int) for step in value)
        return [value] if is_schedule else value

    def find_checkpoints(self) -> list[Checkpoint]:
        """Return the checkpoints; raise UserError where one search cannot compare them."""
        from ddt.checkpoint import format as ckpt
        from ddt.checkpoint.config import other_latents

        paths = self.axis("ckpt")
        folders = [ckpt.find_checkpoint(path) for path in paths]
        require(len({f.resolve() for f in folders}) == len(folders), f"ckpt={paths}: two of them are one checkpoint")
        names = [folder.resolve().name for folder in folders]
        if len(set(names)) < len(names):  # the same step of several runs
            names = [f"{folder.resolve().parent.parent.name}-{folder.name}" for folder in folders]
        require(len(set(names)) == len(names), f"ckpt={paths}: runs of the same name; rename the folder of one")
        checkpoints = [Checkpoint(n, f, ckpt.read_config(f)) for n, f in zip(names, folders, strict=True)]
        first = checkpoints[0]
        for other in checkpoints:
            key = other_latents(first.stored, other.stored)
            require(
                key is None,
                f"ckpt={other.folder}: has another {key} than {first.folder}; search them one by one",
            )
            for kind in self.axis("weights"):
                ckpt.check_weights(other.folder, kind)
        return checkpoints

    def point_sampler(self, checkpoint: Checkpoint, chosen: dict[str, Any]) -> SamplerSettings:
        """Return the sampler of a checkpoint. chosen: the value of each axis."""
        from ddt.model import network_class

        others = {key: getattr(self, key) for key in ("sampler", *SAMPLER_KEYS) if key not in SAMPLER_AXES}
        if chosen["recompute"] is None and self.axis("recompute") != [None]:
            others["forecast_order"] = 0  # it is for the points that share
        stored, network = checkpoint.stored["sampler"], checkpoint.stored["network"]
        overrides = SamplerOverrides(**others, **chosen)
        settings = overrides.resolve(stored, network_class(network).shares_encoder, network.get("base_depth"))
        return dataclasses.replace(settings, cfg_interval=None) if settings.cfg_scale == 1 else settings

    def points(self, checkpoints: list[Checkpoint]) -> list[Point]:
        """Return all combinations; with cfg_scale 1, all intervals are one point."""
        points: dict[str, Point] = {}
        for checkpoint, weights, *values in itertools.product(
            checkpoints, self.axis("weights"), *map(self.axis, SAMPLER_AXES)
        ):
            chosen = dict(zip(SAMPLER_AXES, values, strict=True))
            settings = self.point_sampler(checkpoint, chosen)
            label = self.label(len(checkpoints), checkpoint, weights, chosen["recompute"], settings)
            point = points.setdefault(label, Point(label, checkpoint, weights, settings))
            require(
                point.settings == settings or settings.cfg_scale == 1,
                f"{label}: two points of this name differ in digits that it does not show; choose rounder numbers",
            )
        require(self.top <= len(points), f"top={self.top}: there are {len(points)} points; choose at most so many")
        return list(points.values())

    def label(
        self, num_checkpoints: int, checkpoint: Checkpoint, weights: str, recompute: Recompute,
        settings: SamplerSettings,
    ) -> str:  # fmt: skip
        """Return a folder's name: scale, interval, weights and the other axes of several values."""
        interval, schedules = settings.cfg_interval, self.axis("recompute")
        parts = [checkpoint.name] if num_checkpoints > 1 else []
        parts.append(f"cfg{settings.cfg_scale:g}" + ("" if interval is None else f"_t{interval[0]:g}-{interval[1]:g}"))
        parts.append(weights)
        if len(schedules) > 1:
            named = isinstance(recompute, str) and not recompute.endswith(".json")
            other = str(recompute).replace(":", "") if named else f"z{schedules.index(recompute)}"
            parts.append("unshared" if recompute is None else other)
        if len(self.axis("timeshift")) > 1:
            parts.append(f"shift{settings.timeshift:g}")
        return "_".join(parts)

    def request(self, checkpoints: list[Checkpoint], dtype: Dtype, device: str) -> dict[str, Any]:
        """Return all that a number in the results depends on, as plain values."""
        keys = ("reference", "metric", "num_samples", "top", "final_samples", "repeats", "autoencoder",
                "inception_weights", "pr_dtype")  # fmt: skip
        reference, features = Path(self.reference), self.features
        return {
            **{key: getattr(self, key) for key in keys},
            "features": dataclasses.asdict(features),  # type: ignore[call-overload]
            "reference_sha256": sha256(reference) if reference.is_file() else None,
            "checkpoints": {
                c.name: {"step": c.stored["step"], "sha256": c.hashes(), "sampler": c.stored["sampler"]}
                for c in checkpoints
            },
            **{key: self.axis(key) for key in ("weights", *SAMPLER_AXES)},
            "recompute": [content_of(value) for value in self.axis("recompute")],
            **{key: getattr(self, key) for key in ("sampler", *SAMPLER_KEYS) if key not in SAMPLER_AXES},
            "dtype": dtype,
            "device": device,
        }


def interval_text(interval: Sequence[float] | None) -> str:
    """Return the label of a guidance interval."""
    return "every time" if interval is None else f"{interval[0]:g}–{interval[1]:g}"
