"""Figures by matplotlib: one style, readable logarithmic axes, bars with their values, one legend
for all panels.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ddt.errors import require
from ddt.files import atomic_file, check_new

STYLE = Path(__file__).with_suffix(".mplstyle")
WIDTH = 8.0  # inches, of a figure as wide as a page of the docs
BLUE, ORANGE, GREEN, GREY = "C0", "C1", "C2", "0.65"
LABEL_SHARE = 0.08  # of a panel's height that a label takes
ENTRY, CHARACTER = 0.5, 0.06  # inches, of a legend's entry: its handle, and a character of its label
STEPS = ((1,), (1, 2, 5), (1, 2, 3, 4, 6, 8))  # of ticks in a decade, coarse to fine
MIN_TICKS = 3
FORMATS = (".png", ".pdf", ".svg")


def check_figure(path: Path, key: str = "out") -> None:
    """Raise UserError unless a figure can be written to the file of setting `key`."""
    require(path.suffix in FORMATS, f"{key}={path}: give a {FORMATS[0]}, {FORMATS[1]} or {FORMATS[2]} file")
    check_new(path, key)


def pyplot() -> Any:
    """Return matplotlib's pyplot without a display, in the style of all figures."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.style.use(STYLE)
    return plt


def save_figure(figure: Any, path: Path) -> None:
    """Write a matplotlib figure as its suffix says, in a new folder too, and close it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path, sync=False) as temporary:
        figure.savefig(temporary, format=path.suffix[1:])
    pyplot().close(figure)


def log_ticks(low: float, high: float) -> list[float]:
    """Return round numbers in low..high > 0 for a logarithmic axis: powers of ten, 1, 2, 5, 10, …,
    or evenly spaced ones where the axis spans too little for three of these.
    """
    from matplotlib.ticker import MaxNLocator

    ticks: list[float] = []
    for steps in STEPS:
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        ticks = [tick for k in decades for step in steps if low <= (tick := step * 10.0**k) <= high]
        if len(ticks) >= MIN_TICKS:
            return ticks
    return [tick for tick in MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high) if low <= tick <= high]


def tick_labels(ticks: Sequence[float]) -> list[str]:
    """Return the ticks of a logarithmic axis as people write them: 0.02, 5, 20,000; all of them as
    powers of ten, such as 2×10⁷, where one would be long.
    """
    if all(1e-5 < tick < 1e6 for tick in ticks):
        return [f"{tick:,.6g}" for tick in ticks]
    parts = [f"{tick:.6e}".split("e") for tick in ticks]
    return [("" if float(f) == 1 else f"{float(f):g}×") + f"$10^{{{int(exponent)}}}$" for f, exponent in parts]


def log_scale(axes: Any) -> None:
    """Make the y axis of a complete panel logarithmic, with plain numbers at round ticks."""
    axes.set_yscale("log")
    axes.minorticks_off()
    ticks = log_ticks(*axes.get_ylim())
    axes.set_yticks(ticks, tick_labels(ticks))


def label_bars(axes: Any, bars: Any, texts: Sequence[str], marks: Sequence[float]) -> None:
    """Write a text at the end of each horizontal bar, behind a mark that lies beyond it."""
    for bar, text, mark in zip(bars, texts, marks, strict=True):
        place = max(bar.get_width(), mark), bar.get_y() + bar.get_height() / 2
        axes.annotate(text, place, (4, 0), textcoords="offset points", va="center")


def label_lines(axes: Any) -> None:
    """Write each line's label at its higher end, in its colour, in place of a legend: above the
    line, or below it where another label is.
    """
    low, high = axes.get_ylim()
    above: dict[str, list[float]] = {"left": [], "right": []}
    for line in axes.lines:
        x, y = line.get_xdata(), line.get_ydata()
        end, side = (-1, "right") if y[-1] >= y[0] else (0, "left")
        free = all(abs(y[end] - other) > LABEL_SHARE * (high - low) for other in above[side])
        if free:
            above[side].append(y[end])
        axes.annotate(
            line.get_label(), (x[end], y[end]), (0, 4 if free else -6), textcoords="offset points",
            color=line.get_color(), ha=side, va="bottom" if free else "top",
        )  # fmt: skip


def share_legend(figure: Any) -> None:
    """Write one legend above all panels, each label once, in as many columns as fit."""
    entries: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    if entries:
        width = ENTRY + CHARACTER * max(map(len, entries))
        columns = max(1, min(len(entries), int(figure.get_figwidth() / width)))
        figure.legend(entries.values(), entries.keys(), loc="outside upper center", ncols=columns)
