"""metrics.jsonl is complete, and training continues whatever W&B does."""

import json
import math

import pytest
from conftest import refusal, succeed
from PIL import Image

from ddt.errors import UserError
from ddt.training.tracking import JsonlTracker, WandbTracker

CONFIG = {"name": "run"}


class Run:
    """A W&B run whose every call fails."""

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


def test_a_failing_wandb_stops_nothing(tmp_path, monkeypatch):
    modes = []

    def init(mode, **arguments):
        modes.append((mode, arguments["id"]))
        if mode == "online":
            raise RuntimeError("no network")
        return Run()

    monkeypatch.setattr("wandb.init", init)
    for _ in range(2):  # a resumed run keeps its id
        tracker = WandbTracker(tmp_path, 5, CONFIG)
        tracker.log(5, {"loss": 1.0})
        tracker.finish()
    assert [mode for mode, _ in modes] == ["online", "offline"] * 2
    assert modes[1][1] == modes[2][1]
    assert rows(tmp_path)[-1] == {"step": 5, "loss": 1.0}


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
        assert picture.width == 1200  # two panels
    message = refusal("scripts.plot_run", runs, "keys=[loss,repa_loss]", f"out={tmp_path / 'y.png'}")
    assert message == "keys=repa_loss: no run has logged it; choose from dispersive_loss, loss"
    assert not (tmp_path / "y.png").exists()


@pytest.mark.parametrize("losses", [[math.nan, 2.0, 1.0], [2.0, 1.0, math.nan], [None, 2.0, math.inf]], ids=str)
def test_the_scale_of_a_plot_depends_on_finite_values_alone(tmp_path, monkeypatch, losses):
    figures = []
    monkeypatch.setattr("ddt.pictures.save_figure", lambda figure, path: figures.append(figure))
    (tmp_path / "metrics.jsonl").write_text(
        "".join(f"{json.dumps({'step': k, 'loss': loss, 'lr': k - 1.0})}\n" for k, loss in enumerate(losses))
    )
    succeed("scripts.plot_run", f"runs={tmp_path}", "keys=[loss,lr]", f"out={tmp_path / 'x.png'}")
    assert [axes.get_yscale() for axes in figures[0].axes] == ["log", "linear"]
