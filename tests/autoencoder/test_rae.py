"""Representation autoencoders, against the golden numbers of RAE (tests/golden/rae)."""

import json
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import GOLDEN, small_rae
from safetensors.torch import load_file, save_file

from ddt.autoencoder import RAE, build_autoencoder
from ddt.autoencoder.rae import PUBLISHED_SIZES, RepresentationAutoencoder
from ddt.autoencoder.rae_encoder import FrozenEncoder
from ddt.autoencoder.token_decoder import truncate
from ddt.autoencoder.vit_decoder import ViTDecoder, load_decoder
from ddt.data.latent_statistics import OF_POSITIONS, Moments, block_moments
from ddt.errors import UserError
from ddt.model.class_token import split_token
from ddt.objective.reconstruction import Reconstruction

CLOSE = dict(rtol=1e-4, atol=1e-5)
MEAN, STD = (torch.tensor(values)[:, None, None] for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
ENCODERS = {  # golden file → timm's name, what makes it small
    "dinov2": ("vit_small_patch14_reg4_dinov2.lvd142m", {}),
    "siglip": ("vit_base_patch16_siglip_256.v2_webli", {"mlp_ratio": 2}),
    "mae": ("vit_base_patch16_224.mae", {"mlp_ratio": 2}),
}

pytestmark = pytest.mark.usefixtures("one_thread")


def golden(name):
    return load_file(GOLDEN / "rae" / f"{name}.safetensors")


def part(tensors, prefix):
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def as_map(tokens, side):
    return tokens.transpose(1, 2).unflatten(2, (side, side))


def small_encoder(kind, path):
    name, changes = ENCODERS[kind]
    return FrozenEncoder(name, 4, path, embed_dim=32, depth=2, num_heads=2, **changes)


def stored(kind, tmp_path, change=lambda state: state):
    """The golden encoder's file, changed."""
    save_file(change(part(golden(f"encoder_{kind}"), "model.")), tmp_path / f"{kind}.safetensors")
    return tmp_path / f"{kind}.safetensors"


# --- encoder


@pytest.mark.parametrize("kind", ENCODERS)
def test_tokens_are_those_of_the_published_encoders(kind, tmp_path):
    """Resize, positions at another grid, registers, eps, GELU, final norm without weights."""
    encoder = small_encoder(kind, stored(kind, tmp_path))
    expected = golden(f"encoder_{kind}")
    torch.testing.assert_close(encoder(expected["image"]), as_map(expected["tokens"], 4), **CLOSE)


def with_surplus(prefix, *others):
    """Names as in the file of a larger model, of which the encoder is a part."""
    return lambda state: {
        **{f"{prefix}{name.removeprefix(prefix)}": value for name, value in state.items()},
        **{name: torch.zeros(3) for name in others},
    }


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("mae", with_surplus("vit.", "decoder.mask_token", "decoder.decoder_layers.0.layernorm_before.bias")),
        ("siglip", with_surplus("vision_model.", "vision_model.head.probe", "text_model.final.bias", "logit_scale")),
    ],
)
def test_files_of_whole_models_are_read(kind, change, tmp_path):
    plain = small_encoder(kind, stored(kind, tmp_path))
    (tmp_path / "whole").mkdir()
    assert small_encoder(kind, stored(kind, tmp_path / "whole", change)).fingerprint == plain.fingerprint


@pytest.mark.parametrize("kind", ENCODERS)
def test_timms_own_names_are_read(kind, tmp_path):
    encoder = small_encoder(kind, stored(kind, tmp_path))
    save_file({**encoder.weights(), "norm.weight": torch.ones(32)}, tmp_path / "timm.safetensors")
    assert small_encoder(kind, tmp_path / "timm.safetensors").fingerprint == encoder.fingerprint


def test_another_networks_weights_are_refused(tmp_path):
    for name, change in {
        "Missing": lambda state: {k: v for k, v in state.items() if "layer.1.norm1" not in k},
        "Unexpected": lambda state: {**state, "surplus": torch.zeros(1)},
        "pos_embed": lambda state: {k: v for k, v in state.items() if "position" not in k},
        "no square": lambda state: {**state, "embeddings.position_embeddings": torch.zeros(1, 48, 32)},
        "size mismatch": lambda state: {**state, "embeddings.register_tokens": torch.zeros(1, 3, 32)},
    }.items():
        path = stored("dinov2", tmp_path, change)
        with pytest.raises(UserError, match=rf"^autoencoder\.encoder_weights={path}: .*{name}"):
            small_encoder("dinov2", path)
    with pytest.raises(UserError, match=r"^autoencoder\.encoder=vit_smal: timm has no model"):
        FrozenEncoder("vit_smal", 4, None)
    with pytest.raises(
        UserError, match=r"^autoencoder\.encoder=eva02_tiny_patch14_224: is no plain vision transformer"
    ):
        FrozenEncoder("eva02_tiny_patch14_224", 4, None)


def test_a_convolutional_network_gives_its_map_of_stride_16(tmp_path):
    torch.manual_seed(0)
    name = "test_efficientnet"
    network = timm.create_model(name).eval()
    save_file(network.state_dict(), tmp_path / "whole.safetensors")
    encoder = FrozenEncoder(name, 3, tmp_path / "whole.safetensors")
    pixels = torch.rand(2, 3, 24, 24)
    maps = network.forward_intermediates(encoder.prepare(pixels), intermediates_only=True)
    (expected,) = [each for each in maps if each.shape[-1] == 3]  # of an input of 48 px
    found = encoder(pixels)
    assert (encoder.side, found.shape) == (48, (2, encoder.num_features, 3, 3))
    normed = F.layer_norm(expected.movedim(1, -1), expected.shape[1:2], eps=1e-6).movedim(-1, 1)
    torch.testing.assert_close(found, normed, **CLOSE)
    save_file(encoder.weights(), tmp_path / "part.safetensors")
    assert FrozenEncoder(name, 3, tmp_path / "part.safetensors").fingerprint == encoder.fingerprint
    state = network.state_dict()
    del state["conv_stem.weight"]
    save_file(state, tmp_path / "lost.safetensors")
    with pytest.raises(UserError, match=r"is not a file of test_efficientnet .*Missing.*conv_stem"):
        FrozenEncoder(name, 3, tmp_path / "lost.safetensors")


# --- latents


def autoencoder_of(statistics, decoder=None, num_features=24):
    """An RAE of parts: an encoder of `num_features`, without weights, and a decoder."""
    encoder = FrozenEncoder("vit_base_patch16_224.mae", 4, None)  # for the pixels' mean and deviation
    encoder.num_features, grid = num_features, statistics["mean"].shape[-1]
    decoder = decoder or ViTDecoder(num_features, 8, 1, 8, num_heads=1, grid=grid, patch_size=2)
    return RepresentationAutoencoder(encoder, decoder, {key: statistics[key] for key in ("mean", "var")}, chunk_size=1)


def test_encoder_input_and_latents_are_the_published():
    expected = golden("latents")
    encoder = FrozenEncoder("vit_base_patch16_224.mae", 4, None)
    encoder.side, encoder.mean, encoder.std = 8, MEAN, STD
    torch.testing.assert_close(encoder.prepare(expected["image"]), expected["encoder_input"], **CLOSE)
    rae = autoencoder_of(expected)
    torch.testing.assert_close(rae.sample(as_map(expected["tokens"], 2)), expected["latent"], **CLOSE)


def test_noise_on_tokens_is_the_published_augmentation():
    """Of stage 1: on raw tokens, of deviation 0.8 times each image's uniform number."""
    expected, seen = golden("latents"), []

    class Decoder(torch.nn.Module):
        def forward(self, tokens):
            seen.append(tokens)
            return torch.zeros(len(tokens), 3, 4, 4)

    tokens, noise = (as_map(expected[name], 2) for name in ("tokens", "noise_n"))
    objective = Reconstruction(Decoder(), MEAN, STD, None, noise=0.8, lpips_weight=0, gan_weight=0)
    objective(tokens, torch.zeros(2, 3, 4, 4), noise, expected["noise_u"])
    found = autoencoder_of(expected).sample(seen[0])
    torch.testing.assert_close(found, expected["latent_noised"], **CLOSE)


def test_where_a_feature_is_constant_its_latent_stays_bounded():
    """The 1e-5 lies beside the variance, under the root."""
    rae = autoencoder_of({"mean": torch.ones(3, 2, 2), "var": torch.zeros(3, 2, 2)}, num_features=3)
    torch.testing.assert_close(rae.sample(torch.full((1, 3, 2, 2), 2.0)), torch.full((1, 3, 2, 2), 1e-5**-0.5))


def running(batches):
    """RAE's running statistics of batches (n, B, C, h, w): momentum 0.1 from mean 0, variance 1."""
    mean, var = torch.zeros(batches.shape[2:]), torch.ones(batches.shape[2:])
    for batch in batches:
        mean, var = 0.9 * mean + 0.1 * batch.mean(0), 0.9 * var + 0.1 * batch.var(0, unbiased=False)
    return mean, var


def test_moments_of_processes_merge_to_those_of_all_values():
    """Per channel and position. The published rule, which this code does not use, is other."""
    expected = golden("latents")
    ranks = [expected["rank0"], expected["rank1"]]  # (4, 5, C, h, w)
    batches = [block_moments(batch[:, None], False, OF_POSITIONS) for rank in ranks for batch in rank]
    merged = batches[0]
    for each in batches[1:]:
        merged = Moments.merge(merged, each)
    values = torch.cat(ranks).flatten(0, 1).double()
    assert merged.num_values == 40
    torch.testing.assert_close(merged.mean, values.mean(0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(merged.variance, values.var(0, unbiased=False), rtol=1e-12, atol=1e-12)
    (mean0, var0), (mean1, var1) = map(running, ranks)
    torch.testing.assert_close((mean0, var0), (expected["mean0"], expected["var0"]), **CLOSE)
    mean = (mean0 + mean1) / 2
    var = (var0 + var1) / 2 + (mean0**2 + mean1**2) / 2 - mean**2
    torch.testing.assert_close((mean, var), (expected["mean"], expected["var"]), **CLOSE)


# --- decoder


def test_pixels_are_those_of_the_published_decoder():
    expected = golden("decoder")
    decoder = load_decoder(part(expected, "decoder."), 4)
    rae = autoencoder_of(expected, decoder)
    assert torch.equal(rae.decode(expected["latent"]), expected["pixels_uint8"])
    tokens = expected["latent"] * torch.sqrt(expected["var"] + 1e-5) + expected["mean"]
    torch.testing.assert_close(rae.network.decode(tokens), expected["pixels"], **CLOSE)
    other = decoder(as_map(expected["other_tokens"], 3))
    torch.testing.assert_close(other, expected["other_unpatchified"], **CLOSE)


def test_norms_of_nearly_equal_features_are_not_damped():
    """Where features hardly vary, only the published eps gives variance 1."""
    decoder = load_decoder(part(golden("decoder"), "decoder."), 4)
    norms = [
        decoder.decoder_norm,
        decoder.decoder_layers[0].layernorm_before,
        decoder.decoder_layers[2].layernorm_after,
    ]
    for norm in norms:
        plain = (norm(1e-4 * torch.linspace(-1, 1, 32)) - norm.bias) / norm.weight
        assert plain.var(unbiased=False).item() == pytest.approx(1, abs=1e-3)


def test_pixels_are_truncated_to_8_bits():
    pixels = torch.tensor([-0.5, 0.0, 0.999 / 255, 1 / 255, 0.5, 254.9 / 255, 1.0, 1.5])
    assert truncate(pixels).tolist() == [0, 0, 0, 1, 127, 254, 255, 255]


@pytest.mark.parametrize(
    ("name", "heads", "grid", "count"),
    [("ViTXL", 16, 16, 415_056_640), ("ViTL", 16, 16, 303_887_104), ("ViTB", 12, 16, 86_237_952),
     ("ViTXL 512", 16, 32, 415_056_640)],
)  # fmt: skip
def test_the_published_sizes_have_the_published_names(name, heads, grid, count):
    with torch.device("meta"):
        decoder = ViTDecoder(768, **PUBLISHED_SIZES[name.split()[0]], num_heads=heads, grid=grid, patch_size=16)
    keys = json.loads((GOLDEN / "rae" / "published_keys.json").read_text())[f"decoder {name}"]
    assert {key: list(value.shape) for key, value in decoder.state_dict().items()} == keys
    assert sum(parameter.numel() for parameter in decoder.parameters()) == count


def test_older_and_wrapped_decoder_files_are_read():
    state = part(golden("decoder"), "decoder.")
    expected = load_decoder(state, 4).state_dict()
    old = {name: value for name, value in state.items() if name not in ("trainable_cls_token", "decoder_pos_embed")}
    read = load_decoder({f"decoder.{name}": value for name, value in old.items()}, 4, grid=4).state_dict()
    assert not read.pop("trainable_cls_token").any()
    for name, value in read.items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-6)
    with pytest.raises(UserError, match=r"grid is unknown; give autoencoder\.statistics"):
        load_decoder(old, 4)
    with pytest.raises(UserError, match="decoder_pos_embed is not the sine-cosine table"):
        load_decoder({**state, "decoder_pos_embed": state["decoder_pos_embed"].roll(1, dims=1)}, 4)
    with pytest.raises(UserError, match="decoder_heads=5: does not divide"):
        load_decoder(state, 5)
    with pytest.raises(UserError, match="is no decoder of RAE"):
        load_decoder({"x": torch.zeros(1)}, 4)


# --- together


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rae")
    statistics = {"mean": torch.randn(64, 4, 4), "var": 0.5 + torch.rand(64, 4, 4)}
    torch.save(statistics, folder / "stat.pt")
    return small_rae(folder, statistics="stat.pt", source=str(folder), chunk_size=2)


@pytest.fixture
def images():
    return torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_it_is_an_autoencoder_like_others(settings, images):
    rae, outline = build_autoencoder(settings), build_autoencoder(settings, outline=True)
    assert (rae.pixel_space, rae.stochastic) == (False, False)
    assert rae.latent_shape(3, 16) == outline.latent_shape(3, 16) == (64, 4, 4)
    sizes = [sum(p.numel() for p in each.network.parameters()) for each in (rae, outline)]
    assert sizes[0] == sizes[1]
    moments = rae.encode(images)
    assert (moments.shape, moments.dtype) == ((3, 64, 4, 4), torch.float32)
    torch.testing.assert_close(moments.mean(1), torch.zeros(3, 4, 4), atol=1e-5, rtol=0)
    torch.testing.assert_close(moments.var(1, unbiased=False), torch.ones(3, 4, 4), **CLOSE)
    latents = rae.sample(moments)
    decoded = rae.decode(latents)
    assert (decoded.shape, decoded.dtype) == (images.shape, torch.uint8)
    raw = truncate(rae.network.decode(moments))  # denormalised
    assert (decoded.int() - raw.int()).abs().max() <= 1


def test_latents_may_carry_the_class_token(settings, images, tmp_path):
    plain, rae = build_autoencoder(settings), build_autoencoder({**settings, "class_token": True})
    outline = build_autoencoder({**settings, "class_token": True}, outline=True)
    assert rae.latent_shape(3, 16) == outline.latent_shape(3, 16) == (64, 5, 4)
    assert (plain.class_token, rae.class_token) == (0, 64)
    moments = rae.encode(images)
    latents, token = split_token(rae.sample(moments), 64)
    torch.testing.assert_close(latents, plain.sample(plain.encode(images)))
    network = rae.network.encoder.network
    expected = network.forward_features(rae.network.encoder.prepare(images.float() / 255))[:, 0]  # its norm is removed
    torch.testing.assert_close(token, F.layer_norm(expected, (64,), eps=rae.network.encoder.norm.eps))
    assert torch.equal(rae.decode(rae.sample(moments)), plain.decode(latents))
    assert rae.encoder_fingerprint != plain.encoder_fingerprint  # a cache of one is none of the other
    save_file(timm.create_model("test_efficientnet").state_dict(), tmp_path / "cnn.safetensors")
    cnn = {**settings, "encoder": "test_efficientnet", "encoder_weights": str(tmp_path / "cnn.safetensors")}
    decoder = ViTDecoder(rae_features(cnn), 32, 2, 64, num_heads=2, grid=4, patch_size=4)
    save_file(decoder.state_dict(), tmp_path / "decoder.safetensors")
    cnn |= {"decoder": str(tmp_path / "decoder.safetensors"), "statistics": None}
    build_autoencoder(cnn)
    with pytest.raises(UserError, match=r"^autoencoder\.class_token=true: test_efficientnet has no class token"):
        build_autoencoder({**cnn, "class_token": True})


def rae_features(settings):
    return FrozenEncoder(settings["encoder"], 4, None).num_features


def test_decoding_leaves_the_callers_autocast_and_bounds_its_memory(settings):
    latents = torch.randn(3, 64, 4, 4, generator=torch.Generator().manual_seed(0))
    rae, dtypes = build_autoencoder(settings), []
    half = build_autoencoder({**settings, "decode_dtype": "bf16"})
    for each in (rae, half):
        each.network.decoder.decoder_pred.register_forward_hook(
            lambda _, args, out: dtypes.append((len(out), out.dtype))
        )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        exact = rae.decode(latents)
    assert torch.equal(exact, rae.decode(latents))
    rough = half.decode(latents)
    assert dtypes == [(2, torch.float32), (1, torch.float32)] * 2 + [(2, torch.bfloat16), (1, torch.bfloat16)]
    assert not torch.equal(rough, exact)
    assert (rough.int() - exact.int()).abs().max() < 8
    codec = build_autoencoder({**settings, "encode_dtype": "bf16"})
    images = truncate(torch.rand(2, 3, 16, 16))
    assert 0 < (codec.encode(images) - rae.encode(images)).square().mean().sqrt() < 0.1


def test_fingerprints_say_what_a_cache_and_a_run_depend_on(settings, tmp_path):
    first = build_autoencoder(settings)
    bare = build_autoencoder({**settings, "statistics": None})
    assert first.encoder_fingerprint == bare.encoder_fingerprint
    assert first.fingerprint != bare.fingerprint
    moved = {key: settings[key].replace(settings["source"], str(tmp_path)) for key in ("encoder_weights", "decoder")}
    for name in ("encoder.safetensors", "decoder.safetensors", "stat.pt"):
        (tmp_path / name).write_bytes((Path(settings["source"]) / name).read_bytes())
    assert build_autoencoder({**settings, **moved, "source": str(tmp_path)}).fingerprint == first.fingerprint
    state = load_file(tmp_path / "encoder.safetensors")
    state["blocks.0.attn.proj.bias"][0] += 1
    save_file(state, tmp_path / "encoder.safetensors")
    assert build_autoencoder({**settings, **moved}).encoder_fingerprint != first.encoder_fingerprint


def test_files_that_were_moved_are_found_in_another_folder(settings, tmp_path):
    first = build_autoencoder(settings)
    moved = tmp_path / "moved"
    first.save(moved)
    assert build_autoencoder(RAE.moved(settings, str(moved))).fingerprint == first.fingerprint
    (moved / "decoder.safetensors").rename(moved / "mine.safetensors")
    gone = {**settings, "decoder": "/nowhere/mine.safetensors", "encoder_weights": None}
    assert build_autoencoder(RAE.moved(gone, str(moved))).fingerprint == first.fingerprint
    bare = build_autoencoder(RAE.moved({**gone, "statistics": None}, str(moved)))  # latents stay what they were
    assert not bare.mean.any()
    published = {"decoder": "decoders/x/model.pt", "statistics": "stats/x/stat.pt", "encoder_weights": "a/b"}
    assert RAE.moved(published, "o/n") == {**published, "source": "o/n", "revision": None}
    assert RAE.on_hub({**published, "source": "o/n"})
    assert not RAE.on_hub({**published, "source": "o/n", "statistics": str(moved / "statistics.safetensors")})
    assert not RAE.on_hub(settings)


def test_what_does_not_fit_is_refused(settings, tmp_path):
    def refused(message, **changes):
        with pytest.raises(UserError, match=message) as error:
            build_autoencoder({**settings, **changes})
        assert "\n" not in str(error.value)

    refused(r"^autoencoder\.decoder=nowhere\.pt: .*holds no such file|no such file here", decoder="nowhere.pt")
    refused(r"^autoencoder\.decoder=nowhere\.pt: no such file; give", decoder="nowhere.pt", source=None)
    refused(r"^autoencoder\.statistics=nowhere\.pt: no such file here", statistics="nowhere.pt")
    refused(r"^autoencoder\.encoder_weights=\./nowhere: no such file", encoder_weights="./nowhere")
    refused(r"^autoencoder\.encoder=test_vit: timm has no weights of it|hub", encoder_weights=None)
    refused(r"^autoencoder\.decoder_heads=3|autoencoder\.decoder=.*decoder_heads=3", decoder_heads=3)
    refused(r"^autoencoder\.chunk_size=0", chunk_size=0)
    with pytest.raises(UserError, match="is for tokens of 64 features, but test_vit3 has 96"):
        build_autoencoder({**settings, "encoder": "test_vit3", "encoder_weights": None}, outline=True)
    for tensors, message in (
        ({"mean": torch.zeros(64, 8, 8)}, "is of latents 64×8×8, not of this autoencoder's 64×4×4"),
        ({"mean": torch.zeros(64)}, r"mean is \(64,\), not \(C, H, W\)"),
        ({"mean": torch.zeros(64, 4, 4), "std": torch.ones(64, 4, 4)}, "holds std"),
        ({"var": -torch.ones(64, 4, 4)}, "var is below 0"),
        ({"mean": torch.full((64, 4, 4), torch.nan)}, "mean is not finite"),
    ):
        save_file(tensors, tmp_path / "stat.safetensors")
        refused(message, statistics=str(tmp_path / "stat.safetensors"))
    save_file({"var": torch.full((64, 4, 4), 4.0)}, tmp_path / "stat.safetensors")  # either may be absent
    rae = build_autoencoder({**settings, "statistics": str(tmp_path / "stat.safetensors")})
    torch.testing.assert_close(rae.sample(torch.ones(1, 64, 4, 4)), torch.full((1, 64, 4, 4), 0.5))
    with pytest.raises(UserError, match=r"data: images of 3 channels and 32 px .*data\.image_size=16"):
        rae.latent_shape(3, 32)
    with pytest.raises(UserError, match=r"has 64 latent channels, the model 4"):
        rae.decode(torch.zeros(1, 4, 4, 4))
    with pytest.raises(UserError, match=r"autoencoder\.decoder=a/b\.pt: its shape is not known here"):
        build_autoencoder({**settings, "decoder": "a/b.pt", "source": "o/n"}, outline=True)


@pytest.mark.parametrize(("size", "grid"), [("ViTXL_n08/model.pt", 16), ("ViTXL_n08_i512/model.pt", 32)])
def test_the_published_files_are_outlined_without_a_hub(size, grid):
    settings = {
        "encoder": "vit_base_patch14_reg4_dinov2.lvd142m",
        "decoder": f"decoders/dinov2/wReg_base/{size}",
        "source": "nyu-visionx/RAE-collections",
    }
    outline = RAE.outline(settings)
    assert outline.latent_shape(3, 16 * grid) == (768, grid, grid)
    assert outline.network.encoder.side == 14 * grid
