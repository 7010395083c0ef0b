"""Launching processes, signals to them, torchrun, sweeps and the Slurm script."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import ROOT, rows, run, thinned
from processes import disagree, end_together, stop_on_request, survive, wait_for, wait_long

import ddt.distributed.launch
from ddt.checkpoint import format as ckpt
from ddt.distributed.launch import launch
from ddt.errors import STOPPED_STATUS, Stopped, UserError

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = [
    "model.hidden_size=32", "model.depth=3", "model.encoder_depth=2", "sampler.num_steps=2",
    "trainer.lr_schedule=constant", "trainer.warmup_steps=5", "trainer.global_batch_size=12", "trainer.log_every=4",
    "trainer.validate_every=0", "trainer.preview_every=0", "trainer.save_every=0",
]  # fmt: skip
TORCHRUN = str(Path(sys.executable).with_name("torchrun"))


def alive(pid):
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rsplit(")", 1)[1].split()[0] != "Z"


def pids(folder):
    return [int(path.read_text()) for path in folder.glob("pid*") if path.read_text()]


def when_ready(folder, action):
    """Call `action` in a thread when both processes of `launch` are ready; collect its errors."""
    raised = []

    def wait():
        try:
            wait_for(lambda: len(pids(folder)) == 2)
            action()
        except BaseException as error:
            raised.append(error)
            raise

    thread = threading.Thread(target=wait)
    thread.start()
    return thread, raised


# --- launch


def test_signals_reach_every_process_and_all_finish(tmp_path):
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)]

    def ask():
        os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGTERM)

    thread, raised = when_ready(tmp_path, ask)
    with pytest.raises(Stopped, match=r"^stopped at step 3$"):
        launch(stop_on_request, 2, tmp_path)
    thread.join()
    assert not raised
    for rank in range(2):
        assert json.loads((tmp_path / f"seen{rank}").read_text()) == [signal.SIGUSR1, signal.SIGTERM]
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)] == before


def test_processes_without_handlers_end_with_one_line(tmp_path):
    thread, _ = when_ready(tmp_path, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Stopped, match="ended by SIGTERM; the same command resumes"):
        launch(wait_long, 2, tmp_path)
    thread.join()
    assert not any(map(alive, pids(tmp_path)))


@pytest.mark.slow
def test_the_first_interrupt_is_the_childrens_and_the_second_ends_all(tmp_path):
    def interrupt():
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.5)
        assert all(map(alive, pids(tmp_path)))
        os.kill(os.getpid(), signal.SIGINT)

    thread, raised = when_ready(tmp_path, interrupt)
    with pytest.raises(KeyboardInterrupt):
        launch(survive, 2, tmp_path)
    thread.join()
    assert not raised
    assert not any(map(alive, pids(tmp_path)))


def test_the_process_group_is_destroyed(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    launch(end_together, 2, tmp_path)
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["False"] * 2


@pytest.mark.slow
def test_no_process_outlives_a_parent_that_is_killed(tmp_path):
    call = f"p.ddt.distributed.launch.launch(p.survive, 2, pathlib.Path({str(tmp_path)!r}))"
    code = f"import pathlib, processes as p; {call}"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests" / "distributed")])}
    with subprocess.Popen([sys.executable, "-c", code], env=environment) as parent:
        try:
            wait_for(lambda: len(pids(tmp_path)) == 2)
        finally:
            parent.kill()
    wait_for(lambda: not any(map(alive, pids(tmp_path))), 20)


@pytest.mark.slow
def test_processes_with_different_settings_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(ddt.distributed.launch, "GRACE_SECONDS", 0.5)
    message = "config.trainer.max_steps: is not the same on all processes: 3 (process 0), 4 (process 1); start all"
    with pytest.raises(UserError) as error:
        launch(disagree, 2, tmp_path)
    assert str(error.value).startswith(message)
    assert [(tmp_path / rank).read_text() for rank in "01"] == [str(error.value)] * 2
    assert not any(map(alive, pids(tmp_path)))


def test_tasks_of_srun_without_a_launcher_are_refused(monkeypatch):
    called = []
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    with pytest.raises(UserError, match=r"^srun: started 4 tasks .*srun torchrun.*scripts/slurm/train\.sbatch"):
        launch(called.append, 1, "alone")
    monkeypatch.setenv("RANK", "0")
    launch(called.append, None, "under torchrun")
    monkeypatch.delenv("RANK")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    launch(called.append, 1, "one task")
    assert called == ["under torchrun", "one task"]


@pytest.mark.slow
def test_submitit_runs_a_sweep_in_other_processes(tmp_path):
    """From another folder, with several processes per job; one job fails."""
    options = [*SMALL, "trainer.max_steps=2", "trainer.num_processes=2", "name=jobs"]
    rates = ["optimizer.lr=0,1e-3"]
    launcher = ["hydra/launcher=submitit_local", "hydra.launcher.timeout_min=5"]
    done = run(ROOT / "train.py", "-m", *options, *rates, *launcher, cwd=tmp_path, PYTHONPATH="")
    assert done.returncode == 1, done.stderr
    assert "1 of 2 jobs failed:\n" in done.stderr
    assert "optimizer.lr=0" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    (finished,) = (tmp_path / "runs" / "jobs").glob("*optimizer.lr=0.001*")
    assert (finished / "checkpoints" / "step_0000002" / "manifest.json").is_file()
    assert json.loads((finished / "config.json").read_text())["num_processes"] == 2


# --- torchrun


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    done = run(ROOT / "train.py", *SMALL, "trainer.max_steps=8", "name=one", cwd=folder)
    assert done.returncode == 0, done.stderr
    return rows(folder / "runs" / "one")


def torchrun(folder, *options):
    return subprocess.Popen(
        [TORCHRUN, *options, str(ROOT / "train.py"), *SMALL, "trainer.max_steps=8", "name=two"],
        cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def assert_two_processes_trained_the_same(folder, expected):
    path = folder / "runs" / "two"
    assert json.loads((path / "config.json").read_text())["num_processes"] == 2
    for a, b in zip(rows(path), expected, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)


@pytest.mark.slow
def test_torchrun_starts_the_processes_of_one_machine(tmp_path, one_process):
    started = torchrun(tmp_path, "--standalone", "--nproc-per-node=2")
    _, errors = started.communicate(timeout=200)
    assert started.returncode == 0, errors
    assert_two_processes_trained_the_same(tmp_path, one_process)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "number", "status"),
    [
        ([TORCHRUN, "--standalone", "--nproc-per-node=2"], signal.SIGTERM, 1),  # torchrun has no other status
        ([sys.executable], signal.SIGUSR1, STOPPED_STATUS),
    ],
)
def test_two_processes_stop_at_one_step_with_a_checkpoint(tmp_path, command, number, status):
    options = [*SMALL, "trainer.max_steps=100000", "trainer.log_every=1", "name=two"]
    options += [] if status == 1 else ["trainer.num_processes=2"]
    started = subprocess.Popen(
        [*command, str(ROOT / "train.py"), *options], cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    run_dir = tmp_path / "runs" / "two"
    wait_for(lambda: (run_dir / "metrics.jsonl").is_file() and len((run_dir / "metrics.jsonl").read_text()) > 0)
    started.send_signal(number)
    _, errors = started.communicate(timeout=100)
    assert started.returncode == status, errors
    found = json.loads((run_dir / "status.json").read_text())
    assert (found["state"], found["reason"].count(f"stopped by {number.name}")) == ("preempted", 1)
    assert errors.count("the same command resumes from there") == 1
    assert ckpt.newest_intact_checkpoint(run_dir) == ckpt.checkpoint_folder(run_dir, found["step"])
    assert rows(run_dir)[-1]["step"] == found["step"]
    assert json.loads((run_dir / "config.json").read_text())["num_processes"] == 2


@pytest.mark.slow
def test_torchrun_starts_the_processes_of_two_machines(tmp_path, one_process):
    """Two commands with one process each share the run folder, as two nodes of a cluster do."""
    port = ddt.distributed.launch._free_port()
    options = ["--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{port}"]
    machines = [torchrun(tmp_path, *options, "--rdzv-id=1") for _ in range(2)]
    for machine in machines:
        _, errors = machine.communicate(timeout=200)
        assert machine.returncode == 0, errors
    assert_two_processes_trained_the_same(tmp_path, one_process)


# --- the batch script, with fake Slurm commands

FAKES = {
    "srun": 'while [[ $1 == --* ]]; do shift; done; exec "$@"',
    "scontrol": 'if [[ $1 == show ]]; then echo localhost; else echo "$*" >> scontrol.log; fi',
    "torchrun": f'while [[ $1 == --* ]]; do shift; done; exec {sys.executable} "$@"',
}
FAKE_TRAINING = """
import json, os, sys, time
run = "runs/short run"
os.makedirs(run, exist_ok=True)
json.dump(sys.argv[1:], open("arguments.json", "w"))
def status(**values):
    json.dump(values, open(f"{run}/status.json.tmp", "w"))
    os.replace(f"{run}/status.json.tmp", f"{run}/status.json")
ending = json.loads(os.environ["ENDING"])
status(state="running", step=ending["begin"], reason="")
while ending["state"] == "preempted" and not os.path.exists(f"{run}/STOP"):
    time.sleep(0.02)
time.sleep(0.3)  # the last checkpoint
status(**{key: ending[key] for key in ("state", "step", "reason")})
sys.exit({"done": 0, "preempted": 85, "failed": 1}[ending["state"]])
"""


@pytest.fixture
def slurm(tmp_path):
    """Start the batch script in a folder with the fake commands; returns (process, run folder)."""
    (tmp_path / "bin").mkdir()

    def start(*arguments, fakes=("srun", "scontrol", "torchrun"), **environment):
        for name in fakes:
            file = tmp_path / "bin" / name
            file.write_text(f"#!/usr/bin/env bash\n{FAKES[name]}\n")
            file.chmod(0o755)
        path = os.pathsep.join([str(tmp_path / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]])
        job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "localhost", "SLURM_JOB_NUM_NODES": "1"}
        return subprocess.Popen(
            [str(ROOT / "scripts" / "slurm" / "train.sbatch"), *arguments],
            cwd=tmp_path, env={**os.environ, "PATH": path, **job, **environment},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    return start


def status_of(run_dir):
    file = run_dir / "status.json"
    return json.loads(file.read_text()) if file.exists() else {}


ARGUMENTS = ["seed=1", "data.root=a b;$(touch oh)'\"*", "name=short run"]


@pytest.mark.parametrize(
    ("signalled", "ending", "code", "said", "queued"),
    thinned(
        [
            (
                True,
                dict(state="preempted", begin=3, step=9, reason="runs/x/STOP"),
                0,
                "stopped at step 9; queued",
                True,
            ),
            (False, dict(state="preempted", begin=3, step=9, reason="runs/x/STOP"), 85, "stopped for good at", False),
            (
                False,
                dict(state="preempted", begin=3, step=9, reason="time limit"),
                0,
                "stopped at step 9; queued",
                True,
            ),
            (
                True,
                dict(state="preempted", begin=3, step=3, reason="SIGUSR1"),
                1,
                "no step was taken since step 3",
                False,
            ),
            (False, dict(state="failed", begin=3, step=9, reason="nan"), 1, "failed", False),
            (False, dict(state="done", begin=3, step=9, reason=""), 0, "done", False),
        ],
        2,
    ),
)
def test_the_batch_script_requeues_a_run_that_can_be_resumed(slurm, tmp_path, signalled, ending, code, said, queued):
    (tmp_path / "train.py").write_text(FAKE_TRAINING)
    run_dir = tmp_path / "runs" / "short run"
    run_dir.mkdir(parents=True)
    (run_dir / "status.json").write_text(json.dumps(dict(state="preempted", step=3, reason="")))
    job = slurm(*ARGUMENTS, ENDING=json.dumps(ending))
    wait_for(lambda: status_of(run_dir)["state"] != "preempted")
    if signalled:
        job.send_signal(signal.SIGUSR1)  # to the batch shell alone, as --signal=B: does
    elif ending["state"] == "preempted":
        (run_dir / "STOP").touch()
    output, _ = job.communicate(timeout=60)
    assert job.returncode == code, output
    assert said in output
    log = tmp_path / "scontrol.log"
    assert (log.read_text() if log.exists() else "") == ("requeue 7\n" if queued else "")
    assert not (signalled and (run_dir / "STOP").exists())  # or the next start would stop at once
    assert json.loads((tmp_path / "arguments.json").read_text()) == ARGUMENTS
    assert not (tmp_path / "oh").exists()


@pytest.mark.parametrize(
    ("arguments", "said"), [(["seed=1"], "name: not set"), (["-m", "name=a", "seed=1,2"], "-m: a sweep")]
)
def test_the_batch_script_refuses_sweeps_and_missing_names(slurm, arguments, said):
    job = slurm(*arguments)
    output, _ = job.communicate(timeout=60)
    assert job.returncode == 2
    assert output.startswith(said)
    assert len(output.splitlines()) == 1


@pytest.mark.slow
def test_the_batch_script_trains_stops_and_resumes(slurm, tmp_path):
    """The real training under the real torchrun, on two processes."""
    for name in ("train.py", "evaluate.py", "ddt", "scripts", "conf"):
        (tmp_path / name).symlink_to(ROOT / name)
    last = 1200
    arguments = [*SMALL, f"trainer.max_steps={last}", "name=job", "trainer.log_every=20"]
    run_dir, options = tmp_path / "runs" / "job", dict(fakes=("srun", "scontrol"), SLURM_GPUS_ON_NODE="2")
    job = slurm(*arguments, **options)
    wait_for(lambda: (run_dir / "metrics.jsonl").exists() and len(rows(run_dir)) > 1, 120)
    job.send_signal(signal.SIGUSR1)
    output, _ = job.communicate(timeout=120)
    assert job.returncode == 0, output
    status = status_of(run_dir)
    assert status["state"] == "preempted"
    assert 0 < status["step"] < last
    assert (tmp_path / "scontrol.log").read_text() == "requeue 7\n"
    job = slurm(*arguments, **options)
    output, _ = job.communicate(timeout=300)
    assert job.returncode == 0, output
    assert f"resuming at step {status['step']}" in output
    assert status_of(run_dir)["state"] == "done"
    assert json.loads((run_dir / "config.json").read_text())["num_processes"] == 2
    assert [row["step"] for row in rows(run_dir)] == list(range(20, last + 1, 20))
