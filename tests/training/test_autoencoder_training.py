"""A small autoencoder is trained, measured, and written as a diffusers folder."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from conftest import refusal, succeed, thinned
from PIL import Image

from ddt.autoencoder import KLAutoencoder
from ddt.autoencoder.base import from_uint8
from ddt.data.images import ArrayImages, Digits
from ddt.errors import UserError
from ddt.metrics.reconstruct import psnr
from ddt.training.autoencoder import (
    AutoencoderSettings,
    autoencoder_loss,
    build_network,
    fit,
    train_autoencoder,
)

SMALL = AutoencoderSettings(
    steps=40, batch_size=8, lr=5e-3, block_out_channels=[8, 8], latent_channels=2, kl_weight=1e-4, layers_per_block=1,
    seed=3,
)  # fmt: skip
ARGUMENTS = ("data=digits", "steps=40", "lr=5e-3", "block_out_channels=[8,8]", "latent_channels=2", "seed=3")


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    out = tmp_path_factory.mktemp("autoencoder") / "out"
    succeed("scripts.train_autoencoder", *ARGUMENTS, f"out={out}")
    return out


def test_the_script_writes_what_the_project_reads(written):
    names = {"config.json", "diffusion_pytorch_model.safetensors", "reconstructions.png", "training.json"}
    assert {path.name for path in written.iterdir()} == names
    assert [path.name for path in written.parent.iterdir()] == ["out"]
    codec = KLAutoencoder(str(written))
    assert codec.latent_shape(1, 8) == (2, 4, 4)
    with Image.open(written / "reconstructions.png") as picture:
        assert picture.height == 4 * 50 + 2  # two rows of originals, each above its reconstructions
        assert picture.width > 8 * 50 + 2  # and the names of the rows
    report = json.loads((written / "training.json").read_text())
    assert report["settings"] == dataclasses.asdict(SMALL)
    assert report["data"] == {"name": "digits"}
    assert (report["training_images"], report["held_out_images"]) == (1497, 300)
    assert report["seconds"] > 0
    assert report["squared_error"]["last"] < 0.5 * report["squared_error"]["first"]


def test_the_reported_psnr_is_that_of_held_out_images_sampled_from_the_posterior(written):
    codec, test = KLAutoencoder(str(written)), torch.from_numpy(Digits("test").images)
    noise = torch.randn((len(test), 2, 4, 4), generator=torch.Generator().manual_seed(1))
    expected = psnr(test, codec.decode(codec.sample(codec.encode(test), noise)))
    reported = json.loads((written / "training.json").read_text())["psnr"]
    assert reported == pytest.approx(expected, abs=0.05)
    assert reported > 9


def test_latents_have_mean_0_and_variance_1(written):
    codec, images = KLAutoencoder(str(written)), torch.from_numpy(Digits("train").images)
    moments = codec.encode(images)
    noise = torch.randn(moments[:, :2].shape, generator=torch.Generator().manual_seed(0))
    latents = codec.sample(moments, noise)
    assert abs(latents.mean()) < 0.01
    assert latents.std() == pytest.approx(1, abs=0.01)


def test_one_seed_gives_one_autoencoder_whatever_the_global_state():
    images, settings, weights = Digits("train"), dataclasses.replace(SMALL, steps=4), []
    for global_seed in (1, 2):
        torch.manual_seed(global_seed)
        before = torch.get_rng_state()
        network = build_network(settings, 1, 8)
        fit(network, images, settings, torch.device("cpu"))
        assert torch.equal(torch.get_rng_state(), before)
        weights.append(network.state_dict())
    first, again = weights
    assert all(torch.equal(first[name], again[name]) for name in first)
    other = build_network(dataclasses.replace(SMALL, seed=4), 1, 8).state_dict()
    assert not torch.equal(other["encoder.conv_in.weight"], build_network(SMALL, 1, 8).encoder.conv_in.weight)


def test_the_loss_is_the_squared_error_and_the_divergence():
    network = build_network(SMALL, 1, 8)
    pixels = from_uint8(torch.from_numpy(Digits("test").images[:4]))
    noise = torch.randn((4, 2, 4, 4), generator=torch.Generator().manual_seed(0))
    loss, error = autoencoder_loss(network, pixels, noise, kl_weight=0.5)
    posterior = network.encode(pixels).latent_dist
    expected = torch.nn.functional.mse_loss(network.decode(posterior.mean + posterior.std * noise).sample, pixels)
    torch.testing.assert_close(error, expected)
    normal = torch.distributions.Normal(posterior.mean, posterior.std)
    divergence = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0.0, 1.0)).mean()
    torch.testing.assert_close(loss, error + 0.5 * divergence)


def test_the_learning_rate_rises_and_falls():
    settings = dataclasses.replace(SMALL, steps=100, lr=1.0)
    rates = [settings.lr_at(step) for step in range(100)]
    assert rates[0] == 0.2
    assert max(rates) == pytest.approx(1, abs=0.01)
    assert rates.index(max(rates)) == 4
    assert rates[50] == pytest.approx(0.5)
    assert 0 < rates[-1] < 0.001


def test_training_follows_the_learning_rate(monkeypatch):
    monkeypatch.setattr(AutoencoderSettings, "lr_at", lambda self, step: 0.0)
    network = build_network(SMALL, 1, 8)
    fit(network, Digits("train"), dataclasses.replace(SMALL, steps=2), torch.device("cpu"))
    before = build_network(SMALL, 1, 8).state_dict()
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_a_loss_that_is_not_finite_ends_the_training():
    images = Digits("train")
    network = build_network(SMALL, 1, 8)
    with torch.no_grad():
        network.decoder.conv_out.bias.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="NaN or infinite at step 0; nothing was written; lower lr"):
        fit(network, images, SMALL, torch.device("cpu"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    thinned(
        [
            (["steps=0"], "steps=0: must be at least 1"),
            (["lr=0"], "lr=0.0: must be above 0"),
            (["kl_weight=-1"], "kl_weight=-1.0: must be at least 0"),
            (["block_out_channels=[]"], "block_out_channels=[]: give channels"),
            (["block_out_channels=16"], "block_out_channels=16: give a list such as [a,b]"),
            (["block_out_channels=[8,8,8,8,8]"], "data: images of 8 px cannot be halved 4 times"),
            (["trainer.max_steps=9"], "trainer.max_steps: has no effect here; choose from steps, batch_size, lr"),
            (["model=xl_22en6de"], "model: has no effect here"),
            (["stepz=9"], "stepz: no such setting; did you mean steps?"),
            (["data=photo"], "data=photo: no such choice; did you mean photos?"),
        ],
        3,
    ),
)
def test_mistakes_are_one_line(tmp_path, arguments, message):
    (line,) = refusal("scripts.train_autoencoder", "data=digits", f"out={tmp_path / 'out'}", *arguments).splitlines()
    assert line.startswith(message), line
    assert not list(tmp_path.iterdir())


def test_out_must_be_given_and_is_not_written_over(written, tmp_path):
    empty = ArrayImages(np.empty((0, 1, 8, 8), np.uint8), np.empty(0), ["0"])
    with pytest.raises(UserError, match=r"no held-out images to measure on; give data\.holdout_every=20"):
        train_autoencoder(Digits(), empty, SMALL, tmp_path / "out", {})
    assert refusal("scripts.train_autoencoder", "data=digits") == "out: not set; give out=…"
    before = (written / "training.json").read_bytes()
    message = refusal("scripts.train_autoencoder", *ARGUMENTS, f"out={written}")
    assert message == f"out={written}: exists already and is not written over; choose another out="
    assert (written / "training.json").read_bytes() == before
