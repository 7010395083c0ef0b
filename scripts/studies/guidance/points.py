"""The points of a guidance search: every combination of some checkpoints, their weights and their
samplers.
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from ddt.checkpoint import folder as ckpt
from ddt.errors import require
from ddt.sampling.settings import SamplerSettings

Interval = tuple[float, float] | None
Recompute = list[int] | str | None


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A checkpoint of a search. name: what the search calls it. stored: its config."""

    name: str
    folder: Path
    stored: dict[str, Any]

    def hashes(self) -> dict[str, str]:
        """Return the SHA-256 of its weights by name, as its manifest has them; reading compares
        them.
        """
        return {name: ckpt.weights_sha256(self.folder, name) for name in ckpt.weights_names(self.folder)}


@dataclasses.dataclass(frozen=True)
class Axes:
    """The values that points are combinations of; "checkpoint" is the value of the checkpoint's own
    sampler.
    """

    checkpoints: list[Checkpoint]
    weights: list[str]
    recompute: list[Recompute]
    timeshift: list[float | Literal["checkpoint"]]
    cfg_scale: list[float | Literal["checkpoint"]]
    cfg_interval: list[Interval | Literal["checkpoint"]]


@dataclasses.dataclass(frozen=True)
class Point:
    """One combination. label: the name of its folder."""

    label: str
    checkpoint: Checkpoint
    weights: str
    settings: SamplerSettings

    def row(self) -> dict[str, Any]:
        """Return what tells points apart, as plain values."""
        names = ("recompute", "timeshift", "cfg_scale", "cfg_interval")
        chosen = {name: getattr(self.settings, name) for name in names}
        return {"label": self.label, "checkpoint": self.checkpoint.name, "weights": self.weights, **chosen}


def interval_text(interval: Sequence[float] | None) -> str:
    """Return what people call a guidance interval."""
    return "every time" if interval is None else f"{interval[0]:g}–{interval[1]:g}"


def guidance_text(settings: SamplerSettings) -> str:
    """Return what people call a sampler's guidance."""
    if settings.cfg_scale == 1:
        return "no guidance"
    return f"cfg {settings.cfg_scale:g}, interval {interval_text(settings.cfg_interval)}"


def label_of(axes: Axes, checkpoint: Checkpoint, weights: str, schedule: int, settings: SamplerSettings) -> str:
    """Return a folder's name for a combination: scale, interval and weights, and of the other axes
    those that have several values. schedule: the place of its recompute among those of the axis.
    """
    scale, interval, recompute = settings.cfg_scale, settings.cfg_interval, axes.recompute[schedule]
    parts = [checkpoint.name] if len(axes.checkpoints) > 1 else []
    parts.append(f"cfg{scale:g}" if interval is None else f"cfg{scale:g}_t{interval[0]:g}-{interval[1]:g}")
    parts.append(weights)
    if len(axes.recompute) > 1:
        named = isinstance(recompute, str) and not recompute.endswith(".json")
        parts.append("unshared" if recompute is None else str(recompute).replace(":", "") if named else f"z{schedule}")
    if len(axes.timeshift) > 1:
        parts.append(f"shift{settings.timeshift:g}")
    return "_".join(parts)


def points_of(axes: Axes, settings_of: Callable[[Checkpoint, dict[str, Any]], SamplerSettings]) -> list[Point]:
    """Return all combinations of the axes; settings_of makes a checkpoint's sampler of one. With
    cfg_scale 1 no interval makes a difference: that is one point.
    """
    found: dict[str, Point] = {}
    outer = itertools.product(axes.checkpoints, axes.weights, enumerate(axes.recompute), axes.timeshift)
    for checkpoint, weights, (schedule, recompute), timeshift in outer:
        for scale, interval in itertools.product(axes.cfg_scale, axes.cfg_interval):
            chosen = {"cfg_scale": scale, "cfg_interval": interval, "recompute": recompute, "timeshift": timeshift}
            settings = settings_of(checkpoint, chosen)
            if settings.cfg_scale == 1:
                settings = dataclasses.replace(settings, cfg_interval=None)
            label = label_of(axes, checkpoint, weights, schedule, settings)
            point = found.setdefault(label, Point(label, checkpoint, weights, settings))
            require(
                point.settings == settings or settings.cfg_scale == 1,
                f"{label}: two points of this name differ in digits that it does not show; choose rounder numbers",
            )
    return list(found.values())
