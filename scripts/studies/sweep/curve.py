"""What comes out of a sweep: the means of each setting over its seeds, and their curve beside the
published ones.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from ddt.errors import require
from scripts.studies.sharing.report import Spread, spread
from scripts.studies.sweep.runs import Run

DEPTH = "model.encoder_depth"
UNDIVIDED = "ddt.model.DiT"
# Published (arXiv 2504.05741): FID-50K on ImageNet 256 after 400K steps without guidance.
# name → (blocks, FID by blocks of the encoder, FID of the same blocks undivided, "Improved-REPA")
PUBLISHED: dict[str, tuple[int, dict[int, float], float]] = {
    "B": (12, {4: 18.61, 6: 16.86, 8: 16.32, 10: 17.65}, 19.1),
    "L": (24, {10: 8.66, 12: 8.21, 16: 8.03, 20: 7.98}, 9.3),
}
LOWER = ("fid", "sfid", "fd_", "loss", "validation_loss", "fm_loss", "repa_loss")
HIGHER = ("inception_score", "precision", "recall", "class_accuracy")


@dataclasses.dataclass(frozen=True)
class Setting:
    """The runs that differ in their seed alone.

    settings: those that differ between runs, without the seed. x: the value along the curve, None
    where there is none.
    values: the chosen metric by seed. means: of it and of others over these seeds, empty where no
    run counts.
    """

    settings: dict[str, Any]
    x: float | None
    values: dict[int, float]
    means: dict[str, Spread | None]

    def label(self, x: str) -> str:
        """Return what sets it apart from the others on the curve of `x`, such as "DDT"."""
        parts = []
        for key, value in self.settings.items():
            if key.endswith("._target_"):
                parts.append("undivided (DiT)" if value == UNDIVIDED else str(value).rpartition(".")[2])
            elif key != x:
                parts.append(f"{key}={value if isinstance(value, str) else json.dumps(value)}")
        return ", ".join(parts) or "this sweep"


def better(metric: str) -> str | None:
    """Return "lower" or "higher", whichever is the better of a metric; None where neither is."""
    if metric.startswith(LOWER):
        return "lower"
    return "higher" if metric.startswith(HIGHER) else None


def position(settings: dict[str, Any], x: str) -> float | None:
    """Return where a run stands along the curve: its value of x, or the share of the encoder in all
    blocks.
    """
    value = settings.get(x)
    return value / settings["model.depth"] if x == DEPTH and value is not None else value


def settings_of(runs: list[Run], keys: list[str], metrics: list[str], x: str) -> list[Setting]:
    """Return the settings of the runs, each with the means over the seeds of those that ended with
    `metrics[0]`.

    keys: the settings that differ. A metric that one of the seeds lacks at its end has no mean.
    Raises UserError for two runs of one setting and seed that would both count.
    """
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(json.dumps([(key, run.settings[key]) for key in keys if key in run.settings]), []).append(run)
    found = []
    for own in groups.values():
        seeds: dict[int, Run] = {}
        for run in own:
            if run.missing(metrics[0]) is not None:
                continue
            other = seeds.setdefault(run.settings["seed"], run)
            require(
                other is run,
                f"{run.folder}: has the settings and the seed of {other.folder}, so it is no repeat; leave one out",
            )
        means: dict[str, Spread | None] = {}
        for name in metrics if seeds else ():
            values = [value for run in seeds.values() if (value := run.final(name)) is not None]
            means[name] = spread(values) if len(values) == len(seeds) else None
        settings = own[0].settings
        chosen = {key: settings[key] for key in keys if key in settings}
        finals = {seed: run.metrics[metrics[0]][1] for seed, run in sorted(seeds.items())}
        found.append(Setting(chosen, position(settings, x), finals, means))
    return found


def panel(axes: Axes, found: list[Setting], metric: str, x: str) -> None:
    """Draw a point a seed, and of each setting the mean with its deviation: settings that differ in
    x alone as a line, one without x as a band.
    """
    lines: dict[tuple[str, bool], list[Setting]] = {}
    for one in found:
        if one.means:
            lines.setdefault((one.label(x), one.x is None), []).append(one)
    for n, ((label, without_x), own) in enumerate(lines.items()):
        values = [spread(list(one.values.values())) for one in own]
        means, deviations = (np.array([value[key] or 0 for value in values]) for key in ("mean", "sd"))
        if without_x:
            axes.axhline(means[0], color=f"C{n}", linestyle="--", label=label)
            low, high = means[0] - deviations[0], means[0] + deviations[0]
            axes.axhspan(low, high, color=f"C{n}", alpha=0.15, linewidth=0)
            continue
        axes.errorbar(
            [one.x for one in own], means, deviations, color=f"C{n}", marker="o", markersize=5, capsize=4,
            label=label,
        )  # fmt: skip
        points = [(one.x, value) for one in own for value in one.values.values()]
        axes.plot(*zip(*points, strict=True), ".", color="0.35", markersize=4, zorder=3)
    direction = f"\n({better(metric)} is better)" if better(metric) else ""
    axes.set(ylabel=f"{metric}{direction}", title="this sweep: mean ± sd over seeds, a dot a seed")
    if lines:
        axes.legend(frameon=False)
    else:
        axes.text(0.5, 0.5, "no run has ended with it yet", ha="center", transform=axes.transAxes)


def draw(found: list[Setting], metric: str, x: str, path: Path) -> None:
    """Write a picture of the metric against x. Against the encoder's depth, which is drawn as its
    share of all blocks, the published curves stand beside it, on scales of their own.
    """
    if x != DEPTH:
        figure, axes = plt.subplots(figsize=(6.4, 4.4), layout="constrained")
        panels = {"own": axes}
    else:
        figure, panels = plt.subplot_mosaic(
            [["own", name] for name in PUBLISHED], figsize=(11, 4.8), layout="constrained", width_ratios=[3, 2],
            sharex=True,
        )  # fmt: skip
        for name, (depth, curve, undivided) in PUBLISHED.items():
            places = [blocks / depth for blocks in curve]
            panels[name].plot(places, list(curve.values()), "s-", color="0.3", markersize=4, label=f"DDT-{name}")
            panels[name].axhline(undivided, color="0.3", linestyle="--", label=f"Improved-REPA-{name}, undivided")
            panels[name].set(
                ylabel="FID-50K (lower is better)", title=f"published, ImageNet 256, FID-50K: {name}, {depth} blocks"
            )
            panels[name].legend(frameon=False, fontsize="small")
    panel(panels["own"], found, metric, x)
    for name, axes in panels.items():
        axes.grid(alpha=0.3)
        if name in ("own", list(PUBLISHED)[-1]):
            axes.set_xlabel("share of the encoder: encoder_depth / depth" if x == DEPTH else x)
        axes.title.set_fontsize(10)
    figure.savefig(path, dpi=110)
    plt.close(figure)
