"""What comes out of a sharing curve: means and deviations over its repeats, their table and their
picture.
"""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from scripts.studies.sharing.curve import UNSHARED, Curve

Spread = dict[str, float | None]  # mean and standard deviation over repeats; of one repeat there is no deviation


def spread(values: list[float]) -> Spread:
    """Return mean and standard deviation (divided by count − 1)."""
    return {"mean": float(np.mean(values)), "sd": float(np.std(values, ddof=1)) if len(values) > 1 else None}


def summarise(curve: Curve, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return for each rule and budget what was measured, against the unshared images of the same
    repeat.
    """
    base = {row["repeat"]: row for row in rows if row["rule"] == UNSHARED}
    summary = []
    for rule, budget in dict.fromkeys((row["rule"], row["budget"]) for row in rows):
        own = [row for row in rows if (row["rule"], row["budget"]) == (rule, budget)]
        pairs = [(row, base[row["repeat"]]) for row in own]
        summary.append(
            {
                "rule": rule,
                "encoder_runs": budget,
                "speed_by_macs": curve.bound(rule, budget),
                "speed_measured": spread([a["images_per_second"] / b["images_per_second"] for a, b in pairs]),
                "frechet_distance": spread([a["frechet_distance"] for a in own]),
                "frechet_distance_added": spread([a["frechet_distance"] - b["frechet_distance"] for a, b in pairs]),
                "pixels_rms": spread([a["pixels_rms"] for a in own]),
                "latents_rms": spread([a["latents_rms"] for a in own]),
            }
        )
    return summary


def written(value: Spread, digits: int, sign: str = "") -> str:
    """Return "mean ± sd"."""
    text = f"{value['mean']:{sign}.{digits}f}"
    return text if value["sd"] is None else f"{text} ± {value['sd']:.{digits}f}"


def table(summary: list[dict[str, Any]], name: str) -> str:
    """Return the summary as a Markdown table."""
    lines = [
        f"| rule | encoder runs | speed by MACs | measured | {name} | against unshared | rms, pixels | rms, latents |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in summary:
        cells = [
            row["rule"],
            str(row["encoder_runs"]),
            f"{row['speed_by_macs']:.2f}",
            written(row["speed_measured"], 2),
        ]
        cells.append(written(row["frechet_distance"], 3))
        if row["rule"] == UNSHARED:
            cells += ["–"] * 3
        else:
            cells.append(written(row["frechet_distance_added"], 3, "+"))
            cells += [written(row[key], 4) for key in ("pixels_rms", "latents_rms")]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw_similarity(axes: Any, similarity: np.ndarray, steps: list[int]) -> Any:
    """Draw the similarity of z between all steps (T, T), and over it the segments that share one;
    return the image.
    """
    num_steps = len(similarity)
    image = axes.imshow(similarity, origin="lower", extent=(0, num_steps, 0, num_steps), cmap="viridis")
    for start, end in zip(steps, [*steps[1:], num_steps], strict=True):
        axes.plot([start, end, end, start, start], [start, start, end, end, start], color="white", linewidth=1.2)
    axes.set(xlabel="step", ylabel="step")
    return image


def draw(summary: list[dict[str, Any]], name: str, path: Path) -> None:
    """Write a picture of two panels: Fréchet distance and rms difference of the pixels against the
    speed by MACs.

    The bars of the distance are the deviation of its difference to the unshared images of the same
    noise: that of the distance itself, the grey band, is common to all rules.
    """
    figure, panels = plt.subplots(ncols=2, figsize=(11, 4.4), layout="constrained")
    unshared, *rows = summary
    level, deviation = unshared["frechet_distance"]["mean"], unshared["frechet_distance"]["sd"] or 0
    panels[0].axhline(level, color="0.4", linewidth=1, label="without sharing")
    panels[0].axhspan(level - deviation, level + deviation, color="0.5", alpha=0.15, linewidth=0, label="its deviation")
    for number, rule in enumerate(dict.fromkeys(row["rule"] for row in rows)):
        own = sorted((row for row in rows if row["rule"] == rule), key=lambda row: row["speed_by_macs"])
        speed = np.array([row["speed_by_macs"] for row in own])
        keys = (("frechet_distance", "frechet_distance_added"), ("pixels_rms", "pixels_rms"))
        for axes, (key, bars) in zip(panels, keys, strict=True):
            means = np.array([row[key]["mean"] for row in own])
            deviations = np.array([row[bars]["sd"] or 0 for row in own])
            shown = means > 0  # at num_steps runs nothing is shared, and 0 has no place on a logarithmic scale
            axes.errorbar(
                speed[shown], means[shown], deviations[shown], color=f"C{number}", label=rule, marker="o",
                markersize=4, capsize=3,
            )  # fmt: skip
    panels[0].set(ylabel=f"{name}\nbars: of the difference to no sharing")
    panels[1].set(ylabel="rms difference of the pixels (in [0, 1])", yscale="log")
    for axes in panels:
        axes.set(xlabel="speed against no sharing, by multiply-accumulates")
        axes.grid(alpha=0.3, which="both")
        axes.legend(frameon=False, fontsize="small")
    figure.savefig(path, dpi=100)
    plt.close(figure)
