"""A benchmark's rows as Markdown and as a picture."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from scripts.benchmark.timing import Row

HEADS = (
    "case",
    "way",
    "ms",
    "× base",
    "bound",
    "× first",
    "bound of that",
    "images/s",
    "of a product's rate",
    "peak MiB",
    "error",
)


def number(value: float | None, form: str) -> str:
    """Return a number as text, or a dash for none."""
    return "–" if value is None else format(value, form)


def line(cells: Iterable[str]) -> str:
    """Return a row of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def cells(row: Row) -> list[str]:
    """Return a measured row's cells."""
    others = row["base"] != row["first"]
    return [
        row["case"], row["way"], number(1000 * row["seconds"], ".3g" if row["seconds"] < 1 else ".0f"),
        "1" if row["way"] == row["base"] else number(row["ratio"], ".2f"), number(row["bound"], ".2f"),
        number(row["ratio_to_first"], ".2f") if others else "", number(row["bound_to_first"], ".2f") if others else "",
        number(row["images_per_second"] or None, ".3g"),
        "–" if row["share_of_matmul"] is None else f"{row['share_of_matmul']:.0%}",
        number(row["peak_bytes"] / 2**20, ".0f"), number(row["error"], ".0e"),
    ]  # fmt: skip


def growth_table(rows: list[Row]) -> list[str]:
    """Return the lines of the table of growth."""
    lines = [line(("what grows", "to", "ms a step", "images/s", "of a product's rate")), "|---|---|---|---|---|"]
    for row in rows:
        shown = [row["case"], f"{row['value']:g}"]
        if "not_run" in row:
            shown += [f"not run: {row['not_run']}", "", ""]
        else:
            shown += [
                f"{1000 * row['seconds']:.0f}",
                f"{row['images_per_second']:.3g}",
                f"{row['share_of_matmul']:.0%}",
            ]
        lines.append(line(shown))
    return lines


def markdown(found: dict[str, Any]) -> str:
    """Return the whole report: what was run where, a table a part, and what was not run and why."""
    machine, product = found["machine"], found["matmul"]
    lines = [
        f"# Benchmark: {found['settings']['model']}, {found['settings']['dtype']}", "",
        f"`{found['command']}`, {found['date'][:10]}, {machine['device']}, {machine['threads']} threads, torch "
        f"{machine['torch']}, Python {machine['python']}.", "",
        f"A product of two square {product['dtype']} matrices of {product['size']} ran at "
        f"{product['flops_per_second'] / 1e12:.3g} TFLOP/s. FLOPs are counted (`ddt/model/cost.py`), not measured. Medians "
        "of runs in turns; × base: how many times as fast as the plain way of doing the same, whose own line says 1; × "
        "first: as the first line of the case, where that does more; bound: the ratio of the counts; error: relative "
        "difference from the plain way.",
    ]  # fmt: skip
    measured = [row for row in found["rows"] if "seconds" in row and row["part"] != "growth"]
    for part in dict.fromkeys(row["part"] for row in measured):
        lines += ["", f"## {part}", "", line(HEADS), "|" + "---|" * len(HEADS)]
        lines += [line(cells(row)) for row in measured if row["part"] == part]
    growing = [row for row in found["rows"] if row["part"] == "growth" and "value" in row]
    if growing:
        lines += ["", "## growth", "", *growth_table(growing)]
    left = [row for row in found["rows"] if "not_run" in row and "value" not in row]
    if left:
        lines += ["", "## Not run", "", *(f"- {row['part']}: {row['not_run']}" for row in left)]
    return "\n".join(lines) + "\n"


def draw(found: dict[str, Any], path: Path) -> None:
    """Write a picture: how many times faster each way is, with its bound, and how a step's rate
    grows.
    """
    measured = [row for row in found["rows"] if "seconds" in row and row["part"] != "growth"]
    shown = [row for row in measured if row["way"] != row["base"] and row["part"] != "candidates"]
    growing = [row for row in found["rows"] if row["part"] == "growth" and "seconds" in row]
    kinds = list(dict.fromkeys(row["case"] for row in growing))
    columns = (2 if shown else 0) + (1 if kinds else 0)
    if columns == 0:
        return
    figure = plt.figure(figsize=(5 * columns, max(4.0, 0.28 * len(shown) + 1)), layout="constrained")
    grid = figure.add_gridspec(max(1, len(kinds)), columns)
    if shown:
        axes = figure.add_subplot(grid[:, :2])
        labels = [f"{row['part']}, {row['case']}: {row['way']}" for row in shown]
        axes.barh(labels, [row["ratio"] for row in shown], color="tab:blue")
        bounds = [(row["bound"], label) for row, label in zip(shown, labels, strict=True) if row["bound"] is not None]
        if bounds:
            axes.plot(*zip(*bounds, strict=True), "|", color="black", markersize=11, label="ratio of the counts")
            axes.legend(fontsize=7, loc="lower right")
        axes.axvline(1, color="gray", linewidth=0.8)
        axes.set(xscale="log", xlabel="times as fast as the plain way of doing the same")
        axes.tick_params(axis="y", labelsize=7)
        axes.invert_yaxis()
    for index, kind in enumerate(kinds):
        axes = figure.add_subplot(grid[index, columns - 1])
        here = [row for row in growing if row["case"] == kind]
        axes.plot([row["value"] for row in here], [row["images_per_second"] for row in here], "o-")
        axes.set(xlabel=kind, ylabel="images/s", xscale="log", yscale="log")
        axes.set_xticks([row["value"] for row in here], [f"{row['value']:g}" for row in here])
        axes.minorticks_off()
    figure.savefig(path, dpi=110)
    plt.close(figure)
