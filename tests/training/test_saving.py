"""Checkpoints are written while training continues, and nothing ends before they are."""

import collections
import copy
import io
import json
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import refusal, run_inside, succeed, thinned
from distributed.processes import wait_for
from late import written_late

from ddt.checkpoint import format as ckpt
from ddt.errors import STOPPED_STATUS, UserError
from ddt.training import saving, start, stopping
from ddt.training.state import on_host
from ddt.training.tracking import JsonlTracker

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = [
    "model.hidden_size=32", "model.depth=3", "model.encoder_depth=2", "sampler.num_steps=2", "trainer.warmup_steps=0",
    "trainer.lr_schedule=constant", "trainer.global_batch_size=12", "trainer.log_every=2", "trainer.max_steps=8",
    "trainer.save_every=2", "trainer.keep_last=2", "trainer.validate_every=0", "trainer.preview_every=0",
    "trainer.ema_powers=[0.1]", "trainer.snapshot_every=4",
]  # fmt: skip


@pytest.fixture(autouse=True)
def inside(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def train(name, *overrides):
    succeed("train", *SMALL, f"name={name}", *overrides)
    return Path("runs") / name


def digests(folder):
    """The size and hash of each file of a checkpoint but its config, which holds the run's name."""
    return {name: entry for name, entry in ckpt.read_manifest(folder).files.items() if name != "config.json"}


def test_training_takes_steps_while_a_checkpoint_is_written():
    """Its bytes are those of a run without delay, and no old one goes before it is there."""
    straight, found, there, remove = train("straight", "trainer.keep_last=null"), {}, [], saving.remove

    def removing(path):
        found[path.name] = digests(path)
        there.append(list(ckpt.list_checkpoints(Path("runs/late"))))
        remove(path)

    with pytest.MonkeyPatch.context() as patch, written_late(step=4, until=5):
        patch.setattr(saving, "remove", removing)
        late = train("late")
    assert there == [[2, 4, 6], [4, 6, 8]]
    assert list(ckpt.list_checkpoints(late)) == [6, 8]
    found |= {folder.name: digests(folder) for folder in ckpt.list_checkpoints(late).values()}
    assert found == {folder.name: digests(folder) for folder in ckpt.list_checkpoints(straight).values()}
    assert [len(files) for files in found.values()] == [4, 4, 4, 4]
    snapshots = ([digests(folder) for folder in sorted((run / "snapshots").iterdir())] for run in (straight, late))
    assert next(snapshots) == next(snapshots)


def test_a_copy_has_the_bytes_of_the_state_and_stays():
    weights = collections.OrderedDict(a=torch.randn(3, 2).t(), b=torch.ones(()))
    weights._metadata = {"": {"version": 1}}  # of a module's state dict
    state = {"weights": weights, "groups": [{"lr": 0.1, "betas": (0.9, 0.95)}], "meter": (weights["a"], torch.ones(2))}
    before = copy.deepcopy(state)
    found = on_host(state)

    def saved(tree):
        file = io.BytesIO()
        torch.save(tree, file)
        return file.getvalue()

    assert saved(found) == saved(before)
    assert found["weights"]._metadata == weights._metadata
    with torch.no_grad():
        weights["a"].zero_()
    state["groups"][0]["lr"] = 0.2
    weights._metadata[""]["version"] = 2
    assert saved(found) == saved(before) != saved(state)


def failing(step, error):
    """The writing of files, which fails for those of a step."""
    write = ckpt.write_files

    def write_or_fail(folder, *args):
        if folder.name == f".tmp-step_{step:07d}":
            raise error
        return write(folder, *args)

    return write_or_fail


FULL = OSError(28, "No space left on device")


def test_a_failure_is_reported_by_the_next_save(monkeypatch, caplog):
    monkeypatch.setattr(ckpt, "write_files", failing(4, FULL))
    run = train("once_full", "trainer.keep_last=null")
    assert "runs/once_full/snapshots/step_0000004: could not be written" in caplog.text
    assert "runs/once_full/checkpoints: no checkpoint of step 4 could be written" in caplog.text
    assert list(ckpt.list_checkpoints(run)) == [2, 6, 8]
    assert sorted(path.name for path in (run / "snapshots").iterdir()) == ["step_0000008"]


def test_what_is_no_fault_of_the_disk_ends_the_run(monkeypatch):
    monkeypatch.setattr(ckpt, "write_files", failing(4, RuntimeError("a mistake")))
    with pytest.raises(RuntimeError, match="a mistake"):
        train("mistaken")
    assert json.loads(Path("runs/mistaken/status.json").read_text())["state"] == "failed"


@pytest.mark.parametrize("stops", thinned([False, True], 2))
def test_a_run_ends_as_its_last_write_does(monkeypatch, stops):
    """That of its last step, and that of a stop."""
    write, log, step = ckpt.write_files, JsonlTracker.log, 6 if stops else 8

    def asking(self, number, values):
        log(self, number, values)
        if stops and number == 4:  # taken with the next step, and agreed on with the one after it
            signal.raise_signal(signal.SIGTERM)

    def slow(*args):
        time.sleep(0.3)
        return write(*args)

    monkeypatch.setattr(JsonlTracker, "log", asking)
    arguments = [*SMALL, "trainer.save_every=0"]
    monkeypatch.setattr(ckpt, "write_files", slow)
    done = run_inside("train", *arguments, "name=slow")
    assert done.returncode == (STOPPED_STATUS if stops else 0)
    assert list(ckpt.list_checkpoints(Path("runs/slow"))) == [step]
    monkeypatch.setattr(ckpt, "write_files", write)
    monkeypatch.setattr(ckpt, "write_files", failing(step, FULL))
    message = refusal("train", *arguments, "name=full")
    assert f"no checkpoint of step {step} could be written" in message
    assert json.loads(Path("runs/full/status.json").read_text())["state"] == "failed"


def test_an_error_waits_for_the_write_and_a_second_ctrl_c_does_not(monkeypatch):
    """The write of step 4 ends after the run did; its measurements failed."""
    write, leave, free = ckpt.write_files, saving.Saver.__exit__, threading.Event()

    def late(folder, *args):
        assert folder.name != ".tmp-step_0000004" or free.wait(60)
        time.sleep(0.3)
        return write(folder, *args)

    def leaving(self, kind, *rest):
        if kind is UserError:
            free.set()
        leave(self, kind, *rest)

    def measure(self, names, network, step, tracker):
        if step == 4:
            raise error

    monkeypatch.setattr(ckpt, "write_files", late)
    monkeypatch.setattr(saving.Saver, "__exit__", leaving)
    monkeypatch.setattr(start.Measurements, "__call__", measure)
    options = ["trainer.validate_every=4", "trainer.snapshot_every=0"]
    error = UserError("data.root: lost")
    assert refusal("train", *SMALL, *options, "name=lost") == "data.root: lost"
    assert list(ckpt.list_checkpoints(Path("runs/lost"))) == [2, 4]
    error = KeyboardInterrupt()
    free.clear()
    assert run_inside("train", *SMALL, *options, "name=interrupted").returncode != 0
    assert list(ckpt.list_checkpoints(Path("runs/interrupted"))) == [2]
    free.set()  # the process would have ended by now
    wait_for(lambda: list(ckpt.list_checkpoints(Path("runs/interrupted"))) == [2, 4])


def test_time_for_writing_is_left(monkeypatch):
    """100 s a step by this clock: step 4 is written from 400 s on, until 700 s at least."""
    clock, left, agreed = [0.0], [], stopping.StopRequests.agreed

    def noted(self, *args):
        left.append(self.pause_seconds)
        clock[0] += 100
        return agreed(self, *args)

    monkeypatch.setattr(saving, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    monkeypatch.setattr(stopping.StopRequests, "agreed", noted)
    with written_late(step=4, until=7):
        train("timed", "trainer.save_every=4")
    assert all(seconds < 50 for seconds in left[:5])
    assert left[5] >= 100
    assert left[6] >= 200
    assert left[7] >= 200
