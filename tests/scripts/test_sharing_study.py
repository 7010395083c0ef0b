"""The sharing study: the schedule file of sample.py, and the curve of quality against speed."""

import itertools
import json

import numpy as np
import pytest
from conftest import refusal, small_checkpoint, small_ddt, succeed, thinned

from ddt.checkpoint import format as ckpt
from ddt.sampling.cost import sampling_macs
from ddt.sampling.fitting import fit_schedule
from ddt.sampling.settings import SamplerSettings
from scripts.studies.sharing.curve import Curve
from scripts.studies.sharing.report import UNSHARED, draw, summarise, table

FIT, CURVE = "scripts.studies.sharing.fit", "scripts.studies.sharing.__main__"
SAMPLER = {"solver": "euler", "num_steps": 6, "cfg_scale": 2.0, "cfg_interval": [0.3, 1.0], "last_step": None}
pytestmark = pytest.mark.usefixtures("one_thread")


def write_run(folder, channels=1, target="ddt.model.DDT"):
    """A run of random weights that samples images of 8×8 px."""
    model = small_ddt(in_channels=channels)
    small_checkpoint(ckpt.checkpoint_folder(folder, 3), model=model, target=target, step=3, sampler=SAMPLER)
    return folder


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("curves") / "run")


def curve_arguments(run_folder, out, *changes):
    return (
        f"ckpt={run_folder}", f"out={out}", "features=digits", "reference=data:digits", "features.epochs=1",
        "rules=[uniform,dp+1]", "budgets=[6,3]", "repeats=2", "num_samples=5", "batch_size=3", *changes,
    )  # fmt: skip


def test_a_fitted_schedule_is_used_by_sample(run_folder, tmp_path, caplog):
    caplog.set_level("INFO")
    path = tmp_path / "new" / "s.json"
    succeed(FIT, f"ckpt={run_folder}", "budget=3", f"out={path}", "templates=4", "batch_size=2")
    content = json.loads(path.read_text())
    settings = SamplerSettings(**SAMPLER)
    expected = fit_schedule(small_ddt(in_channels=1), (1, 8, 8), settings, 3, ckpt.torch.device("cpu"), 4, 2)
    assert expected.items() <= content.items()
    assert content["dtype"] == "fp32"
    assert content["versions"]["torch"]
    assert content["date"]
    assert path.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"
    assert f"3 of 6 steps: {', '.join(map(str, content['recompute_steps']))}" in caplog.text
    caplog.clear()
    succeed("sample", f"ckpt={run_folder}", "num_samples=2", f"out={tmp_path / 'a'}", f"recompute={path}")
    assert "was fitted to another" not in caplog.text
    receipt = json.loads((tmp_path / "a" / "receipt.json").read_text())
    assert receipt["recompute_steps"] == content["recompute_steps"]
    arguments = (f"ckpt={run_folder}", "num_samples=2", f"recompute={path}", "cfg_scale=3")
    succeed("sample", *arguments, f"out={tmp_path / 'c'}")
    assert "was fitted to another guidance" in caplog.text
    line = refusal("sample", f"ckpt={run_folder}", f"out={tmp_path / 'b'}", f"recompute={path}", "num_steps=8")
    assert "was fitted to another time grid" in line
    line = refusal(FIT, f"ckpt={run_folder}", "budget=3", f"out={path}")
    assert line == f"out={path}: exists already and is not written over; choose another out="


def test_the_command_line_chooses_the_sampler_of_a_schedule(run_folder, tmp_path):
    path = tmp_path / "s.json"
    sampler = ("sampler=heun", "num_steps=4", "timeshift=2", "dtype=bf16")
    succeed(FIT, f"ckpt={run_folder}", "budget=2", f"out={path}", *sampler)
    content = json.loads(path.read_text())
    assert content["solver"] == "heun"
    assert content["time_grid"] == SamplerSettings(num_steps=4, timeshift=2.0, last_step=None).grid()
    assert content["dtype"] == "bf16"


@pytest.mark.parametrize(
    ("arguments", "message"),
    thinned(
        [
            (["out=s.txt"], "out=s.txt: give a .json file"),
            (["budget=0"], "budget=0: must be at least 1"),
            (["budget=7"], "budget=7: must lie in 1..num_steps=6"),
            (["sampler=adaptive"], "sampler=adaptive: chooses its own steps"),
            (["recompute=uniform:2"], "recompute: no such setting"),
        ],
        2,
    ),
)
def test_a_wrong_fit_is_one_line(run_folder, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ckpt, "read_weights", None)  # nothing is loaded
    (line,) = refusal(FIT, f"ckpt={run_folder}", "budget=3", "out=s.json", *arguments).splitlines()
    assert line.startswith(message)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("script", [FIT, CURVE])
def test_a_model_without_encoder_is_one_line(tmp_path, script):
    folder = write_run(tmp_path / "run", target="ddt.model.DiT")
    needed = ["budget=3"] if script == FIT else ["reference=data:digits"]
    (line,) = refusal(script, f"ckpt={folder}", f"out={tmp_path / 's.json'}", *needed).splitlines()
    assert line == f"ckpt={folder}: DiT has no encoder to share; choose a DDT"


@pytest.fixture(scope="module")
def curve(run_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("curves") / "whole"
    succeed(CURVE, *curve_arguments(run_folder, out))
    return out


def quality(out):
    """The summary without what depends on the clock."""
    result = json.loads((out / "sharing_curve.json").read_text())
    return [{k: v for k, v in row.items() if k != "speed_measured"} for row in result["summary"]]


def test_a_curve_has_every_rule_budget_and_repeat(curve):
    assert sorted(p.name for p in curve.iterdir()) == [
        "plan.json", "points.jsonl", "sharing_curve.json", "sharing_curve.md", "sharing_curve.png",
    ]  # fmt: skip
    result = json.loads((curve / "sharing_curve.json").read_text())
    found = [(row["rule"], row["budget"], row["repeat"]) for row in result["points"]]
    pairs = [("unshared", 6), *itertools.product(("uniform", "dp+1"), (6, 3))]
    assert found == [(*pair, repeat) for repeat in range(2) for pair in pairs]
    assert result["schedules"]["uniform"] == {"6": [0, 1, 2, 3, 4, 5], "3": [0, 2, 4]}
    assert len(result["schedules"]["dp"]["3"]) == 3
    by_point = {(row["rule"], row["encoder_runs"]): row for row in result["summary"]}
    for rule in ("uniform", "dp+1"):  # at 6 of 6 runs nothing is shared, at 3 something is
        whole, half = by_point[rule, 6], by_point[rule, 3]
        assert whole["latents_rms"] == {"mean": pytest.approx(0, abs=1e-5), "sd": pytest.approx(0, abs=1e-5)}
        assert whole["frechet_distance_added"]["mean"] == pytest.approx(0, abs=1e-4)
        assert half["latents_rms"]["mean"] > 1e-4
        assert half["speed_by_macs"] > 1.1
    lines = (curve / "sharing_curve.md").read_text().splitlines()
    assert len(lines) == 2 + len(pairs)
    assert lines[3].split()[1:6] == ["uniform", "|", "6", "|", "1.00"]


def test_a_distance_that_was_not_computed_has_no_mean(curve, tmp_path):
    """Of one point, or of the unshared images of a repeat, which all are compared with."""
    rows = json.loads((curve / "sharing_curve.json").read_text())["points"]
    for rule, missing in (("uniform", {"uniform"}), (UNSHARED, {UNSHARED, "uniform", "dp+1"})):
        broken = [
            {**row, "frechet_distance": None} if (row["rule"], row["repeat"]) == (rule, 1) else row for row in rows
        ]
        summary = summarise(broken, lambda rule, budget: 1.0)
        assert {row["rule"] for row in summary if row["frechet_distance_added"] is None} == missing
        assert {row["rule"] for row in summary if row["frechet_distance"] is None} == {rule}
        (line,) = [line for line in table(summary, "FID").splitlines() if rule in line and " 6 " in line]
        assert "–" in [cell.strip() for cell in line.split("|")]
        draw(summary, "FID", tmp_path / f"{rule}.png")


def test_a_curve_measures_what_it_says(curve, run_folder):
    """One point sampled again by hand."""
    from ddt import sample
    from ddt.draws import noise_of
    from ddt.generation.image_set import image_set

    model, images = ckpt.load_model(run_folder), image_set(5, 5, seed=1)
    noise, y = noise_of(images.seeds, (1, 8, 8)), ckpt.torch.tensor(images.classes)
    unshared = sample(model, noise, y, **SAMPLER)
    shared = sample(model, noise, y, **SAMPLER, recompute=[0, 2, 4])
    result = json.loads((curve / "sharing_curve.json").read_text())
    row = next(r for r in result["points"] if (r["rule"], r["budget"], r["repeat"]) == ("uniform", 3, 1))
    assert row["latents_rms"] == pytest.approx((shared - unshared).pow(2).mean().sqrt().item(), rel=1e-3)
    pixels = (shared.clamp(-1, 1) - unshared.clamp(-1, 1)).pow(2).mean().sqrt().item() / 2
    assert row["pixels_rms"] == pytest.approx(pixels, rel=0.05, abs=0.002)  # of 8 bits
    macs = [sampling_macs(model, 8, 8, SamplerSettings(**SAMPLER, recompute=steps)) for steps in (None, [0, 2, 4])]
    bound = next(r for r in result["summary"] if (r["rule"], r["encoder_runs"]) == ("uniform", 3))["speed_by_macs"]
    assert bound == pytest.approx(macs[0] / macs[1])


@pytest.mark.slow
def test_a_killed_curve_resumes_to_the_same_table(curve, run_folder, tmp_path, monkeypatch, caplog):
    measure, calls = Curve.measure, itertools.count()

    def killed(self, point, bar):
        if next(calls) == 7:  # in the second repeat
            raise KeyboardInterrupt
        return measure(self, point, bar)

    out = tmp_path / "cut"
    monkeypatch.setattr(Curve, "measure", killed)
    assert refusal(CURVE, *curve_arguments(run_folder, out)).startswith("interrupted")
    monkeypatch.undo()
    points = out / "points.jsonl"
    rows = points.read_text().splitlines(keepends=True)
    assert len(rows) == 7
    points.write_text("".join(rows[:6]) + rows[6][:20])  # cut short: this point is sampled again
    succeed(CURVE, *curve_arguments(run_folder, out))
    assert "the last line was cut short" in caplog.text
    assert points.read_text().startswith("".join(rows[:6]))
    assert quality(out) == quality(curve)


@pytest.mark.slow
@pytest.mark.usefixtures("no_mmap")
def test_missing_unshared_images_are_sampled_again_also_without_mmap(curve, run_folder, tmp_path):
    out = tmp_path / "cut"
    out.mkdir()
    (out / "plan.json").write_bytes((curve / "plan.json").read_bytes())
    rows = (curve / "points.jsonl").read_text().splitlines(keepends=True)
    (out / "points.jsonl").write_text("".join(rows[:8]))
    succeed(CURVE, *curve_arguments(run_folder, out))
    assert (out / "points.jsonl").read_text().startswith("".join(rows[:8]))
    assert quality(out) == quality(curve)


@pytest.mark.slow
def test_a_complete_curve_is_left_alone_and_another_refused(curve, run_folder, caplog):
    caplog.set_level("INFO")
    before = {path: path.read_bytes() for path in curve.iterdir()}
    succeed(CURVE, *curve_arguments(run_folder, curve))
    assert "complete, nothing to do" in caplog.text
    for change in ("num_samples=6", "cfg_scale=3", "features.epochs=2", "rules=[dp]"):
        line = refusal(CURVE, *curve_arguments(run_folder, curve, change))
        assert line == f"out={curve}: holds another curve and is not written over; choose another out="
    assert {path: path.read_bytes() for path in curve.iterdir()} == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    thinned(
        [
            (["rules=[foo]"], "rules=foo: give uniform or dp, with +1 or +2"),
            (["rules=[dp+3]"], "rules=dp+3: give uniform or dp, with +1 or +2"),
            (["rules=[]"], "rules=[]: name at least one"),
            (["rules=[dp,dp]"], "rules=['dp', 'dp']: names one twice"),
            (["budgets=[7]"], "budgets=7: must lie in 1..num_steps=6"),
            (["budgets=[0]"], "budgets=0: must lie in 1..num_steps=6"),
            (["budgets=[5]"], "budgets=5: no every r-th of 6 steps makes 5; choose 3, or dp rules alone"),
            (["repeats=0"], "repeats=0: must be at least 1"),
            (["num_samples=1"], "num_samples=1: must be at least 2; statistics need some"),
            (["reference=data:photos"], "features=digits reference=data:photos: the classifier is trained on"),
            (["features=inceptio"], "features=inceptio: no such choice; did you mean inception?"),
        ],
        3,
    ),
)
def test_a_wrong_curve_is_one_line(run_folder, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ckpt, "read_weights", None)  # nothing is loaded
    (line,) = refusal(CURVE, *curve_arguments(run_folder, "curve", *arguments)).splitlines()
    assert line.startswith(message)
    assert not list(tmp_path.iterdir())


def test_a_reference_of_other_images_is_refused(tmp_path):
    folder, out = write_run(tmp_path / "run", channels=3), tmp_path / "curve"
    line = refusal(CURVE, *curve_arguments(folder, out))
    assert line.startswith("reference=data:digits: has latents of shape [1, 8, 8], the model [3, 8, 8]")
    assert not out.exists()


@pytest.mark.slow
def test_the_curve_reads_inception_features(tmp_path, monkeypatch, inception_weights):
    """A short distance replaces FID's, which takes minutes at 2048 features."""
    monkeypatch.setattr("ddt.metrics.scores.frechet_distance", lambda a, b: float(np.abs(a.mean - b.mean).sum()))
    pictures = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "reference.npz", arr_0=pictures)
    folder, out = write_run(tmp_path / "run", channels=3), tmp_path / "curve"
    arguments = (
        f"ckpt={folder}", f"out={out}", "features=inception", f"inception_weights={inception_weights}",
        "rules=[uniform]", "budgets=[3]", "repeats=1", "num_samples=3", "batch_size=2",
    )  # fmt: skip
    line = refusal(CURVE, *arguments, f"reference={tmp_path / 'none.npz'}")
    assert line.startswith(f"reference={tmp_path / 'none.npz'}: no such file")
    assert not out.exists()
    succeed(CURVE, *arguments, f"reference={tmp_path / 'reference.npz'}")
    result = json.loads((out / "sharing_curve.json").read_text())
    assert [row["rule"] for row in result["summary"]] == ["unshared", "uniform"]
    assert all(row["frechet_distance"]["mean"] > 0 for row in result["summary"])
    assert " FID " in (out / "sharing_curve.md").read_text()
