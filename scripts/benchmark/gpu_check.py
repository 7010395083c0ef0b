"""Check on a GPU, without a network, that all of this project is right there, and measure it.

bash scripts/gpu_check.sh OUT [check|benchmark] [key=value …]
"""

import dataclasses
import datetime
import functools
import gc
import importlib.metadata
import json
import logging
import os
import platform
import shlex
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from omegaconf import DictConfig

from ddt.cli import ROOT, arguments_for, checked, entry_point
from ddt.errors import UserError, first_line, require
from ddt.files import check_writable, write_json
from ddt.sweep import kept_environment
from scripts.benchmark import checks, runs
from scripts.benchmark.checks import SIZES, Finding, NotRun, Place, Size
from scripts.machine import output_of

log = logging.getLogger(__name__)
Check = Callable[[Place], list[Finding]]
Row = dict[str, Any]  # of the table: check, what, value, low, high, result, seconds

STAGES = ("check", "benchmark")
CHECKS: dict[str, Check] = {
    "golden numbers": checks.golden_numbers,
    "device against CPU": checks.against_cpu,
    "bf16 against fp32": checks.bf16_against_fp32,
    "compiled against eager": checks.compiled_against_eager,
    "resume": runs.resumed,
    "two processes": runs.two_processes,
    "sampling": runs.sampling,
    "autoencoder and target": checks.frozen_networks,
}


def check_settings(
    out: str,
    stage: Literal["check", "benchmark", "all"],
    device: Literal["cuda", "cpu"],
    size: Literal["full", "tiny"],
    minutes: float,
) -> None:
    """Refuse settings that cannot be, and a folder that holds a result which would be lost."""
    require(minutes > 0, f"minutes={minutes:g}: must be above 0")
    require(not Path(out).exists() or Path(out).is_dir(), f"out={out}: is a file; give a folder")
    check_writable(Path(out))
    require(
        device == "cpu" or torch.cuda.is_available(),
        "device=cuda: torch finds no GPU here; give device=cpu size=tiny to try the check itself",
    )
    there = set(read_results(Path(out))) & set(stages_of(stage))
    require(not there, f"out={out}: holds the result of stage={'/'.join(sorted(there))}; choose another folder")


def stages_of(stage: str) -> list[str]:
    """Return the stages that a choice of `stage` means."""
    return list(STAGES) if stage == "all" else [stage]


def checks_of(stage: str, size: Size) -> dict[str, Check]:
    """Return what a stage does, by name."""
    if stage == "check":
        return CHECKS
    measured = {f"benchmark {name}": functools.partial(runs.benchmark, name=name) for name in size.benchmarks}
    return {**measured, "short training": runs.short_training}


def read_results(out: Path) -> dict[str, Any]:
    """Return what each stage left in OUT/gpu_check.json; raise UserError where that is another
    file.
    """
    path = out / "gpu_check.json"
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text())["stages"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: is not a result of this script; choose another out=") from error


def machine(device: torch.device) -> dict[str, Any]:
    """Return what the numbers depend on: device, driver, versions, and the state of the code."""
    found: dict[str, Any] = {"device": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    if device.type == "cuda":
        about = torch.cuda.get_device_properties(device)
        found |= {
            "device": about.name,
            "gpus": torch.cuda.device_count(),
            "gpu_memory_gib": round(about.total_memory / 2**30, 1),
            "driver": output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
    packages = {found.name.lower(): found.version for found in importlib.metadata.distributions()}
    changes = output_of("git", "-C", str(ROOT), "status", "--porcelain")
    return {
        **found,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "revision": output_of("git", "-C", str(ROOT), "rev-parse", "HEAD"),
        "changed_files": None if changes is None else len(changes.splitlines()),
        "packages": dict(sorted(packages.items())),
    }


def verdict(found: Finding) -> str:
    """Return passed or failed, or measured where there is no bound."""
    if found.low is None and found.high is None:
        return "measured"
    return "passed" if found.sound else "failed"


def rows_of(name: str, check: Check, place: Place) -> list[Row]:
    """Make a check and return its rows, whatever happens in it: the others are to go on."""
    began = time.monotonic()
    findings: list[Finding] = []
    result, reason = "passed", ""
    if place.left() <= 0:
        result, reason = "not run", "out of time"
    else:
        try:
            findings = check(place)
        except NotRun as none:
            result, reason = "not run", str(none)
        except Exception as error:  # of any kind: what is looked for here is what breaks on this machine
            log.warning("%s failed", name, exc_info=True)
            result, reason = "failed", f"{type(error).__name__}: {first_line(error)}"
    gc.collect()
    if place.device.type == "cuda":
        torch.cuda.empty_cache()
    seconds = round(time.monotonic() - began, 1)
    if not findings:
        none = {"value": None, "low": None, "high": None}
        return [{"check": name, "what": reason, **none, "result": result, "seconds": seconds}]
    return [
        {"check": name, **dataclasses.asdict(found), "result": verdict(found), "seconds": seconds} for found in findings
    ]


def number(value: float | str | None) -> str:
    """Return a value as it stands in the table."""
    return "" if value is None else value if isinstance(value, str) else f"{value:.3g}"


def bound(row: Row) -> str:
    """Return the bounds of a row as they stand in the table."""
    low, high = row["low"], row["high"]
    if low is None or high is None:
        return "" if low is high else f"≥ {low:g}" if high is None else f"≤ {high:g}"
    return f"{low:g} … {high:g}"


def table(rows: list[Row]) -> str:
    """Return rows as a Markdown table with even columns; a check's name and seconds stand in its
    first row.
    """
    cells = [["check", "", "value", "bound", "result", "seconds"]]
    before = None
    for row in rows:
        first = row["check"] != before
        before = row["check"]
        name, seconds = (row["check"], f"{row['seconds']:.1f}") if first else ("", "")
        what = row["what"].replace("|", "/")
        cells.append([name, what, number(row["value"]), bound(row), row["result"], seconds])
    widths = [max(len(line[k]) for line in cells) for k in range(len(cells[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in cells
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def report(stages: dict[str, Any]) -> str:
    """Return gpu_check.md: a table and a line on its machine for each stage."""
    parts = []
    for name, found in stages.items():
        about = found["machine"]
        counts = [row["result"] for row in found["rows"]]
        total = ", ".join(f"{counts.count(result)} {result}" for result in dict.fromkeys(counts))
        parts += [
            f"## {name}: {total}",
            table(found["rows"]),
            f"{about['device']}, torch {about['torch']}, {found['date']}, revision {about['revision']}, size "
            f"{found['size']}: `{found['command']}`",
        ]
    return "\n\n".join(parts) + "\n"


def run_stage(name: str, place: Place, origin: dict[str, Any]) -> list[Row]:
    """Make the checks of a stage and write what is known after each of them, so that a kill costs
    the rest alone.
    """
    rows: list[Row] = []
    for title, check in checks_of(name, place.size).items():
        log.info("%s …", title)
        rows += rows_of(title, check, place)
        stages = {**read_results(place.out), name: {**origin, "rows": rows}}
        write_json(place.out / "gpu_check.json", {"kind": "gpu_check", "stages": stages})
        (place.out / "gpu_check.md").write_text(report(stages))
    return rows


@entry_point("gpu_check")
def main(cfg: DictConfig) -> None:
    """Check, run the stages, print the table."""
    values = arguments_for(check_settings, checked(cfg))
    check_settings(**values)
    out, device = Path(values["out"]).absolute(), torch.device(values["device"])
    out.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(dir=out, prefix=".scratch-") as folder:
        scratch = Path(folder)
        environment = {
            "HF_HUB_OFFLINE": "1",
            "WANDB_MODE": "disabled",
            "TORCHINDUCTOR_CACHE_DIR": str(scratch / "inductor"),
            "TRITON_CACHE_DIR": str(scratch / "triton"),
        }
        if device.type == "cpu":
            environment["CUDA_VISIBLE_DEVICES"] = ""
        with kept_environment(**environment), checks.exact():
            for stage in stages_of(values["stage"]):
                origin = {
                    "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                    "command": shlex.join(["python", *sys.argv]),
                    "size": values["size"],
                    "machine": machine(device),
                }
                deadline = time.monotonic() + 60 * values["minutes"]
                place = Place(out, scratch, device, SIZES[values["size"]], values["minutes"], deadline)
                rows += run_stage(stage, place, origin)
    log.info("\n%s", report(read_results(out)))
    if any(row["result"] == "failed" for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
