"""A look inside a model: its figures show what sampling and training compute."""

import dataclasses
import hashlib
import json
import math
import re
import shutil

import numpy as np
import pytest
import torch
from conftest import RUN, picture_folder, refusal, small_checkpoint, small_ddt, succeed
from PIL import Image

from ddt import DiT
from ddt.autoencoder import Identity
from ddt.autoencoder.base import from_uint8
from ddt.checkpoint import format as ckpt
from ddt.data.images import Digits, ImageFolder
from ddt.distributed.prepare import make_accelerator
from ddt.draws import Stream, noise_of, random_generator
from ddt.errors import UserError
from ddt.flow import clean, interpolate, velocity
from ddt.generation.generator import Generator
from ddt.generation.image_set import ImageSet, image_set
from ddt.objective.flow_matching import FlowMatching, velocity_loss
from ddt.sampling.fitting import fit_schedule
from ddt.sampling.settings import SamplerSettings
from scripts.studies.inside import measure as inside
from scripts.studies.inside import report as inside_report
from scripts.studies.inside.measure import (
    Similarity,
    decode_film,
    find_images,
    loss_by_t,
    principal_components,
    shown_steps,
    standard_error,
    walk,
    z_colours,
)
from scripts.studies.inside.settings import InsideSettings

SCRIPT = "scripts.studies.inside.__main__"
SAMPLER = {"solver": "euler", "num_steps": 6, "cfg_scale": 2.0, "cfg_interval": (0.3, 1.0), "last_step": None}
DIGITS = {"_target_": "ddt.data.images.Digits", "fingerprint": Digits().fingerprint}
OBJECTIVE = {"_target_": "ddt.objective.FlowMatching", "time_distribution": "lognorm", "label_dropout": 0.1}
PICTURES = ["denoising.png", "inside.json", "loss_by_t.png", "sampling.gif", "similarity.png", "z_pca.png"]
IMAGES = ("classes=[1,8]", "seeds=4-5")
pytestmark = pytest.mark.usefixtures("one_thread")


def network():
    return small_ddt(in_channels=1, num_classes=10)


def write_run(folder, data=DIGITS, target="ddt.model.DDT"):
    """A run of random weights on `data`, its raw weights other than the EMA weights."""
    sizes = dict(patch_size=2, hidden_size=32, num_heads=2, depth=3, encoder_depth=2, num_classes=10)
    model = network()
    if target == "ddt.model.DiT":
        del sizes["encoder_depth"]
        torch.manual_seed(0)
        model = DiT(in_channels=1, **sizes)
    small_checkpoint(
        ckpt.checkpoint_folder(folder, 3), model=model, raw=2, step=3, sampler=SAMPLER,
        network={"_target_": target, "in_channels": 1, **sizes}, class_names=list("0123456789"),
        **({} if data is None else {"run": {**RUN, "data": data, "objective": OBJECTIVE}}),
    )  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("inside") / "run")


@pytest.fixture(scope="module")
def looked(run_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("inside") / "new" / "out"
    succeed(
        SCRIPT, f"ckpt={run_folder}", f"out={out}", *IMAGES, "columns=2", "recompute=dp:3", "loss_images=7",
        "batch_size=4",
    )  # fmt: skip
    return out


def generator(**changes):
    settings = SamplerSettings(**{**SAMPLER, **changes})
    return Generator(network(), Identity(), (1, 8, 8), settings, "fp32", torch.device("cpu"))


def found(out):
    return json.loads((out / "inside.json").read_text())


@pytest.mark.slow
def test_figures_and_numbers_are_written(looked, run_folder):
    assert sorted(path.name for path in looked.iterdir()) == PICTURES
    for name in PICTURES:
        assert name.endswith(".json") or (looked / name).read_bytes()[:3] in (b"\x89PN", b"GIF")
    said = found(looked)
    request = said["request"]
    assert request["checkpoint"]["ema_sha256"] == ckpt.weights_sha256(ckpt.find_checkpoint(run_folder), "ema")
    assert (request["classes"], request["seeds"]) == ([1, 8, 1, 8], [4, 4, 5, 5])
    assert request["sampler"]["recompute"] == "dp:3"
    assert said["left_out"] == {}
    assert said["versions"]["torch"]
    assert said["command"].startswith("python ")
    assert said["denoising"]["steps"] == said["z_pca"]["steps"] == [0, 5]
    assert said["denoising"]["times"] == [request["time_grid"][step] for step in (0, 5)]
    assert said["denoising"]["rms_to_sample"][-1] == pytest.approx(0, abs=1e-6)
    assert said["denoising"]["rms_to_sample"][0] > 0.01


def test_the_last_column_is_what_sample_py_samples(looked, run_folder, tmp_path):
    out = tmp_path / "samples"
    succeed("sample", f"ckpt={run_folder}", f"out={out}", *IMAGES, "recompute=dp:3")
    pictures = np.load(out / "samples.npz")["arr_0"]
    said = found(looked)
    assert said["denoising"]["samples_sha256"] == hashlib.sha256(pictures.tobytes()).hexdigest()
    maker = generator(recompute=said["similarity"]["chosen"])
    images = ImageSet([1, 8], [4, 5])
    strip = decode_film(maker, walk(maker, images), [0, 5])
    assert np.array_equal(strip.samples, pictures[[0, 3]])
    assert np.abs(strip.predicted[-1].astype(int) - strip.samples).max() <= 1  # Euler's last step is the prediction
    start = Identity().decode(noise_of(images.seeds, (1, 8, 8))).permute(0, 2, 3, 1)
    assert np.array_equal(strip.noisy[0], start)
    unshared = decode_film(generator(), walk(generator(), images), [0]).samples
    assert not np.array_equal(unshared, strip.samples)


def test_the_strip_ends_with_the_sample(monkeypatch, tmp_path):
    maker = generator()
    strip = decode_film(maker, walk(maker, ImageSet([1, 8], [4, 5])), [0, 3])
    given = {}
    monkeypatch.setattr(inside_report, "draw_grid", lambda *values: given.update(values=values))
    inside_report.draw_film(strip, [0.0, 0.5], ["1", "8"], tmp_path / "x.png")
    pictures, titles, names = given["values"][:3]
    assert pictures.shape == (4, 3, 8, 8, 1)
    assert titles == ["t = 0.00", "t = 0.50", "sample"]
    assert names == ["1\npredicted", "x_t", "8\npredicted", "x_t"]
    assert np.array_equal(pictures[:, 2], strip.samples[[0, 0, 1, 1]])
    assert np.array_equal(pictures[2, :2], strip.predicted[:, 1])
    assert np.array_equal(pictures[1, :2], strip.noisy[:, 0])


@pytest.mark.parametrize("solver", ["heun", "adams3", "sde"])
def test_each_solver_is_recorded_at_the_start_of_its_steps(solver):
    way = walk(generator(solver=solver), ImageSet([1], [4]))
    assert way.times == SamplerSettings(**{**SAMPLER, "solver": solver}).grid()[:-1]
    assert torch.equal(way.x_t[0], noise_of([4], (1, 8, 8)))
    assert way.v.shape == (6, 1, 1, 8, 8)


def test_the_prediction_ends_where_the_path_does():
    x, noise = torch.randn(2, 3, 4, 4, 4).unbind(0)
    for t in (0.0, 0.3, 1.0):
        x_t = interpolate(x, noise, torch.full((3,), t))
        assert torch.allclose(clean(velocity(x, noise), x_t, t), x, atol=1e-6)
    wrong = torch.randn_like(x)
    assert torch.equal(clean(wrong, noise, 1.0), noise)


def test_components_are_those_of_the_singular_vectors():
    vectors = torch.randn(60, 7, dtype=torch.float64) * torch.linspace(3, 0.5, 7) + 5
    mean, components, variances = principal_components(vectors.float().split(13))
    centred = vectors.numpy() - vectors.numpy().mean(0)
    _, singular, right = np.linalg.svd(centred, full_matrices=False)
    largest = np.abs(right).argmax(1)
    expected = right * np.sign(right[np.arange(7), largest])[:, None]
    assert np.allclose(mean, vectors.mean(0), atol=1e-6)
    assert np.allclose(components, expected[:3], atol=1e-5)
    assert np.allclose(variances, singular**2 / 60, rtol=1e-4)
    again = principal_components(vectors.float().split(7))[1]
    assert torch.allclose(components, again, atol=1e-5)
    turned = principal_components((-vectors).float().split(13))[1]
    assert torch.allclose(components, turned, atol=1e-5)


def test_z_is_that_of_the_conditional_encoder():
    maker = generator()
    way = walk(maker, ImageSet([1, 8], [4, 5]))
    colours, shares = z_colours(maker, way, [1, 8], [0, 4])
    assert colours.shape == (2, 2, 4, 4, 3)
    assert (colours >= 0).all()
    assert (colours <= 1).all()
    assert sorted(shares, reverse=True) == shares
    assert sum(shares) < 1
    z = torch.stack([maker.model.encode(x, torch.full((2,), t), torch.tensor([1, 8])) for x, t in
                     zip(way.x_t, way.times, strict=True)]).detach().double().flatten(0, 2)  # fmt: skip
    centred = z - z.mean(0)
    _, singular, right = torch.linalg.svd(centred, full_matrices=False)
    first = centred @ right[0] * right[0][right[0].abs().argmax()].sign()
    deviation = singular[0] / math.sqrt(len(z))
    expected = (0.5 + first / (4 * deviation)).clamp(0, 1).unflatten(0, (6, 2, 4, 4))[[0, 4]]
    assert np.allclose(colours[..., 0], expected, atol=1e-4)


def test_the_schedules_are_those_that_sampling_uses(looked):
    content = fit_schedule(network(), (1, 8, 8), SamplerSettings(**SAMPLER), 3, torch.device("cpu"))
    said = found(looked)["similarity"]
    assert said["schedules"] == {"uniform:2": [0, 2, 4], "dp:3": content["recompute_steps"]}
    assert said["chosen"] == content["recompute_steps"]
    assert np.allclose(said["similarity"], content["similarity"], atol=1e-4)
    assert said["similarity_to_z_in_use"]["dp:3"] >= said["similarity_to_z_in_use"]["uniform:2"] - 1e-9


@pytest.mark.parametrize(
    ("recompute", "names", "chosen"),
    [
        (None, ["uniform:3", "dp:2"], None),
        ("uniform:2", ["uniform:2", "dp:3"], [0, 2, 4]),
        ([0, 1], ["uniform:3", "dp:2", "as given"], [0, 1]),
    ],
    ids=str,
)
def test_schedules_of_as_many_runs_lie_beside_the_chosen_one(recompute, names, chosen):
    seen = inside.measure_similarity(generator(recompute=recompute), "0")
    assert seen.chosen == chosen
    assert set(seen.schedules) <= set(names)
    assert chosen is None or chosen in seen.schedules.values()


def test_the_similarity_to_the_z_in_use_is_that_to_the_start_of_its_segment():
    values = np.arange(16.0).reshape(4, 4)
    seen = Similarity(values, {"x": [0, 2], "all": [0, 1, 2, 3]}, None, [])
    assert seen.to_z_in_use("x") == (values[0, 0] + values[0, 1] + values[2, 2] + values[2, 3]) / 4
    assert seen.to_z_in_use("all") == values.diagonal().mean()


def test_the_steps_shown_are_spread_from_first_to_last():
    assert shown_steps(50, 8) == [0, 7, 14, 21, 28, 35, 42, 49]
    assert shown_steps(3, 8) == [0, 1, 2]
    assert shown_steps(9, 1) == [0]


def test_the_loss_is_that_of_training_with_the_ema_weights(looked, run_folder):
    said = found(looked)["loss_by_t"]
    images, model = Digits("test"), ckpt.load_model(run_folder)
    chosen = np.linspace(0, 299, 7).astype(int)
    errors = np.empty((7, 10))
    for row, index in enumerate(chosen):
        x = from_uint8(torch.from_numpy(images.load(chosen[row : row + 1])))
        noise = torch.from_numpy(
            random_generator(0, Stream.VALIDATION, int(index)).standard_normal((1, 1, 8, 8), dtype=np.float32)
        )
        for k in range(10):
            t = torch.tensor([(k + (row + 0.5) * (math.sqrt(5) - 1) / 2 % 1) / 10])
            with torch.no_grad():
                v = model(interpolate(x, noise, t), t, torch.from_numpy(images.labels[chosen[row : row + 1]]))
            errors[row, k] = velocity_loss(v, velocity(x, noise))
    assert said["images"] == 7
    assert said["edges"] == [k / 10 for k in range(11)]
    assert np.allclose(said["mean"], errors.mean(0), rtol=1e-4)
    assert np.allclose(said["standard_error"], errors.std(0, ddof=1) / math.sqrt(7), rtol=1e-4)


def test_the_loss_does_not_depend_on_the_batch():
    maker, images, accelerator = generator(), Digits("test"), make_accelerator()
    objective = FlowMatching(maker.model, time_distribution="uniform").for_validation(maker.model)
    one = loss_by_t(maker, objective, images, accelerator, 5, 2)
    assert np.allclose(one, loss_by_t(maker, objective, images, accelerator, 5, 64), rtol=1e-5)
    assert one.shape == (5, 10)
    assert standard_error(loss_by_t(maker, objective, images, accelerator, 1, 2)).tolist() == [0] * 10
    lognormal = FlowMatching(maker.model).for_validation(maker.model)  # the same times by other normal samples
    assert np.allclose(one, loss_by_t(maker, lognormal, images, accelerator, 5, 2), rtol=1e-4)


def test_what_cannot_be_measured_is_left_out_and_reported(tmp_path, caplog):
    folder = write_run(tmp_path / "run", data=None, target="ddt.model.DiT")
    succeed(SCRIPT, f"ckpt={folder}", f"out={tmp_path / 'out'}", "num_steps=2", "columns=1", "seeds=0", "frames=0")
    reasons = {
        "loss_by_t": "the checkpoint was not trained here and names no data",
        "similarity": "DiT has no encoder, so no z",
        "z_pca": "DiT has no encoder, so no z",
    }
    for name, why in reasons.items():
        assert f"{name}.png is left out: {why}" in caplog.text
    assert found(tmp_path / "out")["left_out"] == reasons
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["denoising.png", "inside.json"]


def test_the_animation_ends_with_the_samples(tmp_path):
    maker = generator(recompute=None)
    strip = decode_film(maker, walk(maker, ImageSet([1, 8], [4, 5])), [0, 2, 5])
    inside_report.write_animation(strip, tmp_path / "x.gif")
    with Image.open(tmp_path / "x.gif") as moving:
        assert moving.n_frames == 4
        frames, times = [], []
        for k in range(4):
            moving.seek(k)
            frames.append(np.asarray(moving.convert("L"), dtype=float))
            times.append(moving.info["duration"])
    assert times == [80, 80, 80, 2000]
    above, below = ([frame[start : start + 64] for frame in frames] for start in (2, 68))
    assert np.abs(above[3] - below[3]).max() <= 1  # the samples, twice
    assert np.abs(above[0] - below[0]).max() > 50  # a prediction above noise
    assert np.abs(above[2] - above[3]).max() <= 2  # Euler's last step is the prediction


def test_moved_data_are_read_from_data_root(tmp_path):
    root = picture_folder(tmp_path / "data", count=12)
    data = {"_target_": "ddt.data.images.ImageFolder", "root": str(root), "image_size": 8,
            "holdout_every": 6}  # fmt: skip
    stored = {"run": {"data": {**data, "fingerprint": ImageFolder(str(root), 8, holdout_every=6).fingerprint}}}
    assert len(find_images(stored, "checkpoint", Identity()).labels) == 4
    moved = root.rename(tmp_path / "moved")
    with pytest.raises(UserError, match=f"^data.root={root}: no such folder; give "):
        find_images(stored, "checkpoint", Identity())
    assert len(find_images(stored, str(moved), Identity()).labels) == 4
    shutil.rmtree(moved / "class1")
    with pytest.raises(UserError, match=f"^data.root={moved}: holds other images than the run was trained on; give"):
        find_images(stored, str(moved), Identity())
    folder = write_run(tmp_path / "run", data=stored["run"]["data"])
    line = refusal(SCRIPT, f"ckpt={folder}", f"out={tmp_path / 'out'}", f"data_root={tmp_path}/nowhere")
    assert line.startswith(f"data_root={tmp_path}/nowhere: no such folder")


@pytest.mark.parametrize("change", [{"_target_": "ddt.data.stream.Digits"}, {"gone": 1}], ids=str)
def test_data_of_an_earlier_version_are_refused(change):
    with pytest.raises(UserError, match=r"^data\.(_target_=.*of this code|gone: no such setting)"):
        find_images({"run": {"data": DIGITS | change}}, "checkpoint", Identity())


def test_a_run_without_held_out_images_is_refused(tmp_path):
    root = picture_folder(tmp_path / "data", count=2)
    images = ImageFolder(str(root), 8, holdout_every=0)
    data = {"_target_": "ddt.data.images.ImageFolder", "root": str(root), "image_size": 8, "holdout_every": 0,
            "fingerprint": images.fingerprint}  # fmt: skip
    with pytest.raises(UserError, match=r"^the run held no images out \(data\.holdout_every=0\)$"):
        find_images({"run": {"data": data}}, "checkpoint", Identity())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["columns=0"], "columns=0: must be at least 1"),
        (["sampler=adaptive"], "sampler=adaptive: chooses its own steps"),
        (["data_root=x"], "data_root=x: this run's data have no folder; leave it out"),
        (["num_samples=3"], "num_samples: no such setting"),
    ],
    ids=str,
)
def test_a_wrong_setting_is_one_line(run_folder, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ckpt, "read_weights", None)  # nothing is loaded
    (line,) = refusal(SCRIPT, f"ckpt={run_folder}", "out=x", *arguments).splitlines()
    assert line.startswith(message)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"recompute": "dp:9"}, "recompute=dp:9: the encoder runs at 1..num_steps=6"),
        ({"classes": [10]}, "classes=[10]: the model has classes 0..9"),
        ({"classes": None, "seeds": "0-1"}, "classes, seeds: make 20 images; name at most 16"),
    ],
    ids=str,
)
def test_settings_of_sampling_are_those_of_sample(run_folder, changes, message):
    stored = ckpt.read_config(ckpt.find_checkpoint(run_folder))
    settings, images = settings_of().sampler_and_images(stored)
    assert settings == SamplerSettings(**SAMPLER)
    assert images == image_set(10, classes="random", seeds="0-5")
    with pytest.raises(UserError, match=f"^{re.escape(message)}"):
        settings_of(**changes).sampler_and_images(stored)


def settings_of(**changes):
    """The settings of the command, as its file has them."""
    usual = dict(
        ckpt="", out="no/such", columns=1, frames=0, loss_images=1, batch_size=1, data_root="checkpoint",
        autoencoder="checkpoint", dtype=None, classes="random", seeds="0-5",
    )  # fmt: skip
    return InsideSettings(**(usual | changes))


def test_files_are_not_written_over(looked, tmp_path):
    (tmp_path / "file").touch()
    for out, message in (
        (looked, "exists already and is not written over; choose another out="),
        (tmp_path / "file", "exists already and is not written over; choose another out="),
    ):
        with pytest.raises(UserError, match=f"^out={out}: {message}$"):
            settings_of(out=str(out))


def test_non_finite_samples_are_one_line():
    maker = generator()
    with torch.no_grad():
        maker.model.decoder.output.linear.bias.fill_(math.nan)
    with pytest.raises(FloatingPointError, match=r"^image 0 is NaN or infinite: try dtype=fp32"):
        walk(dataclasses.replace(maker), ImageSet([1], [4]))
