"""The border between pixels and latents."""

import functools
import json
import pathlib
import shutil

import pytest
import torch
from conftest import small_vae
from diffusers import AutoencoderKL, AutoencoderTiny
from safetensors.torch import load_file, save_file

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


def test_images_decoded_in_bf16_are_near_those_of_float32(vae_folder, images):
    codec = KLAutoencoder(vae_folder)
    latents = codec.sample(codec.encode(images), torch.zeros(3, 4, 8, 8))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = codec.decode(latents)
    assert rough.dtype == torch.uint8
    off = (rough.int() - codec.decode(latents).int()).abs()
    assert off.max() > 0
    assert off.float().mean() < 1.5


@pytest.mark.parametrize(
    ("size", "side"), [(64, 8), *(pytest.param(8 * side, side, marks=pytest.mark.slow) for side in (32, 64))]
)
def test_the_published_sd_vae_of_true_size(tmp_path, size, side):
    """Random weights of the true architecture: shapes, scale and dtype, also at 256 and 512 px."""
    torch.manual_seed(0)
    network = AutoencoderKL.from_config(SD_VAE)
    assert sum(p.numel() for p in network.parameters()) == 83_653_863
    network.save_pretrained(tmp_path)
    codec = KLAutoencoder(str(tmp_path))
    assert codec.latent_shape(3, size) == (4, side, side)
    assert codec.scale.item() == pytest.approx(0.18215)
    moments = codec.encode(torch.zeros(1, 3, size, size, dtype=torch.uint8))
    assert (moments.shape, moments.dtype) == ((1, 8, side, side), torch.float32)
    decoded = codec.decode(codec.sample(moments, torch.zeros(1, 4, side, side)))
    assert (decoded.shape, decoded.dtype) == ((1, 3, size, size), torch.uint8)


@pytest.fixture
def copy(vae_folder, tmp_path):
    return pathlib.Path(shutil.copytree(vae_folder, tmp_path / "copy"))


def weights(folder):
    return load_file(folder / "diffusion_pytorch_model.safetensors")


def test_the_layouts_that_autoencoders_come_in_are_loaded(vae_folder, copy, tmp_path, caplog):
    """As a pickle, inside of a pipeline, with attention's names before 2023, rounded to fp16."""
    expected, state, before = KLAutoencoder(vae_folder), weights(copy), torch.get_rng_state()
    (copy / "diffusion_pytorch_model.safetensors").unlink()
    torch.save(state, copy / "diffusion_pytorch_model.bin")
    assert KLAutoencoder(str(copy)).fingerprint == expected.fingerprint
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    names = {key: functools.reduce(lambda k, pair: k.replace(*pair), old.items(), key) for key in state}
    assert set(names.values()) != set(names)
    torch.save({names[key]: value for key, value in state.items()}, copy / "diffusion_pytorch_model.bin")
    assert KLAutoencoder(str(copy)).fingerprint == expected.fingerprint
    pipeline = tmp_path / "pipeline"
    (pipeline / "unet").mkdir(parents=True)
    (pipeline / "model_index.json").write_text("{}")
    copy.rename(pipeline / "vae")
    assert KLAutoencoder(str(pipeline)).fingerprint == expected.fingerprint
    assert KLAutoencoder.outline({"source": str(pipeline)}).latent_shape(3, 64) == (4, 8, 8)
    assert torch.equal(torch.get_rng_state(), before)
    assert not caplog.records
    (pipeline / "vae" / "diffusion_pytorch_model.bin").unlink()
    half = {key: value.half() for key, value in state.items()}
    save_file(half, pipeline / "vae" / "diffusion_pytorch_model.fp16.safetensors")
    rounded = KLAutoencoder(str(pipeline)).network.state_dict()
    assert all(torch.equal(rounded[key], half[key].float()) for key in half)
    assert "rounded to fp16" in caplog.text


def test_a_single_file_is_told_the_right_path(copy, tmp_path):
    file = copy / "diffusion_pytorch_model.safetensors"
    with pytest.raises(UserError, match=rf"source={file}: is a single file.*give its folder, {copy}$"):
        KLAutoencoder(str(file))
    with pytest.raises(UserError, match=r"is a single file.*give the folder of a diffusers autoencoder$"):
        KLAutoencoder(str(file.rename(tmp_path / "vae-ft-ema.safetensors")))


@pytest.mark.parametrize(
    "change",
    [
        {"block_out_channels": [8, 10**12]},
        {"block_out_channels": "many"},
        {"layers_per_block": 10**7},
        {"layers_per_block": None},
        {"down_block_types": ["Nothing"] * 4},
        {"norm_num_groups": 0},
        {"latent_channels": float("nan")},
        {"_class_name": ["AutoencoderKL"]},
        {"latent_channels": 3},
    ],
)
def test_an_impossible_config_is_one_line(copy, change):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(UserError, match=rf"^autoencoder\.source={copy}: ") as error:
        build_autoencoder({"_target_": "ddt.autoencoder.KLAutoencoder", "source": str(copy)})
    assert len(str(error.value).splitlines()) == 1


def test_damaged_weights_are_named_as_what_they_are(copy):
    file = copy / "diffusion_pytorch_model.safetensors"
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
    with pytest.raises(UserError, match=rf"^autoencoder\.source={copy}: {file}: is a Git LFS pointer"):
        KLAutoencoder(str(copy))
    (copy / "config.json").write_text("{" * 10**5)
    file.unlink()
    torch.save({"w": torch.zeros(1)}, copy / "diffusion_pytorch_model.bin")
    with pytest.raises(UserError, match=r"config\.json: damaged or no JSON"):
        KLAutoencoder(str(copy))


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
    with pytest.raises(UserError, match=r"autoencoder\.source=.*holds no diffusers autoencoder"):
        KLAutoencoder(str(tmp_path))
    with pytest.raises(UserError, match=r"autoencoder\.source=\./nowhere: no such file or folder"):
        KLAutoencoder("./nowhere")
    with pytest.raises(UserError, match="is of class AutoencoderKL, expected AutoencoderTiny"):
        TinyAutoencoder(vae_folder)
    with pytest.raises(UserError, match=r"autoencoder\._target_=os\.system: unknown"):
        build_autoencoder({"_target_": "os.system", "command": "true"})
    config = json.loads((pathlib.Path(small_vae(tmp_path)) / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "layers_per_block": 2}))
    with pytest.raises(UserError, match=r"autoencoder\.source=.*missing keys"):
        KLAutoencoder(str(tmp_path))
