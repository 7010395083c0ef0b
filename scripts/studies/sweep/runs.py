"""The runs of a sweep: folders, differing settings, steps and metrics.

A setting is a dotted key of a run's config.json, such as `model.encoder_depth`.
"""

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ddt.checkpoint.format import newest_checkpoint, read_config
from ddt.config import flat
from ddt.errors import require
from ddt.files import read_json
from ddt.metrics.ranking import is_number
from ddt.model import build_network
from ddt.training.tracking import read_rows

NO_METRICS = {"step", "lr", "partial", "images_per_second"}
# Settings that change no number: runs that differ in these alone are of one setting.
FREE = {"name", "num_processes"} | {
    f"trainer.{key}"
    for key in (
        "num_processes", "micro_batch_size", "num_workers", "save_every", "log_every", "validate_every",
        "preview_every", "parallelism", "reshard_after_forward", "keep_last", "keep_every", "keep_best", "max_hours",
        "snapshot_every",
    )
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Run:
    """A run that has started.

    settings: its config.json, flat. state, reason: of its status.json, or None. metrics: name →
    (step, value), the last logged. measured: those that are no means over training batches.
    num_parameters: of the network; None before the first checkpoint.
    """

    folder: Path
    settings: dict[str, Any]
    step: int
    state: str | None
    reason: str | None
    metrics: dict[str, tuple[int, float]]
    measured: list[str]
    images_per_second: float | None
    num_parameters: int | None

    @property
    def max_steps(self) -> int:
        """Steps of the whole run."""
        return self.settings["trainer.max_steps"]

    def final(self, metric: str) -> float | None:
        """Return a metric of the run's end, None where it is non-finite or from before the end."""
        step, value = self.metrics.get(metric, (-1, math.nan))
        return value if step >= self.max_steps and is_number(value) else None

    def missing(self, metric: str) -> str | None:
        """Return why the run is left out of a metric's means; None where it is not."""
        if self.step < self.max_steps or self.state not in (None, "done"):
            because = f" ({self.reason})" if self.reason else ""
            return f"{self.state or 'not ended'} at step {self.step} of {self.max_steps}{because}"
        if self.final(metric) is not None:
            return None
        if metric not in self.metrics:
            return f"has no {metric}"
        step, value = self.metrics[metric]
        return f"has {metric} at step {step}, not at its end" if is_number(value) else f"its {metric} is {value}"


def count_parameters(folder: Path) -> int | None:
    """Return the number of parameters of the newest checkpoint's network, None without one."""
    newest = newest_checkpoint(folder)
    if newest is None:
        return None
    settings = read_config(newest)["network"]
    with torch.device("meta"):
        network = build_network(settings)
    return sum(parameter.numel() for parameter in network.parameters())


def read_run(folder: Path) -> Run:
    """Read a run's settings, status and metrics; raise UserError for a missing or damaged file."""
    settings = flat(read_json(folder / "config.json"))
    for key, kind in {"seed": int, "model._target_": str, "trainer.max_steps": int}.items():
        ours = type(settings.get(key)) is kind
        require(ours, f"{folder / 'config.json'}: has no {key}, so it is no run's; move it out of the sweep")
    path = folder / "metrics.jsonl"
    require(path.is_file(), f"{path}: is missing; restore it or move the run's folder away")
    rows = read_rows(path)
    status = read_json(folder / "status.json") if (folder / "status.json").is_file() else {}
    metrics = {key: (row["step"], row[key]) for row in rows for key in row if key not in NO_METRICS}
    measured = dict.fromkeys(key for row in rows if "lr" not in row for key in row if key not in NO_METRICS)
    rates = [rate for row in rows if is_number(rate := row.get("images_per_second"))]
    last = status.get("step")
    return Run(
        folder=folder,
        settings=settings,
        step=max([*(row["step"] for row in rows), last if type(last) is int else 0]),
        state=status.get("state"),
        reason=status.get("reason"),
        metrics=metrics,
        measured=list(measured),
        images_per_second=float(np.mean(rates)) if rates else None,
        num_parameters=count_parameters(folder),
    )


def find_runs(sweep: list[str]) -> tuple[list[Run], dict[Path, str]]:
    """Return the runs below some folders, and why others ended before their first step.

    Raises UserError for a folder without runs or named twice, and for damaged files.
    """
    runs: list[Run] = []
    unstarted: dict[Path, str] = {}
    seen: set[Path] = set()
    for root in map(Path, sweep):
        files = [path for name in ("config.json", "status.json") for path in root.rglob(name)]
        inner = {path.relative_to(root).parent for path in files} - {Path()}
        # checkpoints have a config.json, too
        folders = sorted(root / path for path in inner if not {"checkpoints", "export", "snapshots"} & {*path.parts})
        require(
            any((folder / "config.json").is_file() for folder in folders),
            f"sweep={root}: there are no runs below it; give the folder of a sweep, such as runs/encoder_depth",
        )
        for folder in folders:
            require(folder.resolve() not in seen, f"sweep={root}: has {folder}, which another folder has; name it once")
            seen.add(folder.resolve())
            if (folder / "config.json").is_file():
                runs.append(read_run(folder))
                continue
            status = read_json(folder / "status.json")
            unstarted[folder] = f"{status.get('state')} before its first step ({status.get('reason')})"
    return runs, unstarted


def differing(runs: list[Run], x: str) -> list[str]:
    """Return the settings in which runs differ, except seed, fingerprints and `FREE` (x counts).

    A setting that only one kind of a group has, as `model.encoder_depth` of a DDT, differs where
    the runs of that kind differ in it; the kinds differ by `_target_`.
    """
    absent = "absent"  # no JSON
    keys = dict.fromkeys(key for run in runs for key in run.settings)
    result = []
    for key in keys:
        if key != x and (
            key in FREE or key == "seed" or key.startswith("tracker.") or key.rpartition(".")[2] == "fingerprint"
        ):
            continue
        kinds: dict[Any, set[str]] = {}
        for run in runs:
            value = json.dumps(run.settings[key]) if key in run.settings else absent
            kinds.setdefault(run.settings.get(f"{key.split('.')[0]}._target_"), set()).add(value)
        if len(set().union(*kinds.values()) - {absent}) > 1 or any(len(values) > 1 for values in kinds.values()):
            result.append(key)
    return sorted(result, key=lambda key: (key == x, not key.endswith("_target_")))


def default_metric(runs: list[Run]) -> str:
    """Return FID, else another Fréchet distance, of the fewest samples common to the runs that have
    any; else the validation loss.
    """

    def distances(run: Run) -> set[tuple[bool, int, str]]:
        matches = [m for name in run.metrics if (m := re.fullmatch(r"(fid|fd_\w+)_(\d+)(k?)", name))]
        return {(m[1] != "fid", int(m[2]) * (1000 if m[3] else 1), m[0]) for m in matches}

    sets = [names for run in runs if (names := distances(run))]
    common = set.intersection(*sets) if sets else set()
    return min(common)[-1] if common else "validation_loss"
