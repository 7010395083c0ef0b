"""The guidance search: its points, its two stages, resuming, its report."""

import json
import shutil

import numpy as np
import pytest
from conftest import refusal, small_checkpoint, small_ddt, succeed, thinned

import ddt
from ddt.checkpoint import format as ckpt
from ddt.draws import noise_of
from ddt.errors import UserError
from ddt.generation.image_set import image_set
from ddt.metrics.settings import ClassifierSettings
from scripts.studies.guidance import search as guidance_search
from scripts.studies.guidance.report import draw, tables
from scripts.studies.guidance.settings import Checkpoint, GuidanceSettings

SEARCH = "scripts.studies.guidance.__main__"
SAMPLER = {"solver": "euler", "num_steps": 3, "cfg_scale": 2.0, "cfg_interval": [0.3, 1.0], "last_step": None}
METRIC = "fd_digits"
pytestmark = pytest.mark.usefixtures("one_thread")


def write_run(folder, step=3, target="ddt.model.DDT", channels=1, raw=True, names="abcde"):
    """A run of random weights that samples images of 8×8 px, with other raw weights."""
    small_checkpoint(
        ckpt.checkpoint_folder(folder, step), model=small_ddt(in_channels=channels), target=target, step=step,
        raw=1.5 if raw else None, sampler=SAMPLER, class_names=list(names),
    )  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("searches") / "run")


def arguments(run_folder, out, *changes):
    return (
        f"ckpt={run_folder}", f"out={out}", "features=digits", "reference=data:digits", "features.epochs=1",
        "cfg_scale=[1,2]", "cfg_interval=[null,[0.3,1]]", "weights=[ema,model]", "num_samples=12", "top=2",
        "final_samples=10", "repeats=3", "batch_size=12", *changes,
    )  # fmt: skip


@pytest.fixture(scope="module")
def search(run_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("searches") / "whole"
    succeed(SEARCH, *arguments(run_folder, out))
    return out


def result_of(out):
    return json.loads((out / "search.json").read_text())


def numbers(out):
    """The numbers of a search."""
    result = result_of(out)
    return {key: result[key] for key in ("metric", "labels", "points", "winners")}


def values(metrics):
    return {name: metrics[name] for name in metrics["labels"]}


def points_of(**axes):
    """The points of a search over one checkpoint."""
    given = dict(
        ckpt=".", weights="ema", recompute=None, timeshift=1.0, cfg_scale=1.0, cfg_interval=None, sampler="euler",
        reference="data:digits", out="out", num_samples=2, metric=None, top=1, final_samples=2, repeats=1,
        keep_samples=False, autoencoder="checkpoint", dtype=None, batch_size=1, num_processes=None, cache_gib=4.0,
        inception_weights=None, pr_dtype="float16", features=ClassifierSettings("digits", 1, 128, 2e-3),
    )  # fmt: skip
    stored = {"sampler": {**SAMPLER, "num_steps": 4, "cfg_scale": 3.0}, "network": {"_target_": "ddt.model.DDT"}}
    return GuidanceSettings(**(given | axes)).points([Checkpoint("step_3", None, stored)])


def test_without_guidance_there_are_no_intervals():
    points = points_of(
        weights=["ema", "model"], recompute=[None, "uniform:2", [0, 1]], timeshift=[1.0, 1.5],
        cfg_scale=[1.0, 1.5, "checkpoint"], cfg_interval=[None, (0.3, 1.0), (0.0, 0.7)],
    )  # fmt: skip
    assert len(points) == 2 * 3 * 2 * (1 + 2 * 3)
    assert len({point.label for point in points}) == len(points)
    assert sum(point.settings.cfg_scale == 1 for point in points) == 2 * 3 * 2
    assert all(point.settings.cfg_interval is None for point in points if point.settings.cfg_scale == 1)
    guided = {(p.settings.cfg_scale, p.settings.cfg_interval) for p in points if p.settings.cfg_scale != 1}
    assert guided == {(scale, interval) for scale in (1.5, 3.0) for interval in (None, (0.3, 1.0), (0.0, 0.7))}
    assert {"cfg1_ema_unshared_shift1", "cfg1.5_t0.3-1_model_uniform2_shift1.5"} <= {p.label for p in points}
    with pytest.raises(UserError, match=r"cfg1.5_ema: two points of this name differ in digits"):
        points_of(cfg_scale=[1.5, 1.5000001])
    assert [point.label for point in points_of(cfg_interval=(0.3, 1.0))] == ["cfg1_ema"]


def test_a_search_has_two_stages(search):
    assert sorted(path.name for path in search.iterdir()) == [
        "final", "plan.json", "proxy", "search.json", "search.md", "search.png",
    ]  # fmt: skip
    result = result_of(search)
    labels = [f"{guidance}_{weights}" for weights in ("ema", "model") for guidance in ("cfg1", "cfg2", "cfg2_t0.3-1")]
    assert [row["label"] for row in result["points"]] == labels
    assert sorted(path.name for path in (search / "proxy").iterdir()) == sorted(labels)
    for row in result["points"]:
        folder = search / "proxy" / row["label"]
        assert sorted(p.name for p in folder.iterdir()) == ["grid.png", "metrics.json", "nearest.png", "receipt.json"]
        receipt = json.loads((folder / "receipt.json").read_text())["request"]
        assert receipt["seeds"] == "0-11"
        assert receipt["sampler"]["cfg_scale"] == row["cfg_scale"]
        assert receipt["sampler"]["cfg_interval"] == row["cfg_interval"]
        assert receipt["checkpoint"]["weights"] == {"ema": "EMA", "model": "raw"}[row["weights"]]
        assert row["metrics"] == values(json.loads((folder / "metrics.json").read_text()))
    distances = [row["metrics"][METRIC] for row in result["points"]]
    assert len(set(distances)) == len(distances)  # scale, interval and weights each change the images
    assert result["metric"] == METRIC
    assert result["labels"]["proxy"][METRIC].startswith("FD-digits-12 ")
    assert result["labels"]["final"][METRIC].startswith("FD-digits-10 ")
    assert result["comparable"] is False
    assert result["command"].startswith("python ")
    assert result["versions"]["torch"]
    assert result["request"]["checkpoints"]["step_0000003"]["sha256"].keys() == {"ema", "model"}
    assert (search / "search.png").read_bytes()[:4] == b"\x89PNG"


def test_winners_are_the_smallest_and_sampled_from_other_noise(search):
    result = result_of(search)
    ranked = sorted(result["points"], key=lambda row: row["metrics"][METRIC])
    by_rank = sorted(result["winners"], key=lambda row: row["proxy_rank"])
    assert [row["label"] for row in by_rank] == [row["label"] for row in ranked[:2]]
    assert [row["proxy"] for row in by_rank] == [row["metrics"][METRIC] for row in ranked[:2]]
    assert sorted(path.name for path in (search / "final").iterdir()) == sorted(row["label"] for row in by_rank)
    proxy = set(image_set(5, 12, seed=0).seeds)
    for row in result["winners"]:
        folder, found = search / "final" / row["label"], []
        assert sorted(path.name for path in folder.iterdir()) == ["seed_1", "seed_2", "seed_3"]
        for seed in (1, 2, 3):
            request = json.loads((folder / f"seed_{seed}" / "receipt.json").read_text())["request"]
            seeds = image_set(5, 10, seed=seed).seeds
            assert request["seeds"] == f"{seeds[0]}-{seeds[-1]}"
            assert not proxy & set(seeds)
            assert not (folder / f"seed_{seed}" / "samples.npz").exists()
            found.append(values(json.loads((folder / f"seed_{seed}" / "metrics.json").read_text())))
        assert row["repeats"] == [{"seed": seed, **metrics} for seed, metrics in zip((1, 2, 3), found, strict=True)]
        for name, both in row["metrics"].items():
            column = [metrics[name] for metrics in found]
            assert both == {"mean": pytest.approx(np.mean(column)), "sd": pytest.approx(np.std(column, ddof=1))}
    means = [row["metrics"][METRIC]["mean"] for row in result["winners"]]
    assert means == sorted(means)
    assert result["winners"][0]["metrics"][METRIC]["sd"] > 0


def test_a_point_is_what_sample_py_and_evaluate_py_make_of_its_settings(search, run_folder, tmp_path):
    """One point sampled by hand, of the raw weights and with an interval."""
    model, images = ckpt.load_model(run_folder, "model"), image_set(5, 12, seed=0)
    noise, y = noise_of(images.seeds, (1, 8, 8)), ckpt.torch.tensor(images.classes)
    with ckpt.torch.no_grad():
        latents = ddt.sample(model, noise, y, **SAMPLER)
    pixels = ((latents.clamp(-1, 1) + 1) * 127.5).round().to(ckpt.torch.uint8).permute(0, 2, 3, 1).numpy()
    np.savez(tmp_path / "samples.npz", arr_0=pixels, arr_1=np.array(images.classes))
    features = ("features=digits", "reference=data:digits", "features.epochs=1")
    succeed("evaluate", f"samples={tmp_path / 'samples.npz'}", *features)
    expected = json.loads((tmp_path / "metrics.json").read_text())
    row = next(row for row in result_of(search)["points"] if row["label"] == "cfg2_t0.3-1_model")
    assert row["metrics"][METRIC] == pytest.approx(expected[METRIC], rel=0.02)  # pixels are rounded


def test_the_tables_are_sorted_and_say_what_they_show(search):
    text = (search / "search.md").read_text()
    result = result_of(search)
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert rows[0][:3] == ["weights", "cfg scale", "cfg interval"]
    assert rows[0][3].startswith("FD-digits-12 ")
    column = [float(row[3]) for row in rows[2:8]]
    assert column == sorted(column)
    assert sum(row[1:3] == ["1", "–"] for row in rows[2:8]) == 2
    best = result["winners"][0]["metrics"][METRIC]
    assert f"{best['mean']:.3f} ± {best['sd']:.3f}" in lines[10]
    assert "mean ± sd of 3" in text
    assert "FD-digits, real images: " in text
    assert tables(result) + "\n" == text


def test_one_cell_is_a_heat_map(search, tmp_path):
    """The smallest search: no axis has two values."""
    result = result_of(search)
    row = result["points"][0]
    winner = {**result["winners"][0], "label": row["label"], "repeats": result["winners"][0]["repeats"][:1]}
    draw({**result, "points": [row], "winners": [winner]}, tmp_path / "one.png")
    assert (tmp_path / "one.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.slow
def test_a_complete_search_is_left_alone_and_another_refused(search, run_folder, caplog):
    caplog.set_level("INFO")
    before = {path: path.read_bytes() for path in search.rglob("*") if path.is_file()}
    succeed(SEARCH, *arguments(run_folder, search))
    assert "complete, nothing to do" in caplog.text
    for change in ("num_samples=13", "cfg_scale=[1,3]", "repeats=2", "features.epochs=2", "num_steps=4"):
        line = refusal(SEARCH, *arguments(run_folder, search, change))
        assert line == f"out={search}: holds another search and is not written over; choose another out="
    assert {path: path.read_bytes() for path in search.rglob("*") if path.is_file()} == before


@pytest.mark.slow
def test_a_killed_search_resumes(search, run_folder, tmp_path, caplog, monkeypatch):
    caplog.set_level("INFO")
    out = shutil.copytree(search, tmp_path / "cut")
    winner = result_of(search)["winners"][0]["label"]
    for name in ("search.json", "search.md", "search.png"):
        (out / name).unlink()
    for name in ("metrics.json", "nearest.png"):  # killed before they were written
        (out / "proxy" / "cfg2_ema" / name).unlink()
        (out / "final" / winner / "seed_2" / name).unlink()
    (out / "proxy" / "cfg1_ema" / "samples.npz").write_bytes(b"")  # killed before it was removed
    kept = out / "proxy" / "cfg1_ema" / "metrics.json"
    time = kept.stat().st_mtime_ns
    sampled, sample_set = [], guidance_search.sample_set
    monkeypatch.setattr(guidance_search, "sample_set", lambda *args: (sampled.append(args[3]), sample_set(*args)))
    succeed(SEARCH, *arguments(run_folder, out, "batch_size=5"))
    assert sampled == [out / "proxy" / "cfg2_ema", out / "final" / winner / "seed_2"]
    assert "point 2 of 6: cfg 2, interval every time" in caplog.text
    assert kept.stat().st_mtime_ns == time
    assert not list(out.rglob("samples.npz"))
    ours, theirs = result_of(out), result_of(search)
    for a, b in zip(ours["points"], theirs["points"], strict=True):
        assert a["metrics"][METRIC] == pytest.approx(b["metrics"][METRIC], rel=0.02)  # in other batches


def test_points_measured_with_other_weights_are_not_taken(search, run_folder, tmp_path):
    """The request is the same, the files of these names are not."""
    out = shutil.copytree(search, tmp_path / "other")
    (out / "search.json").unlink()
    plan = json.loads((out / "plan.json").read_text())
    plan["inputs"]["features"]["weights"]["tensors_sha256"] = "0"
    (out / "plan.json").write_text(json.dumps(plan))
    line = refusal(SEARCH, *arguments(run_folder, out))
    assert line.startswith(f"out={out}: its points were measured with another content of reference, features or")


@pytest.mark.slow
def test_metrics_of_another_point_are_not_taken(search, run_folder, tmp_path):
    out = shutil.copytree(search, tmp_path / "swapped")
    (out / "search.json").unlink()
    shutil.copy(out / "proxy" / "cfg2_ema" / "metrics.json", out / "proxy" / "cfg1_ema")
    line = refusal(SEARCH, *arguments(run_folder, out))
    assert line.startswith(f"{out / 'proxy' / 'cfg1_ema' / 'metrics.json'}: is of other samples than this point's")
    assert not (out / "search.json").exists()


def without_distance(folder):
    """Take a point's distance from its metrics.json."""
    metrics = json.loads((folder / "metrics.json").read_text())
    (folder / "metrics.json").write_text(json.dumps(metrics | {METRIC: None, "reasons": {METRIC: "broken"}}))


@pytest.mark.slow
def test_a_point_without_a_distance_does_not_win(search, run_folder, tmp_path):
    out = shutil.copytree(search, tmp_path / "broken")
    (out / "search.json").unlink()
    first, second = (row["label"] for row in sorted(result_of(search)["winners"], key=lambda row: row["proxy_rank"]))
    without_distance(out / "proxy" / first)
    without_distance(out / "final" / second / "seed_2")
    succeed(SEARCH, *arguments(run_folder, out))
    result = result_of(out)
    other, last = result["winners"]
    assert first not in (other["label"], last["label"])
    assert (last["label"], last["metrics"][METRIC]) == (second, None)  # one of its repeats has none
    assert [line.split("|")[4].strip() for line in tables(result).splitlines() if line.startswith("| ")][7] == "–"
    (out / "search.json").unlink()
    for folder in (out / "proxy").iterdir():
        without_distance(folder)
    line = refusal(SEARCH, *arguments(run_folder, out))
    assert line.startswith(f"metric={METRIC}: no point has one (broken); choose another metric=")


def test_a_point_of_non_finite_samples_is_named(run_folder, tmp_path):
    line = refusal(SEARCH, *arguments(run_folder, tmp_path / "out", "cfg_scale=[1,1e30]", "weights=ema"))
    assert line.startswith("cfg1e+30_ema: image 0 ")


@pytest.mark.slow
def test_two_processes_find_the_same(run_folder, tmp_path):
    """In the same batches, one per process, to the last bit."""
    few = ("cfg_scale=[1,2]", "cfg_interval=null", "weights=model", "top=1", "repeats=2", "batch_size=5")
    out = {count: tmp_path / str(count) for count in (1, 2)}
    for count, folder in out.items():
        succeed(SEARCH, *arguments(run_folder, folder, *few, f"num_processes={count}"))
    assert result_of(out[2])["num_processes"] == 2
    assert numbers(out[2]) == numbers(out[1])


@pytest.mark.slow
def test_samples_are_kept_where_asked_and_one_repeat_has_no_deviation(run_folder, tmp_path):
    """Single values in place of lists, several checkpoints, shared steps."""
    other, out = write_run(tmp_path / "other", step=4), tmp_path / "out"
    succeed(
        SEARCH,
        *arguments(
            run_folder, out, f"ckpt=[{run_folder},{other}]", "cfg_scale=2", "cfg_interval=[0.3,1]", "weights=model",
            "recompute=[null,uniform:2]", "forecast_order=1", "timeshift=2", "keep_samples=true", "repeats=1", "top=1",
        ),
    )  # fmt: skip
    result = result_of(out)
    assert [row["label"] for row in result["points"]] == [
        f"step_000000{step}_cfg2_t0.3-1_model_{schedule}" for step in (3, 4) for schedule in ("unshared", "uniform2")
    ]
    assert all(row["timeshift"] == 2 for row in result["points"])
    assert len(list(out.rglob("samples.npz"))) == 5
    assert result["winners"][0]["metrics"][METRIC]["sd"] is None
    text = (out / "search.md").read_text()
    assert [cell.strip() for cell in text.split("|")[1:4]] == ["checkpoint", "recompute", "cfg scale"]
    assert "encoder at every step" in text
    assert "on other noise, once:" in text
    assert "±" not in text


@pytest.mark.parametrize(
    ("changes", "message"),
    thinned(
        [
            (["metric=fid"], "metric=fid: features=digits measures fd_digits; choose from these"),
            (["cfg_scale=[]"], "cfg_scale=[]: name at least one"),
            (["cfg_scale=[2,2.0]"], "cfg_scale: names [2.0] twice; name each value once"),
            (["cfg_interval=[[0.3,1],[0.3,1.0]]"], "cfg_interval: names [(0.3, 1.0)] twice"),
            (["cfg_interval=[1,0.3]"], "cfg_interval=[1.0,0.3]: needs 0 <= lo < hi <= 1"),
            (["cfg_interval=[null,[0.3]]"], "cfg_interval=[null,[0.3]]: "),
            (["weights=[ema,raw]"], "weights=raw: "),
            (["num_samples=1"], "num_samples=1: must lie in 2..1000000"),
            (["repeats=0"], "repeats=0: must be at least 1"),
            (["top=7"], "top=7: there are 6 points; choose at most so many"),
            (["cache_gib=-1"], "cache_gib=-1.0: must be at least 0"),
            (["recompute=[1,2]"], "recompute=[1, 2]: step 0 must be among them"),
            (["sampler=adaptive", "timeshift=[1,2]"], "timeshift=1.0: sampler=adaptive chooses its own steps"),
            (["forecast_order=1"], "forecast_order=1: has no effect without recompute="),
            (["reference=data:photos"], "features=digits reference=data:photos: the classifier is trained on this"),
            (["inception_weights=x.pth"], "inception_weights=x.pth: has no effect with features=digits"),
            (["num_processes=0"], "num_processes=0: must be at least 1"),
            (["top_k=4"], "top_k: no such setting; did you mean top?"),
        ],
        3,
    ),
)
def test_a_wrong_search_is_one_line(run_folder, tmp_path, monkeypatch, changes, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ckpt, "read_weights", None)  # nothing is loaded
    (line,) = refusal(SEARCH, *arguments(run_folder, "search", *changes)).splitlines()
    assert line.startswith(message)
    assert not list(tmp_path.iterdir())


def test_no_features_are_one_line(run_folder, tmp_path):
    given = [word for word in arguments(run_folder, tmp_path / "out") if not word.startswith("features.")]
    assert refusal(SEARCH, *given, "features=none").startswith("features=none: measures nothing")


@pytest.mark.slow
def test_checkpoints_that_cannot_be_searched_are_one_line(run_folder, tmp_path):
    out = tmp_path / "out"
    line = refusal(SEARCH, *arguments(write_run(tmp_path / "ema_alone", raw=False), out))
    assert line.startswith("weights=model: ")
    assert line.endswith("has no model.safetensors; choose from ema")
    line = refusal(SEARCH, *arguments(write_run(tmp_path / "dit", target="ddt.model.DiT"), out, "recompute=uniform:2"))
    assert line == "recompute=uniform:2: this model has no encoder to share; give null"
    line = refusal(SEARCH, *arguments(write_run(tmp_path / "colour", channels=3), out))
    assert line.startswith("reference=data:digits: has latents of shape [1, 8, 8], the model [3, 8, 8]")
    newest = ckpt.find_checkpoint(run_folder)
    line = refusal(SEARCH, *arguments(run_folder, out, f"ckpt=[{run_folder},{newest}]"))
    assert line.endswith("two of them are one checkpoint")
    other = write_run(tmp_path / "classes", names="vwxyz")
    line = refusal(SEARCH, *arguments(run_folder, out, f"ckpt=[{run_folder},{other}]"))
    assert "has another class_names than" in line
    assert not out.exists()
    out.write_text("a file")
    assert refusal(SEARCH, *arguments(run_folder, out)) == f"out={out}: is a file; give a folder"
    assert out.read_text() == "a file"
