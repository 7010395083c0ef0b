"""Check on a GPU, without a network, that everything works there, and measure it.

bash scripts/gpu_check.sh OUT [check|benchmark] [key=value …]
"""

import dataclasses
import datetime
import functools
import gc
import importlib.metadata
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import torch

from ddt.cli import command
from ddt.errors import UserError, first_line, require
from ddt.files import check_writable, read_json, write_json, write_text
from ddt.metrics.features import exact_arithmetic
from ddt.receipts import command_line, revision
from ddt.tables import markdown_table
from scripts.benchmark import checks, run
from scripts.benchmark.checks import SIZES, Finding, NotRun, Place

log = logging.getLogger(__name__)
Check = Callable[[Place], list[Finding]]
Row = dict[str, Any]  # of the table: check, what, value, low, high, result, seconds

STAGES = ("check", "benchmark")
CHECKS: dict[str, Check] = {
    "golden numbers": checks.golden_numbers,
    "device against CPU": checks.device_against_cpu,
    "bf16 against fp32": checks.bf16_against_fp32,
    "compiled against eager": checks.compiled_against_eager,
    "resume": checks.resume,
    "two processes": checks.two_processes,
    "sampling": checks.sampling,
    "autoencoder and target": checks.frozen_networks,
}


@dataclasses.dataclass(frozen=True)
class GpuCheckSettings:
    """See conf/gpu_check.yaml. Raises UserError for wrong values and results in the way."""

    out: str
    stage: Literal["check", "benchmark", "all"]
    device: Literal["cuda", "cpu"]
    size: Literal["full", "tiny"]
    minutes: float
    only: list[str] | None

    def __post_init__(self) -> None:
        require(self.minutes > 0, f"minutes={self.minutes:g}: must be above 0")
        known = [name for stage in self.stages for name in self.checks(stage)]
        for name in self.only or ():
            require(name in known, f"only={name}: no such check of stage={self.stage}; choose from {', '.join(known)}")
        out = Path(self.out)
        require(not out.exists() or out.is_dir(), f"out={out}: is a file; give a folder")
        check_writable(out)
        require(
            self.device == "cpu" or torch.cuda.is_available(),
            "device=cuda: torch finds no GPU here; give device=cpu size=tiny to try the check itself",
        )
        require(
            (out / "gpu_check.json").is_file() or not (out / "gpu_check.md").exists(),
            f"out={out}: holds gpu_check.md, but no gpu_check.json; choose another folder",
        )
        there = set(read_results(out)) & set(self.stages)
        require(not there, f"out={out}: holds the result of stage={'/'.join(sorted(there))}; choose another folder")

    @property
    def stages(self) -> list[str]:
        """The stages to run."""
        return list(STAGES) if self.stage == "all" else [self.stage]

    def checks(self, stage: str) -> dict[str, Check]:
        """Return the checks of a stage by name."""
        if stage == "check":
            return CHECKS
        names = SIZES[self.size].benchmarks
        benchmarks = {f"benchmark {name}": functools.partial(checks.benchmark, name=name) for name in names}
        return {**benchmarks, "short training": checks.short_training}


def read_results(out: Path) -> dict[str, Any]:
    """Return the results by stage in OUT/gpu_check.json; raise UserError for another file."""
    path = out / "gpu_check.json"
    if not path.is_file():
        return {}
    try:
        return read_json(path)["stages"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: is not a result of this script; choose another out=") from error


def machine(device: torch.device) -> dict[str, Any]:
    """Return what the numbers depend on: device, driver, versions, revision of the code."""
    about = run.machine(device)
    if device.type == "cuda":
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        about["cudnn"] = torch.backends.cudnn.version()
        about["gpu_memory_gib"] = round(torch.cuda.get_device_properties(device).total_memory / 2**30, 1)
        if shutil.which(query[0]):
            about["driver"] = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
    packages = {package.name.lower(): package.version for package in importlib.metadata.distributions()}
    return {**about, "revision": revision(), "packages": dict(sorted(packages.items()))}


def rows_of(name: str, check: Check, place: Place) -> list[Row]:
    """Run a check and return its rows; an error of any kind becomes a row, so the others run."""
    start = time.monotonic()
    findings: list[Finding] = []
    result, reason = "not run", "out of time"
    if place.seconds_left() > 0:
        try:
            findings = check(place)
        except NotRun as error:
            reason = str(error)
        except Exception as error:
            log.warning("%s failed", name, exc_info=True)
            result, reason = "failed", f"{type(error).__name__}: {first_line(error)}"
    gc.collect()
    if place.device.type == "cuda":
        torch.cuda.empty_cache()
    common = {"check": name, "seconds": round(time.monotonic() - start, 1)}
    if not findings:
        return [{**common, "what": reason, "value": None, "low": None, "high": None, "result": result}]
    return [{**common, **dataclasses.asdict(finding), "result": finding.result} for finding in findings]


def cells(row: Row, first: bool) -> list[str]:
    """Return a row of the table; a check's name and seconds stand in its first row."""
    value, low, high = row["value"], row["low"], row["high"]
    if low is not None and high is not None:
        bound = f"{low:g} … {high:g}"
    else:
        bound = f"≥ {low:g}" if low is not None else f"≤ {high:g}" if high is not None else ""
    text = "" if value is None else value if isinstance(value, str) else f"{value:.3g}"
    name, seconds = (row["check"], f"{row['seconds']:.1f}") if first else ("", "")
    return [name, row["what"], text, bound, row["result"], seconds]


def report(stages: dict[str, Any]) -> str:
    """Return gpu_check.md: a table and a line on its machine for each stage."""
    parts = []
    for name, stage in stages.items():
        about, rows = stage["machine"], stage["rows"]
        results = [row["result"] for row in rows]
        total = ", ".join(f"{results.count(result)} {result}" for result in dict.fromkeys(results))
        names = [row["check"] for row in rows]
        lines = [cells(row, n == 0 or names[n - 1] != row["check"]) for n, row in enumerate(rows)]
        parts += [
            f"## {name}: {total}",
            markdown_table(["check", "", "value", "bound", "result", "seconds"], lines, "lllllr"),
            f"{about['device']}, torch {about['torch']}, {stage['date']}, revision {about['revision']}, size "
            f"{stage['size']}: `{stage['command']}`",
        ]
    return "\n\n".join(parts) + "\n"


def run_stage(stage: str, settings: GpuCheckSettings, place: Place) -> list[Row]:
    """Run the checks of a stage; the report is written after each, for a kill to lose little."""
    rows: list[Row] = []
    origin = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": command_line(), "size": settings.size, "machine": machine(place.device),
    }  # fmt: skip
    for title, check in settings.checks(stage).items():
        if settings.only is not None and title not in settings.only:
            continue
        log.info("%s …", title)
        rows += rows_of(title, check, place)
        stages = {**read_results(place.out), stage: {**origin, "rows": rows}}
        write_json(place.out / "gpu_check.json", {"kind": "gpu_check", "stages": stages})
        write_text(place.out / "gpu_check.md", report(stages))
    return rows


@command("gpu_check", settings=f"{__name__}.GpuCheckSettings")
def main(settings: GpuCheckSettings) -> None:
    """Run the stages and print the table; a failed check ends it with status 1."""
    out, device = Path(settings.out).absolute(), torch.device(settings.device)
    out.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(dir=out, prefix=".scratch-") as folder:
        scratch = Path(folder)
        environment = {
            "HF_HUB_OFFLINE": "1",
            "WANDB_MODE": "disabled",
            "TORCHINDUCTOR_CACHE_DIR": str(scratch / "inductor"),
            "TRITON_CACHE_DIR": str(scratch / "triton"),
            **({"CUDA_VISIBLE_DEVICES": ""} if device.type == "cpu" else {}),
        }
        with mock.patch.dict(os.environ, environment), exact_arithmetic():
            for stage in settings.stages:
                deadline = time.monotonic() + 60 * settings.minutes
                place = Place(out, scratch, device, SIZES[settings.size], settings.minutes, deadline)
                rows += run_stage(stage, settings, place)
    log.info("\n%s", report(read_results(out)))
    if any(row["result"] == "failed" for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
