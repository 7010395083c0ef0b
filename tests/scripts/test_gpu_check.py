"""The GPU check at tiny sizes on the CPU: what it notices, writes and refuses."""

import json
import math
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, refusal, run_inside
from hydra.core.global_hydra import GlobalHydra
from hydra.core.singleton import Singleton

from scripts.benchmark import checks, gpu_check, packages
from scripts.benchmark.checks import SIZES, Finding, NotRun, Place

pytestmark = pytest.mark.usefixtures("one_thread")
TINY = ["device=cpu", "size=tiny"]
BENCHMARK = """
import json, pathlib, sys
given = dict(argument.split("=") for argument in sys.argv[1:])
out = pathlib.Path(given["out"])
out.mkdir()
rows = [("training", "ours", 3.0, 0.25), ("training", "ours compiled", 5.0, 0.5), ("training", "plain", 9.0, 0.125),
        ("optimizer", "ours", 0, None)]
keys = ("part", "way", "images_per_second", "share_of_matmul")
others = {"case": given["model"], "base": "plain", "first": "plain", "ratio": 1.5, "ratio_to_first": 1.5}
rows = [{**dict(zip(keys, row)), **others} for row in rows] + [{"part": "sampling", "not_run": "out of time"}]
(out / "benchmark.json").write_text(json.dumps({"kind": "benchmark", "rows": rows, "given": given}))
"""


def call_inside(place, entry, *arguments, name, seconds=300):
    """Call an entry point as `checks.call` does, but in this process."""
    state = Singleton.get_state()
    GlobalHydra.instance().clear()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(place.out)
            done = run_inside(entry.removesuffix(".py"), *arguments)
    finally:
        Singleton.set_state(state)
    if done.returncode:
        raise RuntimeError(f"{entry}: {done.stderr}")


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """Leave out what is slow on a CPU: processes, C++ kernels, and the benchmark."""
    call, compile_blocks = checks.call, torch.nn.Module.compile
    (tmp_path / "benchmark.py").write_text(BENCHMARK)

    def quick_call(place, entry, *arguments, **options):
        if entry == "scripts.benchmark":
            call(place, str(tmp_path / "benchmark.py"), *arguments, **options)
        else:
            call_inside(place, entry, *arguments, **options)

    monkeypatch.setattr(checks, "call", quick_call)
    cheap = {"backend": "aot_eager"}
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: compile_blocks(self, **options | cheap))
    monkeypatch.chdir(tmp_path)


def table(text):
    """The rows of all tables in a text: check, what, value, bound, result."""
    lines = [line for line in text.splitlines() if line.startswith("| ") and not set(line) <= set("|-: ")]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]


@pytest.mark.slow
def test_the_whole_check_passes_at_tiny_sizes(quick, tmp_path):
    out = tmp_path / "out"
    done = run_inside("scripts.benchmark.gpu_check", f"out={out}", *TINY)
    content = json.loads((out / "gpu_check.json").read_text())["stages"]
    rows = [row for stage in content.values() for row in stage["rows"]]
    assert done.returncode == 0, rows
    results = {row["check"]: row["result"] for row in rows}
    assert list(content) == ["check", "benchmark"]
    assert set(results) == {*gpu_check.CHECKS, "benchmark b", "short training"}
    assert {row["result"] for row in rows} == {"passed", "measured"}
    assert all(row["low"] is not None or row["high"] is not None for row in rows if row["result"] == "passed")
    measured, missing = [row for row in rows if row["check"] == "benchmark b"]
    # the fastest way of the part that is not plain
    assert measured["value"] == "5 images/s, 50% of a product's rate, × 1.50 of plain"
    assert missing["what"] == "sampling: not run: out of time"
    given = json.loads((out / "benchmark_b" / "benchmark.json").read_text())["given"]
    assert (given["model"], given["minutes"], given["batch_size"]) == ("nano", "7", "2")
    assert done.stderr.endswith((out / "gpu_check.md").read_text() + "\n")  # the table comes last
    assert len(table((out / "gpu_check.md").read_text())) == len(rows) + 2
    machine = content["check"]["machine"]
    assert (machine["torch"], machine["packages"]["torch"][:4]) == (torch.__version__, torch.__version__[:4])
    assert len(machine["revision"] or 40 * "0") == 40
    assert (out / "grid.png").is_file()
    assert not list(out.glob(".scratch*"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["benchmark.py", "out"]  # nothing lies elsewhere
    assert "holds the result of stage=benchmark" in refusal(
        "scripts.benchmark.gpu_check", f"out={out}", "stage=benchmark", *TINY
    )


def broken(place):
    raise ValueError("the first line\nand another")


def test_an_error_is_reported_and_the_other_checks_run(quick, tmp_path, monkeypatch):
    chosen = {
        "breaks": broken,
        "golden numbers": checks.golden_numbers,
        "two processes": lambda place: (_ for _ in ()).throw(NotRun("one GPU")),
        "not finite": lambda place: [Finding("loss", float("nan"), high=1)],
        "device against CPU": checks.device_against_cpu,
    }
    monkeypatch.setattr(gpu_check, "CHECKS", chosen)
    monkeypatch.setattr("ddt.model.layers.rotate", lambda x, cos, sin: x)  # on every device, so that these agree
    out = tmp_path / "out"
    done = run_inside("scripts.benchmark.gpu_check", f"out={out}", "stage=check", *TINY)
    assert done.returncode == 1
    rows = json.loads((out / "gpu_check.json").read_text())["stages"]["check"]["rows"]
    found = {row["check"]: row["result"] for row in reversed(rows)}
    assert found == {
        "breaks": "failed",
        "golden numbers": "failed",
        "two processes": "not run",
        "not finite": "failed",
        "device against CPU": "passed",
    }
    text = (out / "gpu_check.md").read_text()
    assert ["breaks", "ValueError: the first line", "", "", "failed"] in [row[:5] for row in table(text)]
    assert ["two processes", "one GPU", "", "", "not run"] in [row[:5] for row in table(text)]
    before = json.loads((out / "gpu_check.json").read_text())["stages"]["check"]
    fine = {"fine": lambda place: [Finding("one", 1, 1, 1)]}
    monkeypatch.setattr(gpu_check.GpuCheckSettings, "checks", lambda self, stage: fine)
    assert run_inside("scripts.benchmark.gpu_check", f"out={out}", "stage=benchmark", *TINY).returncode == 0
    content = json.loads((out / "gpu_check.json").read_text())["stages"]
    assert content["check"] == before  # the second stage repeats the first
    assert {"breaks", "fine"} <= {row[0] for row in table((out / "gpu_check.md").read_text())}


def place_in(folder, seconds=60):
    return Place(folder, folder, torch.device("cpu"), SIZES["tiny"], 1, time.monotonic() + seconds)


def test_no_check_starts_after_the_deadline(tmp_path):
    (row,) = gpu_check.rows_of("late", broken, place_in(tmp_path, seconds=0))
    assert (row["result"], row["what"]) == ("not run", "out of time")


def test_each_difference_is_noticed(tmp_path, monkeypatch):
    """A wrong number in what is compared, on one side alone."""
    place = place_in(tmp_path)
    velocity, calls = checks.velocity, []

    def drifting(*arguments):
        calls.append(1)
        return velocity(*arguments) * (1 + 1e-3 * (len(calls) % 2))

    with monkeypatch.context() as patch:
        patch.setattr(checks, "velocity", drifting)
        assert [found.result for found in checks.device_against_cpu(place)] == ["failed", "passed", "passed"]
    monkeypatch.setattr(checks, "autocast", lambda device, dtype: torch.autocast("cpu", enabled=False))
    assert {found.result for found in checks.bf16_against_fp32(place)} == {"failed"}  # nothing was in bf16
    monkeypatch.setattr(checks, "compile_blocks", lambda network, dynamic: None)
    found = {finding.what: finding.result for finding in checks.compiled_against_eager(place)}
    assert found["fp32 graphs compiled"] == "failed"


def test_runs_that_differ_are_noticed(tmp_path, monkeypatch):
    place, zero = place_in(tmp_path), torch.zeros(3)
    monkeypatch.setattr(checks, "on_digits", lambda place, name, *_: Path(name))
    monkeypatch.setattr(checks, "uninterrupted", lambda place: Path("uninterrupted"))
    monkeypatch.setattr(checks, "tensors", lambda run, step: {"a": zero, "b": zero + (run.name == "resumed") * 1e-7})
    assert checks.resume(place) == [Finding("tensors of 2 that differ", 1, high=0)]
    losses = {"uninterrupted": [1.0] * 4, "two_processes": [1.0, 1.0, 1.02, 1.0]}
    monkeypatch.setattr(checks, "read_rows", lambda path: [{"loss": loss} for loss in losses[path.parent.name]])
    (found,) = checks.two_processes(place)
    assert found.result == "failed"
    losses["two_processes"] = [1.0, math.nan, 1.0, 1.0]
    (found,) = checks.two_processes(place)
    assert found.result == "failed"


def test_a_process_that_fails_or_hangs_is_one_line(tmp_path):
    fails, hangs = tmp_path / "fails.py", tmp_path / "hangs.py"
    fails.write_text("import sys; print('why'); sys.exit(3)")
    with pytest.raises(RuntimeError, match=r"fails.py: status 3: why$"):
        checks.call(place_in(tmp_path), str(fails), name="fails")
    hangs.write_text("import time; time.sleep(60)")
    with pytest.raises(RuntimeError, match=r"hangs.py took more than 1 s: runs/logs/hangs.txt$"):
        checks.call(place_in(tmp_path), str(hangs), name="hangs", seconds=1)


def test_processes_find_packages_of_the_search_path(tmp_path, monkeypatch):
    (tmp_path / "carried.py").touch()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    script = tmp_path / "imports.py"
    script.write_text("import carried, ddt")
    checks.call(place_in(tmp_path), str(script), name="imports")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "device=cuda: torch finds no GPU here; give device=cpu size=tiny to try the check itself"),
        (["stage=bench", *TINY], "stage=bench: give 'check', 'benchmark' or 'all'"),
        (["minutes=0", *TINY], "minutes=0: must be above 0"),
        (
            ["only=[resume,speed]", "stage=benchmark", *TINY],
            "only=resume: no such check of stage=benchmark; choose from benchmark b, short training",
        ),
    ],
)
def test_wrong_settings_are_one_line(tmp_path, monkeypatch, arguments, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert refusal("scripts.benchmark.gpu_check", f"out={tmp_path / 'out'}", *arguments) == message
    assert not (tmp_path / "out").exists()


def test_files_in_the_way_are_refused(tmp_path):
    (tmp_path / "file").touch()
    line = refusal("scripts.benchmark.gpu_check", f"out={tmp_path / 'file'}", *TINY)
    assert line.endswith("is a file; give a folder")
    (tmp_path / "gpu_check.json").write_text("{}")
    assert "is not a result of this script" in refusal("scripts.benchmark.gpu_check", f"out={tmp_path}", *TINY)


def shell(folder, *arguments, python):
    """Call the script with a Python of our choice."""
    interpreter = folder / "python"
    interpreter.write_text(f"#!/bin/sh\n{python}\n")
    interpreter.chmod(0o755)
    command, environment = ["bash", ROOT / "scripts" / "gpu_check.sh"], {**os.environ, "PYTHON": str(interpreter)}
    return subprocess.run(
        [*command, *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


def test_the_script_names_missing_packages_and_how_to_carry_them(tmp_path):
    done = shell(tmp_path, "out", python=f'exec {shlex.quote(sys.executable)} -S "$@"')  # without installed packages
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("missing packages: accelerate>=1.10, ")
    assert "hydra-core" in line
    assert "pip wheel --wheel-dir wheels" in line
    assert "--no-index --find-links wheels" in line
    assert "diffusers" not in line  # one check is left out without it
    assert packages.missing() == []


def test_the_script_passes_its_arguments_on(tmp_path):
    echo = 'echo "$HF_HUB_OFFLINE $@"'
    assert shell(tmp_path, python=echo).returncode == 2
    for given, stage, rest in (([], "all", ""), (["check"], "check", ""), (["size=tiny"], "all", " size=tiny")):
        done = shell(tmp_path, "my out", *given, python=echo)
        assert done.stdout.splitlines()[-1] == f"1 -m scripts.benchmark.gpu_check out=my out stage={stage}{rest}"
