"""The alignment losses in closed form; the frozen target: its weights, inputs and refusals."""

import functools
import math
import shutil
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import ROOT, thinned, to_transformers
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from timm.layers import resample_abs_pos_embed
from torch import nn

from ddt.config import locate, parse
from ddt.errors import UserError
from ddt.files import sha256
from ddt.objective.alignment import (
    REPA,
    Alignment,
    AlignmentLoss,
    CachedFeatures,
    Dispersive,
    DispersiveLoss,
    to_grid,
)
from ddt.objective.alignment_target import Target
from ddt.timm_networks import from_transformers

DINOV2 = "vit_small_patch14_dinov2.lvd142m"
REGISTERS = "vit_small_patch14_reg4_dinov2.lvd142m"
LITE0 = "tf_efficientnet_lite0.in1k"
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


pytestmark = pytest.mark.usefixtures("one_thread")


def images(size, batch=2, channels=3):
    generator = torch.Generator().manual_seed(3)
    return torch.randint(256, (batch, channels, size, size), generator=generator).to(torch.uint8)


def random_network(name, **changes):
    """A timm network all of whose values are random, so that no constant hides an error."""
    torch.manual_seed(5)
    if name.startswith("vit"):
        changes["weight_init"] = "skip"  # slow, and made up for below
    network = timm.create_model(name, **changes).eval()
    with torch.no_grad():
        for key, parameter in network.named_parameters():
            scales = parameter.ndim == 1 and not key.endswith("bias")
            parameter.copy_(scales + 0.04 * torch.randn_like(parameter))
        for key, value in network.named_buffers():
            if key.endswith(("running_mean", "running_var")):
                value.add_(0.1 * torch.rand_like(value))
    return network


def saved(folder, name, **changes):
    path = folder / f"{name}.safetensors"
    save_file(random_network(name, **changes).state_dict(), path)
    return str(path)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Weight files by model name, at the model's own input size (518 px for DINOv2)."""
    folder = tmp_path_factory.mktemp("weights")
    return functools.cache(lambda name: saved(folder, name))


def changed(file, folder, change, name="changed.safetensors"):
    """Write a copy of a weight file after `change(state)`."""
    state = load_file(file)
    change(state)
    save_file(state, folder / name)
    return str(folder / name)


def by_hand(pixels, side, mean=IMAGENET[0], std=IMAGENET[1]):
    x = (pixels.float() / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    return F.interpolate(x, size=(side, side), mode="bicubic", antialias=False, align_corners=False)


# the target


@pytest.mark.parametrize(("name", "prefix"), thinned([(REGISTERS, 5), (DINOV2, 1)], 2))
def test_vit_features_are_the_patch_tokens_of_the_resampled_network(files, name, prefix):
    state = load_file(files(name))
    grid_tokens = 37 * 37
    assert state["pos_embed"].shape[1] in (grid_tokens, grid_tokens + 1)  # stored at 518 px
    in_table = state["pos_embed"].shape[1] - grid_tokens
    state["pos_embed"] = resample_abs_pos_embed(state["pos_embed"], [16, 16], num_prefix_tokens=in_table)
    reference = timm.create_model(name, img_size=224).eval()
    reference.load_state_dict(state)
    target = Target(name, files(name), 256)
    assert torch.equal(target.network.pos_embed, state["pos_embed"])
    assert (target.num_features, target.grid) == (384, (16, 16))
    with torch.no_grad():
        tokens = reference.forward_features(by_hand(images(256), 224))
    assert tokens.shape[1] == prefix + 256
    torch.testing.assert_close(target(images(256)), tokens[:, prefix:])


@pytest.mark.parametrize(
    ("name", "num_features", "size"),
    [
        pytest.param("vit_base_patch14_dinov2.lvd142m", 768, 256, marks=pytest.mark.slow),
        (DINOV2, 384, 512),
        pytest.param("vit_base_patch14_dinov2.lvd142m", 768, 512, marks=pytest.mark.slow),
    ],
)
def test_dinov2_gives_the_grid_of_the_latent_tokens(files, name, num_features, size):
    target = Target(name, files(name), size)
    tokens = size // 16
    assert (target.side, target.grid, target.num_features) == (tokens * 14, (tokens, tokens), num_features)
    features = target(images(size, batch=1))
    assert (features.shape, features.dtype) == ((1, tokens * tokens, num_features), torch.float32)
    assert features.isfinite().all()


def test_patch_16_sees_the_image_at_its_own_size(tmp_path):
    name = "vit_tiny_patch16_224.augreg_in21k"  # its published file has a head and another normalisation
    file = saved(tmp_path, name)
    target = Target(name, file, 64)
    assert (target.side, target.grid, target.num_features) == (64, (4, 4), 192)
    reference = timm.create_model(name, img_size=64, num_classes=0).eval()
    reference.load_state_dict(target.network.state_dict())
    with torch.no_grad():
        tokens = reference.forward_features(by_hand(images(64), 64, (0.5,) * 3, (0.5,) * 3))
    torch.testing.assert_close(target(images(64)), tokens[:, 1:])


@pytest.mark.parametrize(("name", "num_features"), thinned([(LITE0, 112), ("resnet18.a1_in1k", 256)], 2))
@pytest.mark.parametrize("head", [True, False])
def test_convolutional_features_are_the_stride_16_map(files, tmp_path, name, num_features, head):
    network = random_network(name)
    classifier = network.pretrained_cfg["classifier"]

    def drop(state):
        if not head:
            del state[f"{classifier}.weight"], state[f"{classifier}.bias"]

    target = Target(name, changed(files(name), tmp_path, drop), 64)
    assert (target.num_features, target.grid) == (num_features, (4, 4))
    reference = timm.create_model(name, features_only=True, out_indices=(3,)).eval()
    assert reference.feature_info.reduction() == [16]
    assert not reference.load_state_dict(network.state_dict(), strict=False).missing_keys
    cfg = network.pretrained_cfg
    with torch.no_grad():
        maps = reference(by_hand(images(64), 64, cfg["mean"], cfg["std"]))[0]
    torch.testing.assert_close(target(images(64)), maps.flatten(2).transpose(1, 2))


def test_the_fingerprint_is_of_the_weights_and_not_of_the_head(files, tmp_path):
    def drop(state):
        del state["classifier.weight"], state["classifier.bias"]

    def shift(state):
        state["conv_stem.weight"] += 1e-3

    whole = Target(LITE0, files(LITE0), 32).fingerprint
    assert whole == Target(LITE0, changed(files(LITE0), tmp_path, drop), 32).fingerprint
    assert whole != Target(LITE0, changed(files(LITE0), tmp_path, shift), 32).fingerprint


def test_images_are_scaled_normalised_and_then_resized(files):
    target = Target(DINOV2, files(DINOV2), 32)
    seen = []
    target.extract = lambda pixels: seen.append(pixels) or torch.zeros(len(pixels), 4, 384)
    target(torch.full((1, 3, 32, 32), 51, dtype=torch.uint8))
    target(images(32))
    constant = torch.tensor([(0.2 - mean) / std for mean, std in zip(*IMAGENET, strict=True)])
    torch.testing.assert_close(seen[0], constant[None, :, None, None].expand(1, 3, 28, 28))
    torch.testing.assert_close(seen[1], by_hand(images(32), 28))
    grey = images(32, channels=1)
    target(grey)
    torch.testing.assert_close(seen[2], by_hand(grey.expand(-1, 3, -1, -1), 28))


def test_the_target_is_frozen_and_deterministic(files):
    file = files(DINOV2)
    state = torch.get_rng_state()
    target = Target(DINOV2, file, 32)
    assert torch.equal(torch.get_rng_state(), state)
    assert not isinstance(target, nn.Module)
    assert not target.network.training
    assert not any(parameter.requires_grad for parameter in target.network.parameters())
    for parameter in target.network.parameters():
        parameter.requires_grad_(True)  # even so there is no graph
    features = target(images(32))
    assert not features.requires_grad
    assert not features.is_inference()  # the loss saves it for its backward pass
    assert torch.equal(features, target(images(32)))
    assert target.to(torch.device("cpu")) is target


def test_the_network_follows_the_callers_autocast(files):
    target = Target(LITE0, files(LITE0), 32)
    exact = target(images(32))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = target(images(32))
    assert rounded.dtype == torch.float32
    assert not torch.equal(rounded, exact)
    torch.testing.assert_close(rounded, exact, atol=0.1, rtol=0.1)


@pytest.mark.slow
def test_compiled_features_are_the_same(files, monkeypatch):
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(
        torch,
        "compile",
        lambda *args, original=torch.compile, options, **other: original(
            *args, backend=backend, fullgraph=True, **other
        ),
    )
    plain, compiled = (REPA(DINOV2, files(DINOV2)).build_target(32) for _ in range(2))
    compiled.compile()
    assert not graphs
    torch.testing.assert_close(compiled(images(32)), plain(images(32)))
    assert graphs
    assert compiled.fingerprint == plain.fingerprint


@pytest.mark.slow
def test_the_layout_published_by_dinov2_is_read(files, tmp_path):
    """Its own files hold a mask token, and with registers one table row for the class token."""

    def plain(state):
        state["mask_token"] = torch.zeros(1, 384)

    def with_registers(state):
        plain(state)
        state["register_tokens"] = state.pop("reg_token")
        state["pos_embed"] = torch.cat([torch.zeros(1, 1, 384), state["pos_embed"]], dim=1)

    for name, change in {DINOV2: plain, REGISTERS: with_registers}.items():
        own = changed(files(name), tmp_path, change)
        assert Target(name, own, 32).fingerprint == Target(name, files(name), 32).fingerprint
    torch.save({"model": load_file(files(DINOV2))}, tmp_path / "w.pth")  # pickled, as DINOv2's are
    assert Target(DINOV2, str(tmp_path / "w.pth"), 32).fingerprint == Target(DINOV2, files(DINOV2), 32).fingerprint


def test_the_layout_of_transformers_is_read(files, tmp_path):
    meta = load_file(files(DINOV2)) | {"mask_token": torch.zeros(1, 384), "register_tokens": torch.zeros(1, 4, 384)}
    theirs = to_transformers(meta)
    assert "encoder.layer.3.attention.attention.key.bias" in theirs
    for state in (meta, theirs, {f"dinov2.{name}": value for name, value in theirs.items()}):
        found = from_transformers(state)
        assert found.keys() == meta.keys()
        assert all(torch.equal(found[name], meta[name]) for name in meta)
    del theirs["encoder.layer.3.attention.attention.key.bias"], theirs["embeddings.register_tokens"]
    save_file(theirs, tmp_path / "lost.safetensors")
    refused(lambda: Target(DINOV2, str(tmp_path / "lost.safetensors"), 32), "Missing", "blocks.3.attn.qkv.bias")


# what is refused


def refused(call, *words):
    with pytest.raises(UserError) as error:
        call()
    message = str(error.value)
    assert "\n" not in message
    assert len(message) < 600
    for word in words:
        assert word in message, message


@pytest.mark.parametrize("name", thinned([LITE0, DINOV2], 2))
def test_weights_must_be_exactly_the_networks(files, tmp_path, name):
    lost = "blocks.2.norm1.weight" if name == DINOV2 else "blocks.2.0.bn1.running_mean"

    def lose(state):
        del state[lost]

    def add(state):
        state["blocks.9.surplus"] = torch.zeros(3)

    def reshape(state):
        state[lost] = torch.zeros(7)

    for change, words in ((lose, ("Missing", lost)), (add, ("Unexpected", "blocks.9.surplus")), (reshape, (lost,))):
        file = changed(files(name), tmp_path, change)
        refused(lambda: Target(name, file, 32), f"alignment.weights={file}: is not a file of {name}", *words)  # noqa: B023


@pytest.mark.slow
def test_the_weights_of_another_model_are_refused_in_a_short_line(files):
    for name, other in ((DINOV2, LITE0), (LITE0, DINOV2), (DINOV2, REGISTERS)):
        refused(lambda: Target(name, files(other), 32), f"is not a file of {name}")  # noqa: B023


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_a_damaged_file_is_named(tmp_path, suffix):
    file = tmp_path / f"damaged.{suffix}"
    file.write_bytes(b"\x07 no weights" * 40)
    refused(lambda: Target(DINOV2, str(file), 32), f"alignment.weights={file}: cannot be read")
    torch.save(torch.zeros(3), tmp_path / "tensor.pth")
    refused(lambda: Target(DINOV2, str(tmp_path / "tensor.pth"), 32), "holds no state dict, but a Tensor")


def test_a_missing_file_and_an_unknown_name_are_refused_before_anything_is_loaded():
    refused(lambda: REPA(DINOV2, "nowhere.safetensors"), "alignment.weights=nowhere.safetensors: no such file")
    refused(lambda: REPA("vit_base_patch14_dinov2.lvd14m"), "alignment.target=", "did you mean vit_base_patch14_dinov2")
    refused(lambda: REPA("qqqqqqqq"), "alignment.target=qqqqqqqq", "timm.list_models()")


def test_an_unreachable_hub_is_reported_with_the_fix(monkeypatch):
    def unreachable(*args, **kwargs):
        raise OSError("no route\nto the host")

    monkeypatch.setattr("ddt.hub.cached_folder", lambda *_: None)
    monkeypatch.setattr("huggingface_hub.HfApi", unreachable)
    target = REPA(DINOV2)
    refused(lambda: target.build_target(32), f"alignment.target={DINOV2}", "no route", "alignment.weights=FILE")


def test_timms_own_weights_come_from_the_hubs_cache(files, tmp_path, monkeypatch):
    asked = []

    def cached_folder(name, revision):
        asked.append(name)
        return tmp_path

    monkeypatch.setattr("ddt.hub.cached_folder", cached_folder)
    shutil.copy(files(DINOV2), tmp_path / "model.safetensors")
    assert REPA(DINOV2).build_target(32).fingerprint == Target(DINOV2, files(DINOV2), 32).fingerprint
    assert asked == [f"timm/{DINOV2}"]


@pytest.mark.parametrize("size", [0, 8, 28, 250])
def test_an_image_must_be_of_whole_cells(size):
    refused(lambda: Target(DINOV2, None, size), f"data.image_size={size}: ", "a multiple of 16")


def test_a_network_without_a_grid_of_stride_16_is_refused(files):
    refused(lambda: Target("crossvit_tiny_240", None, 32), "alignment.target=crossvit_tiny_240", "stride 16")
    target = Target(DINOV2, files(DINOV2), 32)
    target.grid = (3, 3)
    refused(lambda: target(images(32)), "gives 4 tokens, not 3×3")


@pytest.mark.parametrize(
    ("kind", "values", "key"),
    [
        (REPA, {"align_depth": 0}, "alignment.align_depth=0"),
        (REPA, {"weight": 0.0}, "alignment.weight=0.0"),
        (REPA, {"until_step": 0}, "alignment.until_step=0"),
        (REPA, {"projector_width": 0}, "alignment.projector_width=0"),
        (Dispersive, {"align_depth": 0}, "alignment.align_depth=0"),
        (Dispersive, {"weight": -1.0}, "alignment.weight=-1.0"),
        (Dispersive, {"until_step": -1}, "alignment.until_step=-1"),
        (Dispersive, {"temperature": 0.0}, "alignment.temperature=0.0"),
    ],
)
def test_impossible_settings_are_named(kind, values, key):
    refused(lambda: kind(**({"target": DINOV2} if kind is REPA else {}), **values), key)


# the losses


def aligned(grid=(4, 4), token_grid=(4, 4)):
    return AlignmentLoss(nn.Identity(), 8, 0.5, grid, token_grid)


def tokens(batch=2, count=16, width=6, seed=0):
    return torch.randn(batch, count, width, generator=torch.Generator().manual_seed(seed))


def test_loss_is_one_minus_the_cosine():
    h, features = tokens(), tokens(seed=1)
    cosine = (h * features).sum(-1) / (h.norm(dim=-1) * features.norm(dim=-1))
    torch.testing.assert_close(aligned()(h, features), (1 - cosine).mean())
    torch.testing.assert_close(aligned()(3 * features, features), torch.tensor(0.0), atol=1e-6, rtol=0)
    torch.testing.assert_close(aligned()(-features, features), torch.tensor(2.0))
    right_angles = torch.eye(2)[None]  # (1, 2, 2)
    assert aligned((1, 2), (1, 2))(right_angles, right_angles.flip(1)) == 1


def test_the_projector_is_three_layers_with_silu():
    torch.manual_seed(0)
    loss = REPA(DINOV2).build_loss(6, 5, (4, 4), (4, 4))
    state = loss.state_dict()
    names = [f"projector.{layer}.{kind}" for layer in (0, 2, 4) for kind in ("weight", "bias")]
    assert list(state) == names
    shapes = [tuple(state[f"projector.{layer}.weight"].shape) for layer in (0, 2, 4)]
    assert shapes == [(6, 6), (6, 6), (5, 6)]  # P = D
    loss(tokens(), tokens(width=5, seed=1)).backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in loss.parameters())
    h = tokens()
    for layer in (0, 2, 4):
        h = h @ state[f"projector.{layer}.weight"].T + state[f"projector.{layer}.bias"]
        h = h if layer == 4 else h * torch.sigmoid(h)
    torch.testing.assert_close(loss.projector(tokens()), h)
    features = tokens(width=5, seed=1)
    torch.testing.assert_close(loss(tokens(), features), aligned()(h, features))
    wide = REPA(DINOV2, projector_width=9).build_loss(6, 5, (4, 4), (4, 4))
    assert wide.projector[2].weight.shape == (9, 9)
    assert (loss.name, loss.align_depth, loss.weight) == ("repa_loss", 8, 0.5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_cosine_is_in_float32_under_autocast(dtype):
    """300² is more than float16 holds: a cosine in half precision would be 0 or NaN."""
    h = torch.full((1, 16, 6), 300.0, dtype=dtype)
    with torch.autocast("cpu", dtype=dtype):
        loss = aligned()(h, h)
        disperse = DispersiveLoss(1, 0.5, 1.0)(torch.cat([h, -h]))
    assert (loss.dtype, disperse.dtype) == (torch.float32, torch.float32)
    torch.testing.assert_close(loss, torch.tensor(0.0), atol=1e-6, rtol=0)
    torch.testing.assert_close(disperse, torch.tensor(-4.0))


def test_features_on_another_grid_are_resized_bilinearly():
    features = tokens(count=6)
    maps = features.transpose(1, 2).reshape(2, 6, 2, 3)
    expected = F.interpolate(maps, size=(4, 4), mode="bilinear", align_corners=False).flatten(2).transpose(1, 2)
    torch.testing.assert_close(to_grid(features, (2, 3), (4, 4)), expected)
    ramp = torch.tensor([0.0, 1.0])[None, :, None]  # (1, 2, 1): one row
    assert to_grid(ramp, (1, 2), (1, 4)).flatten().tolist() == [0.0, 0.25, 0.75, 1.0]
    assert to_grid(features, (2, 3), (2, 3)) is features
    torch.testing.assert_close(aligned((2, 3), (4, 4))(expected, features), torch.tensor(0.0), atol=1e-6, rtol=0)


def test_dispersive_loss_in_closed_form():
    first, second = torch.eye(12).reshape(12, 3, 4)[[0, 7]]  # in two tokens
    h = torch.stack([first, 5 * first, 2 * second])  # at distance² 0, 2 and 2 once they have unit length
    loss = Dispersive(align_depth=2, temperature=0.5).build_loss()
    torch.testing.assert_close(loss(h), torch.tensor(math.log((1 + 2 * math.exp(-4)) / 3)))
    torch.testing.assert_close(loss(h[:2]), torch.tensor(0.0))
    slanted = torch.stack([second, 3 * first + 4 * second])  # cosine 0.8, distance² 0.4
    torch.testing.assert_close(loss(slanted), torch.tensor(-0.8))
    cold = Dispersive(temperature=1e-3).build_loss()
    torch.testing.assert_close(cold(h[1:]), torch.tensor(-2000.0))  # exp(−2000) is no float32
    assert (loss.name, loss.align_depth, loss.weight) == ("dispersive_loss", 2, 0.5)
    assert not loss.state_dict()
    refused(lambda: loss(h[:1]), "trainer.micro_batch_size=1", "at least 2")  # one image has no pair


def test_descending_the_dispersive_loss_spreads_the_batch():
    h = tokens(batch=3).requires_grad_()
    loss = DispersiveLoss(1, 0.5, 1.0)
    before = loss(h)
    before.backward()
    assert loss(h - h.grad) < before
    twins = torch.ones(2, 4, 3, requires_grad=True)
    loss(twins).backward()
    assert twins.grad.isfinite().all()


# the settings


def alignment(name):
    """The settings of a file in conf/alignment."""
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        node = OmegaConf.to_container(compose(f"alignment/{name}"))["alignment"]
    target = node.pop("_target_")
    return target and parse(locate(target), node, "alignment")


def cached(target, file=None, **changes):
    values = dict(target=target, weights_sha256=file and sha256(Path(file)), fingerprint="f", num_features=5)
    return CachedFeatures(**{**values, "grid": (2, 2), "root": "cache", **changes})


def test_an_alignment_is_built_of_a_target_or_of_cached_features(files):
    file = files(LITE0)
    settings = REPA(LITE0, file, align_depth=1, until_step=7)
    online = settings.build(6, (4, 4), 32, None)
    assert online.target is not None
    assert (online.fingerprint, online.end_step, online.needs_features) == (online.target.fingerprint, 7, True)
    assert online.loss.projector[4].out_features == 112
    stored = settings.build(6, (4, 4), 32, cached(LITE0, file))
    assert (stored.target, stored.fingerprint) == (None, "f")
    assert (stored.loss.projector[4].out_features, stored.loss.grid, stored.loss.token_grid) == (5, (2, 2), (4, 4))
    other = cached(LITE0, weights_sha256="0")
    refused(lambda: settings.build(6, (4, 4), 32, other), "is not the file that the cached features")
    refused(lambda: settings.build(6, (4, 4), 32, cached(DINOV2)), f"holds features of {DINOV2}")


def test_without_a_target_nothing_is_loaded():
    dispersive = Dispersive().build(6, (4, 4), 32, cached(LITE0))
    assert isinstance(dispersive.loss, DispersiveLoss)
    assert (dispersive.end_step, dispersive.needs_features, dispersive.target) == (math.inf, False, None)
    assert Alignment().end_step == 0


def test_the_alignments_on_offer(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "efficientnet_lite0.safetensors").touch()
    for name, target, depth in (("dinov2_b", "vit_base_patch14_dinov2.lvd142m", 8), ("efficientnet_lite0", LITE0, 2)):
        settings = alignment(f"repa_{name}")
        assert (settings.target, settings.align_depth, settings.weight) == (target, depth, 0.5)
        assert (settings.until_step, settings.projector_width) == (None, None)
        assert settings.needs_target
    assert alignment("none") is None
    assert alignment("dispersive") == Dispersive()
    assert not Dispersive.needs_target
    refused(lambda: parse(Dispersive, {"until_step": 2.5}, "alignment"), "alignment.until_step=2.5")
    Dispersive(align_depth=4).check_depth(4)
    words = "alignment.align_depth=5: the encoder has 4 blocks, choose 1..4"
    refused(lambda: Dispersive(align_depth=5).check_depth(4), words)
