"""The report of a sweep: its numbers by hand, what is left out, one-line errors."""

import csv
import json
import math

import pytest
from conftest import refusal, small_checkpoint, small_ddt, succeed
from matplotlib import pyplot as plt
from PIL import Image

from ddt.errors import UserError
from ddt.metrics.ranking import better
from scripts.studies.sweep.report import DEPTH, PUBLISHED, draw, group_by_setting, write_report
from scripts.studies.sweep.runs import count_parameters, default_metric, differing, find_runs
from scripts.studies.sweep.settings import SweepSettings

pytestmark = pytest.mark.usefixtures("one_thread")
REPORT = "scripts.studies.sweep.__main__"
DISTANCES = {1: [40.0, 44.0, 48.0], 3: [24.0, 26.0, 31.0]}  # by encoder depth, then seed
BASELINE = [50.0, 52.0, 51.0]


def test_parameters_are_those_of_the_newest_checkpoint(tmp_path):
    assert count_parameters(tmp_path) is None
    small_checkpoint(tmp_path / "checkpoints" / "step_0000007")
    assert count_parameters(tmp_path) == sum(p.numel() for p in small_ddt(in_channels=1).parameters())


def row(step, **values):
    return {"step": step, **values}


def write_run(folder, encoder_depth, seed, distance, state="done", step=20, rows=None, **changes):
    """A run folder as training leaves it, without weights."""
    folder.mkdir(parents=True)
    model = {"_target_": "ddt.model.DDT", "depth": 4, "decoder_block": "attention", "encoder_depth": encoder_depth}
    if encoder_depth is None:
        model = {"_target_": "ddt.model.DiT", "depth": 4}
    config = {
        "name": f"sweep/{folder.name}",
        "seed": seed,
        "model": model,
        "data": {"_target_": "ddt.data.images.Digits", "fingerprint": "f"},
        "trainer": {"max_steps": 20, "num_workers": seed, "ema_decay": 0.5},
        "optimizer": {"lr": 0.002},
        "num_processes": 1 + seed,
    }
    for key, value in changes.items():
        group, _, name = key.partition("__")
        config[group][name] = value
    (folder / "config.json").write_text(json.dumps(config))
    if rows is None:
        rows = [row(10, loss=0.9, lr=1e-3, images_per_second=100.0), row(10, fd_digits_1k=99.0, fd_digits_500=98.0)]
        rows += [row(20, loss=0.8, lr=1e-3, images_per_second=300.0, partial=True), row(20, validation_loss=0.5)]
        rows += [row(20, fd_digits_1k=distance, fd_digits_500=distance + 1, class_accuracy_1k=0.5)]
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(each)}\n" for each in rows))
    if state is not None:
        (folder / "status.json").write_text(json.dumps({"state": state, "step": step, "reason": "asked to stop"}))
    return folder


@pytest.fixture
def sweep(tmp_path):
    """Two depths and the undivided baseline, of three seeds each, some with a checkpoint."""
    folder = tmp_path / "runs" / "sweep"
    for depth, distances in DISTANCES.items():
        for seed, distance in enumerate(distances):
            run = write_run(folder / f"depth={depth}" / f"seed={seed}", depth, seed, distance)
            (run / "checkpoints" / "step_0000020").mkdir(parents=True)
            (run / "checkpoints" / "step_0000020" / "config.json").write_text("{}")
    for seed, distance in enumerate(BASELINE):
        write_run(folder / f"model=dit,seed={seed}", None, seed, distance, state=None)
    return folder


def make(sweep, out, metric=None, x=DEPTH, figure=False):
    """Write a report, by default without its slow figure; return JSON, CSV lines and Markdown."""
    with pytest.MonkeyPatch.context() as patch:
        if not figure:
            patch.setattr("scripts.studies.sweep.report.draw", lambda *_: None)
        write_report(SweepSettings(sweep if isinstance(sweep, list) else str(sweep), str(out), metric, x))
    return contents(out)


def contents(out):
    with (out / "report.csv").open() as file:
        lines = list(csv.DictReader(file))
    return json.loads((out / "report.json").read_text()), lines, (out / "report.md").read_text()


def refused(sweep, out, metric=None, x=DEPTH):
    """The one line that refuses a report."""
    with pytest.raises(UserError) as error:
        write_report(SweepSettings(sweep if isinstance(sweep, list) else str(sweep), str(out), metric, x))
    (line,) = str(error.value).splitlines()
    return line


def table_line(text, *cells):
    """The line of a Markdown table that begins with some cells, as a list of cells."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    (row,) = [row for row in rows if row[: len(cells)] == list(cells)]
    return row


def test_means_deviations_and_tables(sweep, tmp_path):
    found, lines, text = make(sweep, tmp_path / "out", "fd_digits_1k", figure=True)
    means = {one["settings"].get(DEPTH): one for one in found["means"]}
    assert set(means) == {1, 3, None}
    assert means[1]["means"]["fd_digits_1k"] == {"mean": 44.0, "sd": 4.0}
    assert means[3]["means"]["fd_digits_1k"] == {"mean": 27.0, "sd": pytest.approx(math.sqrt(13))}
    assert means[None]["means"]["fd_digits_1k"] == {"mean": 51.0, "sd": 1.0}
    assert [means[key]["x"] for key in (1, 3, None)] == [0.25, 0.75, None]
    assert all(one["seeds"] == 3 for one in means.values())
    # only in these do the settings differ: not in what a DiT lacks, nor in names, processes and
    # workers
    assert means[3]["settings"] == {"model._target_": "ddt.model.DDT", DEPTH: 3}
    assert means[None]["settings"] == {"model._target_": "ddt.model.DiT"}
    assert table_line(text, "ddt.model.DDT", "1", "3")[3] == "44.00 ± 4.00"
    assert table_line(text, "ddt.model.DDT", "3", "3")[3] == "**27.00 ± 3.61**"
    assert table_line(text, "ddt.model.DiT", "–", "3")[3] == "51.00 ± 1.00"
    header = ["run", "model._target_", DEPTH, "seed", "parameters", "steps", "status", "fd_digits_1k"]
    assert table_line(text, *header)
    cells = table_line(text, "depth=3/seed=2")
    assert cells[:8] == ["depth=3/seed=2", "ddt.model.DDT", "3", "2", "–", "20/20", "done", "31.00"]
    assert cells[-1] == "200"  # the mean rate
    assert "None." in text
    assert len(lines) == 9
    line = next(line for line in lines if line["run"].endswith("depth=1/seed=1"))
    assert (line["fd_digits_1k"], line["fd_digits_500"], line["loss"]) == ("44.0", "45.0", "0.8")
    assert not {"partial", "lr"} & set(line)
    assert (line["images_per_second"], line["state"], line["left_out"]) == ("200.0", "done", "")
    with Image.open(tmp_path / "out" / "curve.png") as picture:
        assert picture.width > picture.height


def test_unfinished_runs_and_those_without_the_metric_are_left_out(sweep, tmp_path, caplog):
    write_run(sweep / "preempted", 1, 3, 1e6, "preempted", step=12, rows=[row(10, loss=1.0, lr=0.1)])
    write_run(sweep / "running", 1, 4, 1e6, "running")
    write_run(sweep / "killed", 1, 5, 1e6, None, rows=[row(10, fd_digits_1k=1e6)])
    write_run(sweep / "started", 1, 6, 1e6, "running", step=0, rows=[])
    write_run(sweep / "early", 3, 3, 1e6, rows=[row(10, fd_digits_1k=1e6), row(20, loss=1.0, lr=0.1)])
    write_run(sweep / "without", 3, 4, 1e6, rows=[row(20, loss=1.0, lr=0.1)])
    write_run(sweep / "diverged", 3, 5, math.nan)
    (sweep / "broken").mkdir()
    (sweep / "broken" / "status.json").write_text('{"state": "failed", "step": 0, "reason": "no such file"}')
    found, lines, text = make(sweep, tmp_path / "out", "fd_digits_1k")
    assert found["left_out"] == {
        f"{sweep}/preempted": "preempted at step 12 of 20 (asked to stop)",
        f"{sweep}/running": "running at step 20 of 20 (asked to stop)",
        f"{sweep}/killed": "not ended at step 10 of 20",
        f"{sweep}/started": "running at step 0 of 20 (asked to stop)",
        f"{sweep}/early": "has fd_digits_1k at step 10, not at its end",
        f"{sweep}/without": "has no fd_digits_1k",
        f"{sweep}/diverged": "its fd_digits_1k is nan",
        f"{sweep}/broken": "failed before its first step (no such file)",
    }
    for folder, reason in found["left_out"].items():
        assert f"- `{folder}`: {reason}" in text
        assert f"{folder}: {reason}" in caplog.text
    means = {one["settings"].get(DEPTH): one["means"]["fd_digits_1k"]["mean"] for one in found["means"]}
    assert means == {1: 44.0, 3: 27.0, None: 51.0}
    assert len(lines) == 16
    assert {line["run"] for line in lines if line["left_out"]} == set(found["left_out"]) - {f"{sweep}/broken"}
    assert table_line(text, "early")[7] == "1000000.00 (step 10)"
    assert table_line(text, "preempted")[5:7] == ["12/20", "preempted"]


def test_a_sweep_that_just_started_has_a_table_without_means(tmp_path):
    write_run(tmp_path / "sweep" / "a", 1, 0, 0, "running", step=10, rows=[row(10, loss=1.0, lr=0.1)])
    found, _, text = make(tmp_path / "sweep", tmp_path / "out", "loss", figure=True)
    assert [(one["seeds"], one["means"]) for one in found["means"]] == [(0, {})]
    assert "running at step 10 of 20" in text
    assert (tmp_path / "out" / "curve.png").is_file()


def test_a_metric_that_one_of_the_seeds_lacks_has_no_mean(sweep, tmp_path):
    path = sweep / "depth=3" / "seed=1" / "metrics.jsonl"
    path.write_text(path.read_text().replace('"class_accuracy_1k": 0.5', '"other": 0'))
    found, *_ = make(sweep, tmp_path / "out", "fd_digits_1k")
    means = {one["settings"].get(DEPTH): one["means"]["class_accuracy_1k"] for one in found["means"]}
    assert means == {1: {"mean": 0.5, "sd": 0.0}, 3: None, None: {"mean": 0.5, "sd": 0.0}}


def test_settings_that_differ(sweep):
    """Absent is a value of its own but where another kind of the group explains it."""
    write_run(sweep / "lr", 3, 7, 1.0, optimizer__lr=0.1)
    write_run(sweep / "eps", 3, 8, 1.0, optimizer__eps=1e-6, data__fingerprint="another", trainer__save_every=3)
    runs, _ = find_runs([str(sweep)])
    assert differing(runs, DEPTH) == ["model._target_", "optimizer.lr", "optimizer.eps", DEPTH]
    assert "trainer.num_workers" in differing(runs, "trainer.num_workers")  # asked for
    found = group_by_setting(runs, differing(runs, DEPTH), ["fd_digits_1k"], DEPTH)
    assert sorted(len(one.values) for one in found) == [1, 1, 3, 3, 3]


def test_a_baseline_of_another_depth_has_the_share_of_its_own(sweep):
    write_run(sweep / "deep", 3, 0, 1.0, model__depth=12)
    runs, _ = find_runs([str(sweep)])
    found = group_by_setting(runs, differing(runs, DEPTH), ["fd_digits_1k"], DEPTH)
    assert sorted(one.x for one in found if one.x is not None) == [0.25, 0.25, 0.75]


def test_default_metric(sweep, tmp_path):
    assert make(sweep, tmp_path / "a")[0]["metric"] == "fd_digits_500"

    def chosen(*names):
        runs = [
            write_run(tmp_path / "_".join(names) / str(seed), 1, seed, 0, rows=[row(20, **dict.fromkeys(own, 1.0))])
            for seed, own in enumerate(map(str.split, names))
        ]
        return default_metric(find_runs([str(runs[0].parent)])[0])

    assert chosen("fd_digits_500 fid_50k fid_5k sfid_1k", "fid_50k fid_5k") == "fid_5k"
    assert chosen("fd_dinov2_5k fd_dinov2_900", "fd_dinov2_5k", "loss") == "fd_dinov2_5k"
    assert chosen("fid_5k validation_loss", "fid_50k") == "validation_loss"  # of different samples
    assert chosen("loss", "loss validation_loss") == "validation_loss"
    names = ("fid_5k", "fd_digits_1k", "validation_loss", "class_accuracy_1k", "recall_5k", "authenticity_1k")
    assert [better(name) for name in names] == ["lower", "lower", "lower", "higher", "higher", "higher"]


def test_the_best_mean_of_a_metric_whose_higher_values_are_better(sweep, tmp_path):
    path = sweep / "model=dit,seed=0" / "metrics.jsonl"
    path.write_text(path.read_text().replace('"class_accuracy_1k": 0.5', '"class_accuracy_1k": 0.8'))
    _, _, text = make(sweep, tmp_path / "out", "class_accuracy_1k")
    assert table_line(text, "ddt.model.DiT", "–", "3")[3] == "**0.6000 ± 0.1732**"


def panels_of(monkeypatch, tmp_path, sweep, x):
    """The axes of the figure by title."""
    monkeypatch.setattr(plt, "close", lambda figure: None)
    runs, _ = find_runs([str(sweep)])
    draw(group_by_setting(runs, differing(runs, x), ["fd_digits_1k"], x), "fd_digits_1k", x, tmp_path / "x.png")
    figure = plt.gcf()
    monkeypatch.undo()
    plt.close(figure)
    return {axes.get_title(): axes for axes in figure.axes}


def lines_of(axes):
    lines = [list(zip(*map(list, line.get_data()), strict=True)) for line in axes.lines if line.get_linestyle() == "-"]
    return [points for points in lines if len(points) > 1]


def legend_of(figure):
    """The labels of the one legend, which no panel has beside it."""
    (legend,) = figure.legends
    assert [axes.get_legend() for axes in figure.axes] == [None] * len(figure.axes)
    return [text.get_text() for text in legend.get_texts()]


def test_the_published_curves_stand_apart(monkeypatch, tmp_path, sweep):
    """Ours and theirs against the share of the encoder, on axes of their own."""
    own, *theirs = panels_of(monkeypatch, tmp_path, sweep, DEPTH).items()
    assert lines_of(own[1]) == [[(0.25, 44.0), (0.75, 27.0)]]
    points = [line.get_xydata().tolist() for line in own[1].lines if line.get_marker() == "."]
    assert sorted(map(tuple, points[0])) == sorted(
        (depth / 4, value) for depth, values in DISTANCES.items() for value in values
    )
    band = own[1].patches[0].get_extents().transformed(own[1].transData.inverted())
    assert (band.y0, band.y1) == (pytest.approx(50.0), pytest.approx(52.0))
    assert legend_of(own[1].figure) == ["undivided (DiT)", "DDT", "published: DDT",
                                        "published: undivided (Improved-REPA)"]  # fmt: skip
    assert [title.split(":")[0] for title, _ in theirs] == ["published, ImageNet 256"] * 2
    for (_, axes), (depth, curve, undivided) in zip(theirs, PUBLISHED.values(), strict=True):
        assert lines_of(axes) == [[(blocks / depth, fid) for blocks, fid in curve.items()]]
        (level,) = [line.get_ydata()[0] for line in axes.lines if line.get_linestyle() == "--"]
        assert level == undivided


def test_another_setting_along_the_curve_has_nothing_published_beside_it(monkeypatch, tmp_path, sweep):
    write_run(sweep / "lr", 3, 0, 20.0, optimizer__lr=0.1)
    ((_, axes),) = panels_of(monkeypatch, tmp_path, sweep, "optimizer.lr").items()
    assert axes.get_xlabel() == "optimizer.lr"
    assert lines_of(axes) == [[(0.002, 27.0), (0.1, 20.0)]]
    labels = legend_of(axes.figure)
    assert set(labels) == {"DDT, model.encoder_depth=1", "DDT, model.encoder_depth=3", "undivided (DiT)"}
    assert len(labels) == 3


def test_only_the_same_command_writes_a_report_again(sweep, tmp_path):
    out = tmp_path / "out"
    make(sweep, out)
    write_run(sweep / "new", 1, 3, 52.0)
    assert len(make(sweep, out)[1]) == 10
    before = (out / "report.json").read_bytes()
    for changes in ({"x": "model.depth"}, {"metric": "loss"}):
        line = refused(sweep, out, **changes)
        assert line == f"out={out}: holds another report and is not written over; choose another out="
    other = tmp_path / "other"
    other.mkdir()
    (other / "report.md").write_text("mine")
    assert "nothing is written over" in refused(sweep, other)
    assert "is a file; give a folder" in refused(sweep, other / "report.md")
    assert [path.read_text() for path in other.iterdir()] == ["mine"]
    assert (out / "report.json").read_bytes() == before


def test_several_folders(sweep, tmp_path):
    more = str(write_run(tmp_path / "runs" / "more" / "a", 20, 0, 30.0).parent)
    found, lines, _ = make([str(sweep), more], tmp_path / "out")
    assert len(lines) == 10
    assert [one["settings"].get(DEPTH) for one in found["means"]] == [1, 3, 20, None]  # by size
    line = refused([str(sweep), str(tmp_path / "runs")], tmp_path / "b")
    assert "which another folder has; name it once" in line


def damage(text):
    return lambda path: path.write_text(text)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("metrics.jsonl", lambda path: path.unlink(), "is missing; restore it or move the run's folder away"),
        ("metrics.jsonl", damage('{"step": 1}\n{"loss": 3}\n'), "line 2 is damaged (no step); remove it"),
        ("config.json", damage('{"seed": 1'), "damaged or no JSON ("),
        ("metrics.jsonl", damage('{"step": NaN}\n'), "line 1 is damaged (no step); remove it"),
        ("config.json", damage("3"), "holds no settings, but a int"),
        ("config.json", damage("[" * 9999), "damaged or no JSON ("),
        ("config.json", damage('{"seed": 1}'), "has no model._target_, so it is no run's; move it out of the sweep"),
        ("status.json", damage("{"), "damaged or no JSON ("),
    ],
)
def test_a_damaged_file_is_named(sweep, tmp_path, file, change, message):
    path = sweep / "depth=3" / "seed=1" / file
    change(path)
    assert refused(sweep, tmp_path / "out").startswith(f"{path}: {message}")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sweep": "no/such"}, "sweep=no/such: no such folder; give the folder of a sweep"),
        ({"sweep": []}, "sweep=[]: name at least one folder"),
        ({"sweep": "empty"}, "sweep=empty: there are no runs below it; give the folder of a sweep"),
        ({"sweep": "alone"}, "sweep=alone: there are no runs below it; give the folder of a sweep"),
        ({"sweep": "started"}, "started/a/metrics.jsonl: is empty; wait for the first row"),
        ({"sweep": "twice"}, "twice/b: has the settings and the seed of twice/a, so it is no repeat; leave one out"),
        ({"metric": "fid_5k"}, "metric=fid_5k: no run has logged it; choose from class_accuracy_1k, fd_digits_1k, "),
        ({"x": "model.encoder_dept"}, "x=model.encoder_dept: no run has this setting; did you mean model.encoder_dep"),
        ({"x": "seed"}, "x=seed: the means are over seeds; give another setting, such as model.encoder_depth"),
        ({"x": "model._target_"}, "x=model._target_: has values that are not numbers; choose from model.encoder_depth"),
    ],
)
def test_wrong_input_is_one_line(sweep, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    write_run(tmp_path / "alone", 1, 0, 1.0)
    write_run(tmp_path / "started" / "a", 1, 0, 1.0, rows=[])
    for name in "ab":
        write_run(tmp_path / "twice" / name, 1, 0, 1.0)
    assert refused(**{"sweep": sweep, "out": "out"} | arguments).startswith(message)
    assert not (tmp_path / "out").exists()


def test_a_mistake_on_the_command_line_is_one_line(sweep, tmp_path):
    arguments = (f"sweep={sweep}", f"out={tmp_path / 'out'}")
    assert refusal(REPORT, *arguments, "metrics=loss") == "metrics: no such setting; did you mean metric?"
    assert refusal(REPORT, *arguments, "metric=x").startswith("metric=x: no run has logged it; choose from class_acc")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_presets_of_the_sweep_end_to_end(tmp_path, monkeypatch):
    """Depth and baseline land in one tree, are measured at their end, and the report finds both."""
    monkeypatch.chdir(tmp_path)
    small = ["trainer.max_steps=2", "trainer.global_batch_size=8", "trainer.preview_every=0", "sampler.num_steps=1"]
    small += ["model.hidden_size=32", "model.depth=2", "features.epochs=1", "trainer.eval_samples=70"]
    succeed("train", "-m", "experiment=encoder_depth", "model.encoder_depth=1", *small)
    succeed("train", "-m", "experiment=encoder_depth_baseline", *small)
    sweep = tmp_path / "runs" / "encoder_depth"
    succeed(REPORT, "sweep=[runs/encoder_depth]", "out=out")
    found, lines, _ = contents(tmp_path / "out")
    assert found["metric"] == "fd_digits_70"
    assert [(one["settings"], one["seeds"]) for one in found["means"]] == [
        ({"model._target_": "ddt.model.DDT"}, 1),
        ({"model._target_": "ddt.model.DiT"}, 1),
    ]
    names = {"model=dit_nano" in line["run"]: int(line["parameters"]) for line in lines}
    assert 10_000 < names[True] < names[False] < 100_000
    for line in lines:
        logged = [json.loads(text) for text in (tmp_path / line["run"] / "metrics.jsonl").read_text().splitlines()]
        (distance,) = [each["fd_digits_70"] for each in logged if "fd_digits_70" in each]
        assert float(line["fd_digits_70"]) == distance
        assert line["step"] == "2"
    assert {path.parent for path in sweep.rglob("metrics.jsonl")} == {tmp_path / line["run"] for line in lines}
