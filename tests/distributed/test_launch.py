"""Processes, signals to them, and sweeps: who is asked, who ends, with which status."""

import json
import logging
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, refusal, rows, run, succeed
from processes import disagree, end_together, stop_on_request, survive, wait_for, wait_long
from safetensors.torch import load_file
from test_training import SMALL

import ddt.distributed.launch
import train
from ddt.checkpoint import folder as ckpt
from ddt.distributed.launch import launch
from ddt.distributed.prepare import make_accelerator
from ddt.errors import STOPPED_STATUS, Stopped, UserError
from ddt.sweep import Outcome

pytestmark = pytest.mark.usefixtures("one_thread")
TORCHRUN = str(Path(sys.executable).with_name("torchrun"))


def alive(pid):
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rsplit(")", 1)[1].split()[0] != "Z"


def pids(folder):
    return [int(path.read_text()) for path in folder.glob("pid*") if path.read_text()]


def asked(folder, action):
    """Call `action` in a thread when both processes of `launch` are ready; what it raises fails the
    test.
    """
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


def test_a_request_reaches_every_process_and_all_are_left_to_finish(tmp_path):
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)]

    def ask():
        os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGTERM)

    thread, raised = asked(tmp_path, ask)
    with pytest.raises(Stopped, match=r"^stopped at step 3$"):
        launch(stop_on_request, 2, tmp_path)
    thread.join()
    assert not raised
    for rank in range(2):
        assert json.loads((tmp_path / f"seen{rank}").read_text()) == [signal.SIGUSR1, signal.SIGTERM]
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)] == before


def test_processes_that_take_no_requests_end_with_one_line(tmp_path):
    thread, _ = asked(tmp_path, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Stopped, match="ended by SIGTERM; the same command goes on"):
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

    thread, raised = asked(tmp_path, interrupt)
    with pytest.raises(KeyboardInterrupt):
        launch(survive, 2, tmp_path)
    thread.join()
    assert not raised
    assert not any(map(alive, pids(tmp_path)))


def test_no_process_ends_in_a_group(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    launch(end_together, 2, tmp_path)
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["False"] * 2


@pytest.mark.slow
def test_no_process_outlives_a_parent_that_is_killed(tmp_path):
    code = f"import pathlib, processes as p; p.ddt.distributed.launch.launch(p.survive, 2, pathlib.Path({str(tmp_path)!r}))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    with subprocess.Popen([sys.executable, "-c", code], env=environment) as parent:
        try:
            wait_for(lambda: len(pids(tmp_path)) == 2)
        finally:
            parent.kill()
    wait_for(lambda: not any(map(alive, pids(tmp_path))), 20)


@pytest.mark.slow
def test_processes_that_mean_different_runs_are_told_so_all_alike(tmp_path, monkeypatch):
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


# --- jobs of an entry point


@pytest.fixture
def job(tmp_path, monkeypatch):
    """Replace what `train.py` starts by a function of the seed; return the list of the seeds that
    were started.
    """
    monkeypatch.chdir(tmp_path)
    started = []

    def replace(**outcomes):
        def fake(function, num_processes, config):
            started.append(config["seed"])
            outcome = outcomes.get(f"s{config['seed']}")
            if outcome is not None:
                raise outcome

        monkeypatch.setattr(train, "launch", fake)
        return started

    return replace


def test_failed_jobs_are_named_and_the_others_run(job, capsys):
    started = job(
        s0=UserError("key: wrong; right it"),
        s1=FloatingPointError("the loss is nan"),
        s2=OSError(28, "No space left on device", "runs/x"),
        s3=RuntimeError("unexpected\nand more"),
        s4=SystemExit(1),
    )
    message = refusal("train", "-m", "seed=0,1,2,3,4,5", "trainer.max_steps=2")
    assert started == [0, 1, 2, 3, 4, 5]
    lines = message.splitlines()
    assert lines[0] == "5 of 6 jobs failed:"
    expected = [
        "key: wrong; right it",
        "the loss is nan",
        "runs/x: No space left on device; check the path and the disk",
        "RuntimeError: unexpected",
        "exit status 1, see above",
    ]
    assert lines[1:] == [f"seed={k} trainer.max_steps=2: {line}" for k, line in enumerate(expected)]
    shown = capsys.readouterr().err
    assert shown.count("Traceback") == 1
    assert [line for line in lines[1:] if line in shown.splitlines()] == lines[1:]
    job()
    succeed("train", "-m", "seed=6,7")  # nothing is left of the failures


def test_what_was_asked_to_stop_starts_no_other_job(job, capsys):
    started = job(s0=UserError("key: wrong"), s1=Stopped("stopped at step 3; the same command goes on"))
    assert refusal("train", "-m", "seed=0,1,2") == str(STOPPED_STATUS)
    assert started == [0, 1]
    assert refusal("train", "seed=1") == str(STOPPED_STATUS)
    assert capsys.readouterr().err.splitlines().count("stopped at step 3; the same command goes on") == 2


def test_a_single_run_shows_an_unexpected_error_as_it_is(job):
    job(s0=RuntimeError("unexpected"))
    with pytest.raises(RuntimeError, match="unexpected"):
        succeed("train", "seed=0")


def test_a_sweep_under_a_launcher_is_refused_once(job, monkeypatch):
    started = job()
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, said in (("0", "-m: a sweep starts its own processes"), ("1", "1")):
        monkeypatch.setenv("RANK", rank)
        assert refusal("train", "-m", "seed=0,1").startswith(said)
    assert started == []


def test_an_outcome_is_known_where_it_arrives():
    Outcome.known.clear()
    sent = pickle.dumps(Outcome("seed=1", "why"))
    Outcome.known.clear()
    pickle.loads(sent)
    assert list(map(str, Outcome.known)) == ["seed=1: why"]
    Outcome.known.clear()


def test_a_job_leaves_the_process_as_it_was(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = []

    def state():
        return (
            signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGUSR1), list(logging.getLogger().handlers),
            logging.getLogger().level, torch.get_num_threads(), os.environ.get("LEFT"), os.environ["PATH"],
        )  # fmt: skip

    def fake(function, num_processes, config):
        found.append(state())
        signal.signal(signal.SIGTERM, lambda *_: None)
        signal.signal(signal.SIGUSR1, lambda *_: None)
        logging.getLogger().addHandler(logging.NullHandler())
        logging.getLogger().setLevel(logging.ERROR)
        torch.set_num_threads(3)
        os.environ.update(LEFT="1", PATH="")
        make_accelerator(config["trainer"]["mixed_precision"])
        raise UserError("failed")

    monkeypatch.setattr(train, "launch", fake)
    before = state()
    assert refusal("train", "-m", "trainer.mixed_precision=bf16,fp32").startswith("2 of 2 jobs failed:")
    assert len(found) == 2
    assert found[0] == found[1] == before == state()
    assert "HYDRA_FULL_ERROR" not in os.environ


def test_the_second_job_of_a_sweep_is_bit_for_bit_that_job_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = [*SMALL, "trainer.max_steps=4", "trainer.log_every=1"]
    succeed("train", *small, "name=alone", "trainer.mixed_precision=fp32")
    precisions = "trainer.mixed_precision=bf16,fp32"
    succeed("train", "-m", *small, "name=sweep", precisions, "hydra.sweep.subdir=${trainer.mixed_precision}")
    runs = [tmp_path / "runs" / name for name in ("alone", "sweep/fp32", "sweep/bf16")]
    alone, second, first = (load_file(path / "checkpoints" / "step_0000004" / "model.safetensors") for path in runs)
    assert all(torch.equal(alone[key], second[key]) for key in alone)
    assert not all(torch.equal(alone[key], first[key]) for key in alone)
    assert rows(runs[0]) == rows(runs[1]) != rows(runs[2])


# --- Hydra's submitit launcher


@pytest.fixture
def submitit(monkeypatch):
    """Be a process of submitit's: its handler of SIGUSR2 ends the process at once. Returns what
    happens in order.
    """
    events = []

    def requeue(signum, frame):
        events.append("queued")
        sys.exit(144)

    monkeypatch.setenv("SUBMITIT_EXECUTOR", "local")
    before = signal.getsignal(signal.SIGUSR1), signal.signal(signal.SIGUSR2, requeue)
    yield events
    assert signal.getsignal(signal.SIGUSR2) is requeue
    signal.signal(signal.SIGUSR1, before[0])
    signal.signal(signal.SIGUSR2, before[1])


@pytest.mark.parametrize(
    ("message", "status", "expected"),
    [
        ("stopped at step 3 (SIGUSR1)", "144", ["asked", "saved", "queued"]),
        ("the time limit is near", "144", ["asked", "saved", "queued"]),
        ("runs/a/STOP was found", str(STOPPED_STATUS), ["asked", "saved"]),
    ],
)
def test_a_job_of_submitit_is_queued_again_when_it_has_saved(
    tmp_path, monkeypatch, submitit, message, status, expected
):
    def fake(function, num_processes, config):
        signal.signal(signal.SIGUSR1, lambda *_: submitit.append("asked"))
        os.kill(os.getpid(), signal.SIGUSR2)
        submitit.append("saved")
        raise Stopped(message)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "launch", fake)
    assert refusal("train", "-m", "seed=0,1") == status
    assert submitit == expected


def test_a_job_of_submitit_with_nothing_to_save_is_queued_at_once(tmp_path, monkeypatch, submitit):
    def fake(function, num_processes, config):
        os.kill(os.getpid(), signal.SIGUSR2)
        submitit.append("went on")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "launch", fake)
    assert refusal("train", "-m", "seed=0,1") == "144"
    assert submitit == ["queued"]


@pytest.mark.slow
def test_submitit_runs_a_sweep_in_other_processes(tmp_path):
    """Away from the repository, with several processes a job; one of the jobs fails."""
    options = [*SMALL, "trainer.max_steps=2", "trainer.num_processes=2", "name=jobs"]
    micro = ["trainer.micro_batch_size=5,3", "hydra.sweep.subdir=${trainer.micro_batch_size}"]
    launcher = ["hydra/launcher=submitit_local", "hydra.launcher.timeout_min=5"]
    done = run(ROOT / "train.py", "-m", *options, *micro, *launcher, cwd=tmp_path, PYTHONPATH="")
    assert done.returncode == 1, done.stderr
    assert "1 of 2 jobs failed:\n" in done.stderr
    assert "trainer.micro_batch_size=5 does not divide" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    finished = tmp_path / "runs" / "jobs" / "3"
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


@pytest.mark.parametrize(
    ("command", "number", "status"),
    [
        ([TORCHRUN, "--standalone", "--nproc-per-node=2"], signal.SIGTERM, 1),  # torchrun has no other status
        pytest.param([sys.executable], signal.SIGUSR1, STOPPED_STATUS, marks=pytest.mark.slow),
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
    assert errors.count("the same command goes on from there") == 1
    assert ckpt.sound_checkpoint(run_dir) == ckpt.checkpoint_folder(run_dir, found["step"])
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


# --- the batch script, with commands of Slurm that run things here

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
    [
        (True, dict(state="preempted", begin=3, step=9, reason="runs/x/STOP"), 0, "stopped at step 9; queued", True),
        (
            False,
            dict(state="preempted", begin=3, step=9, reason="runs/x/STOP"),
            85,
            "stopped for good at step 9",
            False,
        ),
        (False, dict(state="preempted", begin=3, step=9, reason="time limit"), 0, "stopped at step 9; queued", True),
        (True, dict(state="preempted", begin=3, step=3, reason="SIGUSR1"), 1, "no step was taken since step 3", False),
        (False, dict(state="failed", begin=3, step=9, reason="nan"), 1, "failed", False),
        (False, dict(state="done", begin=3, step=9, reason=""), 0, "done", False),
    ],
)
def test_the_batch_script_asks_for_a_requeue_where_a_run_can_go_on(
    slurm, tmp_path, signalled, ending, code, said, queued
):
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
def test_the_batch_script_refuses_what_it_cannot_follow(slurm, arguments, said):
    job = slurm(*arguments)
    output, _ = job.communicate(timeout=60)
    assert job.returncode == 2
    assert output.startswith(said)
    assert len(output.splitlines()) == 1


@pytest.mark.slow
def test_the_batch_script_trains_stops_and_goes_on(slurm, tmp_path):
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
