"""The border between pixels and latents."""

import json
import pathlib

import pytest
import torch
from conftest import small_vae
from diffusers import AutoencoderKL, AutoencoderTiny

from ddt.autoencoder import Identity, KLAutoencoder, TinyAutoencoder, build_autoencoder
from ddt.autoencoder.base import from_uint8, to_uint8
from ddt.autoencoder.diffusers import SD_VAE
from ddt.errors import UserError


def test_identity_gives_every_pixel_back():
    images = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    latents = Identity().sample(Identity().encode(images))
    assert (latents.min(), latents.max()) == (-1, 1)
    assert torch.equal(Identity().decode(latents), images)
    assert Identity().latent_shape(3, 32) == (3, 32, 32)


def test_uint8_rounds_to_the_nearest_and_clips():
    pixels = torch.tensor([-1.5, -1.0, 0.0, 0.0039, 0.004, 1.0, 2.0])
    assert to_uint8(pixels).tolist() == [0, 0, 128, 128, 128, 255, 255]


@pytest.fixture(scope="module")
def vae_folder(tmp_path_factory):
    return small_vae(tmp_path_factory.mktemp("vae"), scaling_factor=0.25, shift_factor=0.5)


@pytest.fixture
def images():
    return torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_kl_autoencoder_reads_scale_and_shift_and_samples_the_posterior(vae_folder, images):
    codec = build_autoencoder({"_target_": "ddt.autoencoder.KLAutoencoder", "source": vae_folder, "chunk_size": 2})
    assert codec.latent_shape(3, 64) == (4, 8, 8)
    posterior = codec.network.encode(from_uint8(images)).latent_dist
    moments = codec.encode(images)
    assert moments.shape == (3, 8, 8, 8)
    noise = torch.randn(3, 4, 8, 8)
    torch.testing.assert_close(codec.sample(moments, torch.zeros_like(noise)), (posterior.mean - 0.5) * 0.25)
    expected = (posterior.mean + posterior.std * noise - 0.5) * 0.25
    torch.testing.assert_close(codec.sample(moments, noise), expected)
    extreme = torch.cat([torch.zeros(1, 4, 1, 1), torch.full((1, 4, 1, 1), 90.0)], dim=1)  # logvar is clamped to 20
    clamped = (float(torch.tensor(10.0).exp()) - 0.5) * 0.25
    torch.testing.assert_close(codec.sample(extreme, torch.ones(1, 4, 1, 1)), torch.full((1, 4, 1, 1), clamped))
    latents = codec.sample(moments, noise)
    decoded = codec.decode(latents)
    assert decoded.dtype == torch.uint8
    assert decoded.shape == images.shape
    one_by_one = torch.cat([to_uint8(codec.network.decode(z[None] / 0.25 + 0.5).sample) for z in latents])
    assert (decoded.int() - one_by_one.int()).abs().max() <= 1


@pytest.mark.parametrize("channels", [16, 32])
def test_other_channels_and_normalisation_a_channel_flow_from_the_config(tmp_path, images, channels):
    mean, std = [0.1 * k for k in range(channels)], [1.0 + k for k in range(channels)]
    folder = small_vae(tmp_path, channels, 3, scaling_factor=0.5, latents_mean=mean, latents_std=std)
    codec = KLAutoencoder(folder)
    assert codec.latent_shape(3, 64) == (channels, 16, 16)
    moments = codec.encode(images)
    latents = codec.sample(moments, torch.zeros(3, channels, 16, 16))
    for k in (0, channels - 1):
        torch.testing.assert_close(latents[:, k], (moments[:, k] - mean[k]) / std[k] * 0.5)
    raw = to_uint8(codec.network.decode(moments[:, :channels]).sample)
    assert (codec.decode(latents).int() - raw.int()).abs().max() <= 1


def test_tiny_autoencoder_stores_the_mean_alone(tmp_path, images):
    torch.manual_seed(0)
    AutoencoderTiny(encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4).save_pretrained(tmp_path)
    codec = TinyAutoencoder(str(tmp_path), chunk_size=2)
    assert not codec.stochastic
    assert codec.latent_shape(3, 64) == (4, 8, 8)
    latents = codec.sample(codec.encode(images))
    torch.testing.assert_close(latents, codec.network.encode(from_uint8(images)).latents)
    assert codec.decode(latents).shape == images.shape


def test_chunks_bound_what_the_network_sees_at_once(vae_folder, images):
    codec, sizes = KLAutoencoder(vae_folder, chunk_size=2), []
    codec.network.encoder.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    codec.network.decoder.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    codec.decode(codec.sample(codec.encode(images), torch.zeros(3, 4, 8, 8)))
    assert sizes == [2, 1, 2, 1]


def test_bf16_encoding_is_near_float32(vae_folder, images):
    exact, rough = (KLAutoencoder(vae_folder, encode_dtype=d).encode(images) for d in ("fp32", "bf16"))
    assert rough.dtype == torch.float32
    assert not torch.equal(exact, rough)
    assert (exact - rough).square().mean().sqrt() < 0.05 * exact.square().mean().sqrt()


def test_fingerprint_is_of_the_weights_and_not_of_the_place(vae_folder, tmp_path):
    first = KLAutoencoder(vae_folder)
    first.network.save_pretrained(tmp_path / "copy")
    assert KLAutoencoder(str(tmp_path / "copy")).fingerprint == first.fingerprint
    with torch.no_grad():
        first.network.decoder.conv_out.bias[0] += 1
    first.network.save_pretrained(tmp_path / "changed")
    assert KLAutoencoder(str(tmp_path / "changed")).fingerprint != KLAutoencoder(vae_folder).fingerprint
    assert Identity().fingerprint is None


@pytest.mark.parametrize(("size", "side"), [(256, 32), pytest.param(512, 64, marks=pytest.mark.slow)])
def test_the_published_sd_vae_of_true_size(tmp_path, size, side):
    """Random weights of the true architecture: shapes, scale and dtype at 256 and 512 px."""
    torch.manual_seed(0)
    network = AutoencoderKL.from_config(SD_VAE)
    assert sum(p.numel() for p in network.parameters()) == 83_653_863
    network.save_pretrained(tmp_path)
    codec = KLAutoencoder(str(tmp_path))
    assert codec.latent_shape(3, size) == (4, side, side)
    assert codec.scale.item() == pytest.approx(0.18215)
    moments = codec.encode(torch.zeros(1, 3, size, size, dtype=torch.uint8))
    assert (moments.shape, moments.dtype) == ((1, 8, side, side), torch.float32)
    if size == 256:  # decoding 512 px takes seconds and shows nothing more
        with torch.autocast("cpu", dtype=torch.bfloat16):
            decoded = codec.decode(codec.sample(moments, torch.zeros(1, 4, side, side)))
        assert (decoded.shape, decoded.dtype) == ((1, 3, size, size), torch.uint8)


def test_kl_autoencoder_refuses_what_does_not_fit(vae_folder):
    with pytest.raises(UserError, match="multiples of 8 px"):
        KLAutoencoder(vae_folder).latent_shape(3, 60)
    with pytest.raises(UserError, match="takes 3 channels"):
        KLAutoencoder(vae_folder).latent_shape(1, 64)
    with pytest.raises(UserError, match="has 4 latent channels, the model 3"):
        KLAutoencoder(vae_folder).decode(torch.zeros(1, 3, 8, 8))
    with pytest.raises(UserError, match=r"autoencoder\.chunk_size=0"):
        KLAutoencoder(vae_folder, chunk_size=0)


def test_missing_weights_and_unknown_kinds_are_named(tmp_path, vae_folder):
    with pytest.raises(UserError, match=r"autoencoder\.source=.*local folder"):
        KLAutoencoder(str(tmp_path))
    with pytest.raises(UserError, match=r"autoencoder\.source=\./nowhere: no such folder"):
        KLAutoencoder("./nowhere")
    with pytest.raises(UserError, match="is of class AutoencoderKL, expected AutoencoderTiny"):
        TinyAutoencoder(vae_folder)
    with pytest.raises(UserError, match=r"autoencoder\._target_=os\.system: unknown"):
        build_autoencoder({"_target_": "os.system", "command": "true"})
    config = json.loads((pathlib.Path(small_vae(tmp_path)) / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "layers_per_block": 2}))
    with pytest.raises(UserError, match=r"autoencoder\.source=.*missing keys"):
        KLAutoencoder(str(tmp_path))
