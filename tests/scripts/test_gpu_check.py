"""The GPU check at tiny sizes on the CPU: what it notices, writes and refuses."""

import json
import math
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, refusal, run_inside
from hydra.core.global_hydra import GlobalHydra
from hydra.core.singleton import Singleton

from scripts.benchmark import all_checks, checks, commands, packages
from scripts.benchmark.checks import SIZES, Finding, NotRun, Place

pytestmark = pytest.mark.usefixtures("one_thread")
TINY = ["device=cpu", "size=tiny"]


def call_inside(place, entry, *arguments, name, launcher=()):
    """Call an entry point as `commands.call` does, but here; under a launcher, in two processes."""
    arguments += ("trainer.num_processes=2",) if launcher else ()
    state = Singleton.get_state()
    GlobalHydra.instance().clear()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(place.out)
            done = run_inside(entry.removesuffix(".py").replace("/", "."), *arguments)
    finally:
        Singleton.set_state(state)
    if done.returncode:
        raise RuntimeError(f"{entry}: {done.stderr}")


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """Leave out what is slow on a CPU: processes and C++ kernels."""
    compile_blocks = torch.nn.Module.compile
    monkeypatch.setattr(commands, "call", call_inside)
    cheap = {"backend": "aot_eager"}
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: compile_blocks(self, **options | cheap))
    monkeypatch.setattr("scripts.benchmark.run.MATMUL_SIZE", {"cpu": 256})
    monkeypatch.chdir(tmp_path)


def table(text):
    """The rows of all tables in a text: check, what, value, bound, result."""
    lines = [line for line in text.splitlines() if line.startswith("| ") and not set(line) <= set("|-: ")]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]


def calls_in(out):
    return json.loads((out / "gpu_check.json").read_text())["calls"]


@pytest.mark.slow
def test_the_whole_check_passes_at_tiny_sizes(quick, tmp_path):
    out = tmp_path / "out"
    done = run_inside("scripts.benchmark.gpu_check", f"out={out}", *TINY)
    (call,) = calls_in(out)
    rows = call["rows"]
    assert done.returncode == 0, rows
    assert list(dict.fromkeys(row["check"] for row in rows)) == list(all_checks.CHECKS)
    assert {row["result"] for row in rows} == {"passed", "measured"}
    assert all(row["low"] is not None or row["high"] is not None for row in rows if row["result"] == "passed")
    assert done.stderr.endswith((out / "gpu_check.md").read_text() + "\n")  # the table comes last
    assert len(table((out / "gpu_check.md").read_text())) == len(rows) + 1
    beside = {(row["row"]["part"], row["row"]["way"]) for row in rows if row["check"] == "XL beside plain"}
    ways = {("training", "plain"), ("training", "ours"), ("sampling", "plain 0.80"), ("sampling", "ours 0.80")}
    assert ways <= beside
    machine = call["machine"]
    assert (machine["torch"], machine["packages"]["torch"][:4]) == (torch.__version__, torch.__version__[:4])
    assert len(machine["revision"] or 40 * "0") == 40
    assert (out / "grid.png").is_file()
    assert not list(out.glob(".scratch*"))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]  # nothing lies elsewhere
    assert "holds the results of all these checks" in refusal("scripts.benchmark.gpu_check", f"out={out}", *TINY)


@pytest.mark.slow
def test_timings_are_rows_of_a_benchmark(quick, tmp_path):
    out, timed = tmp_path / "out", ["training XL", "sampling XL", "small batches"]
    assert run_inside("scripts.benchmark.gpu_check", f"out={out}", f"checks={timed}", *TINY).returncode == 0
    (call,) = calls_in(out)
    rows = {name: [row["row"] for row in call["rows"] if row["check"] == name] for name in timed}
    assert [row["images"] for row in rows["training XL"]] == [2, 1]
    for row in rows["training XL"] + rows["sampling XL"]:
        assert row["model"] == "nano"
        assert row["images_per_second"] == pytest.approx(row["images"] / row["seconds"])
    plain, shared = rows["sampling XL"][2:]  # guided always
    assert plain["flops"] > 1.1 * shared["flops"]
    assert [row["result"] for row in call["rows"] if row["check"] == "small batches"] == ["passed", "measured"] * 2


def test_a_second_call_goes_on(quick, tmp_path, monkeypatch):
    out, done = tmp_path / "out", []

    def check(name):
        return lambda place: done.append(name) or iter([Finding(name, 1, 1, 1)])

    def slow(place):
        yield Finding("one", 1)
        while True:
            time.sleep(0.01)

    chosen = {"first": (check("first"), 9), "slow": (slow, 0.2), "last": (check("last"), 9)}
    monkeypatch.setattr(all_checks, "CHECKS", chosen)
    start = time.monotonic()
    first = run_inside("scripts.benchmark.gpu_check", f"out={out}", "checks=[first,slow]", *TINY)
    assert time.monotonic() - start < 9  # cut
    assert first.returncode == 0
    assert f"not run: slow; the same command goes on with them, if out={out} is kept" in first.stderr
    assert [row["result"] for row in calls_in(out)[0]["rows"]] == ["passed", "measured", "not run"]
    monkeypatch.setitem(chosen, "slow", (check("slow"), 9))
    assert run_inside("scripts.benchmark.gpu_check", f"out={out}", *TINY).returncode == 0
    assert done == ["first", "slow", "last"]
    assert [[row["check"] for row in call["rows"]] for call in calls_in(out)][1:] == [["slow", "last"]]
    assert {"first", "slow", "last"} <= {row[0] for row in table((out / "gpu_check.md").read_text())}


def broken(place):
    raise ValueError("the first line\nand another")


def test_an_error_is_reported_and_the_other_checks_run(quick, tmp_path, monkeypatch):
    chosen = {
        "breaks": broken,
        "golden numbers": checks.golden_numbers,
        "two processes": lambda place: (_ for _ in ()).throw(NotRun("one GPU")),
        "not finite": lambda place: [Finding("loss", float("nan"), high=1)],
        "last": lambda place: [Finding("loss", 0.5, high=1)],
    }
    monkeypatch.setattr(all_checks, "CHECKS", {name: (function, 60) for name, function in chosen.items()})
    monkeypatch.setattr("ddt.model.layers.rotate", lambda x, cos, sin: x)
    out = tmp_path / "out"
    done = run_inside("scripts.benchmark.gpu_check", f"out={out}", *TINY)
    assert done.returncode == 1
    rows = calls_in(out)[0]["rows"]
    found = {row["check"]: row["result"] for row in reversed(rows)}
    assert found == {
        "breaks": "failed",
        "golden numbers": "failed",
        "two processes": "not run",
        "not finite": "failed",
        "last": "passed",
    }
    text = (out / "gpu_check.md").read_text()
    assert ["breaks", "ValueError: the first line", "", "", "failed"] in [row[:5] for row in table(text)]
    assert ["two processes", "one GPU", "", "", "not run"] in [row[:5] for row in table(text)]


def place_in(folder, seconds=60):
    return Place(folder, folder, torch.device("cpu"), SIZES["tiny"], time.monotonic() + seconds)


def test_no_check_starts_after_the_deadline(tmp_path):
    (row,) = all_checks.rows_of("late", (broken, 60), place_in(tmp_path, seconds=0))
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


def test_a_sharded_network_with_other_gradients_is_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **_: None)  # of the bf16 half
    place = place_in(tmp_path)
    assert [found.result for found in checks.sharded(place)] == ["passed", "passed"]
    monkeypatch.setattr(checks, "full", lambda gradient: 1.1 * getattr(gradient, "full_tensor", lambda: gradient)())
    assert [found.result for found in checks.sharded(place)] == ["failed", "failed"]


def test_losses_and_metrics_from_files_to_metrics_are_compared(tmp_path, monkeypatch):
    losses, metrics = {"from_files": [1.0, 1.0], "from_cache": [1.0, 1.0]}, {"fid": 1.0, "sfid": 2.0}

    def call(place, entry, *arguments, name):
        runs = place.out / "runs"
        folder = runs / (name if name in losses else name.replace("samples_", "samples/"))
        folder.mkdir(parents=True, exist_ok=True)
        if entry == "train.py":
            rows = [{"step": n + 1, "loss": loss, "images_per_second": 9.0} for n, loss in enumerate(losses[name])]
            (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        elif entry == "sample.py":
            np.savez(folder / "samples.npz", arr_0=np.zeros((5, 8, 8, 3), np.uint8))
            (folder / "receipt.json").write_text(json.dumps({"images_per_second": 9.0}))
        elif entry == "evaluate.py":
            (runs / "metrics").mkdir(exist_ok=True)
            (runs / "metrics" / "metrics.json").write_text(json.dumps({**metrics, "labels": dict.fromkeys(metrics)}))
            found.append(len(np.load(place.scratch / "copies.npz")["arr_0"]))

    def results():
        folder = tmp_path / str(len(found))
        folder.mkdir()
        return {row.what: row.result for row in commands.end_to_end(place_in(folder)) if row.result != "measured"}

    found = []
    for name in ("random_vae", "random_target"):
        monkeypatch.setattr(commands, name, lambda place: place.scratch / "network")
    monkeypatch.setattr(commands, "write_random_inception", lambda file: None)
    monkeypatch.setattr(commands, "call", call)
    assert list(results().values()) == ["passed", "passed"]
    losses["from_cache"], metrics["sfid"] = [1.0, 1.02], None
    assert list(results().values()) == ["failed", "failed"]
    assert found == [SIZES["tiny"].end_to_end.evaluated] * 2


def test_runs_that_differ_are_noticed(tmp_path, monkeypatch):
    place, zero = place_in(tmp_path), torch.zeros(3)
    monkeypatch.setattr(commands, "briefly", lambda place, name, *_, **__: Path(name))
    monkeypatch.setattr(commands, "uninterrupted", lambda place: Path("uninterrupted"))
    monkeypatch.setattr(commands, "tensors", lambda run, step: {"a": zero, "b": zero + (run.name == "resumed") * 1e-7})
    assert commands.resume(place) == [Finding("tensors of 2 that differ", 1, high=0)]
    losses = {"uninterrupted": [1.0] * 4, "many_processes": [1.0, 1.0, 1.02, 1.0], "fp16": [1.0, 1.0, 1.0, 1.1]}
    last = {"skipped_steps": 0.0}
    monkeypatch.setattr(
        commands, "read_rows", lambda path: [{"loss": loss} | last for loss in losses[path.parent.name]]
    )
    assert commands.many_processes(place)[0].result == commands.fp16(place)[0].result == "failed"
    losses |= {"many_processes": [1.0] * 4, "fp16": [1.0] * 4}
    assert commands.many_processes(place)[0].result == commands.fp16(place)[0].result == "passed"
    losses |= {"many_processes": [1.0, math.nan, 1.0, 1.0], "fp16": [math.nan] * 4}
    assert commands.many_processes(place)[0].result == commands.fp16(place)[0].result == "failed"


def test_a_process_that_fails_is_one_line_and_one_that_hangs_is_ended(tmp_path):
    fails, hangs = tmp_path / "fails.py", tmp_path / "hangs.py"
    fails.write_text("import sys; print('why'); sys.exit(3)")
    with pytest.raises(RuntimeError, match=r"fails.py: status 3: why$"):
        commands.call(place_in(tmp_path), str(fails), name="fails")
    hangs.write_text("import time; time.sleep(60)")
    start = time.monotonic()
    hanging = lambda place: commands.call(place, str(hangs), name="hangs")  # noqa: E731
    (row,) = all_checks.rows_of("hangs", (hanging, 0.5), place_in(tmp_path))
    assert (row["result"], row["what"]) == ("not run", "cut after 0.5 s, the most that it may take")
    assert time.monotonic() - start < 30


def test_processes_find_packages_of_the_search_path(tmp_path, monkeypatch):
    (tmp_path / "carried.py").touch()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    script = tmp_path / "imports.py"
    script.write_text("import carried, ddt")
    commands.call(place_in(tmp_path), str(script), name="imports")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "device=cuda: torch finds no GPU here; give device=cpu size=tiny to try the check itself"),
        (["minutes=0", *TINY], "minutes=0: must be above 0"),
        (["checks=[resume,speed]", *TINY], f"checks=speed: no such check; choose from {', '.join(all_checks.CHECKS)}"),
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
    done = shell(tmp_path, "my out", "size=tiny", python=echo)
    assert done.stdout.splitlines()[-1] == "1 -m scripts.benchmark.gpu_check out=my out size=tiny"
