"""The report of a guidance search: numbers, tables and heat map of both stages."""

import itertools
import re
from pathlib import Path
from typing import Any

import numpy as np

from ddt.figures import ORANGE, log_ticks, pyplot, save_figure, tick_labels
from ddt.metrics.comparability import in_words, short
from ddt.metrics.ranking import is_number, ranked
from ddt.receipts import nested
from ddt.tables import markdown_table
from scripts.studies.guidance.settings import Point, interval_text
from scripts.studies.study import Row, mean_sd, number, spread

PANELS = ("checkpoint", "weights", "recompute", "timeshift")  # axes of which each combination has a panel
FRAME, BEST = {"linewidth": 1.8}, {"linewidth": 4}  # of points that were sampled again, and of the best of them


def make_result(
    points: list[tuple[Point, Row]], winners: list[tuple[Point, Row, list[tuple[int, Row]]]], metric: str
) -> Row:
    """Return the numbers of a search: its points, and its winners, the best at full size first.

    points: with their metrics. winners: with their metrics as a point and, by seed, at full size.
    """
    first, last = points[0][1], winners[0][2][0][1]
    names, rows = list(first["labels"]), []
    for rank, (point, proxy, repeats) in enumerate(winners, start=1):
        values = {name: [metrics[name] for _, metrics in repeats] for name in names}
        rows.append(
            {
                **point.row(),
                "proxy_rank": rank,
                "proxy": proxy[metric],
                "metrics": {name: spread(column) for name, column in values.items()},
                "repeats": [{"seed": seed, **{name: metrics[name] for name in names}} for seed, metrics in repeats],
            }
        )
    return {
        "metric": metric,
        "labels": {"proxy": first["labels"], "final": last["labels"]},
        "comparable": last["comparable"],
        "not_comparable_because": last["not_comparable_because"],
        "points": [{**point.row(), "metrics": {name: metrics[name] for name in names}} for point, metrics in points],
        "winners": best_first(rows, metric, [nested(row["metrics"][metric], "mean") for row in rows]),
    }


def best_first(rows: list[Row], metric: str, values: list[float | None]) -> list[Row]:
    """Return rows by their values of a metric, those without one last."""
    order = ranked(dict(enumerate(values)), metric)
    return [rows[n] for n in (*order, *(n for n in range(len(rows)) if n not in order))]


def axis_text(axis: str, value: Any) -> str:
    """Return the label of an axis's value."""
    if axis == "weights":
        return {"ema": "EMA", "model": "raw"}[value]
    if axis == "cfg_interval":
        return interval_text(value)
    if axis == "recompute":
        return "encoder at every step" if value is None else str(value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def panel_title(chosen: dict[str, Any]) -> str:
    """Return in words of which values of the other axes a panel is."""
    words = {"weights": "{} weights", "timeshift": "time shift {}"}
    texts = {axis: words.get(axis, "{}").format(axis_text(axis, value)) for axis, value in chosen.items()}
    if "recompute" in texts:
        texts["recompute"] = re.sub(r"^uniform:(\d+)$", r"encoder at one of \1 steps", texts["recompute"])
    return ", ".join(texts.values())


def values_of(points: list[Row], axis: str) -> list[Any]:
    """Return the values of an axis in their order, each once."""
    return [row[axis] for n, row in enumerate(points) if row[axis] not in [other[axis] for other in points[:n]]]


def shown_axes(points: list[Row]) -> list[str]:
    """Return the columns of a table: guidance, and the other axes of several values."""
    return [axis for axis in PANELS if len(values_of(points, axis)) > 1] + ["cfg_scale", "cfg_interval"]


def settings_cells(row: Row, axes: list[str]) -> list[str]:
    """Return the settings of a row as text; without guidance the interval is –."""
    return ["–" if axis == "cfg_interval" and row["cfg_scale"] == 1 else axis_text(axis, row[axis]) for axis in axes]


def tables(result: Row) -> str:
    """Return both stages as Markdown tables, the best first, and the metrics of real images."""
    points, metric, labels = result["points"], result["metric"], result["labels"]
    axes, titles = shown_axes(points), [axis.replace("_", " ") for axis in shown_axes(points)]
    names = sorted((n for n in labels["proxy"] if not n.endswith("_real")), key=lambda name: name != metric)
    best = best_first(points, metric, [row["metrics"][metric] for row in points])
    proxy = [settings_cells(row, axes) + [number(row["metrics"][name], 3) for name in names] for row in best]
    final = [
        settings_cells(row, axes) + [number(row["proxy"], 3)] + [mean_sd(row["metrics"][name], 3) for name in names]
        for row in result["winners"]
    ]
    repeats = len(result["winners"][0]["repeats"])
    values = points[0]["metrics"]
    real = [f"{label}: {number(values[n], 3)}" for n, label in labels["proxy"].items() if n.endswith("_real")]
    return "\n\n".join(
        [
            "Every point, on the same noise:",
            markdown_table([*titles, *(labels["proxy"][name] for name in names)], proxy),
            f"The best of them, on other noise, {'once' if repeats == 1 else f'mean ± sd of {repeats}'}:",
            markdown_table(
                [*titles, f"on the first noise: {labels['proxy'][metric]}", *(labels["final"][name] for name in names)],
                final,
            ),
            *(["; ".join(real)] if real else []),
        ]
    )


def draw(result: Row, path: Path) -> None:
    """Write a heat map of scale × interval, a panel for each combination of the other axes.

    The points of the final stage are framed, the best of them thickly.
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LogNorm
    from matplotlib.patches import Patch

    points, metric = result["points"], result["metric"]
    scales, intervals = sorted(values_of(points, "cfg_scale")), intervals_of(points)
    varied = [axis for axis in PANELS if len(values_of(points, axis)) > 1]
    combinations = list(itertools.product(*(values_of(points, axis) for axis in varied)))
    columns = min(2, len(combinations))
    lines = -(-len(combinations) // columns)
    size = (1.2 + columns * (0.9 + 0.54 * len(scales)), 1.0 + lines * (0.8 + 0.4 * len(intervals)))
    figure, grid = pyplot().subplots(lines, columns, figsize=size, squeeze=False)
    distances = [value for row in points if is_number(value := row["metrics"][metric])]
    low = max(min(distances), 1e-9)  # a logarithm has no 0
    norm = LogNorm(low, max(max(distances), 1.01 * low))
    for axes, combination in zip(grid.flat, combinations, strict=False):
        chosen = dict(zip(varied, combination, strict=True))
        own = [row for row in points if all(row[axis] == value for axis, value in chosen.items())]
        panel(axes, own, result, scales, intervals, norm)
        axes.set_title(panel_title(chosen))
    for axes in grid.flat[len(combinations) :]:
        axes.set_visible(False)
    _, bracket, remarks = result["labels"]["proxy"][metric].partition(" (")
    label = in_words(metric, short(result["request"]["num_samples"])).replace("\n", " ") + bracket + remarks
    bar = figure.colorbar(ScalarMappable(norm, "viridis_r"), ax=grid, label="distance (lower is better)")
    ticks = log_ticks(norm.vmin, norm.vmax)
    bar.set_ticks(ticks, labels=tick_labels(ticks))
    bar.ax.minorticks_off()
    figure.suptitle(label)
    frames = {"sampled again with other noise": FRAME, "the best there": BEST}
    handles = [Patch(fill=False, edgecolor=ORANGE, label=name, **style) for name, style in frames.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=2)
    save_figure(figure, path)


def intervals_of(points: list[Row]) -> list[Any]:
    """Return the guidance intervals in their order, of the guided points where there are any."""
    return values_of([row for row in points if row["cfg_scale"] != 1] or points, "cfg_interval")


def panel(axes: Any, own: list[Row], result: Row, scales: list[float], intervals: list[Any], norm: Any) -> None:
    """Draw a panel of the heat map; a point without guidance takes a whole column."""
    from matplotlib.patches import Rectangle

    values = np.full((len(intervals), len(scales)), np.nan)
    best, *others = [row["label"] for row in result["winners"]]
    for row in own:
        column = scales.index(row["cfg_scale"])
        place = slice(None) if row["cfg_scale"] == 1 else slice(i := intervals.index(row["cfg_interval"]), i + 1)
        values[place, column] = value if is_number(value := row["metrics"][result["metric"]]) else np.nan
        if row["label"] in (best, *others):
            top, height, _ = place.indices(len(intervals))
            style: Any = {"fill": False, "edgecolor": ORANGE, "zorder": 3, **(BEST if row["label"] == best else FRAME)}
            axes.add_patch(Rectangle((column - 0.46, top - 0.46), 0.92, height - top - 0.08, **style))
    image = axes.imshow(values, cmap="viridis_r", norm=norm, aspect="auto")
    for (i, j), value in np.ndenumerate(values):
        if not np.isnan(value):
            luminance = np.dot(image.cmap(norm(value))[:3], (0.299, 0.587, 0.114))
            color = "black" if luminance > 0.5 else "white"
            axes.text(j, i, f"{value:.3g}", ha="center", va="center", color=color)
    axes.set_xticks(range(len(scales)), [f"{scale:g}" for scale in scales])
    axes.set_yticks(range(len(intervals)), [interval_text(interval) for interval in intervals])
    axes.set(xlabel="guidance scale", ylabel="guidance interval (t)")
    axes.tick_params(length=0)
    axes.grid(False)
