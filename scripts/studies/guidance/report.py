"""What comes out of a guidance search: the numbers of both stages, their tables and their heat map."""

import itertools
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from scripts.studies.guidance.points import Point, interval_text
from scripts.studies.guidance.search import Job
from scripts.studies.sharing.report import spread, written

Row = dict[str, Any]
PANELS = ("checkpoint", "weights", "recompute", "timeshift")  # axes of which each combination has a panel
FRAME = "#d62728"


def result_of(
    points: list[Point], proxy: list[Row], order: list[int], jobs: list[Job], final: list[Row], metric: str
) -> Row:
    """Return what a search found: the points in their order, and the winners, the best at full size
    first.

    proxy, final: the metrics of the points and of the jobs. order: the winners' places among the
    points.
    """
    names = list(proxy[0]["labels"])
    winners = []
    for rank, n in enumerate(order, start=1):
        own = [(job, found) for job, found in zip(jobs, final, strict=True) if job.point is points[n]]
        values = {name: [found[name] for _, found in own] for name in names}
        winners.append(
            {
                **points[n].row(),
                "proxy_rank": rank,
                "proxy": proxy[n][metric],
                "metrics": {name: None if None in found else spread(found) for name, found in values.items()},
                "repeats": [{"seed": job.seed, **{name: found[name] for name in names}} for job, found in own],
            }
        )
    return {
        "metric": metric,
        "labels": {"proxy": proxy[0]["labels"], "final": final[0]["labels"]},
        "comparable": final[0]["comparable"],
        "not_comparable_because": final[0]["not_comparable_because"],
        "points": [
            {**point.row(), "metrics": {name: found[name] for name in names}}
            for point, found in zip(points, proxy, strict=True)
        ],
        "winners": sorted(winners, key=lambda row: row["metrics"][metric]["mean"]),
    }


def axis_text(axis: str, value: Any) -> str:
    """Return what people call a value of an axis."""
    if axis == "weights":
        return {"ema": "EMA", "model": "raw"}[value]
    if axis == "cfg_interval":
        return interval_text(value)
    if axis == "recompute":
        return "encoder at every step" if value is None else str(value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def values_of(points: list[Row], axis: str) -> list[Any]:
    """Return the values of an axis in their order, each once."""
    return [row[axis] for n, row in enumerate(points) if row[axis] not in [other[axis] for other in points[:n]]]


def shown_axes(points: list[Row]) -> list[str]:
    """Return the axes that a table has columns for: guidance, and what else has several values."""
    return [axis for axis in PANELS if len(values_of(points, axis)) > 1] + ["cfg_scale", "cfg_interval"]


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def settings_cells(row: Row, axes: list[str]) -> list[str]:
    """Return the settings of a row; without guidance there is no interval."""
    return ["–" if axis == "cfg_interval" and row["cfg_scale"] == 1 else axis_text(axis, row[axis]) for axis in axes]


def tables(result: Row) -> str:
    """Return both stages as Markdown tables, the best first, and the metrics of real images, where
    they are known.
    """
    points, metric = result["points"], result["metric"]
    axes, titles = shown_axes(points), [axis.replace("_", " ") for axis in shown_axes(points)]
    labels = {stage: dict(found) for stage, found in result["labels"].items()}
    names = sorted((n for n in labels["proxy"] if not n.endswith("_real")), key=lambda name: name != metric)
    ranked = sorted(points, key=lambda row: row["metrics"][metric])

    def number(value: float | None) -> str:
        return "–" if value is None else f"{value:.3f}"

    proxy = [settings_cells(row, axes) + [number(row["metrics"][name]) for name in names] for row in ranked]
    final = [
        settings_cells(row, axes)
        + [number(row["proxy"])]
        + ["–" if row["metrics"][name] is None else written(row["metrics"][name], 3) for name in names]
        for row in result["winners"]
    ]
    repeats = len(result["winners"][0]["repeats"])
    real = [
        f"{label}: {number(points[0]['metrics'][n])}" for n, label in labels["proxy"].items() if n.endswith("_real")
    ]
    return "\n\n".join(
        [
            "Every point, on the same noise:",
            markdown([*titles, *(labels["proxy"][name] for name in names)], proxy),
            f"The best of them, on other noise, {'once' if repeats == 1 else f'mean ± sd of {repeats}'}:",
            markdown(
                [*titles, f"on the first noise: {labels['proxy'][metric]}", *(labels["final"][name] for name in names)],
                final,
            ),
            *(["; ".join(real)] if real else []),
        ]
    )


def draw(result: Row, path: Path) -> None:
    """Write a heat map: scale across, interval down, a panel for each combination of the other
    axes. The points that were drawn again are framed, the best of them thickly.
    """
    points, metric = result["points"], result["metric"]
    scales, intervals = sorted(values_of(points, "cfg_scale")), intervals_of(points)
    varied = [axis for axis in PANELS if len(values_of(points, axis)) > 1]
    combinations = list(itertools.product(*(values_of(points, axis) for axis in varied)))
    columns = min(2, len(combinations))
    lines = -(-len(combinations) // columns)
    size = (1.6 + columns * (1.2 + 0.85 * len(scales)), 1.0 + lines * (1.0 + 0.6 * len(intervals)))
    figure, grid = plt.subplots(lines, columns, figsize=size, layout="constrained", squeeze=False)
    distances = [row["metrics"][metric] for row in points]
    low = max(min(distances), 1e-9)  # a logarithm has no 0
    norm = LogNorm(low, max(max(distances), 1.01 * low))
    for axes, combination in zip(grid.flat, combinations, strict=False):
        chosen = dict(zip(varied, combination, strict=True))
        own = [row for row in points if all(row[axis] == value for axis, value in chosen.items())]
        panel(axes, own, result, scales, intervals, norm)
        axes.set_title(", ".join(f"{axis} {axis_text(axis, value)}" for axis, value in chosen.items()), fontsize=10)
    for axes in grid.flat[len(combinations) :]:
        axes.set_visible(False)
    label = result["labels"]["proxy"][metric]
    colour_bar(figure, grid, norm, label)
    figure.suptitle(f"{label}; framed: drawn again on other noise, thickly: the best there")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def intervals_of(points: list[Row]) -> list[Any]:
    """Return the guidance intervals in their order; those of points without guidance are none,
    unless they are all.
    """
    return values_of([row for row in points if row["cfg_scale"] != 1] or points, "cfg_interval")


def panel(axes: Axes, own: list[Row], result: Row, scales: list[float], intervals: list[Any], norm: LogNorm) -> None:
    """Draw a panel of the heat map. A point without guidance takes a whole column: no interval
    changes it.
    """
    values = np.full((len(intervals), len(scales)), np.nan)
    best, *others = [row["label"] for row in result["winners"]]
    for row in own:
        column = scales.index(row["cfg_scale"])
        place = slice(None) if row["cfg_scale"] == 1 else slice(i := intervals.index(row["cfg_interval"]), i + 1)
        values[place, column] = row["metrics"][result["metric"]]
        if row["label"] in (best, *others):
            top, height, _ = place.indices(len(intervals))
            axes.add_patch(
                Rectangle(
                    (column - 0.46, top - 0.46), 0.92, height - top - 0.08, fill=False, edgecolor=FRAME, zorder=3,
                    linewidth=4 if row["label"] == best else 1.8,
                )
            )  # fmt: skip
    image = axes.imshow(values, cmap="viridis_r", norm=norm, aspect="auto")
    for (i, j), value in np.ndenumerate(values):
        if not np.isnan(value):
            luminance = np.dot(image.cmap(norm(value))[:3], (0.299, 0.587, 0.114))
            axes.text(
                j,
                i,
                f"{value:.3g}",
                ha="center",
                va="center",
                color="black" if luminance > 0.5 else "white",
                fontsize=9,
            )
    axes.set_xticks(range(len(scales)), [f"{scale:g}" for scale in scales])
    axes.set_yticks(range(len(intervals)), [interval_text(interval) for interval in intervals])
    axes.set(xlabel="cfg scale", ylabel="guidance interval")
    axes.tick_params(length=0)


def colour_bar(figure: Figure, grid: np.ndarray, norm: LogNorm, label: str) -> None:
    """Add the bar of the common colour scale, with a few round numbers beside it."""
    bar = figure.colorbar(plt.cm.ScalarMappable(norm, "viridis_r"), ax=grid, label=label)
    ticks = np.geomspace(norm.vmin, norm.vmax, 5)
    bar.set_ticks(ticks.tolist(), labels=[f"{tick:.3g}" for tick in ticks])
    bar.ax.minorticks_off()
