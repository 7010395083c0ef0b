"""The GPU check: its checks in order, each with its limit, their rows, and the report."""

import contextlib
import dataclasses
import datetime
import functools
import importlib.metadata
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn
from unittest import mock

import torch

from ddt.errors import UserError, first_line
from ddt.files import read_json, write_json, write_text
from ddt.receipts import command_line, revision
from ddt.tables import markdown_table
from scripts.benchmark import checks, commands, run, speed
from scripts.benchmark.checks import SIZES, Finding, NotRun, Place
from scripts.benchmark.settings import GpuCheckSettings

log = logging.getLogger(__name__)
Check = tuple[Callable[[Place], Iterable[Finding]], float]  # and the most seconds that it may take
Row = dict[str, Any]  # of the table: check, what, value, low, high, result, seconds, row

CHECKS: dict[str, Check] = {
    "product": (speed.product, 30),
    "training XL": (functools.partial(speed.training, chosen="XL"), 150),
    "sampling XL": (functools.partial(speed.sampling, chosen="XL"), 90),
    "golden numbers": (checks.golden_numbers, 60),
    "device against CPU": (checks.device_against_cpu, 60),
    "compiled against eager": (checks.compiled_against_eager, 90),
    "resume": (commands.resume, 150),
    "sampling": (commands.sampling, 180),
    "short training": (commands.short_training, 120),
    "XL beside plain": (speed.against_plain, 180),
    "training of others": (functools.partial(speed.training, chosen="others"), 150),
    "sampling of others": (functools.partial(speed.sampling, chosen="others"), 90),
    "bf16 against fp32": (checks.bf16_against_fp32, 60),
    "autoencoder and target": (checks.frozen_networks, 60),
    "autoencoder's speed": (speed.autoencoder, 30),
    "EMA": (speed.ema, 30),
    "FSDP": (checks.sharded, 90),
    "many processes": (commands.many_processes, 90),
    "deterministic": (commands.deterministic, 90),
    "fp16": (commands.fp16, 90),
    "end to end": (commands.end_to_end, 330),
    "training of few images": (speed.training_graphs, 90),  # last: a graph whose capture fails breaks what follows
    "small batches": (speed.small_batches, 120),
}


def read_results(out: Path) -> list[dict[str, Any]]:
    """Return the calls in OUT/gpu_check.json; raise UserError for another file."""
    path = out / "gpu_check.json"
    if not path.is_file():
        return []
    try:
        return read_json(path)["calls"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: is not a result of this script; choose another out=") from error


def finished(calls: list[dict[str, Any]]) -> set[str]:
    """Return the names of the checks of which a call has a whole result."""
    result = set()
    for call in calls:
        late = {row["check"] for row in call["rows"] if row["result"] == "not run"}
        result |= {row["check"] for row in call["rows"]} - late
    return result


class OutOfTime(BaseException):
    """A check's time is up; no Exception, so that nothing on the way up takes it for its own."""


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise OutOfTime in the main thread after so many seconds."""

    def stop(*_: object) -> NoReturn:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def machine(device: torch.device) -> dict[str, Any]:
    """Return what the numbers depend on: device, driver, versions, revision of the code."""
    about = run.machine(device)
    if device.type == "cuda":
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        about["cudnn"] = torch.backends.cudnn.version()
        about["gpu_memory_gib"] = round(torch.cuda.get_device_properties(device).total_memory / 2**30, 1)
        if shutil.which(query[0]):
            about["driver"] = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
    texts = [package.metadata for package in importlib.metadata.distributions()]  # parsed anew at each access
    packages = {text["Name"].lower(): text["Version"] for text in texts}
    return {**about, "revision": revision(), "packages": dict(sorted(packages.items()))}


def rows_of(name: str, check: Check, place: Place) -> Iterator[Row]:
    """Run a check and yield its rows as they come; an error of any kind becomes a row, so the
    others run.
    """
    function, limit = check
    start, seconds = time.monotonic(), min(limit, place.seconds_left())

    def row(result: str, what: str, **values: Any) -> Row:
        values = {"value": None, "low": None, "high": None, **values}
        return {"check": name, "what": what, **values, "result": result, "seconds": round(time.monotonic() - start, 1)}

    if seconds <= 0:
        yield row("not run", "out of time")
        return
    try:
        with time_limit(seconds):
            for finding in function(place):
                yield row(**{**dataclasses.asdict(finding), "result": finding.result})
    except OutOfTime:
        reason = "the most that it may take" if seconds == limit else "the end of minutes="
        yield row("not run", f"cut after {seconds:.3g} s, {reason}")
    except NotRun as error:
        yield row("not run", str(error))
    except Exception as error:
        log.warning("%s failed", name, exc_info=True)
        yield row("failed", f"{type(error).__name__}: {first_line(error)}")
    torch.compiler.reset()
    speed.free(place.device)


def cells(row: Row, last: bool) -> list[str]:
    """Return a row of the table; a check's name and seconds stand in its last row."""
    value, low, high = row["value"], row["low"], row["high"]
    if low is not None and high is not None:
        bound = f"{low:g} … {high:g}"
    else:
        bound = f"≥ {low:g}" if low is not None else f"≤ {high:g}" if high is not None else ""
    text = "" if value is None else value if isinstance(value, str) else f"{value:.3g}"
    name, seconds = (row["check"], f"{row['seconds']:.1f}") if last else ("", "")
    return [name, row["what"], text, bound, row["result"], seconds]


def report(calls: list[dict[str, Any]]) -> str:
    """Return gpu_check.md: a table and a line on its machine for each call."""
    parts = []
    for call in calls:
        about, rows = call["machine"], call["rows"]
        results = [row["result"] for row in rows]
        total = ", ".join(f"{results.count(result)} {result}" for result in dict.fromkeys(results))
        names = [row["check"] for row in rows]
        lines = [cells(row, names[n : n + 2] != [row["check"]] * 2) for n, row in enumerate(rows)]
        parts += [
            f"## {about['device']}: {total}",
            markdown_table(["check", "", "value", "bound", "result", "seconds"], lines, "lllllr"),
            f"{about['device']}, torch {about['torch']}, {call['date']}, revision {about['revision']}, size "
            f"{call['size']}: `{call['command']}`",
        ]
    return "\n\n".join(parts) + "\n"


def run_checks(settings: GpuCheckSettings, place: Place) -> list[Row]:
    """Run the checks; the results are written after each row, for a kill to lose little."""
    before, rows = read_results(place.out), list[Row]()
    call = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), "command": command_line(),
        "size": settings.size, "machine": machine(place.device), "rows": rows,
    }  # fmt: skip
    for name in settings.chosen:
        log.info("%s …", name)
        for row in rows_of(name, CHECKS[name], place):
            log.info("  %s: %s", row["what"], "" if row["value"] is None else row["value"])
            rows.append(row)
            calls = [*before, call]
            write_json(place.out / "gpu_check.json", {"kind": "gpu_check", "calls": calls})
            write_text(place.out / "gpu_check.md", report(calls))
    return rows


def check_gpu(settings: GpuCheckSettings) -> None:
    """Run the checks and print the table; a failed one ends the command with status 1."""
    deadline = time.monotonic() + 60 * settings.minutes
    out, device = Path(settings.out).absolute(), torch.device(settings.device)
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out, prefix=".scratch-") as folder:
        scratch = Path(folder)
        environment = {
            "HF_HUB_OFFLINE": "1",
            "WANDB_MODE": "disabled",
            "TORCHINDUCTOR_CACHE_DIR": str(scratch / "inductor"),
            "TRITON_CACHE_DIR": str(scratch / "triton"),
            **({"CUDA_VISIBLE_DEVICES": ""} if device.type == "cpu" else {}),
        }
        with mock.patch.dict(os.environ, environment):
            rows = run_checks(settings, Place(out, scratch, device, SIZES[settings.size], deadline))
    log.info("\n%s", report(read_results(out)[-1:]))
    late = dict.fromkeys(row["check"] for row in rows if row["result"] == "not run")
    if late:
        log.info("not run: %s; the same command goes on with them, if out=%s is kept", ", ".join(late), settings.out)
    if any(row["result"] == "failed" for row in rows):
        sys.exit(1)
