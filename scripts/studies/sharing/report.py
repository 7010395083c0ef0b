"""The report of a sharing curve: means and deviations over the repeats, their table and figure."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from ddt.figures import WIDTH, log_scale, pyplot, save_figure, share_legend
from ddt.receipts import nested
from ddt.tables import markdown_table
from scripts.studies.study import Row, mean_sd, spread

UNSHARED = "unshared"


def added(value: float | None, base: float | None) -> float | None:
    """Return the difference to a base, None where one of both is missing."""
    return None if value is None or base is None else value - base


def summarise(rows: list[Row], speed_by_macs: Callable[[str, int], float]) -> list[Row]:
    """Return means by rule and budget, against the unshared images of the same repeat."""
    base = {row["repeat"]: row for row in rows if row["rule"] == UNSHARED}
    summary = []
    for rule, budget in dict.fromkeys((row["rule"], row["budget"]) for row in rows):
        own = [row for row in rows if (row["rule"], row["budget"]) == (rule, budget)]
        pairs = [(row, base[row["repeat"]]) for row in own]
        summary.append(
            {
                "rule": rule,
                "encoder_runs": budget,
                "speed_by_macs": speed_by_macs(rule, budget),
                "speed_measured": spread([a["images_per_second"] / b["images_per_second"] for a, b in pairs]),
                "frechet_distance": spread([a["frechet_distance"] for a in own]),
                "frechet_distance_added": spread(
                    [added(a["frechet_distance"], b["frechet_distance"]) for a, b in pairs]
                ),
                "pixels_rms": spread([a["pixels_rms"] for a in own]),
                "latents_rms": spread([a["latents_rms"] for a in own]),
            }
        )
    return summary


def table(summary: list[Row], distance: str) -> str:
    """Return the summary as a Markdown table."""
    heads = ("rule", "encoder runs", "speed by MACs", "measured", distance, "against unshared", "rms, pixels",
             "rms, latents")  # fmt: skip
    lines = []
    for row in summary:
        differences = [mean_sd(row["frechet_distance_added"], 3, "+"), mean_sd(row["pixels_rms"], 4),
                       mean_sd(row["latents_rms"], 4)]  # fmt: skip
        lines.append(
            [
                row["rule"], str(row["encoder_runs"]), f"{row['speed_by_macs']:.2f}",
                mean_sd(row["speed_measured"], 2), mean_sd(row["frechet_distance"], 3),
                *(["–"] * 3 if row["rule"] == UNSHARED else differences),
            ]
        )  # fmt: skip
    return markdown_table(heads, lines)


def rule_in_words(rule: str) -> str:
    """Return a rule such as dp+1 as the legend says it."""
    kind, _, order = rule.partition("+")
    words = {"uniform": "uniform steps", "dp": "fitted steps (dp)"}.get(kind, kind)
    return f"{words}, forecast of order {order}" if order else words


def draw(summary: list[Row], distance: str, path: Path) -> None:
    """Write a figure: Fréchet distance and rms difference of the pixels against the speed by MACs.

    distance: the first panel's title, `ddt.metrics.comparability.in_words`.
    The bars of the distance are the deviation of its difference to the unshared images of the same
    noise; that of the distance itself, the grey band, is common to all rules.
    """
    figure, panels = pyplot().subplots(ncols=2, figsize=(WIDTH, 3.9))
    unshared, *rows = summary
    if (base := unshared["frechet_distance"]) is not None:
        low, high = base["mean"] - (base["sd"] or 0), base["mean"] + (base["sd"] or 0)
        panels[0].axhline(base["mean"], color="0.4", linewidth=1, label="without sharing: mean")
        panels[0].axhspan(low, high, color="0.5", alpha=0.15, linewidth=0, label="its deviation over the noise")
    for number, rule in enumerate(dict.fromkeys(row["rule"] for row in rows)):
        own = sorted((row for row in rows if row["rule"] == rule), key=lambda row: row["speed_by_macs"])
        speed = np.array([row["speed_by_macs"] for row in own])
        keys = (("frechet_distance", "frechet_distance_added"), ("pixels_rms", "pixels_rms"))
        for axes, (key, bars) in zip(panels, keys, strict=True):
            means = np.array([np.nan if row[key] is None else row[key]["mean"] for row in own])
            deviations = np.array([nested(row[bars], "sd") or 0 for row in own])
            shown = means > 0  # 0, at num_steps runs, has no place on a logarithmic scale; NaN is above nothing
            style = {"color": f"C{number}", "label": rule_in_words(rule), "marker": "o"}
            axes.errorbar(speed[shown], means[shown], deviations[shown], **style)
    panels[0].set(title=distance, ylabel="lower is better\nbars: of the difference to no sharing")
    panels[1].set(title="Difference to the images\nwithout sharing", ylabel="rms over pixels in [0, 1]")
    log_scale(panels[1])
    for axes in panels:
        axes.set(xlabel="times as fast as without sharing,\nby multiply-accumulates")
    share_legend(figure)
    save_figure(figure, path)
