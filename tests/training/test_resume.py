"""A run that was stopped, killed or damaged anywhere ends as the run that was left alone."""

import itertools
import json
import os
import platform
import resource
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import filelock
import numpy as np
import pytest
import torch
from conftest import full_disk_stream, picture_folder, refusal, rows, run_inside, succeed, thinned
from late import written_late
from safetensors.torch import load_file
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

import ddt
from ddt.checkpoint import format as ckpt
from ddt.data.images import FileImages
from ddt.data.stream import TrainingStream
from ddt.errors import STOPPED_STATUS
from ddt.objective import FlowMatching
from ddt.training import saving, start, stopping
from ddt.training.ema import EMA, PowerFunction
from ddt.training.loop import diverged
from ddt.training.measurements import Measurements
from ddt.training.resume import frozen_differences
from ddt.training.tracking import JsonlTracker

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = ["model.hidden_size=32", "model.depth=3", "model.encoder_depth=2", "model.patch_size=4", "sampler.num_steps=2"]
SMALL += [
    "trainer.lr_schedule=constant",
    "trainer.warmup_steps=5",
    "trainer.global_batch_size=12",
    "trainer.log_every=4",
]
SMALL += ["trainer.validate_every=4", "trainer.preview_every=0", "trainer.save_every=0", "trainer.max_steps=12"]
SMALL += ["trainer.ema_decays=[0.5]", "trainer.ema_powers=[0.1]"]


class Killed(BaseException):
    """Stands for SIGKILL: nothing is caught, nothing is put in order."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A working folder with pictures: an epoch of them is 22 images, less than two steps."""
    folder = tmp_path_factory.mktemp("resume")
    picture_folder(folder / "pictures")
    return folder


@pytest.fixture(autouse=True)
def _inside(folder, monkeypatch):
    monkeypatch.chdir(folder)


def arguments(name, *overrides):
    data = ["data=folder", "data.root=pictures", "data.image_size=8", "data.holdout_every=5"]
    return *data, *SMALL, f"name={name}", *overrides


def train(name, *overrides):
    succeed("train", *arguments(name, *overrides))
    return Path("runs") / name


@pytest.fixture(scope="module")
def straight(folder):
    """12 steps without a stop."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return folder / train("straight")


def whole(run, step=12):
    """All tensors of a checkpoint, by file and name."""
    found, folder = {}, ckpt.checkpoint_folder(run, step)
    for name in ckpt.weights_names(folder):
        found |= {f"{name} {key}": value for key, value in ckpt.read_weights(folder, name).items()}
    for index, values in ckpt.read_train_state(folder)["optimizer"]["state"].items():
        found |= {f"optimizer {index} {key}": value for key, value in values.items()}
    return found


def assert_same_end(run, straight):
    found, expected = whole(run), whole(straight)
    assert found.keys() == expected.keys()
    assert len(expected) > 200
    for key in expected:
        assert torch.equal(found[key], expected[key]), key
    steps = {row["step"] for row in rows(straight)}  # a run that was to end earlier was measured there too
    assert [row for row in rows(run) if row["step"] in steps] == rows(straight)
    assert json.loads((run / "status.json").read_text())["state"] == "done"


ACCUMULATED = ["trainer.micro_batch_size=6", "trainer.num_workers=1"]


@pytest.mark.parametrize(
    ("stop", "options"),
    [
        pytest.param(3, [], marks=pytest.mark.slow),
        (11, []),
        (3, ACCUMULATED),
        pytest.param(11, ACCUMULATED, marks=pytest.mark.slow),
        pytest.param(3, ["model=nano_ditdh"], marks=pytest.mark.slow),
        pytest.param(11, ["model=nano_ditdh"], marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_steps_and_a_resume_are_the_straight_run(folder, straight, stop, options):
    """Between log rows, in the middle of an epoch; with gradients accumulated and with other
    workers; with weights that are never trained.
    """
    name = f"stopped_{stop}_{len(options)}"
    if options:  # a sum over micro-batches has other last bits, too: it is compared with its like
        straight = train(f"{name}_straight", options[0])
    train(name, f"trainer.max_steps={stop}", *options[:1])
    assert_same_end(train(name, *options), straight)


def test_a_resumed_run_sees_the_same_images(straight, monkeypatch):
    """Sample for sample, over the ends of epochs."""
    seen = []
    read = TrainingStream.__getitem__

    def noted(self, positions):
        seen.append([self.index(position) for position in positions])
        return read(self, positions)

    monkeypatch.setattr(TrainingStream, "__getitem__", noted)
    train("seen_straight", "trainer.validate_every=0")
    whole_run, seen = seen, []
    train("seen", "trainer.validate_every=0", "trainer.max_steps=7")
    train("seen", "trainer.validate_every=0")
    assert seen == whole_run
    visited = list(itertools.chain(*whole_run))
    epoch = sorted(set(visited))
    assert sorted(visited[: len(epoch)]) == sorted(visited[len(epoch) : 2 * len(epoch)]) == epoch


# what a kill comes before: a call of this function, after so many others since the save began
POINTS = {
    "between snapshot and checkpoint": (saving.Saver, "write_atomically", 1),
    "before the export": (saving, "export_ema", 0),
    "before it is done": (start, "write_status", 0),
    "while files are written": (ckpt, "save_file", 3),
    "before the manifest": (ckpt, "write_json", 3),
    "before it has its name": (Path, "rename", 1),
    "before an old one is removed": (saving.Saver, "prune", 0),
    "while an old one is removed": (shutil, "rmtree", 4),
    "before it is measured": (JsonlTracker, "log", 0),
}
UNNAMED = ("while files are written", "before the manifest", "before it has its name")


@pytest.mark.parametrize("point", thinned(POINTS, 4))
def test_a_kill_while_saving_costs_nothing(straight, monkeypatch, point):
    """Killed at the checkpoint of step 8 or 12, perhaps in the thread that writes it while training
    continues; then the same command.
    """
    owner, name, calls = POINTS[point]
    options = ["trainer.save_every=4", "trainer.keep_last=2", "trainer.snapshot_every=4"]
    original, left, step = getattr(owner, name), [], 12 if name in ("prune", "rmtree", "write_status") else 8

    def killing(*args, **kwargs):
        if left:
            left[0] -= 1
            if left[0] < 0:
                raise Killed
        return original(*args, **kwargs)

    def armed(self, state, **kwargs):
        if state.step == step:  # the third checkpoint is the first to remove another
            left.append(calls)
        save(self, state, **kwargs)

    save = saving.Saver.save
    with monkeypatch.context() as patch:
        patch.setattr(saving.Saver, "save", armed)
        patch.setattr("ddt.training.start.write_status", lambda *args: None)  # a killed process writes no status
        patch.setattr(owner, name, killing)
        with pytest.raises(Killed):
            train(f"killed_{name}", *options)
    if point in UNNAMED:  # what a killed process leaves
        left_over = Path(f"runs/killed_{name}/checkpoints")
        assert sorted(path.name for path in left_over.iterdir()) == [".tmp-step_0000008", "step_0000004"]
    run = train(f"killed_{name}", *options)
    assert_same_end(run, straight)
    assert [path.name for path in sorted(run.rglob("*")) if path.name.startswith((".tmp", ".del"))] == []
    assert list(ckpt.list_checkpoints(run)) == [8, 12]
    assert [folder.name for folder in sorted((run / "snapshots").iterdir())] == [
        f"step_00000{k}" for k in ("04", "08", "12")
    ]
    assert ckpt.weights_sha256(run / "export", "ema") == ckpt.weights_sha256(
        run / "checkpoints" / "step_0000012", "ema"
    )


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "truncated": lambda folder: os.truncate(folder / "train_state.pt", 1000),
    "one bit of the weights": lambda folder: flip(folder / "model.safetensors"),
    "one bit of an EMA": lambda folder: flip(folder / "ema_0.5.safetensors"),
    "a file is missing": lambda folder: (folder / "ema.safetensors").unlink(),
    "no manifest": lambda folder: (folder / "manifest.json").unlink(),
    "a damaged manifest": lambda folder: (folder / "manifest.json").write_text("{"),
}


@pytest.fixture(scope="module")
def saved_often(folder):
    """A run of 8 steps with two checkpoints."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return folder / train("often", "trainer.max_steps=8", "trainer.save_every=4")


@pytest.mark.parametrize("damage", thinned(DAMAGES, 2))
def test_a_damaged_newest_is_named_and_the_one_before_used(straight, saved_often, caplog, damage):
    caplog.set_level("INFO")
    name = f"damaged_{damage}".replace(" ", "_")
    shutil.copytree(saved_often, Path("runs") / name)
    DAMAGES[damage](Path("runs") / name / "checkpoints" / "step_0000008")
    run = train(name)
    assert "step_0000008" in caplog.text
    assert "it is set aside as" in caplog.text
    assert "resuming at step 4 to step 12" in caplog.text
    assert (run / "checkpoints" / "damaged_step_0000008").is_dir()  # nothing is thrown away
    assert_same_end(run, straight)


def test_a_run_without_an_intact_checkpoint_is_not_begun_again(saved_often):
    run = Path("runs/hopelessly_damaged")
    shutil.copytree(saved_often, run)
    for folder in (run / "checkpoints").iterdir():
        flip(folder / "model.safetensors")
    before = (run / "metrics.jsonl").read_text()
    for _ in range(2):
        message = refusal("train", *arguments("hopelessly_damaged"))
        assert "runs/hopelessly_damaged: no intact checkpoint is left" in message
    assert (run / "metrics.jsonl").read_text() == before


def test_a_full_disk_costs_a_checkpoint_and_no_step(straight, caplog):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    save, wait = saving.Saver.save, saving.Saver.wait

    def limited(self, state, **kwargs):
        if state.step == 4:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
        save(self, state, **kwargs)

    def waited(self, **kwargs):
        wait(self, **kwargs)
        resource.setrlimit(resource.RLIMIT_FSIZE, before)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saving.Saver, "save", limited)
        patch.setattr(saving.Saver, "wait", waited)
        try:
            run = train("full", "trainer.save_every=4")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "no checkpoint of step 4 could be written" in caplog.text
    assert "training continues" in caplog.text
    assert list(ckpt.list_checkpoints(run)) == [8, 12]
    assert not list((run / "checkpoints").glob(".tmp*"))
    assert_same_end(run, straight)


def test_three_failures_in_a_row_end_the_run(monkeypatch):
    monkeypatch.setattr(ckpt, "save_file", lambda *args: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    message = refusal("train", *arguments("hopeless", "trainer.save_every=1"))
    assert "no checkpoint of step 3 could be written" in message
    assert "3 in a row" in message
    assert json.loads(Path("runs/hopeless/status.json").read_text())["state"] == "failed"


def test_no_room_is_said_before_the_first_step(monkeypatch):
    usage = shutil.disk_usage(".")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    message = refusal("train", *arguments("roomless"))
    assert "runs/roomless: no room for a checkpoint" in message
    assert "free some space" in message
    assert not Path("runs/roomless").exists()


def test_rows_wait_for_room(tmp_path, caplog):
    tracker = JsonlTracker(tmp_path, 0, {})
    tracker.log(1, {"loss": 1.0})
    file, tracker.file = tracker.file, open("/dev/full", "ab", buffering=0)  # noqa: SIM115
    tracker.log(2, {"loss": 2.0})
    tracker.log(3, {"loss": 3.0})
    assert caplog.text.count("rows wait in memory") == 1
    tracker.file = file
    tracker.log(4, {"loss": 4.0})
    tracker.finish()
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3, 4]


def test_which_checkpoints_stay():
    options = [
        "trainer.save_every=1",
        "trainer.keep_last=2",
        "trainer.keep_every=5",
        "trainer.keep_best=validation_loss",
    ]
    run = train("kept", *options, "trainer.validate_every=1", "trainer.log_every=1")
    losses = {row["step"]: row["validation_loss"] for row in rows(run) if "validation_loss" in row}
    best = min(losses, key=losses.get)
    assert list(ckpt.list_checkpoints(run)) == sorted({5, 10, 11, 12, best})
    assert list(ckpt.list_checkpoints(train("all_kept", "trainer.save_every=3"))) == [3, 6, 9, 12]


def test_the_best_is_by_the_metrics_direction(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        "".join(json.dumps({"step": k, "fid_5k": abs(k - 3), "recall_5k": -abs(k - 2)}) + "\n" for k in range(6))
    )
    with (tmp_path / "metrics.jsonl").open("a") as file:
        for step, value in enumerate(("NaN", "3.0", "null", "-Infinity"), start=1):
            file.write(f'{{"step": {step}, "fid_9k": {value}}}\n')
    saver = saving.Saver.__new__(saving.Saver)
    saver.run_dir = tmp_path
    found = {step: tmp_path for step in (1, 2, 3, 4)}
    assert saver.best(found, "fid_5k") == 3
    assert saver.best(found, "recall_5k") == 2
    assert saver.best({1: tmp_path}, "fid_5k") == 1
    assert saver.best({9: tmp_path}, "fid_5k") is None
    assert saver.best(found, "fid_9k") == 2


@pytest.mark.slow
def test_snapshots_of_an_abandoned_stretch_do_not_stay():
    options = ["trainer.snapshot_every=2", "trainer.save_every=4"]
    run = train("abandoned", *options)
    flip(run / "checkpoints" / "step_0000012" / "model.safetensors")
    flip(run / "checkpoints" / "step_0000008" / "model.safetensors")
    train("abandoned", "trainer.snapshot_every=3")
    assert sorted(path.name for path in (run / "snapshots").iterdir()) == [
        f"step_00000{k:02d}" for k in (2, 4, 6, 9, 12)
    ]


def test_what_a_damaged_log_or_export_lacks_is_said(caplog):
    run = train("damaged_records", "trainer.max_steps=4", "trainer.save_every=2")
    exported = (run / "export" / "ema.safetensors").read_bytes()
    (run / "metrics.jsonl").write_text("")
    (run / "export" / "manifest.json").write_text("{}")
    train("damaged_records", "trainer.max_steps=6", "trainer.save_every=2")
    assert "metrics.jsonl: lacks the rows after step 0" in caplog.text
    assert "export: stays as it is" in caplog.text
    assert "manifest.json" in caplog.text
    assert (run / "export" / "ema.safetensors").read_bytes() == exported


def test_the_export_holds_the_ema_weights_and_stays():
    run = train("exported", "trainer.save_every=4", "trainer.keep_last=2")
    assert sorted(path.name for path in (run / "export").iterdir()) == [
        "config.json",
        "ema.safetensors",
        "manifest.json",
    ]
    shutil.rmtree(run / "checkpoints")
    model = ddt.load_model(run / "export")
    exported = load_file(run / "export" / "ema.safetensors")
    assert all(torch.equal(value, exported[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("reason", "ask"),
    thinned(
        [
            ("SIGTERM", lambda run: signal.raise_signal(signal.SIGTERM)),
            ("SIGUSR1", lambda run: signal.raise_signal(signal.SIGUSR1)),
            ("SIGINT", lambda run: signal.raise_signal(signal.SIGINT)),
            ("the file STOP", lambda run: (run / "STOP").touch()),
        ],
        3,
    ),
)
def test_a_run_stops_on_request_and_goes_on(straight, monkeypatch, reason, ask):
    name = f"asked_{reason}".replace(" ", "_")
    run, log = Path("runs") / name, JsonlTracker.log
    handlers = [signal.getsignal(number) for number in stopping.SIGNALS]
    monkeypatch.setattr(stopping.StopRequests, "__enter__", patient(stopping.StopRequests.__enter__))

    def asking(self, step, values):
        log(self, step, values)
        if step == 4 and "loss" in values:
            ask(run)

    with monkeypatch.context() as patch:
        patch.setattr(JsonlTracker, "log", asking)
        stopped(name, f"stopped by {reason} at step 6")
    status = json.loads((run / "status.json").read_text())
    assert (status["state"], status["step"]) == ("preempted", 6)
    assert not (run / "STOP").exists()
    assert list(ckpt.list_checkpoints(run)) == [6]
    assert [signal.getsignal(number) for number in stopping.SIGNALS] == handlers
    assert_same_end(train(name), straight)


def patient(enter):
    """Let a run look for STOP at every step."""

    def entered(self):
        self.checked_at = -np.inf
        check = self.check

        def always():
            self.checked_at = -np.inf
            return check()

        self.check = always
        return enter(self)

    return entered


def stopped(name, message, *overrides):
    """Train; the run must stop on request with this message."""
    done = run_inside("train", *arguments(name, *overrides))
    assert done.returncode == STOPPED_STATUS
    assert message in done.stderr


def test_the_end_of_the_job_is_seen_coming(straight, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_END_TIME", "1000000000")
    stopped("slurm", "stopped by the time limit")
    assert json.loads(Path("runs/slurm/status.json").read_text())["state"] == "preempted"
    monkeypatch.delenv("SLURM_JOB_END_TIME")
    monkeypatch.setattr("ddt.training.stopping.MARGIN", 1000)
    stopped("hours", "stopped by the time limit", "trainer.max_hours=0.04")
    assert_same_end(train("slurm"), straight)


def test_time_for_saving_and_measuring_is_left(tmp_path, monkeypatch):
    before = [signal.getsignal(number) for number in stopping.SIGNALS]
    with stopping.StopRequests(tmp_path, 1000.0, torch.device("cpu"), 0, 1) as requests:
        assert [signal.getsignal(number) for number in stopping.SIGNALS] != before
    assert [signal.getsignal(number) for number in stopping.SIGNALS] == before
    monkeypatch.setattr(stopping.time, "time", lambda: 1000.0 - stopping.MARGIN - 100)
    requests.pause_seconds = 49.0
    assert requests.check() == 0
    requests.pause_seconds = 51.0
    assert stopping.REASONS[requests.check()] == "the time limit"


def test_a_run_has_one_command_at_a_time(straight):
    before = rows(straight)
    with filelock.FileLock(straight / ".lock"):
        message = refusal("train", *arguments("straight", "trainer.max_steps=20"))
    assert (
        message
        == "runs/straight: another command is training in this folder; wait for it, or give this one another name="
    )
    assert rows(straight) == before


def poisoned(monkeypatch, steps):
    """Make the gradients of some steps, counted from 1, NaN."""
    forward, calls = FlowMatching.forward, [0]

    def spoilt(self, **batch):
        losses = forward(self, **batch)
        calls[0] += 1
        return {**losses, "loss": losses["loss"] * float("nan")} if calls[0] in steps else losses

    monkeypatch.setattr(FlowMatching, "forward", spoilt)


def test_a_step_without_finite_gradients_changes_nothing(monkeypatch):
    poisoned(monkeypatch, [3])
    run = train(
        "poisoned", "trainer.save_every=1", "trainer.max_steps=5", "trainer.validate_every=0", "trainer.log_every=1"
    )
    before, after, later = (whole(run, step) for step in (2, 3, 4))
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert all(not torch.equal(later[key], before[key]) for key in before if key.endswith("exp_avg"))
    logged = rows(run)
    assert [row["skipped_steps"] for row in logged] == [0, 0, 1, 1, 1]
    assert ["loss" in row for row in logged] == [True, True, False, True, True]


def test_skipped_steps_are_kept_over_a_resume(monkeypatch):
    poisoned(monkeypatch, [3])
    train("kept_skips", "trainer.max_steps=4")
    assert [row["skipped_steps"] for row in rows(train("kept_skips")) if "loss" in row] == [1, 1, 1]


def test_a_lost_loading_process_ends_the_run(monkeypatch):
    monkeypatch.setattr(FileImages, "load", lambda self, indices: os.kill(os.getpid(), signal.SIGKILL))
    monkeypatch.setattr(_MultiProcessingDataLoaderIter._try_get_data, "__defaults__", (0.05,))
    monkeypatch.setattr(start, "check_shared_memory", lambda *_: None)  # it loads an image in this process
    options = ["trainer.num_workers=1", "trainer.validate_every=0"]
    monkeypatch.setattr(Measurements, "show_training_images", lambda *_: None)  # likewise
    message = refusal("train", *arguments("lost", *options))
    assert message.startswith("num_workers: a data loading process ")
    assert len(message.splitlines()) == 1
    assert json.loads(Path("runs/lost/status.json").read_text())["state"] == "failed"


def test_many_of_them_end_the_run(monkeypatch):
    poisoned(monkeypatch, range(8, 99))
    options = ["trainer.save_every=7", "trainer.validate_every=0", "trainer.max_steps=16"]
    with written_late(step=7, until=13):  # when it is seen that five were skipped
        message = refusal("train", *arguments("spoilt", *options))
    assert "5 steps in a row had non-finite gradients" in message
    assert "the last good checkpoint, for init_from, is runs/spoilt/checkpoints/step_0000007" in message
    status = json.loads(Path("runs/spoilt/status.json").read_text())
    assert status["state"] == "failed"
    assert all(value.isfinite().all() for value in whole(Path("runs/spoilt"), 7).values())


@pytest.mark.parametrize(("saved", "good"), [([3, 5, 6, 10], 5), ([4, 8], 4), ([6, 11], None)])
def test_no_checkpoint_from_the_streak_is_called_good(tmp_path, saved, good):
    for step in saved:
        folder = tmp_path / f"checkpoints/step_{step:07d}"
        folder.mkdir(parents=True)
        (folder / "manifest.json").touch()
    run = SimpleNamespace(settings=SimpleNamespace(run_dir=tmp_path))
    message = str(diverged("NaN", run, step=11, skipped_in_a_row=5))  # of the steps 6 to 10
    assert message.endswith(f"step_{good:07d}" if good else "there is no checkpoint from before")


def test_non_finite_weights_are_never_saved(monkeypatch):
    step = torch.optim.AdamW.step

    def breaking(self, *args):
        step(self, *args)
        with torch.no_grad():
            self.param_groups[0]["params"][0].view(-1)[0] = float("inf")

    def spoiling(self, *args, **kwargs):
        update(self, *args, **kwargs)
        if isinstance(self.rule, PowerFunction):
            next(self.model.parameters()).view(-1)[0] = float("nan")

    update = EMA.update
    for name, owner, method, broken in (
        ("broken", torch.optim.AdamW, "step", breaking), ("broken_average", EMA, "update", spoiling),
    ):  # fmt: skip
        with monkeypatch.context() as patch:
            patch.setattr(owner, method, broken)
            message = refusal("train", *arguments(name, "trainer.save_every=1"))
        assert "a weight is NaN or infinite at step 1" in message
        assert not list(Path("runs").glob(f"{name}/checkpoints/step_*"))


def test_clipping_bounds_the_step_and_logs_the_norm_before():
    free = train("free", "trainer.max_steps=2", "trainer.log_every=1")
    clipped = train("clipped", "trainer.max_steps=2", "trainer.log_every=1", "trainer.clip_norm=1e-3")
    assert rows(clipped)[0]["grad_norm"] == rows(free)[0]["grad_norm"] > 0.1
    assert rows(clipped)[0]["clipped"] == 1
    assert "clipped" not in rows(free)[0]

    def moment(run):
        return torch.cat([v.flatten() for k, v in whole(run, 2).items() if k.endswith("exp_avg")]).norm().item()

    # two steps of norm 1e-3 at most: exp_avg is at most (0.1·0.9 + 0.1)·1e-3
    assert moment(clipped) <= 0.19e-3 * 1.001
    assert moment(clipped) < 0.1 * moment(free)


@pytest.mark.slow
def test_an_evaluation_missed_by_a_kill_is_made_up_for(straight, monkeypatch):
    """The run dies after the last save: the next call finds step 12 complete but for its
    validation.
    """
    run = Path("runs/missed")
    shutil.copytree(straight, run)
    kept = [line for line in (run / "metrics.jsonl").read_text().splitlines(True) if "validation" not in line]
    (run / "metrics.jsonl").write_text("".join(kept))
    train("missed", "trainer.preview_every=12")  # it is complete but for these
    assert [row["step"] for row in rows(run) if "validation_loss" in row] == [12]
    assert (run / "previews" / "step_0000012.png").is_file()
    train("missed", "trainer.max_steps=13")
    assert [row["step"] for row in rows(run) if "validation_loss" in row] == [12, 13]
    (run / "metrics.jsonl").write_text((run / "metrics.jsonl").read_text().replace("validation", "other"))
    train("missed", "trainer.max_steps=13")
    assert [row["step"] for row in rows(run) if "partial" in row] == [13]  # the last row stays


@pytest.mark.parametrize("state", ["running", "failed", None])
def test_a_complete_run_is_done_whatever_its_status_says(straight, state):
    (straight / "status.json").unlink()
    if state is not None:
        stopping.write_status(straight, state, 3)
    train("straight")
    assert stopping.read_status(straight)["state"] == "done"


def test_only_folders_of_steps_are_checkpoints(saved_often, straight, caplog):
    run = Path("runs/strangers")
    shutil.copytree(saved_often, run)
    for name in ("step_best", "step_4", "step_final"):
        shutil.copytree(run / "checkpoints" / "step_0000004", run / "checkpoints" / name)
    train("strangers")
    assert_same_end(run, straight)
    assert (run / "checkpoints" / "step_best" / "manifest.json").is_file()
    assert "set aside" not in caplog.text


def test_nothing_is_removed_while_the_best_is_unknown(saved_often, tmp_path, caplog):
    run = shutil.copytree(saved_often, tmp_path / "run")
    shutil.copytree(run / "checkpoints" / "step_0000008", run / "checkpoints" / "step_0000009")
    saver = saving.Saver.__new__(saving.Saver)
    saver.run_dir, saver.accelerator = run, SimpleNamespace(is_main_process=True)
    saver.settings = SimpleNamespace(keep_last=2, keep_every=0, keep_best="fid_5k")
    saver.prune()
    assert "no checkpoint has this metric, so all stay" in caplog.text
    assert list(ckpt.list_checkpoints(run)) == [4, 8, 9]
    saver.settings.keep_best = None
    saver.prune()
    assert list(ckpt.list_checkpoints(run)) == [8, 9]


def test_what_cannot_be_removed_costs_nothing(monkeypatch, caplog, straight):
    remove = shutil.rmtree

    def busy(path, **kwargs):
        if path.name.startswith(".del-step"):
            raise OSError(16, "busy")
        remove(path, **kwargs)

    monkeypatch.setattr(shutil, "rmtree", busy)
    run = train("busy", "trainer.save_every=4", "trainer.keep_last=2")
    assert_same_end(run, straight)
    assert "could not be removed" in caplog.text


def test_what_a_resumed_run_must_share():
    trainer = {"lr_schedule": "constant", "decay_end": None, "max_steps": 10, "save_every": 5}
    old = {"model": {"depth": 6}, "seed": 0, "trainer": trainer}
    new = {"model": {"depth": 7}, "seed": 0, "trainer": {**trainer, "max_steps": 20, "save_every": 1}}
    assert frozen_differences(old, new) == {"model.depth": (6, 7)}
    new["trainer"]["lr_schedule"] = old["trainer"]["lr_schedule"] = "linear"
    assert frozen_differences(old, new) == {"model.depth": (6, 7), "trainer.max_steps": (10, 20)}
    new["trainer"]["decay_end"] = old["trainer"]["decay_end"] = 10  # the learning rate no longer depends on max_steps
    assert frozen_differences(old, new) == {"model.depth": (6, 7)}
    new["trainer"]["decay_end"] = 20
    assert frozen_differences(old, new) == {"model.depth": (6, 7), "trainer.decay_end": (10, 20)}


# --- whose folder


def contents(folder):
    """Every file below a folder but the lock, with its bytes."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


def test_a_folder_of_another_training_is_not_taken_over_without_its_checkpoints():
    run = train("archived", "trainer.save_every=4")
    (run / "checkpoints").rename(run.parent / "archive")
    before = contents(run)
    said = refusal("train", *arguments("archived", "model.depth=4"))
    assert "runs/archived/config.json: belongs to another training (model.depth 3 -> 4)" in said
    assert "runs/archived: holds export and snapshots" not in said
    said = refusal("train", *arguments("archived"))
    assert said.startswith(
        "runs/archived: holds export and metrics.jsonl of this training but no checkpoint of it; put"
    )
    assert contents(run) == before
    (run / "checkpoints").mkdir()  # and without what was in it
    assert "but no checkpoint of it" in refusal("train", *arguments("archived"))
    assert contents(run) == before
    (run / "checkpoints").rmdir()
    (run.parent / "archive").rename(run / "checkpoints")
    assert_same_end(train("archived"), run)


def test_a_run_killed_before_its_first_checkpoint_starts_over(straight, monkeypatch):
    def kill(*_, **__):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(saving.Saver, "save", kill)
        with pytest.raises(Killed):
            train("early")
    assert (Path("runs/early") / "metrics.jsonl").read_text()
    (Path("runs/early") / "train.log").write_text("mine")
    assert_same_end(train("early"), straight)
    assert (Path("runs/early") / "train.log").read_text() == "mine"


def test_files_that_a_run_would_write_over_are_refused():
    run = Path("runs/others")
    run.mkdir(parents=True)
    (run / "metrics.jsonl").write_text("mine")
    assert refusal("train", *arguments("others")).startswith("name=runs/others: holds metrics.jsonl, not written by")
    (run / "config.json").write_text("{}")
    assert refusal("train", *arguments("others")).startswith("runs/others/config.json: belongs to another training (")
    assert {path.name for path in contents(run)} == {"metrics.jsonl", "config.json"}


def test_an_export_of_other_weights_is_not_replaced(straight):
    run = Path(shutil.copytree(straight, "runs/foreign_export"))
    config = json.loads((run / "export" / "config.json").read_text())
    config["run"]["seed"] = 7
    (run / "export" / "config.json").write_text(json.dumps(config))
    before = contents(run)
    said = refusal("train", *arguments("foreign_export", "trainer.max_steps=16"))
    assert said.startswith("runs/foreign_export/export: belongs to another training (seed 7 -> 0)")
    assert contents(run) == before


def test_the_jobs_of_a_sweep_lie_beside_the_outputs_of_a_run_of_its_name(straight):
    before = contents(straight)
    job = train("straight/seed1", "seed=1", "trainer.max_steps=1")
    assert ckpt.newest_checkpoint(job) is not None
    shutil.rmtree(job)
    assert contents(straight) == before
    job = train("alone/seed1", "seed=1", "trainer.max_steps=1")  # and the other way round
    train("alone", "trainer.max_steps=1")
    assert ckpt.newest_checkpoint(job) is not None


@pytest.mark.parametrize(
    "name",
    ["straight/previews/x", "straight/checkpoints/x", "straight/checkpoints/step_0000012", "straight/export/a/b"],
)
def test_no_run_lies_inside_the_outputs_of_another_or_a_checkpoint(straight, name):
    before = contents(straight)
    said = refusal("train", *arguments(name))
    assert said.startswith(f"runs/{name}: lies inside ")
    assert said.endswith("give another name=")
    assert contents(straight) == before


def test_temporary_files_of_others_stay_in_a_runs_folder(straight):
    run = Path(shutil.copytree(straight, "runs/notes"))
    for path in (run / ".tmp-notes" / "a", run / "checkpoints" / ".tmp-export" / "a"):
        path.parent.mkdir()
        path.write_text("mine")
    for left in (run / "checkpoints" / ".tmp-step_0000016", run / ".tmp-export", run / ".del-export"):
        left.mkdir()
    (run / f".tmp-ddt-{platform.node()}-{2**22 + 1}-config.json").touch()
    train("notes", "trainer.max_steps=16")
    assert sorted(path.name for path in run.rglob(".tmp-*")) == [".tmp-export", ".tmp-notes"]
    assert not (run / ".tmp-export").exists()
    assert not (run / ".del-export").exists()


@pytest.mark.slow
def test_checkpoints_are_pruned_after_the_measurements_that_a_kill_cost(monkeypatch):
    options = ["trainer.save_every=1", "trainer.validate_every=1", "trainer.keep_last=2", "trainer.max_steps=6"]
    options += ["trainer.keep_best=validation_loss"]
    losses = {1: 5, 2: 1, 3: 4, 4: 4, 5: 4, 6: 0}  # step 2 is the best until step 6 is measured

    def measure(self, names, network, step, tracker):
        if step == 6 and self.run_dir.name == "kept_killed" and kill:
            raise Killed
        tracker.log(step, {"validation_loss": losses[step]})

    monkeypatch.setattr(start.Measurements, "__call__", measure)
    assert list(ckpt.list_checkpoints(train("kept_whole", *options))) == [5, 6]
    kill = True
    with pytest.raises(Killed):
        train("kept_killed", *options)
    kill = False
    assert list(ckpt.list_checkpoints(train("kept_killed", *options))) == [5, 6]


def test_a_log_on_a_full_disk_costs_no_step(straight, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("sys.stderr", full_disk_stream())
        run = train("unlogged")
    assert_same_end(run, straight)
