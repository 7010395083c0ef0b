"""Statistics of latents: those of all values at once, whatever the shards, and an autoencoder that
is normalised by them.
"""

import json

import numpy as np
import pytest
import torch
from conftest import picture_folder, refusal, small_vae, succeed
from diffusers import AutoencoderTiny

from ddt.autoencoder import KLAutoencoder, TinyAutoencoder
from ddt.data import latent_statistics as statistics
from ddt.data.latent_cache import LatentCache
from ddt.data.latent_statistics import STATISTICS, Moments, block_moments, latent_statistics
from ddt.errors import UserError


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    return small_vae(tmp_path_factory.mktemp("vae"), channels=3, levels=2, scaling_factor=0.5)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return picture_folder(tmp_path_factory.mktemp("pictures"))


def cached(pictures, vae, out, *more):
    succeed(
        "scripts.cache_latents", "data=folder", f"data.root={pictures}", "data.image_size=16", "data.holdout_every=5",
        "autoencoder=kl", f"autoencoder.source={vae}", f"out={out}", "num_workers=0", "flip=true", *more,
    )  # fmt: skip
    return out


@pytest.fixture(scope="module")
def cache(pictures, vae, tmp_path_factory):
    return cached(pictures, vae, tmp_path_factory.mktemp("cache") / "a", "shard_size=5")


def test_they_are_those_of_all_training_values_at_once(cache):
    images = LatentCache(str(cache), "train")
    everything = np.arange(len(images.labels))
    both = [images.load_moments(everything, np.full(len(everything), side)) for side in (False, True)]
    mean, logvar = np.split(np.stack(both).astype(np.float64), 2, axis=2)  # (flips, B, C, h, w)
    found = json.loads((cache / STATISTICS).read_text())
    axes = (0, 1, 3, 4)
    np.testing.assert_allclose(found["mean"], mean.mean(axes), rtol=1e-12)
    np.testing.assert_allclose(found["std"], np.sqrt(mean.var(axes) + np.exp(logvar).mean(axes)), rtol=1e-12)
    assert found["count"] == 2 * len(everything) * 8 * 8
    # and of what is sampled from the posterior
    autoencoder = object.__new__(KLAutoencoder)  # without weights
    autoencoder.stochastic, autoencoder.shift, autoencoder.scale = True, torch.zeros(1), torch.ones(1)
    moments = torch.from_numpy(np.concatenate(both)).repeat(40, 1, 1, 1)
    noise = torch.randn(len(moments), 3, 8, 8, generator=torch.Generator().manual_seed(0))
    latents = autoencoder.sample(moments, noise)
    np.testing.assert_allclose(found["std"], latents.std((0, 2, 3)).numpy(), rtol=0.01)


def test_shards_and_blocks_change_nothing_but_rounding(cache, pictures, vae, tmp_path, monkeypatch):
    found = json.loads((cache / STATISTICS).read_text())
    other = cached(pictures, vae, tmp_path / "b", "shard_size=8192", "batch_size=4")
    monkeypatch.setattr(statistics, "BLOCK", 3)
    again = latent_statistics(other)
    for key in ("mean", "std"):
        np.testing.assert_allclose(again[key], found[key], rtol=1e-12)
    # a large mean does not eat the variance
    values = 1e6 + np.random.default_rng(0).standard_normal((6, 1, 2, 4, 4))
    parts = [block_moments(torch.from_numpy(values[k : k + 2]), stochastic=False) for k in (0, 2, 4)]
    merged = Moments.merge(Moments.merge(*parts[:2]), parts[2])
    np.testing.assert_allclose(merged.variance, values.var((0, 1, 3, 4)), rtol=1e-9)


def test_a_complete_cache_without_them_gets_them(cache, pictures, vae):
    before = (cache / STATISTICS).read_bytes()
    (cache / STATISTICS).unlink()
    cached(pictures, vae, cache, "shard_size=5")
    assert (cache / STATISTICS).read_bytes() == before


def test_an_autoencoder_takes_them_and_the_same_cache(cache, vae, tmp_path):
    found = json.loads((cache / STATISTICS).read_text())
    own = KLAutoencoder(vae)
    normalised = KLAutoencoder(vae, latents_mean=tuple(found["mean"]), latents_std=tuple(found["std"]))
    assert own.fingerprint != normalised.fingerprint
    assert own.encoder_fingerprint == normalised.encoder_fingerprint == own.fingerprint
    images = LatentCache(str(cache), "train")
    images.check_autoencoder(normalised)
    moments = torch.from_numpy(images.load_moments(np.arange(17), np.zeros(17, dtype=bool)))
    noise = torch.randn(17, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    latents = normalised.sample(moments, noise)
    mean, std = (torch.tensor(found[key]).reshape(-1, 1, 1) for key in ("mean", "std"))
    torch.testing.assert_close(latents, (own.sample(moments, noise) / 0.5 - mean) / std)
    assert latents.mean((0, 2, 3)).abs().max() < 0.1
    assert (latents.std((0, 2, 3)) - 1).abs().max() < 0.1
    decoded = own.network.decode(latents * std + mean).sample
    assert torch.equal(normalised.decode(latents), ((decoded + 1) * 127.5 + 0.5).clamp(0, 255).byte())
    # a copy of the network is this autoencoder: exports hold no other settings
    normalised.network.save_pretrained(tmp_path)
    assert KLAutoencoder(str(tmp_path)).fingerprint == normalised.fingerprint


def test_a_copy_of_a_tiny_autoencoder_keeps_them(tmp_path):
    AutoencoderTiny(encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1),
                    num_decoder_blocks=(1, 1)).save_pretrained(tmp_path / "a")  # fmt: skip
    normalised = TinyAutoencoder(str(tmp_path / "a"), latents_mean=(0.1,) * 4, latents_std=(3.0,) * 4)
    normalised.network.save_pretrained(tmp_path / "b")
    assert TinyAutoencoder(str(tmp_path / "b")).fingerprint == normalised.fingerprint
    around = TinyAutoencoder.around(AutoencoderTiny.from_pretrained(tmp_path / "b"), 1)  # as the pipeline loads it
    assert around.fingerprint == normalised.fingerprint


@pytest.mark.parametrize(
    ("mean", "std", "key"),
    [((0.0,), (1.0, 1.0, 1.0), "mean"), ((0.0,) * 3, None, "std"), ((0.0,) * 3, (1.0, 0.0, 1.0), "std"),
     ((float("nan"),) * 3, (1.0,) * 3, "mean"), ((1e38,) * 3, (1e-37,) * 3, "std")],
)  # fmt: skip
def test_other_numbers_are_refused(vae, mean, std, key):
    with pytest.raises(UserError, match=rf"^autoencoder.latents_{key}="):
        KLAutoencoder(vae, latents_mean=mean, latents_std=std)


def test_training_takes_them_from_the_command_line(cache, vae, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = ["model.hidden_size=32", "model.depth=3", "model.encoder_depth=2", "data=latents", f"data.root={cache}",
             "autoencoder=kl", f"autoencoder.source={vae}", "name=x", "trainer.global_batch_size=4",
             "trainer.max_steps=1", "trainer.preview_every=0", "sampler.num_steps=2"]  # fmt: skip
    normalised = ["autoencoder.latents_mean=[0.1,0.2,0.3]", "autoencoder.latents_std=[1,2,3]"]
    succeed("train", *small, *normalised)
    assert "autoencoder.latents_std" in refusal("train", *small, *normalised[:1], "autoencoder.latents_std=[1,2,4]")
    succeed("sample", "ckpt=runs/x", "num_samples=2", "out=s")
