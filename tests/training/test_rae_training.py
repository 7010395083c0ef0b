"""RAE latents from end to end: statistics, cache, training, samples, export."""

import json
import re

import numpy as np
import pytest
import torch
from conftest import ROOT, picture_folder, refusal, rows, run, run_inside, small_rae, succeed, train_settings
from safetensors import safe_open
from safetensors.torch import load_file

from ddt.autoencoder import build_autoencoder
from ddt.data.images import ImageFolder
from ddt.data.latent_cache import LatentCache
from ddt.training.run import build_run

pytestmark = pytest.mark.usefixtures("one_thread")
DATA = ["data=folder", "data.image_size=16", "data.holdout_every=5"]
SMALL = [
    "model.hidden_size=32", "model.depth=3", "model.encoder_depth=2", "model.patch_size=1", "sampler.num_steps=2",
    "trainer.max_steps=4", "trainer.global_batch_size=4", "trainer.log_every=2", "trainer.preview_every=4",
    "trainer.validate_every=0", "trainer.save_every=0", "trainer.warmup_steps=0", "data.holdout_every=5",
]  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with pictures and an RAE."""
    folder = tmp_path_factory.mktemp("rae")
    picture_folder(folder / "pictures", 8)
    small_rae(folder / "rae")
    return folder


@pytest.fixture(autouse=True)
def inside(place, monkeypatch):
    monkeypatch.chdir(place)


def autoencoder(place, **changes):
    """What chooses it on the command line."""
    settings = small_rae(place / "rae", **changes)
    return ["autoencoder=rae_dinov2_b", "autoencoder.source=null", "autoencoder.statistics=null"] + [
        f"autoencoder.{key}={value}" for key, value in settings.items() if key != "_target_"
    ]


@pytest.mark.slow
def test_statistics_are_those_of_all_latents_of_images_or_a_cache(place):
    data = [*DATA, f"data.root={place / 'pictures'}"]
    arguments = [*autoencoder(place), "num_workers=0", "batch_size=3"]
    succeed("scripts.latent_statistics", *data, *arguments, "data.horizontal_flip=true", "out=both.safetensors")
    pixels = ImageFolder("pictures", 16, "train", holdout_every=5)
    images = torch.from_numpy(pixels.load(np.arange(len(pixels.labels))))
    codec = build_autoencoder(small_rae(place / "rae"))
    values = codec.encode(torch.cat([images, images.flip(-1)])).double()
    found = load_file("both.safetensors")
    torch.testing.assert_close(found["mean"].double(), values.mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["var"].double(), values.var(0, unbiased=False), rtol=1e-4, atol=1e-5)
    with safe_open("both.safetensors", "pt") as file:
        receipt = json.loads(file.metadata()["receipt"])
    assert (receipt["images"], receipt["count"]) == (len(images), 2 * len(images))
    assert receipt["encoder_sha256"] == codec.encoder_fingerprint
    # latents that they normalise
    normalised = build_autoencoder(small_rae(place / "rae", statistics="both.safetensors"))
    latents = normalised.sample(values).double()
    assert latents.mean(0).abs().max() < 1e-4
    expected = (values.var(0, unbiased=False) / (values.var(0, unbiased=False) + 1e-5)).float()
    torch.testing.assert_close(latents.var(0, unbiased=False).float(), expected, rtol=1e-3, atol=0)
    # a cache says the same, up to float16
    succeed("scripts.cache_latents", *data, *arguments, "flip=true", "out=mirrored", "shard_size=4")
    cached = ["data=latents", "data.root=mirrored", *arguments, "out=cached.safetensors"]
    succeed("scripts.latent_statistics", *cached)
    for name, value in load_file("cached.safetensors").items():
        torch.testing.assert_close(value, found[name], rtol=1e-2, atol=2e-3)
    assert "exists already" in refusal("scripts.latent_statistics", *cached)
    with_kl = [*data, "autoencoder=sd_ft_ema", "out=kl.safetensors"]
    assert "takes no file of statistics" in refusal("scripts.latent_statistics", *with_kl)


@pytest.mark.slow
def test_two_processes_write_the_statistics_of_one(place):
    data, chosen = [*DATA, "data.root=pictures"], autoencoder(place)
    for name, more in (("one", []), ("two", ["num_processes=2", "batch_size=4", "num_workers=1"])):
        done = run(
            ROOT / "scripts" / "latent_statistics.py", *data, *chosen, f"out={name}.safetensors", *more, cwd=place
        )
        assert done.returncode == 0, done.stderr
    one, two = load_file("one.safetensors"), load_file("two.safetensors")
    for key, value in one.items():
        torch.testing.assert_close(value, two[key], rtol=1e-5, atol=1e-6)


def test_training_from_a_cache_is_that_on_the_fly_then_samples_and_an_export(place):
    data = [*DATA, f"data.root={place / 'pictures'}"]
    chosen = autoencoder(place)
    done = run_inside("scripts.cache_latents", *data, *chosen, "out=cache", "num_workers=0", "dtype=float32")
    assert done.returncode == 0, done.stderr
    assert "16 images to encode: moments 0.1 MB" in done.stderr
    assert "mean and std of each channel" in done.stderr  # not 64 numbers
    moments = LatentCache("cache").load_moments(np.arange(3), np.zeros(3, dtype=bool))
    assert moments.shape == (3, 64, 4, 4)
    small = [each for each in SMALL if not each.startswith("data.")]
    succeed("train", "name=fly", *data, *chosen, *small)
    succeed("train", "name=cached", "data=latents", "data.root=cache", *chosen, *small)
    fly, cached = ([row["loss"] for row in rows(place / "runs" / name) if "loss" in row] for name in ("fly", "cached"))
    assert fly == pytest.approx(cached, rel=1e-5)
    succeed("sample", "ckpt=runs/cached", "num_samples=4", "out=samples", "batch_size=3")
    with np.load("samples/samples.npz") as file:
        images = file["arr_0"]
    assert (images.shape, images.dtype) == ((4, 16, 16, 3), np.uint8)
    # an export has the autoencoder's files, and samples the same
    succeed("scripts.export", "ckpt=runs/cached", "out=hub", "format=hub")
    names = {path.name for path in (place / "hub" / "autoencoder").iterdir()}
    assert names == {"encoder.safetensors", "decoder.safetensors"}
    succeed("sample", "ckpt=hub", "num_samples=4", "out=again", "batch_size=3")
    with np.load("again/samples.npz") as file:
        assert np.array_equal(file["arr_0"], images)
    succeed("scripts.export", "ckpt=runs/cached", "out=pipeline", "format=diffusers")
    texts = [path.read_text() for path in (place / "pipeline").rglob("*") if path.suffix in (".json", ".md", ".py")]
    assert len(texts) == 10
    assert not [text for text in texts if str(place) in text]


@pytest.mark.slow
def test_epochs_become_steps_and_null_shifts_those_of_the_latents(place):
    """12 images, 2 steps of 6 an epoch; latents of 64×16×16 are four times 4,096 numbers."""
    small = [each for each in SMALL if "=4" not in each and not each.startswith("data.")]
    small += ["trainer.global_batch_size=6", "trainer.log_every=1", "trainer.preview_every=0", "model.depth=3"]
    epochs = ["trainer.max_steps=2epochs", "trainer.lr_schedule=linear", "trainer.decay_after=0.5epochs"]
    shape = autoencoder(place / "large", grid=16, patch_size=1)
    command = ["name=epochs", *DATA, "data.root=pictures", *shape, *small, *epochs, "optimizer.lr=1"]
    said = run_inside("train", *command).stderr
    assert "an epoch of 12 images is 2 steps: trainer.max_steps=4, trainer.decay_after=1" in said
    assert "training to step 4;" in said
    assert "2 epochs in all" in said
    folder = place / "runs" / "epochs"
    assert [row["lr"] for row in rows(folder) if "lr" in row] == pytest.approx([1, 1, 2 / 3, 1 / 3])
    run_config = json.loads((folder / "config.json").read_text())
    stored = json.loads((folder / "checkpoints" / "step_0000004" / "config.json").read_text())
    shifts = run_config["objective"]["timeshift"], run_config["sampler"]["timeshift"], stored["sampler"]["timeshift"]
    assert shifts == (2, 2, 2)
    assert run_config["trainer"]["max_steps"] == 4
    built = build_run(train_settings(*command, "trainer.max_steps=4", "trainer.decay_after=1"))
    assert (built.objective.times.timeshift, built.settings.sampler.timeshift) == (2, 2)
    assert "complete at step 4" in run_inside("train", *command).stderr
    # where the decay ends is its own number: a longer training is the same one
    longer = [each for each in command if "max_steps" not in each] + ["name=longer", "trainer.decay_end=2epochs"]
    succeed("train", *longer, "trainer.max_steps=4")
    succeed("train", *longer, "trainer.max_steps=3epochs")
    factors = [row["lr"] for row in rows(place / "runs" / "longer") if "lr" in row]
    assert factors == pytest.approx([1, 1, 2 / 3, 1 / 3, 0, 0])


def test_data_in256_rae_is_on_the_fly_without_alignment():
    settings = train_settings("data=in256_rae", "data.root=somewhere")
    assert settings.alignment is None
    assert settings.autoencoder.target == "ddt.autoencoder.RAE"
    assert settings.data.settings["horizontal_flip"]


REG = ["objective=reg", "autoencoder.class_token=true"]


@pytest.mark.slow
def test_reg_trains_samples_shares_and_exports(place):
    data, small = [*DATA, "data.root=pictures"], [each for each in SMALL if not each.startswith("data.")]
    small += ["trainer.validate_every=2", "optimizer.lr=0.01"]
    chosen = [*autoencoder(place), *REG]
    succeed("scripts.cache_latents", *data, *autoencoder(place), "autoencoder.class_token=true", "out=with_token",
            "num_workers=0", "dtype=float32")  # fmt: skip
    small += ["model=nano_ditdh", "model.decoder_hidden_size=48"]
    succeed("train", "name=reg", *data, *chosen, *small)
    succeed("train", "name=reg_cached", "data=latents", "data.root=with_token", *chosen, *small)
    fly, cached = (
        [row for row in rows(place / "runs" / name) if "token_loss" in row] for name in ("reg", "reg_cached")
    )
    for a, b in zip(fly, cached, strict=True):
        assert a["loss"] == pytest.approx(a["fm_loss"] + 0.03 * a["token_loss"], rel=1e-5)
        assert a["token_loss"] == pytest.approx(b["token_loss"], rel=1e-5)
    assert sum("validation_loss" in row for row in rows(place / "runs" / "reg")) == 2
    shared = ["num_samples=4", "recompute=uniform:2", "cfg_scale=2.0"]
    succeed("sample", "ckpt=runs/reg", "out=reg", *shared)
    with np.load("reg/samples.npz") as file:
        images = file["arr_0"]
    assert images.shape == (4, 16, 16, 3)
    succeed("scripts.export", "ckpt=runs/reg", "out=reg_hub", "format=hub")
    succeed("sample", "ckpt=reg_hub", "out=reg_again", *shared)
    with np.load("reg_again/samples.npz") as file:
        assert np.array_equal(file["arr_0"], images)
    line = refusal("scripts.export", "ckpt=runs/reg", "out=reg.safetensors", "format=released")
    assert "class_token=64: the published format" in line
    without = [*data, *autoencoder(place), *small]
    undivided = [each for each in without if not re.match(r"model(=|\.encoder|\.decoder)", each)] + ["model=dit_nano"]
    aligned = ["alignment=dispersive", "alignment.align_depth=1"]
    for name, wrong, line in (
        ("a", [*without, "objective=reg"], "objective=reg: the latents hold no class token; give autoencoder.class_"),
        ("b", [*without, "autoencoder.class_token=true"], "the latents hold a class token .*; give objective=reg"),
        ("c", [*undivided, *REG], "autoencoder.class_token=true: DiT takes no class token; give false"),
        ("d", [*without, *REG, "model.patch_size=2"], "model.patch_size=2: with a class token"),
        ("e", [*without, *REG, "objective.token_weight=0"], "objective.token_weight=0.0: must be above 0"),
        ("f", [*without, *REG, *aligned], "alignment: REG aligns by the class"),
        ("g", ["data=latents", "data.root=with_token", *autoencoder(place), *small], "made by another autoencoder"),
    ):
        assert re.search(line, refusal("train", f"name=wrong_{name}", *wrong))
