"""The diffusers pipeline samples the images of sample.py, and every argument has its effect."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from conftest import SMALL, WIDE, small_network, small_vae
from diffusers import DDIMScheduler
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from pipelines import CALL, exported, exported_rae, sampled
from safetensors.torch import load_file

import ddt
from ddt.draws import noise_of
from ddt.errors import UserError
from ddt.generation.generator import cast_weights
from ddt.pipeline import DDTPipeline, DDTRAEDecoder, DDTScheduler, DDTTransformer2DModel
from ddt.sampling.settings import SamplerSettings

pytestmark = pytest.mark.usefixtures("one_thread")
SHARED = {"recompute": "uniform:2", "forecast_order": 1}


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


def uint8(images):
    return np.stack([np.asarray(image) for image in images])


def test_the_images_of_sample_py_bit_for_bit(places, pipeline, tmp_path):
    checkpoint, _ = places
    plain = uint8(pipeline(**CALL).images)
    assert np.array_equal(plain, sampled(checkpoint, tmp_path / "plain"))
    shared = uint8(pipeline(**CALL, **SHARED).images)
    assert np.array_equal(shared, sampled(checkpoint, tmp_path / "shared", "recompute=uniform:2", "forecast_order=1"))
    assert not np.array_equal(plain, shared)
    pipeline.save_pretrained(tmp_path / "again")
    assert np.array_equal(uint8(DDTPipeline.from_pretrained(tmp_path / "again")(**CALL).images), plain)


def changed_config(component, tmp_path, change):
    """A copy of a component's folder with changes in its config."""
    folder = shutil.copytree(component, tmp_path / component.name)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    return folder


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"sample_size": [8]}, r"sample_size=\[8\]: give two whole numbers"),
        ({"sample_size": "x"}, "sample_size=x: give two whole numbers"),
        ({"sample_size": None}, "sample_size=None: give two whole numbers"),
        ({"sample_size": [0, 8]}, "sample_size=.*: must lie in 1"),
        ({"sample_size": [10**9, 8]}, "sample_size=.*: must lie in 1"),
        ({"sample_size": [7, 8]}, "network.patch_size=2: does not divide the latents' 7"),
        ({"settings": "x"}, "settings=x: give _target_ and arguments"),
        ({"settings": {"_target_": "ddt.model.DDT", "width": 8}}, "settings: .*'width'"),
        ({"settings": {"_target_": "os.mkdir"}}, "model._target_=os.mkdir: unknown network"),
    ],
    ids=str,
)
def test_a_wrong_config_of_the_network_is_one_line(places, tmp_path, change, line):
    folder = changed_config(places[1] / "transformer", tmp_path, change)
    with pytest.raises(UserError, match=f"^{line}"):
        DDTTransformer2DModel.from_pretrained(folder)


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


@pytest.fixture(scope="module")
def rae(tmp_path_factory):
    """A checkpoint of RAE latents with a class token, and its export."""
    return exported_rae(tmp_path_factory.mktemp("rae"), class_token=64)


def test_the_decoder_of_an_rae(rae, tmp_path):
    """Decodes in its own precision, whatever that of the pipeline, and holds no encoder."""
    checkpoint, folder = rae
    files = {path.name for path in (folder / "vae").iterdir()}
    assert files == {"config.json", "diffusion_pytorch_model.safetensors", "vae_ddt.py"}
    weights = load_file(folder / "vae" / "diffusion_pytorch_model.safetensors")
    assert {name.partition(".")[0] for name in weights} == {
        "decoder", "latents_mean", "latents_var", "pixels_mean", "pixels_std"
    }  # fmt: skip
    assert str(checkpoint.parent) not in (folder / "ddt.json").read_text()
    pipeline = DDTPipeline.from_pretrained(folder)
    assert type(pipeline.vae) is DDTRAEDecoder
    assert np.array_equal(uint8(pipeline(**CALL).images), sampled(checkpoint, tmp_path / "set"))
    half = DDTPipeline.from_pretrained(folder, torch_dtype=torch.bfloat16)
    assert (half.transformer.dtype, half.vae.dtype) == (torch.bfloat16, torch.float32)
    half.save_pretrained(tmp_path / "again")
    assert np.array_equal(uint8(half(**CALL).images), sampled(checkpoint, tmp_path / "half", "dtype=bf16"))
    again = load_file(tmp_path / "again" / "vae" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(again[name], value) for name, value in weights.items())
    with pytest.raises(UserError, match=r"^vae: is torch\.bfloat16; it decodes by float32 weights"):
        half.to(torch.bfloat16)(0)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"width": 10**9}, "width=1000000000: must be at most 65,536"),
        ({"depth": 0}, "depth=0: must be at least 1"),
        ({"num_heads": 3}, "autoencoder.decoder_heads=3: does not divide"),
        ({"class_token": -1}, "class_token=-1: must be at least 0"),
        ({"decode_dtype": "fp8"}, "decode_dtype=fp8: choose from bf16, fp16, fp32"),
    ],
    ids=str,
)
def test_a_wrong_config_of_an_rae_is_one_line(rae, tmp_path, change, line):
    folder = changed_config(rae[1] / "vae", tmp_path, change)
    with pytest.raises(UserError, match=f"^{line}"):
        DDTRAEDecoder.from_pretrained(folder)


def test_a_ditdh(tmp_path):
    """Its frozen frequencies stay float32, and its grid ends where the checkpoint says."""
    model = small_network("ditdh", in_channels=1)
    network = {"_target_": "ddt.model.DiTDH", **SMALL, **WIDE, "in_channels": 1}
    sampler = {"num_steps": 4, "cfg_interval": None, "last_step": None, "t_end": 0.9, "timeshift": 2.0}
    checkpoint, folder = exported(tmp_path, model=model, network=network, sampler=sampler)
    call = {**CALL, "recompute": "uniform:2"}
    whole = uint8(DDTPipeline.from_pretrained(folder)(**call).images)[..., None]
    assert np.array_equal(whole, sampled(checkpoint, tmp_path / "set", "recompute=uniform:2"))
    half = DDTPipeline.from_pretrained(folder, torch_dtype={"transformer": torch.bfloat16})
    assert half.transformer.network.encoder.t_embedder.W.dtype == torch.float32
    found = uint8(half(**call).images)[..., None]
    assert np.array_equal(found, sampled(checkpoint, tmp_path / "half", "recompute=uniform:2", "dtype=bf16"))


def test_internal_guidance_of_a_model_with_base_head(pipeline, tmp_path):
    network = {"_target_": "ddt.model.DDT", **SMALL, "in_channels": 1, "base_depth": 1}
    model = small_network("ddt", in_channels=1, base_depth=1)
    checkpoint, folder = exported(tmp_path, model=model, network=network)
    loaded = DDTPipeline.from_pretrained(folder)
    plain = uint8(loaded(**CALL).images)[..., None]
    guided = uint8(loaded(**CALL, internal_scale=1.7, internal_interval=(0.0, 0.6)).images)[..., None]
    settings = ("internal_scale=1.7", "internal_interval=[0.0,0.6]")
    assert np.array_equal(guided, sampled(checkpoint, tmp_path / "set", *settings))
    assert not np.array_equal(guided, plain)
    for wrong in ({"internal_scale": -1.0}, {"internal_scale": 2.0, "internal_interval": (0.9, 0.1)}):
        with pytest.raises(UserError, match=f"^{list(wrong)[-1]}="):
            loaded(0, **wrong)
    with pytest.raises(UserError, match=r"^internal_scale=1\.7: this model has no base head"):
        pipeline(0, internal_scale=1.7)


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


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_the_callback_cannot_change_the_result(pipeline, solver):
    def scaled(_, step, t, tensors):
        tensors["latents"].mul_(0.1)
        return tensors

    def swallowing(*arguments):
        shown.append(arguments[-1]["latents"])
        return {}

    call = {"class_labels": 0, "seeds": 3, "solver": solver, "output_type": "latent"}
    expected, shown = pipeline(**call).images, []
    for callback in (scaled, lambda *arguments: scaled(*arguments) and None, lambda *_: {"latents": torch.zeros(1)}):
        with pytest.raises(UserError, match="changes the latents; it can watch the steps"):
            pipeline(**call, callback_on_step_end=callback)
    assert torch.equal(pipeline(**call, callback_on_step_end=swallowing).images, expected)
    for latents in shown:
        latents.zero_()  # after the call
    assert torch.equal(pipeline(**call, callback_on_step_end=swallowing).images, expected)


def test_tensor_inputs_of_the_callback_are_those_of_diffusers(pipeline):
    class Watching(PipelineCallback):
        tensor_inputs = ["latents"]  # noqa: RUF012  # as diffusers' own

        def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
            seen.append((step_index, *callback_kwargs))
            return callback_kwargs

    seen = []
    for callback in (Watching(), MultiPipelineCallbacks([Watching()])):
        pipeline(0, num_inference_steps=1, callback_on_step_end=callback)
    assert seen == [(0, "latents")] * 2
    chosen = {"callback_on_step_end": lambda *arguments: seen.append(arguments[3])}
    pipeline(0, num_inference_steps=1, **chosen, callback_on_step_end_tensor_inputs=[])
    assert seen[-1] == {}
    with pytest.raises(UserError, match=r"^callback_on_step_end_tensor_inputs=\['v'\]: choose from latents"):
        pipeline(0, **chosen, callback_on_step_end_tensor_inputs=["latents", "v"])


def test_an_interrupted_call_returns_the_step_it_was_at(pipeline):
    seen = []

    def stop(pipeline, step, t, tensors):
        seen.append(tensors["latents"])
        pipeline._interrupt = step == 1

    call = {"class_labels": 0, "seeds": 3, "output_type": "latent"}
    whole = pipeline(**call).images
    found = pipeline(**call, callback_on_step_end=stop).images
    assert len(seen) == 2
    assert torch.equal(found, seen[1])
    assert pipeline.interrupt
    assert torch.equal(pipeline(**call).images, whole)
    assert not pipeline.interrupt


def test_non_finite_images_are_an_error(pipeline):
    for form in ("pil", "latent"):
        with pytest.raises(FloatingPointError, match=r"image 0 or one of the 1 after it .* a smaller guidance_scale"):
            pipeline([0, 1], guidance_scale=1e30, output_type=form)
    for value in (torch.nan, torch.inf):
        noise = torch.randn(1, 4, 8, 8)
        noise[0, 2, 3, 4] = value
        with pytest.raises(UserError, match=r"^latents: hold NaN or infinite values"):
            pipeline(0, latents=noise)


@pytest.fixture
def counted():
    """A compiler that counts the graphs it gets, and returns them unchanged."""
    torch.compiler.reset()

    def count(graph, _):
        count.graphs += 1
        return graph.forward

    count.graphs = 0
    return count


def test_compiling_compiles_what_a_call_uses(pipeline, counted):
    """By diffusers' `compile_repeated_blocks`, which `compile` calls."""
    call = {"class_labels": 0, "seeds": 3, "output_type": "latent", "num_inference_steps": 1, "guidance_scale": 1}
    expected = pipeline(**call).images
    pipeline.transformer.compile(backend=counted)
    assert torch.equal(pipeline(**call).images, expected)
    assert counted.graphs == 2  # blocks of encoder and decoder


def test_a_compiled_call_that_sampling_does_not_make_is_refused(places, pipeline, counted, tmp_path):
    """But it can be saved, as the network that it wraps."""
    pipeline.transformer = torch.compile(pipeline.transformer, backend=counted)
    with pytest.raises(UserError, match=r"^transformer: torch\.compile.* use transformer\.compile\(\)"):
        pipeline(0)
    pipeline.save_pretrained(tmp_path)
    index, code = json.loads((tmp_path / "model_index.json").read_text()), "transformer/transformer_ddt.py"
    assert index["transformer"] == ["transformer_ddt", "DDTTransformer2DModel"]
    assert (tmp_path / code).read_text() == (places[1] / code).read_text()


def test_another_scheduler_is_refused(pipeline):
    other = DDIMScheduler()
    with pytest.raises(UserError, match=r"^scheduler: DDIMScheduler takes other steps"):
        DDTPipeline(pipeline.transformer, pipeline.vae, other)
    pipeline.scheduler = other
    with pytest.raises(UserError, match=r"^scheduler: DDIMScheduler takes other steps"):
        pipeline(0)


@pytest.mark.parametrize("kind", [np.int64, np.uint8, np.array, torch.tensor], ids=lambda kind: kind.__name__)
def test_whole_numbers_of_any_kind(pipeline, kind):
    one = {"class_labels": 2, "seeds": 3, "num_images_per_class": 1}
    expected = pipeline(**one, output_type="latent").images
    call = {name: kind(value) for name, value in one.items()}
    assert torch.equal(pipeline(**call, output_type="latent").images, expected)
    several = {"class_labels": [kind(2)], "seeds": [kind(3)]}
    assert torch.equal(pipeline(**several, output_type="latent").images, expected)


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
        ({"latents": torch.zeros(1, 4, 8, 8, dtype=torch.int64)}, "latents: are torch.int64; give a tensor of floats"),
        ({"latents": [0.0]}, "latents: are list; give a tensor of floats"),
        ({"class_labels": 1.0}, "class_labels=1.0: give a whole number"),
        ({"class_labels": [1, 1.5]}, "class_labels=1.5: give a whole number"),
        ({"class_labels": torch.tensor([1.0])}, "class_labels=1.0: give a whole number"),
        ({"class_labels": True}, "class_labels=True: give a whole number"),
        ({"class_labels": None}, "class_labels=None: give a whole number"),
        ({"num_images_per_class": 1.5}, "num_images_per_class=1.5: give a whole number"),
        ({"seeds": 3.0}, "seeds=3.0: give a whole number"),
        ({"seeds": [np.float64(3)]}, "seeds=3.0: give a whole number"),
        ({"seeds": "3"}, "seeds=3: give a whole number"),
        ({"generator": 3}, r"generator: \['int'\] in place of a torch.Generator"),
        ({"generator": []}, "generator: 0 of them for 1 images; give one"),
        ({"generator": [torch.Generator()] * 2}, "generator: 2 of them for 1 images; give one"),
        ({"num_images_per_class": 3, "generator": [torch.Generator()]}, "generator: 1 of them for 3 images"),
        ({"callback_on_step_end": 3}, "callback_on_step_end=3: is no function"),
        ({"output_type": "jpeg"}, "output_type=jpeg: choose from"),
        ({"guidance_interval": (0.9, 0.1)}, "^guidance_interval="),
        ({"guidance_interval": 0.5}, "^guidance_interval=0.5: give two numbers"),
        ({"guidance_interval": ("a", 1)}, "^guidance_interval=a: give a finite number"),
        ({"guidance_scale": "4"}, "^guidance_scale=4: give a finite number"),
        ({"guidance_scale": None}, "^guidance_scale=None: give a finite number"),
        ({"timeshift": float("nan")}, "^timeshift=nan: give a finite number"),
        ({"num_inference_steps": 5.5}, "^num_inference_steps=5.5: give a whole number"),
        ({"solver": 3}, "^solver=3: give text"),
        ({"recompute": 3.5}, "^recompute=3.5: give a whole number"),
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
    cast_weights(model, "bf16")
    expected = {name: value.dtype for name, value in model.state_dict().items()}
    assert {name: value.dtype for name, value in half.network.state_dict().items()} == expected
    assert set(expected.values()) == {torch.float32, torch.bfloat16}
    pipeline = DDTPipeline.from_pretrained(places[1], torch_dtype={"transformer": torch.bfloat16})
    found = uint8(pipeline(**CALL).images)
    assert np.array_equal(found, sampled(places[0], tmp_path / "half", "dtype=bf16"))
    fitted = uint8(pipeline(**CALL, recompute="dp:2").images)
    assert np.array_equal(fitted, sampled(places[0], tmp_path / "fitted", "dtype=bf16", "recompute=dp:2"))
    fp16 = DDTPipeline.from_pretrained(places[1], torch_dtype={"transformer": torch.float16})
    assert np.array_equal(uint8(fp16(**CALL).images), sampled(places[0], tmp_path / "fp16", "dtype=fp16"))
    with pytest.raises(UserError, match=r"torch_dtype=torch\.float64: the networks run in"):
        DDTPipeline.from_pretrained(places[1], torch_dtype=torch.float64)(0)


def test_the_installed_class_runs_no_code_of_a_folder(places, tmp_path):
    folder = shutil.copytree(places[1], tmp_path / "folder")
    for path in folder.rglob("*.py"):
        path.write_text("raise SystemExit")
    loaded = DDTPipeline.from_pretrained(folder)
    assert [type(loaded.transformer), type(loaded.scheduler)] == [DDTTransformer2DModel, DDTScheduler]
    loaded.save_pretrained(tmp_path / "again")  # with the code of this project
    for path in places[1].rglob("*.py"):
        assert (tmp_path / "again" / path.relative_to(places[1])).read_text() == path.read_text()
