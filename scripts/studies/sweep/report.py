"""The report of a sweep: means of each setting over its seeds, tables, and a curve beside the
published ones.
"""

import csv
import dataclasses
import json
import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ddt.config import did_you_mean
from ddt.errors import require
from ddt.figures import WIDTH, pyplot, save_figure, share_legend
from ddt.files import atomic_file, write_text
from ddt.metrics.ranking import better, ranked
from ddt.model import NETWORKS
from ddt.tables import markdown_table
from ddt.training.tracking import title
from scripts.studies.study import Row, Spread, mean_sd, number, spread, write_numbers
from scripts.studies.sweep.runs import Run, default_metric, differing, find_runs
from scripts.studies.sweep.settings import SweepSettings

log = logging.getLogger(__name__)
DEPTH = "model.encoder_depth"
# Published (arXiv 2504.05741): FID-50K on ImageNet 256 after 400K steps without guidance.
# name → (blocks, FID by blocks of the encoder, FID of the same blocks undivided, "Improved-REPA")
PUBLISHED: dict[str, tuple[int, dict[int, float], float]] = {
    "B": (12, {4: 18.61, 6: 16.86, 8: 16.32, 10: 17.65}, 19.1),
    "L": (24, {10: 8.66, 12: 8.21, 16: 8.03, 20: 7.98}, 9.3),
}


@dataclasses.dataclass(frozen=True)
class Setting:
    """The runs that differ in their seed alone.

    settings: those that differ between runs, without the seed. x: the value along the curve, or
    None. values: the chosen metric by seed. means: of each metric over these seeds, empty without.
    """

    settings: Row
    x: float | None
    values: dict[int, float]
    means: dict[str, Spread | None]

    def label(self, x: str) -> str:
        """Return how it differs from the others on the curve of `x`, such as "DDT"."""
        parts = []
        for key, value in self.settings.items():
            if key.endswith("._target_"):
                shares = value not in NETWORKS or NETWORKS[value].shares_encoder
                name = str(value).rpartition(".")[2]
                parts.append(name if shares else f"undivided ({name})")
            elif key != x:
                parts.append(f"{key}={cell(self.settings, key)}")
        return ", ".join(parts) or "this sweep"


def direction(metric: str, text: str) -> str:
    """Return `text` with "lower" or "higher" filled in, "" for a metric that has no direction."""
    return text.format(better(metric)) if better(metric) else ""


def position(settings: Row, x: str) -> float | None:
    """Return a run's value of x; of the encoder's depth its share of all blocks."""
    value = settings.get(x)
    return value / settings["model.depth"] if x == DEPTH and value is not None else value


def group_by_setting(runs: list[Run], keys: list[str], metrics: list[str], x: str) -> list[Setting]:
    """Return the settings of the runs, with means over the seeds that ended with `metrics[0]`.

    keys: the settings that differ. A metric that one of the seeds lacks at its end has no mean.
    Raises UserError for two such runs of one setting and seed.
    """
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(json.dumps([(key, run.settings[key]) for key in keys if key in run.settings]), []).append(run)
    result = []
    for group in groups.values():
        seeds: dict[int, Run] = {}
        for run in group:
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
        settings = {key: group[0].settings[key] for key in keys if key in group[0].settings}
        finals = {seed: run.metrics[metrics[0]][1] for seed, run in sorted(seeds.items())}
        result.append(Setting(settings, position(group[0].settings, x), finals, means))
    return result


def check_x(x: str, runs: list[Run], keys: list[str]) -> None:
    """Raise UserError where no run has the setting x, or has values that are not numbers."""
    choices = [key for key in keys if any(isinstance(run.settings.get(key), int | float) for run in runs)]
    values = [run.settings[x] for run in runs if run.settings.get(x) is not None]
    require(len(values) > 0, f"x={x}: no run has this setting{did_you_mean(x, choices)}")
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    require(numbers, f"x={x}: has values that are not numbers{did_you_mean(x, choices)}")


def order(run: Run, keys: list[str]) -> list[tuple[bool, float, str]]:
    """Return the sort key of a run: its settings, numbers by size, then the seed."""
    values = [run.settings.get(key) for key in (*keys, "seed")]
    return [(v is None, v, "") if isinstance(v, int | float) else (v is None, 0, str(v)) for v in values]


def write_report(settings: SweepSettings) -> None:
    """Read the runs, and write report.json, report.csv, report.md and curve.png."""
    request, x, out = settings.request, settings.x, Path(settings.out)
    runs, unstarted = find_runs(request["sweep"])
    keys = differing(runs, x)
    check_x(x, runs, keys)
    known = sorted({name for run in runs for name in run.metrics})
    require(len(known) > 0, f"{runs[0].folder / 'metrics.jsonl'}: is empty; wait for the first row (trainer.log_every)")
    metric = settings.metric or default_metric(runs)
    require(metric in known, f"metric={metric}: no run has logged it; choose from {', '.join(known)}")
    runs.sort(key=lambda run: order(run, keys))
    measured = {name for run in runs for name in run.measured} | {"loss"} & set(known)
    names = [metric, *sorted(measured - {metric})]
    means = group_by_setting(runs, keys, names, x)
    left_out = {str(run.folder): reason for run in runs if (reason := run.missing(metric)) is not None}
    left_out |= {str(path): reason for path, reason in unstarted.items()}
    rows = [row_of(run, keys, known, metric) for run in runs]
    out.mkdir(parents=True, exist_ok=True)
    numbers = {
        "request": request, "metric": metric, "better": better(metric), "runs": rows, "left_out": left_out,
        "means": [{**dataclasses.asdict(one), "seeds": len(one.values)} for one in means], "published": PUBLISHED,
    }  # fmt: skip
    write_numbers(out / "report.json", numbers, torch.device("cpu"))  # first: a later call knows the folder by it
    with atomic_file(out / "report.csv", sync=False) as temporary, temporary.open("w", newline="") as file:
        table = csv.DictWriter(file, rows[0], lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
    write_text(out / "report.md", report(runs, means, keys, names, left_out) + "\n")
    draw(means, metric, x, out / "curve.png")
    log.info("%s\n%s", table_of_means(means, keys, names), out / "report.md")
    if left_out:
        log.warning("warning: left out of the means: %s", "; ".join(f"{k}: {v}" for k, v in left_out.items()))


# --- tables


def digits(value: float) -> int:
    """Return the number of decimals that a value of this size is shown with."""
    return 2 if abs(value) >= 10 else 4


def cell(settings: Row, key: str) -> str:
    """Return a setting as text, – where the run has none of the kind."""
    if key not in settings:
        return "–"
    return settings[key] if isinstance(settings[key], str) else json.dumps(settings[key])


def row_of(run: Run, keys: list[str], metrics: list[str], metric: str) -> Row:
    """Return a run as a line of report.csv."""
    return {
        "run": str(run.folder),
        **{key: run.settings.get(key) for key in (*keys, "seed")},
        "parameters": run.num_parameters,
        "step": run.step,
        "max_steps": run.max_steps,
        "state": run.state,
        "left_out": run.missing(metric),
        **{name: run.metrics[name][1] if name in run.metrics else None for name in metrics},
        "images_per_second": run.images_per_second,
    }


def table_of_runs(runs: list[Run], keys: list[str], names: list[str]) -> str:
    """Return a line per run; a metric from before the run's end names its step."""
    top = os.path.commonpath([run.folder.parent for run in runs])
    lines = []
    for run in runs:
        line = [os.path.relpath(run.folder, top), *(cell(run.settings, key) for key in (*keys, "seed"))]
        line.append("–" if run.num_parameters is None else f"{run.num_parameters:,}")
        line += [f"{run.step}/{run.max_steps}", run.state or "–"]
        for name in names:
            step, value = run.metrics.get(name, (run.max_steps, None))
            line.append(number(value, digits(value or 0)) + ("" if step >= run.max_steps else f" (step {step})"))
        lines.append([*line, number(run.images_per_second, 0)])
    return markdown_table(["run", *keys, "seed", "parameters", "steps", "status", *names, "images/s"], lines)


def table_of_means(settings: list[Setting], keys: list[str], names: list[str]) -> str:
    """Return a line per setting, the best mean of the first metric in bold."""
    metric = names[0]
    means = {n: value["mean"] for n, one in enumerate(settings) if (value := one.means.get(metric)) is not None}
    best = means[order[0]] if (order := ranked(means, metric)) and better(metric) else None
    lines = []
    for one in settings:
        line = [*(cell(one.settings, key) for key in keys), str(len(one.values))]
        for name in names:
            value = one.means.get(name)
            text = mean_sd(value, digits(value["mean"] or 0) if value else 0)
            line.append(f"**{text}**" if name == metric and value is not None and value["mean"] == best else text)
        lines.append(line)
    return markdown_table([*keys, "seeds", *names], lines)


def report(runs: list[Run], means: list[Setting], keys: list[str], names: list[str], left_out: dict[str, str]) -> str:
    """Return the whole report as Markdown."""
    metric = names[0]
    omitted = [f"- `{folder}`: {reason}" for folder, reason in left_out.items()] or ["None."]
    published = [
        [name, f"{depth}", ", ".join(f"{n}: {value}" for n, value in curve.items()), f"{undivided}"]
        for name, (depth, curve, undivided) in PUBLISHED.items()
    ]
    return "\n\n".join(
        [
            "# Report of a sweep",
            f"Mean ± sample standard deviation over seeds, of the runs that ended with `{metric}`"
            + direction(metric, "; {} is better, the best mean is bold")
            + ".",
            table_of_means(means, keys, names),
            f"![{metric} of each setting](curve.png)",
            "Left out of the means and the curve:",
            "\n".join(omitted),
            "The last value of each metric of every run; report.csv and report.json have the losses of the training "
            "batches too. images/s: mean of the logged rates.",
            table_of_runs(runs, keys, names),
            "Published, ImageNet 256, FID-50K after 400K steps without guidance, for the shape of the curve alone:",
            markdown_table(["model", "blocks", "FID by encoder blocks", "undivided (Improved-REPA)"], published),
        ]
    )


# --- the curve


def panel(axes: Any, settings: list[Setting], metric: str, x: str) -> None:
    """Draw a point per seed, and per setting mean ± sd: along x as a line, without x as a band."""
    lines: dict[tuple[str, bool], list[Setting]] = {}
    for one in settings:
        if one.means:
            lines.setdefault((one.label(x), one.x is None), []).append(one)
    for n, ((label, without_x), line) in enumerate(lines.items()):
        values = [spread(list(one.values.values())) for one in line]
        means, deviations = (np.array([value[key] or 0 for value in values]) for key in ("mean", "sd"))
        if without_x:
            axes.axhline(means[0], color=f"C{n}", linestyle="--", label=label)
            low, high = means[0] - deviations[0], means[0] + deviations[0]
            axes.axhspan(low, high, color=f"C{n}", alpha=0.15, linewidth=0)
            continue
        style: Any = {"color": f"C{n}", "marker": "o", "label": label}
        axes.errorbar([one.x for one in line], means, deviations, **style)
        points = [(one.x, value) for one in line for value in one.values.values()]
        axes.plot(*zip(*points, strict=True), ".", color="0.35", markersize=4, zorder=3)
    ylabel = title(metric).replace("\n", " ") + direction(metric, "\n({} is better)")
    axes.set(ylabel=ylabel, title="this sweep: mean ± sd over seeds, a dot a seed")
    if not lines:
        axes.text(0.5, 0.5, "no run has ended with it yet", ha="center", transform=axes.transAxes)


def draw(settings: list[Setting], metric: str, x: str, path: Path) -> None:
    """Write a figure of the metric against x; beside the encoder's depth the published curves."""
    if x != DEPTH:
        figure, axes = pyplot().subplots(figsize=(5.5, 3.6))
        panels = {"own": axes}
    else:
        mosaic = [["own", name] for name in PUBLISHED]
        figure, panels = pyplot().subplot_mosaic(mosaic, figsize=(WIDTH, 4.2), width_ratios=[3, 2], sharex=True)
        for name, (depth, curve, undivided) in PUBLISHED.items():
            axes, shares = panels[name], [blocks / depth for blocks in curve]
            axes.plot(shares, list(curve.values()), "s-", color="0.3", label="published: DDT")
            axes.axhline(undivided, color="0.3", linestyle="--", label="published: undivided (Improved-REPA)")
            axes.set(ylabel="FID-50K", title=f"published, ImageNet 256: {name}, {depth} blocks")
    panel(panels["own"], settings, metric, x)
    for name, axes in panels.items():
        if name in ("own", list(PUBLISHED)[-1]):
            axes.set_xlabel("blocks of the encoder as a share of all" if x == DEPTH else x)
    share_legend(figure)
    save_figure(figure, path)
