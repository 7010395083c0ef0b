"""The border between pixels and latents."""

import pytest
import torch
from diffusers import AutoencoderKL

from ddt.autoencoder import Identity, KLAutoencoder, build_autoencoder, to_uint8
from ddt.errors import UserError


def test_identity_gives_every_pixel_back():
    images = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    latents = Identity().encode(images)
    assert (latents.min(), latents.max()) == (-1, 1)
    assert torch.equal(Identity().decode(latents), images)
    assert Identity().latent_shape(3, 32) == (3, 32, 32)


def test_uint8_rounds_to_the_nearest_and_clips():
    pixels = torch.tensor([-1.5, -1.0, 0.0, 0.0039, 0.004, 1.0, 2.0])
    assert to_uint8(pixels).tolist() == [0, 0, 128, 128, 128, 255, 255]


@pytest.fixture(scope="module")
def vae_folder(tmp_path_factory):
    """A small AutoencoderKL of the SD-VAE's kind, with random weights, in a local folder."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("vae")
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        scaling_factor=0.25,
        shift_factor=0.5,
    ).save_pretrained(folder)
    return str(folder)


def test_kl_autoencoder_reads_scale_and_shift_and_draws_the_posterior(vae_folder):
    codec = build_autoencoder(
        {"_target_": "ddt.autoencoder.KLAutoencoder", "source": vae_folder, "decode_batch_size": 2}
    )
    assert codec.latent_shape(3, 64) == (4, 8, 8)
    images = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8)
    moments = codec.vae.encode(images.float() / 127.5 - 1).latent_dist
    noise = torch.randn(3, 4, 8, 8)
    torch.testing.assert_close(codec.encode(images, torch.zeros_like(noise)), (moments.mean - 0.5) * 0.25)
    torch.testing.assert_close(codec.encode(images, noise), (moments.mean + moments.std * noise - 0.5) * 0.25)
    latents = codec.encode(images, noise)
    decoded = codec.decode(latents)
    assert decoded.dtype == torch.uint8
    assert decoded.shape == images.shape
    one_by_one = torch.cat([to_uint8(codec.vae.decode(z[None] / 0.25 + 0.5).sample) for z in latents])
    assert (decoded.int() - one_by_one.int()).abs().max() <= 1


def test_kl_autoencoder_refuses_images_that_do_not_fit(vae_folder):
    with pytest.raises(UserError, match="multiples of 8 px"):
        KLAutoencoder(vae_folder).latent_shape(3, 60)
    with pytest.raises(UserError, match="takes 3 channels"):
        KLAutoencoder(vae_folder).latent_shape(1, 64)


def test_missing_weights_and_unknown_kinds_are_named(tmp_path):
    with pytest.raises(UserError, match=r"autoencoder\.source=.*local folder"):
        KLAutoencoder(str(tmp_path))
    with pytest.raises(UserError, match=r"autoencoder\._target_=os\.system: unknown"):
        build_autoencoder({"_target_": "os.system", "command": "true"})
