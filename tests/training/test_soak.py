"""Fifty kills at random moments: `bash scripts/test.sh --slow tests/training/test_soak.py -s`
prints what happened.
"""

import collections
import importlib
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import rows, succeed

from ddt.checkpoint import format as ckpt

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]
KILLS = 50
SMALL = ["model.hidden_size=32", "model.depth=2", "model.encoder_depth=1", "model.patch_size=4", "sampler.num_steps=2"]
SMALL += ["trainer.global_batch_size=8", "trainer.max_steps=3000", "trainer.save_every=10", "trainer.keep_last=2"]
SMALL += ["trainer.keep_every=500", "trainer.keep_best=validation_loss", "trainer.log_every=7"]
SMALL += ["trainer.validate_every=50", "trainer.preview_every=1000", "trainer.ema_decays=[0.5]"]
SMALL += ["trainer.ema_powers=[0.1]", "trainer.snapshot_every=100"]


def attempt(name, folder, seconds=0.0, number=None, begun=False):
    """Train in a process of its own, which gets a signal after some seconds, counted from its
    start, or from its first step where it is to have `begun`; return how it ended.
    """
    status_file, started = folder / "runs" / name / "status.json", time.time()
    importlib.import_module("train")  # what it costs is paid once, and not by each child
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.chdir(folder)
            sys.stderr = sys.stdout = open(os.devnull, "w")  # noqa: SIM115
            succeed("train", *SMALL, f"name={name}")
            status = 0
        except SystemExit as exit_:
            status = exit_.code
        finally:
            os._exit(status)
    if number is not None:
        deadline = time.time() + 60
        while begun and not (status_file.exists() and status_file.stat().st_mtime > started):
            assert time.time() < deadline, "the run does not begin"
            time.sleep(0.01)
        time.sleep(seconds)
        os.kill(child, number)
    _, status = os.waitpid(child, 0)
    return status


def everything(run):
    """All tensors of all checkpoints and snapshots that a run keeps."""
    found = {}
    for folder in [*ckpt.list_checkpoints(run).values(), *sorted((run / "snapshots").iterdir())]:
        for name in ckpt.weights_names(folder):
            found |= {f"{folder.name} {name} {k}": v for k, v in ckpt.read_weights(folder, name).items()}
    state = ckpt.read_train_state(ckpt.newest_checkpoint(run))
    for index, values in state["optimizer"]["state"].items():
        found |= {f"optimizer {index} {key}": value for key, value in values.items()}
    return found


def test_fifty_kills_cost_nothing(tmp_path):
    generator, ends, steps = random.Random(0), collections.Counter(), [0]
    started = time.perf_counter()
    assert attempt("straight", tmp_path) == 0
    straight_seconds = time.perf_counter() - started
    run = tmp_path / "runs" / "killed"
    for _ in range(KILLS):
        number = generator.choice([signal.SIGKILL, signal.SIGTERM])
        begun = generator.random() < 0.8
        status = attempt("killed", tmp_path, generator.uniform(0, 0.6), number, begun)
        newest = ckpt.newest_checkpoint(run) if run.exists() else None
        if newest is not None:
            for file in ckpt.read_manifest(newest).files:
                ckpt.verify_file(newest, file)
            steps.append(int(newest.name[5:]))
            assert steps[-1] >= steps[-2], "a kill took the run back behind a checkpoint"
        ended = os.waitstatus_to_exitcode(status)
        ends[f"{number.name} → {ended if ended >= 0 else signal.Signals(-ended).name}"] += 1
    left = [path for path in (run / "checkpoints").iterdir() if path.name.startswith(".")]
    assert attempt("killed", tmp_path) == 0
    print(f"\n{dict(ends)}; checkpoints after each kill: {steps[1:]}; {len(left)} left-overs before the last call")
    print(f"straight {straight_seconds:.0f} s, all {time.perf_counter() - started:.0f} s")
    assert steps[-1] < 3000, "the run ended before its last kill: give it more steps"
    killed, straight = everything(run), everything(tmp_path / "runs" / "straight")
    assert killed.keys() == straight.keys()
    assert all(torch.equal(killed[key], straight[key]) for key in killed)
    assert rows(run) == rows(tmp_path / "runs" / "straight")
    assert json.loads((run / "status.json").read_text())["state"] == "done"
    for folder in ("previews", "snapshots", "checkpoints"):
        names = [sorted(p.name for p in (base / folder).iterdir()) for base in (run, tmp_path / "runs" / "straight")]
        assert names[0] == names[1]
    previews = [Path(base) / "previews" / "step_0003000.png" for base in (run, tmp_path / "runs" / "straight")]
    assert previews[0].read_bytes() == previews[1].read_bytes()
