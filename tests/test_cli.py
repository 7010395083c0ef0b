"""Commands: a mistake is one line, each job of a sweep is a process, signals reach it."""

import os
import signal
import sys
import textwrap
import threading
import time

import pytest
from conftest import refusal, run
from hydra.core.override_parser.overrides_parser import OverridesParser

from ddt.cli import quoted_path, wait_for
from ddt.errors import STOPPED_STATUS

SCRIPT = """
import dataclasses, os, sys
from pathlib import Path
from ddt.cli import command
from ddt.errors import Stopped, UserError

@dataclasses.dataclass(frozen=True)
class Settings:
    name: str
    seed: int
    rate: float | None

@command("conf", settings="script.Settings", folder=Path(__file__).parent / "conf", outcome=lambda run_dir: None)
def main(settings):
    "Do what the seed says."
    with open("started", "a") as file:
        file.write(f"{settings.name} {settings.seed}\\n")
    outcomes = {
        0: UserError("key: wrong; right it"),
        1: FloatingPointError("the loss is NaN"),
        2: OSError(28, "No space left on device", "runs/x"),
        3: RuntimeError("unexpected"),
        5: Stopped("stopped at step 3; the same command resumes from there"),
    }
    if settings.seed in outcomes:
        raise outcomes[settings.seed]

if __name__ == "__main__":
    main()
"""
CONF = """
name: sweep
seed: 9
rate: null
unused: 1
hydra:
  sweep: { dir: "runs/${name}", subdir: . }
"""


@pytest.fixture
def script(tmp_path):
    (tmp_path / "script.py").write_text(textwrap.dedent(SCRIPT))
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "conf.yaml").write_text(CONF)

    def call(*arguments, **environment):
        return run(tmp_path / "script.py", *arguments, cwd=tmp_path, **environment)

    call.started = lambda: (tmp_path / "started").read_text().splitlines()
    return call


def test_failed_jobs_are_named_and_the_others_run(script):
    done = script("-m", "seed=0,1,2,3,4", "rate=1")
    assert done.returncode == 1
    assert script.started() == [f"sweep/rate=1,seed={seed} {seed}" for seed in range(5)]
    lines = done.stderr.splitlines()
    assert lines[-5:] == [
        "4 of 5 jobs failed:",
        *(f"seed={seed} rate=1: exit status 1, see above" for seed in range(4)),
    ]
    expected = ["key: wrong; right it", "the loss is NaN"]
    expected += ["runs/x: No space left on device; check the path and the disk", "RuntimeError: unexpected"]
    assert all(line in lines for line in expected)
    assert done.stderr.count("Traceback") == 1  # of the unexpected error alone


def test_a_job_that_stops_on_request_ends_the_sweep(script):
    done = script("-m", "seed=4,5,6")
    assert done.returncode == STOPPED_STATUS
    assert script.started() == ["sweep/seed=4 4", "sweep/seed=5 5"]
    assert done.stderr.splitlines()[-1] == "stopped at step 3; the same command resumes from there"
    assert script("seed=5").returncode == STOPPED_STATUS


def test_a_sweep_under_a_launcher_is_refused_once(script):
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for rank, stderr in (("0", "-m: a sweep starts its own processes"), ("1", "")):
        done = script("-m", "seed=6,7", WORLD_SIZE="2", RANK=rank, LOCAL_RANK=rank, **address)
        assert (done.returncode, stderr in done.stderr) == (1, True)
        assert done.stderr.count("-m: ") == (rank == "0")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["seed=x"], "seed=x: give a whole number"),
        (["seed=true"], "seed=true: give a number"),
        (["sead=1"], "sead: no such setting; did you mean seed?"),
        (["+sead=1"], "sead: no such setting; did you mean seed?"),
        (["unused=2"], "unused: has no effect here; choose from name, seed, rate"),
        (["~seed"], "~seed: a setting cannot be removed; leave it out for its default"),
        (["seed=???"], "seed: not set; give seed=…"),
        (["rate=x", "seed=y"], "seed=y: give a whole number\nrate=x: give a number or null"),
    ],
)
def test_a_mistake_ends_with_its_lines(script, arguments, line):
    done = script(*arguments)
    assert (done.returncode, done.stdout) == (1, "")
    assert sorted(done.stderr.splitlines()) == sorted(line.splitlines())


def test_help_says_what_the_command_does_and_where_its_settings_are(script):
    done = script("--help")
    assert done.stdout.startswith("Do what the seed says. Every setting with its comment: conf/conf.yaml")
    assert "seed: 9" in done.stdout


@pytest.mark.parametrize("value", ["a b", r"a\b c", 'say "x"', r"a\"b", "ends with \\", r"C:\x y", "ü"])
def test_paths_come_through_as_they_are(value):
    (override,) = OverridesParser.create().parse_overrides([quoted_path(f"out={value}")])
    assert override.value() == value


@pytest.mark.parametrize("name", ["sample", "evaluate"])
def test_only_training_sweeps(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    assert refusal(name, "-m", "ckpt=a,b").startswith("-m: only train.py sweeps")
    assert not list(tmp_path.iterdir())


# --- signals of a job: from Slurm; submitit announces the time limit by SIGUSR2

CHILD = """
import signal, sys, time
from pathlib import Path
def stop(number, frame):
    Path("got").write_text(signal.Signals(number).name)
    sys.exit(int(sys.argv[1]))
signal.signal(signal.SIGUSR1, stop)
signal.signal(signal.SIGTERM, stop)
Path("ready").touch()
time.sleep(60)
"""


def send_when_ready(folder, number):
    def send():
        while not (folder / "ready").exists():
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    threading.Thread(target=send, daemon=True).start()


@pytest.mark.parametrize(
    ("number", "status", "received", "requeued"),
    [
        (signal.SIGUSR2, STOPPED_STATUS, "SIGUSR1", True),
        (signal.SIGUSR2, 1, "SIGUSR1", False),
        (signal.SIGTERM, STOPPED_STATUS, "SIGTERM", False),
        (signal.SIGUSR1, STOPPED_STATUS, "SIGUSR1", False),
    ],
)
def test_a_signal_reaches_the_job_and_submitit_requeues_what_has_saved(
    tmp_path, monkeypatch, number, status, received, requeued
):
    monkeypatch.chdir(tmp_path)
    queued = []
    before = signal.signal(signal.SIGUSR2, lambda *_: queued.append(True))
    try:
        send_when_ready(tmp_path, number)
        assert wait_for([sys.executable, "-c", CHILD, str(status)]) == status
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert (tmp_path / "got").read_text() == received
    assert bool(queued) == requeued
