"""The diffusers pipeline samples the images of sample.py, and every argument has its effect."""

import dataclasses

import numpy as np
import pytest
import torch
from conftest import run_inside, small_checkpoint, small_vae
from diffusers import DiffusionPipeline

import ddt
from ddt.draws import noise_of
from ddt.errors import UserError
from ddt.export import ExportSettings, export
from ddt.generation.generator import cast_weights
from ddt.pipeline import DDTPipeline, DDTScheduler
from ddt.sampling.settings import SamplerSettings

pytestmark = pytest.mark.usefixtures("one_thread")
SHARED = {"recompute": "uniform:2", "forecast_order": 1}


def exported(tmp_path, **arguments):
    folder = small_checkpoint(tmp_path / "checkpoint", **arguments)
    export(ExportSettings(str(folder), "diffusers", str(tmp_path / "exported")))
    return folder, tmp_path / "exported"


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A checkpoint of latents, and its export."""
    tmp_path = tmp_path_factory.mktemp("latents")
    return exported(tmp_path, vae=small_vae(tmp_path / "vae", levels=2, scaling_factor=0.5, shift_factor=0.1))


@pytest.fixture
def pipeline(places):
    made = DDTPipeline.from_pretrained(places[1])
    made.set_progress_bar_config(disable=True)
    return made


def sampled(checkpoint, out, *settings):
    """Images of sample.py, uint8 (n, H, W, C)."""
    arguments = [f"ckpt={checkpoint}", f"out={out}", "num_processes=1", "seeds=[3,8]", "classes=[0,4]"]
    done = run_inside("sample", *arguments, *settings)
    assert done.returncode == 0, done.stderr
    with np.load(out / "samples.npz") as file:
        return file["arr_0"]


CALL = {"class_labels": ["a", 4, "a", 4], "seeds": [3, 3, 8, 8]}


def uint8(images):
    return np.stack([np.asarray(image) for image in images])


def test_the_images_of_sample_py_bit_for_bit(places, pipeline, tmp_path):
    checkpoint, folder = places
    plain = uint8(pipeline(**CALL).images)
    assert np.array_equal(plain, sampled(checkpoint, tmp_path / "plain"))
    shared = uint8(pipeline(**CALL, **SHARED).images)
    assert np.array_equal(shared, sampled(checkpoint, tmp_path / "shared", "recompute=uniform:2", "forecast_order=1"))
    assert not np.array_equal(plain, shared)
    by_diffusers = DiffusionPipeline.from_pretrained(folder, custom_pipeline=str(folder), trust_remote_code=True)
    assert np.array_equal(uint8(by_diffusers(**CALL).images), plain)
    pipeline.save_pretrained(tmp_path / "again")
    assert np.array_equal(uint8(DDTPipeline.from_pretrained(tmp_path / "again")(**CALL).images), plain)


def test_a_model_of_pixels_has_no_vae(tmp_path):
    checkpoint, folder = exported(tmp_path)
    pipeline = DDTPipeline.from_pretrained(folder)
    assert pipeline.vae is None
    found = pipeline(**CALL, recompute="dp:2").images
    assert found[0].mode == "L"
    assert np.array_equal(uint8(found)[..., None], sampled(checkpoint, tmp_path / "set", "recompute=dp:2"))


def test_the_undivided_baseline(tmp_path):
    model = ddt.DiT(1, 2, 32, 2, 3, 5)
    network = dict(in_channels=1, patch_size=2, hidden_size=32, num_heads=2, depth=3, num_classes=5)
    network["_target_"] = "ddt.model.DiT"
    checkpoint, folder = exported(tmp_path, model=model, network=network)
    pipeline = DDTPipeline.from_pretrained(folder)
    assert np.array_equal(uint8(pipeline(**CALL).images)[..., None], sampled(checkpoint, tmp_path / "set"))
    with pytest.raises(UserError, match="this model has no encoder to share"):
        pipeline(0, recompute="uniform:2")


def test_arguments_are_those_of_the_sampler(pipeline):
    settings = dict(num_steps=5, cfg_scale=3.0, cfg_interval=None, recompute=[0, 2], forecast_order=1, solver="heun",
                    timeshift=2.0, last_step=0.1)  # fmt: skip
    expected = ddt.sample(pipeline.transformer.network, noise_of([3], (4, 8, 8)), torch.tensor([2]), **settings)
    theirs = {"num_steps": "num_inference_steps", "cfg_scale": "guidance_scale", "cfg_interval": "guidance_interval"}
    call = {theirs.get(name, name): value for name, value in settings.items()}
    assert torch.equal(pipeline(2, seeds=3, output_type="latent", **call).images, expected)


def test_noise_may_come_from_seeds_generators_or_a_tensor(pipeline):
    call = {"class_labels": [1, 2], "output_type": "latent", "num_images_per_class": 2}
    expected = pipeline(**call, seeds=[5, 6, 7, 8]).images
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 6, 7, 8)]
    assert torch.equal(pipeline(**call, generator=generators).images, expected)
    assert torch.equal(pipeline(**call, latents=noise_of([5, 6, 7, 8], (4, 8, 8))).images, expected)
    by_one = [pipeline(**call, generator=torch.Generator().manual_seed(1)).images for _ in range(2)]
    assert torch.equal(*by_one)
    single = pipeline([1, 1, 2, 2], seeds=[5, 6, 7, 8], output_type="latent").images
    assert torch.equal(single, expected)


def test_latents_are_decoded_in_the_checkpoints_chunks(pipeline):
    assert pipeline.config.decode_chunk_size == pipeline._autoencoder().chunk_size == 2


def test_forms_of_the_images(pipeline):
    call = {"class_labels": [0, 1], "seeds": [1, 2]}
    pictures = uint8(pipeline(**call).images)
    assert pictures.shape == (2, 16, 16, 3)
    (arrays,) = pipeline(**call, output_type="np", return_dict=False)
    assert arrays.dtype == np.float32
    assert np.array_equal((arrays * 255).round(), pictures)
    tensors = pipeline(**call, output_type="pt").images
    assert np.array_equal(tensors.permute(0, 2, 3, 1).numpy(), arrays)
    assert pipeline(**call, output_type="latent").images.shape == (2, 4, 8, 8)


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_the_callback_sees_the_result_of_each_step(pipeline, solver):
    seen = []

    def look(_, step, t, tensors):
        seen.append((step, t, tensors["latents"].clone()))
        return tensors

    last = pipeline(0, seeds=3, solver=solver, output_type="latent", callback_on_step_end=look).images
    assert [step for step, _, _ in seen] == [0, 1, 2, 3]
    assert [t for _, t, _ in seen] == pytest.approx([0, 0.25, 0.5, 0.75])
    assert torch.equal(seen[-1][2], last)
    shorter = {"num_steps": 4, "cfg_interval": (0.0, 0.9), "last_step": None, "solver": solver}
    v = []
    ddt.sample(pipeline.transformer.network, noise_of([3], (4, 8, 8)), torch.tensor([0]), **shorter,
               observe=lambda step, t, x, _: v.append((step, x)))  # fmt: skip
    assert torch.equal(seen[0][2], next(x for step, x in v if step == 1))
    with pytest.raises(UserError, match="it can watch the steps, not change them"):
        pipeline(0, callback_on_step_end=lambda *_: {"latents": torch.zeros(1)})


def test_progress_counts_the_steps(pipeline, monkeypatch):
    bars = []
    make = pipeline.progress_bar
    monkeypatch.setattr(pipeline, "progress_bar", lambda **options: bars.append(make(**options)) or bars[-1])
    pipeline.set_progress_bar_config(disable=False)
    pipeline(0, seeds=3, solver="heun", num_inference_steps=5)
    assert [(bar.n, bar.total) for bar in bars] == [(5, 5)]


def test_names_of_classes(pipeline):
    pipeline.register_to_config(id2label={"0": "crane, a bird", "1": "tench, Tinca tinca", "2": "crane"})
    assert pipeline.get_label_ids(["tench", "Tinca tinca", "a bird", "tench, Tinca tinca"]) == [1, 1, 0, 1]
    with pytest.raises(UserError, match="class_labels=crane: is the name of classes 0 and 2; give the number"):
        pipeline("crane")
    with pytest.raises(UserError, match="class_labels=tensh: no such class; did you mean tench"):
        pipeline("tensh")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"class_labels": 5}, r"class_labels=\[5\]: the model has classes 0\.\.4"),
        ({"class_labels": []}, r"class_labels=\[\]"),
        ({"num_images_per_class": 0}, "num_images_per_class=0: must be at least 1"),
        ({"seeds": [1, 2]}, "seeds: 2 of them for 1 images"),
        ({"seeds": -1}, r"seeds=\[-1\]: a seed must lie in"),
        ({"seeds": 1, "generator": torch.Generator()}, "seeds, generator: .* give one"),
        ({"latents": torch.zeros(1, 4, 4, 4)}, r"latents: have shape \(1, 4, 4, 4\), expected \(1, 4, 8, 8\)"),
        ({"output_type": "jpeg"}, "output_type=jpeg: choose from"),
        ({"guidance_interval": (0.9, 0.1)}, "^guidance_interval="),
        ({"num_inference_steps": 0}, "^num_inference_steps=0"),
        ({"solver": "runge"}, "^solver=runge"),
        ({"recompute": [1]}, "recompute="),
        ({"forecast_order": 1}, "forecast_order=1: has no effect without recompute="),
    ],
)
def test_wrong_arguments_are_named_as_they_were_given(pipeline, call, message):
    with pytest.raises(UserError, match=message):
        pipeline(**{"class_labels": 0, **call})


def test_the_scheduler_holds_every_setting_of_the_sampler(pipeline, tmp_path):
    assert DDTScheduler().settings() == dataclasses.asdict(SamplerSettings())
    settings = pipeline.scheduler.settings()
    changed = DDTScheduler.from_config(pipeline.scheduler.config, solver="heun", cfg_steps=[1])
    changed.save_pretrained(tmp_path)
    loaded = DDTScheduler.from_pretrained(tmp_path)
    assert loaded.settings() == settings | {"solver": "heun", "cfg_steps": [1]}
    with pytest.raises(TypeError, match="num_stepz"):
        DDTScheduler(num_stepz=5)


def test_bfloat16_is_that_of_sample_py(places, tmp_path):
    half = DDTPipeline.from_pretrained(places[1], torch_dtype=torch.bfloat16).transformer
    model = ddt.load_model(places[0])
    cast_weights(model)
    expected = {name: value.dtype for name, value in model.state_dict().items()}
    assert {name: value.dtype for name, value in half.network.state_dict().items()} == expected
    assert set(expected.values()) == {torch.float32, torch.bfloat16}
    pipeline = DDTPipeline.from_pretrained(places[1], torch_dtype={"transformer": torch.bfloat16})
    found = uint8(pipeline(**CALL).images)
    assert np.array_equal(found, sampled(places[0], tmp_path / "half", "dtype=bf16"))
    fitted = uint8(pipeline(**CALL, recompute="dp:2").images)
    assert np.array_equal(fitted, sampled(places[0], tmp_path / "fitted", "dtype=bf16", "recompute=dp:2"))
    with pytest.raises(UserError, match=r"torch_dtype=torch\.float16: the networks run in"):
        DDTPipeline.from_pretrained(places[1], torch_dtype=torch.float16)(0)
