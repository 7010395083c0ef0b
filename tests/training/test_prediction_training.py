"""A run that predicts the clean latent: its checkpoint, samples and exports know it."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from conftest import refusal, run_inside, succeed

import ddt
from ddt.autoencoder import Identity
from ddt.draws import noise_of
from ddt.export import ExportSettings, export
from ddt.flow import velocity_of
from ddt.generation.settings import SamplerOverrides
from ddt.pipeline import DDTPipeline

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = [
    "model.hidden_size=32",
    "model.depth=3",
    "model.encoder_depth=2",
    "sampler.num_steps=4",
    "trainer.global_batch_size=8",
    "trainer.max_steps=2",
    "trainer.preview_every=0",
    "trainer.ema_decay=0.5",
]
SEEDS, CLASSES = [3, 8], [0, 4]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a run of two steps on digits."""
    root = tmp_path_factory.mktemp("prediction")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        succeed("train", *SMALL, "name=x", "objective.prediction=x")
    return root


def sampled(checkpoint, out):
    arguments = [f"ckpt={checkpoint}", f"out={out}", "num_processes=1", f"seeds={SEEDS}", f"classes={CLASSES}"]
    done = run_inside("sample", *arguments)
    assert done.returncode == 0, done.stderr
    with np.load(out / "samples.npz") as file:
        return file["arr_0"], file["arr_1"]


def pixels(place, model, chosen):
    """The pixels that `ddt.sample` makes, by the run's sampler."""
    stored = json.loads((place / "runs/x/checkpoints/step_0000002/config.json").read_text())
    sampler = dataclasses.asdict(SamplerOverrides().resolve(stored["sampler"], True))
    noise = noise_of([seed for seed in SEEDS for _ in CLASSES], (1, 8, 8))
    return Identity().decode(ddt.sample(model, noise, torch.from_numpy(chosen), **sampler)).permute(0, 2, 3, 1).numpy()


def test_samples_are_those_of_the_stored_prediction(place, tmp_path):
    images, classes = sampled(place / "runs/x", tmp_path / "samples")
    model = ddt.load_model(place / "runs/x")
    assert model.prediction == "x"
    assert np.array_equal(images, pixels(place, model, classes))
    model.prediction = "v"
    assert not np.array_equal(images, pixels(place, model, classes))


def test_exports_keep_it(place, tmp_path):
    images, classes = sampled(place / "runs/x", tmp_path / "samples")
    for form in ("hub", "diffusers"):
        export(ExportSettings(str(place / "runs/x"), form, str(tmp_path / form)))
    assert ddt.load_model(tmp_path / "hub").prediction == "x"
    assert np.array_equal(sampled(tmp_path / "hub", tmp_path / "again")[0], images)
    pipeline = DDTPipeline.from_pretrained(tmp_path / "diffusers")
    pipeline.set_progress_bar_config(disable=True)
    order = [seed for seed in SEEDS for _ in CLASSES]
    found = pipeline([int(k) for k in classes], seeds=order, output_type="np").images
    assert np.array_equal((found * 255).round().astype(np.uint8), images)
    x, t, y = torch.randn(2, 1, 8, 8), torch.tensor([0.3, 0.99]), torch.tensor([1, 2])
    network = pipeline.transformer.network
    assert torch.equal(pipeline.transformer(x, t, y), velocity_of(network(x, t, y), x, t, "x"))
    with pytest.raises(ddt.UserError, match=r"objective\.prediction=x: .*choose format=hub or diffusers"):
        export(ExportSettings(str(place / "runs/x"), "released", str(tmp_path / "released.safetensors")))


def test_a_wrong_or_another_prediction_is_one_line(place, monkeypatch):
    monkeypatch.chdir(place)
    assert refusal("train", *SMALL, "name=other", "objective.prediction=e").startswith("objective.prediction=e: give")
    assert "objective.prediction x -> v" in refusal("train", *SMALL, "name=x", "trainer.max_steps=3")
    other = refusal("train", *SMALL, "name=v", "init_from=runs/x")
    assert "is another network (objective.prediction x -> v)" in other
    assert "objective.prediction=v" in refusal("train", *SMALL, "name=v", "+model.prediction=x")
