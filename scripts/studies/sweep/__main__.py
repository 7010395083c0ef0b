"""Gather the runs of a sweep into tables and a curve of a metric against a setting, with means over
seeds.

python scripts/studies/sweep/__main__.py sweep=runs/encoder_depth out=FOLDER [metric=fd_digits_1k]
[x=model.encoder_depth]
"""

import csv
import dataclasses
import json
import logging
import os
import shlex
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from omegaconf import DictConfig

from ddt.cli import arguments_for, checked, entry_point
from ddt.config import did_you_mean
from ddt.errors import require
from ddt.files import check_writable, write_json
from ddt.receipts import circumstances
from scripts.studies.guidance.report import markdown
from scripts.studies.sharing.report import written
from scripts.studies.sweep.curve import PUBLISHED, Setting, better, draw, settings_of
from scripts.studies.sweep.runs import Run, default_metric, differing, find_runs

log = logging.getLogger(__name__)
Row = dict[str, Any]


def number(value: float | None) -> str:
    """Return a metric as a table shows it."""
    return "–" if value is None else f"{value:.{digits(value)}f}"


def digits(value: float) -> int:
    """Return how many decimals a value of this size is shown with."""
    return 2 if abs(value) >= 10 else 4


def cell(settings: Row, key: str) -> str:
    """Return a setting as a table shows it; – where the run has none of the kind."""
    if key not in settings:
        return "–"
    return settings[key] if isinstance(settings[key], str) else json.dumps(settings[key])


def table_of_runs(runs: list[Run], keys: list[str], names: list[str]) -> str:
    """Return a Markdown table with a line a run; a metric from before the run's end names its step."""
    top = os.path.commonpath([run.folder.parent for run in runs])
    lines = []
    for run in runs:
        line = [os.path.relpath(run.folder, top), *(cell(run.settings, key) for key in (*keys, "seed"))]
        line.append("–" if run.num_parameters is None else f"{run.num_parameters:,}")
        line += [f"{run.step}/{run.max_steps}", run.state or "–"]
        for name in names:
            step, value = run.metrics.get(name, (run.max_steps, None))
            line.append(number(value) + ("" if step >= run.max_steps else f" (step {step})"))
        rate = run.images_per_second
        lines.append([*line, "–" if rate is None else f"{rate:.0f}"])
    return markdown(["run", *keys, "seed", "parameters", "steps", "status", *names, "images/s"], lines)


def table_of_means(found: list[Setting], keys: list[str], names: list[str]) -> str:
    """Return a Markdown table with a line a setting, the best mean of the first metric in bold."""
    metric = names[0]
    means = [value["mean"] for one in found if (value := one.means.get(metric)) is not None]
    pick = {"lower": min, "higher": max}.get(better(metric) or "")
    best = pick(means) if pick is not None and means else None
    lines = []
    for one in found:
        line = [*(cell(one.settings, key) for key in keys), str(len(one.values))]
        for name in names:
            value = one.means.get(name)
            text = "–" if value is None else written(value, digits(value["mean"]))
            line.append(f"**{text}**" if name == metric and value is not None and value["mean"] == best else text)
        lines.append(line)
    return markdown([*keys, "seeds", *names], lines)


def report(runs: list[Run], found: list[Setting], keys: list[str], names: list[str], left_out: dict[str, str]) -> str:
    """Return the whole report as Markdown."""
    metric = names[0]
    direction = f"; {better(metric)} is better, the best mean is bold" if better(metric) else ""
    omitted = [f"- `{folder}`: {reason}" for folder, reason in left_out.items()] or ["None."]
    published = [
        [name, f"{depth}", ", ".join(f"{n}: {value}" for n, value in curve.items()), f"{undivided}"]
        for name, (depth, curve, undivided) in PUBLISHED.items()
    ]
    return "\n\n".join(
        [
            "# Report of a sweep",
            f"Mean ± sample standard deviation over seeds, of the runs that ended with `{metric}`{direction}.",
            table_of_means(found, keys, names),
            f"![{metric} of each setting](curve.png)",
            "Left out of the means and the curve:",
            "\n".join(omitted),
            "The last value of each metric of every run; report.csv and report.json have the losses of the training "
            "batches too. images/s: mean of the logged rates.",
            table_of_runs(runs, keys, names),
            "Published, ImageNet 256, FID-50K after 400K steps without guidance, for the shape of the curve alone:",
            markdown(["model", "blocks", "FID by encoder blocks", "undivided (Improved-REPA)"], published),
        ]
    )


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


def check_out(out: Path, request: Row) -> None:
    """Raise UserError unless `out` is new, empty, or holds an earlier report of the same request."""
    require(not out.exists() or out.is_dir(), f"out={out}: is a file; give a folder")
    if out.exists() and any(out.iterdir()):
        try:
            same = json.loads((out / "report.json").read_text())["request"] == request
        except (OSError, ValueError, KeyError, TypeError):
            same = False
        require(same, f"out={out}: holds another report or other files and is not written over; choose another out=")
    check_writable(out)


def check_x(x: str, runs: list[Run], keys: list[str]) -> None:
    """Raise UserError where the setting along the curve is none of the runs', or no number."""
    choices = [key for key in keys if any(isinstance(run.settings.get(key), int | float) for run in runs)]
    values = [run.settings[x] for run in runs if run.settings.get(x) is not None]
    require(len(values) > 0, f"x={x}: no run has this setting{did_you_mean(x, choices)}")
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    require(numbers, f"x={x}: has values that are no numbers{did_you_mean(x, choices)}")


def chosen_metric(metric: str | None, runs: list[Run]) -> str:
    """Return the metric of the means; raise UserError where no run has it."""
    known = sorted({name for run in runs for name in run.metrics})
    require(len(known) > 0, f"{runs[0].folder / 'metrics.jsonl'}: is empty; wait for the first row (trainer.log_every)")
    chosen = metric or default_metric(runs)
    require(chosen in known, f"metric={chosen}: no run has logged it; choose from {', '.join(known)}")
    return chosen


def order(run: Run, keys: list[str]) -> list[tuple[bool, float, str]]:
    """Return what runs are sorted by: their settings, numbers by size, then the seed."""
    values = [run.settings.get(key) for key in (*keys, "seed")]
    return [(v is None, v, "") if isinstance(v, int | float) else (v is None, 0, str(v)) for v in values]


def write(sweep: list[str] | str, out: str, metric: str | None, x: str) -> None:
    """Read the runs, refuse what does not fit, write the report."""
    sweep, folder = [sweep] if isinstance(sweep, str) else sweep, Path(out)
    request = {"sweep": sweep, "metric": metric, "x": x}
    require(x != "seed", "x=seed: the means are over seeds; give another setting, such as model.encoder_depth")
    check_out(folder, request)
    runs, unstarted = find_runs(sweep)
    keys = differing(runs, x)
    check_x(x, runs, keys)
    chosen = chosen_metric(metric, runs)
    runs.sort(key=lambda run: order(run, keys))
    known = sorted({name for run in runs for name in run.metrics})
    measured = {name for run in runs for name in run.measured} | {"loss"} & set(known)
    names = [chosen, *sorted(measured - {chosen})]
    found = settings_of(runs, keys, names, x)
    left_out = {str(run.folder): reason for run in runs if (reason := run.missing(chosen)) is not None}
    left_out |= {str(path): reason for path, reason in unstarted.items()}
    rows = [row_of(run, keys, known, chosen) for run in runs]
    folder.mkdir(parents=True, exist_ok=True)
    write_json(  # first: it is what tells a later call that the folder is this report's
        folder / "report.json",
        {
            "request": request, "metric": chosen, "better": better(chosen), "runs": rows, "left_out": left_out,
            "means": [{**dataclasses.asdict(one), "seeds": len(one.values)} for one in found], "published": PUBLISHED,
            "command": shlex.join(["python", *sys.argv]), **circumstances(torch.device("cpu")),
        },
    )  # fmt: skip
    with (folder / "report.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, rows[0], lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
    (folder / "report.md").write_text(report(runs, found, keys, names, left_out) + "\n")
    draw(found, chosen, x, folder / "curve.png")
    log.info("%s\n%s", table_of_means(found, keys, names), folder / "report.md")
    if left_out:
        log.warning("warning: left out of the means: %s", "; ".join(f"{k}: {v}" for k, v in left_out.items()))


@entry_point("sweep_report")
def main(cfg: DictConfig) -> None:
    """Check, read, write."""
    write(**arguments_for(write, checked(cfg)))


if __name__ == "__main__":
    main()
