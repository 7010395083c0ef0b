"""metrics.jsonl is complete, and training continues whatever W&B does."""

import json
import math

import pytest
import torch
from conftest import refusal, succeed, thinned
from PIL import Image

from ddt.errors import UserError
from ddt.training.throughput import Clock
from ddt.training.tracking import JsonlTracker, TensorBoardTracker, WandbTracker, dashboard_name, last_measurement

CONFIG = {"name": "run"}


class Run:
    """A W&B run whose every call fails."""

    offline, url, dir = False, "https://wandb.ai/run", "wandb/offline-run-1-x/files"

    def fail(self, *args, **kwargs):
        raise ConnectionResetError("no network")

    log = finish = fail

    def define_metric(self, *args, **kwargs):
        pass


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_rows_after_the_resumed_step_and_partial_rows_are_cut(tmp_path):
    tracker = JsonlTracker(tmp_path, 0, CONFIG)
    for step in (2, 4, 6):
        tracker.log(step, {"loss": step / 2})
    tracker.log(3, {"loss": 1.0, "partial": True})
    tracker.finish()
    tracker = JsonlTracker(tmp_path, 4, CONFIG)
    tracker.log(6, {"loss": 9.0})
    tracker.finish()
    assert rows(tmp_path) == [{"step": 2, "loss": 1.0}, {"step": 4, "loss": 2.0}, {"step": 6, "loss": 9.0}]


def test_a_damaged_row_in_the_middle_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl: line 2 is damaged"):
        JsonlTracker(tmp_path, 3, CONFIG)


def test_a_failing_wandb_stops_nothing_and_keeps_its_id(tmp_path, monkeypatch):
    calls = []

    def init(mode, **arguments):
        calls.append((mode, arguments["id"]))
        if mode == "online":
            raise RuntimeError("no network")
        return Run()

    monkeypatch.setattr("wandb.init", init)
    monkeypatch.setattr("wandb.teardown", lambda: calls.append("teardown"))
    for _ in range(2):  # one training is one run on W&B, however often it starts without a network
        tracker = WandbTracker(tmp_path, 5, CONFIG, mode="online")
        tracker.log(5, {"loss": 1.0})
        tracker.finish()
    name = (tmp_path / "wandb_id").read_text()
    assert calls == [("online", name), "teardown", ("offline", name)] * 2
    assert rows(tmp_path)[-1] == {"step": 5, "loss": 1.0}


@pytest.mark.slow
def test_wandb_keeps_its_id_when_its_service_is_unreachable(tmp_path, monkeypatch):
    """Its service holds the id of a failed attempt: without `teardown` the second one fails too."""
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nothing listens there
    import wandb

    wandb.teardown()
    tracker = WandbTracker(tmp_path, 0, CONFIG, mode="online", init_timeout=1)
    try:
        assert tracker.run.id == (tmp_path / "wandb_id").read_text()
    finally:
        tracker.finish()
        wandb.teardown()


def wandb_arguments(folder, monkeypatch, environment=None, **settings):
    calls = []
    monkeypatch.setattr("wandb.init", lambda **arguments: calls.append(arguments) or Run())
    if environment is None:
        monkeypatch.delenv("WANDB_MODE", raising=False)
    else:
        monkeypatch.setenv("WANDB_MODE", environment)
    WandbTracker(folder, 0, CONFIG, **settings).finish()
    return calls


def test_the_mode_of_the_environment_is_respected(tmp_path, monkeypatch):
    for environment, settings, mode in (
        ("offline", {}, "offline"),
        ("disabled", {}, None),
        ("offline", {"mode": "online"}, "online"),
        ("online", {"mode": "disabled"}, None),
    ):
        calls = wandb_arguments(tmp_path, monkeypatch, environment, **settings)
        assert [arguments["mode"] for arguments in calls] == [mode] * (mode is not None)
    (arguments,) = wandb_arguments(tmp_path, monkeypatch, "offline", entity="team", tags=("a", "b"))
    assert (arguments["entity"], arguments["tags"]) == ("team", ["a", "b"])


def test_without_a_login_nothing_starts_and_nobody_is_asked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a prompt"))
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    message = refusal("train", "tracker=wandb", "tracker.mode=online")
    assert message.startswith("tracker=wandb: no login of W&B on this machine; run wandb login, or give tracker.mode=")
    assert not list(tmp_path.iterdir())


def test_dashboards_get_names_in_groups(tmp_path, monkeypatch, caplog):
    named = {
        "loss": "train/loss", "fm_loss_by_t/0.0-0.1": "train/fm_loss_by_t/0.0-0.1", "lr": "train/lr",
        "validation_loss": "val/loss", "fid_50k": "eval/fid_50k", "fd_digits_500": "eval/fd_digits_500",
        "precision_1.5k": "eval/precision_1.5k", "images_per_second": "perf/images_per_second", "mfu": "perf/mfu",
    }  # fmt: skip
    assert {name: dashboard_name(name) for name in named} == named
    row = Clock(torch.device("cpu"), 1, 4, 10, 0, "fp32").row()
    assert {dashboard_name(name).partition("/")[0] for name in row} == {"perf"}

    class Online(Run):
        def log(self, values):
            sent.append(values)

    sent = []
    monkeypatch.setattr("wandb.init", lambda **_: Online())
    with caplog.at_level("INFO"):
        WandbTracker(tmp_path, 0, CONFIG, mode="online").log(3, {"loss": 1.0, "validation_loss": 2.0})
    assert sent == [{"step": 3, "train/loss": 1.0, "val/loss": 2.0}]
    assert rows(tmp_path) == [{"step": 3, "loss": 1.0, "validation_loss": 2.0}]  # the file's names are flat
    assert caplog.messages == ["W&B: https://wandb.ai/run"]
    monkeypatch.setattr(Online, "offline", True)
    with caplog.at_level("INFO"):
        WandbTracker(tmp_path, 0, CONFIG, mode="offline")
    assert caplog.messages[-1] == "W&B: offline; later: wandb sync wandb/offline-run-1-x"


def test_tensorboard_shows_values_and_pictures_and_hides_what_a_resume_logs_again(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    Image.new("RGB", (5, 3), (255, 0, 0)).save(tmp_path / "grid.png")
    tracker = TensorBoardTracker(tmp_path, 0, CONFIG)
    for step in (1, 2, 3):
        tracker.log(step, {"loss": step / 2})
    tracker.image(2, "preview", tmp_path / "grid.png")
    tracker.finish()
    tracker = TensorBoardTracker(tmp_path, 2, CONFIG)  # the checkpoint of step 2
    tracker.log(3, {"loss": 9.0, "fid_1k": 4.0})
    tracker.finish()
    seen = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in seen.Scalars("train/loss")] == [(1, 0.5), (2, 1.0), (3, 9.0)]
    assert [event.value for event in seen.Scalars("eval/fid_1k")] == [4.0]
    (picture,) = seen.Images("images/preview")
    assert (picture.step, picture.width, picture.height) == (2, 5, 3)
    assert rows(tmp_path)[-1] == {"step": 3, "loss": 9.0, "fid_1k": 4.0}


@pytest.mark.parametrize(
    ("keep_best", "expected"), [(None, 0.25), ("fid_5k", 7.0), ("validation_loss", 0.25), ("precision_5k", 0.25)]
)
def test_a_sweeper_gets_what_was_measured_last(tmp_path, keep_best, expected):
    (tmp_path / "config.json").write_text(json.dumps({"trainer": {"keep_best": keep_best}}))
    logged = [{"step": 1, "loss": 2.0}, {"step": 1, "validation_loss": 0.5, "fid_5k": 9.0}]
    logged += [{"step": 2, "validation_loss": 0.25}, {"step": 2, "fid_5k": 7.0}, {"step": 3, "loss": 1.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in logged))
    assert last_measurement(tmp_path) == expected


def test_runs_of_a_sweep_are_one_group(tmp_path, monkeypatch):
    groups = []
    monkeypatch.setattr("wandb.init", lambda **arguments: groups.append(arguments["group"]) or Run())
    for name in ("alone", "depths/model.encoder_depth=3"):
        WandbTracker(tmp_path, 0, {"name": name}).finish()
    assert groups == [None, "depths"]


def test_plot_run_plots_logged_values(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        rows = [{"step": k, "loss": 1 / k, "dispersive_loss": -k} for k in range(1, 4)]
        (tmp_path / name / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    runs = f"runs=[{tmp_path / 'a'},{tmp_path / 'b'}]"
    succeed("scripts.plot_run", runs, "keys=[loss,dispersive_loss]", f"out={tmp_path / 'x.png'}")
    with Image.open(tmp_path / "x.png") as picture:
        assert picture.width > 2 * picture.height  # two panels
    message = refusal("scripts.plot_run", runs, "keys=[loss,repa_loss]", f"out={tmp_path / 'y.png'}")
    assert message == "keys=repa_loss: no run has logged it; choose from dispersive_loss, loss"
    assert not (tmp_path / "y.png").exists()


LOSSES = [[math.nan, 2.0, 1.0], [2.0, 1.0, math.nan], [None, 2.0, math.inf]]


@pytest.mark.parametrize("losses", thinned(LOSSES, 3), ids=str)
def test_the_scale_of_a_plot_depends_on_finite_values_alone(tmp_path, monkeypatch, losses):
    figures = []
    monkeypatch.setattr("ddt.figures.save_figure", lambda figure, path: figures.append(figure))
    (tmp_path / "metrics.jsonl").write_text(
        "".join(f"{json.dumps({'step': k, 'loss': loss, 'lr': k - 1.0})}\n" for k, loss in enumerate(losses))
    )
    succeed("scripts.plot_run", f"runs={tmp_path}", "keys=[loss,lr]", f"out={tmp_path / 'x.png'}")
    assert [axes.get_yscale() for axes in figures[0].axes] == ["log", "linear"]
