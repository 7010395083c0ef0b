"""Features of DINOv2: what the network sees, the table of positions, and what is refused."""

import json
import math

import numpy as np
import pytest
import timm
import torch
import torch_fidelity
from conftest import ROOT, thinned, to_transformers
from hydra.utils import instantiate
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.layers import resample_abs_pos_embed

from ddt.errors import UserError
from ddt.files import sha256
from ddt.metrics.dinov2 import DINOv2, FeatureExtractorDINOv2, hub_positions
from ddt.metrics.settings import DINOv2Settings

SMALL = "vit_small_patch14_dinov2.lvd142m"
LARGE = "vit_large_patch14_dinov2.lvd142m"
CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("one_thread")


class SmallExtractor(FeatureExtractorDINOv2):
    model = SMALL


torch_fidelity.register_feature_extractor("dinov2-vit-s-14-timm", SmallExtractor)


def images(height, width, batch=2, seed=3):
    """Coloured noise, each channel of another brightness."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randint(128, (batch, 3, height, width), generator=generator)
    return (noise + torch.tensor([0, 60, 120])[:, None, None]).to(torch.uint8)


def smooth_table(width, side=37):
    """Positions (1, 1 + side², width): slow waves over the grid, row 0 all sevens."""
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    k = torch.arange(width)
    waves = torch.cos(0.05 * (1 + k % 5) * y[..., None] + 0.04 * (1 + k % 7) * x[..., None] + k)
    return torch.cat([torch.full((1, 1, width), 7.0), waves.reshape(1, side * side, width)], dim=1)


def random_network(name):
    """The network at 518 px, all of its values random, so that no constant hides an error."""
    torch.manual_seed(5)
    network = timm.create_model(name, weight_init="skip").eval()
    with torch.no_grad():
        for key, parameter in network.named_parameters():
            scales = parameter.ndim == 1 and not key.endswith("bias")
            parameter.copy_(scales + 0.04 * torch.randn_like(parameter))
        network.pos_embed.copy_(smooth_table(network.num_features))
    return network


@pytest.fixture(scope="module")
def reference():
    return random_network(SMALL)


@pytest.fixture(scope="module")
def file(reference, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "small.safetensors"
    save_file(reference.state_dict(), path)
    return str(path)


@pytest.fixture(scope="module")
def extractor(file):
    return DINOv2Settings(weights=file, model=SMALL).extractor(CPU)


def changed(file, folder, change):
    """Write a copy of a weight file after `change(state)`."""
    state = load_file(file)
    change(state)
    save_file(state, folder / "changed.safetensors")
    return str(folder / "changed.safetensors")


# positions


def cubic(distance, a=-0.75):
    t = abs(distance)
    if t <= 1:
        return (a + 2) * t**3 - (a + 3) * t**2 + 1
    return a * (t**3 - 5 * t**2 + 8 * t - 4) if t < 2 else 0.0


def bicubic_matrix(scale, source, target=16):
    """One axis of bicubic interpolation at a scale: float64 (target, source), edges repeated."""
    matrix = torch.zeros(target, source, dtype=torch.float64)
    for i in range(target):
        place = (i + 0.5) / scale - 0.5
        for j in range(math.floor(place) - 1, math.floor(place) + 3):
            matrix[i, min(max(j, 0), source - 1)] += cubic(place - j)
    return matrix


def by_matrices(table, scale):
    """The rule written out: the class token's row, and the grid interpolated on both axes."""
    side = math.isqrt(table.shape[1] - 1)
    axis = bicubic_matrix(scale, side)
    grid = table[0, 1:].double().unflatten(0, (side, side))
    grid = torch.einsum("is,jt,stf->ijf", axis, axis, grid).flatten(0, 1)
    return torch.cat([table[0, :1].double(), grid]).float()[None]


def distance(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("side", [37, 20])
def test_positions_are_resampled_by_the_hubs_rule(side):
    table = smooth_table(12, side)
    expected = by_matrices(table, 16.1 / side)
    result = hub_positions(table)
    torch.testing.assert_close(result, expected, atol=1e-5, rtol=0)
    assert torch.equal(result[:, 0], table[:, 0])
    assert distance(by_matrices(table, 16 / side)[:, 1:], expected[:, 1:]) > 0.01  # without the 0.1
    assert distance(resample_abs_pos_embed(table, [16, 16])[:, 1:], expected[:, 1:]) > 0.01  # timm's


def test_the_network_holds_the_hubs_positions_and_the_files_weights(extractor, reference):
    state, original = extractor.network.state_dict(), reference.state_dict()
    torch.testing.assert_close(
        state.pop("pos_embed"), by_matrices(original.pop("pos_embed"), 16.1 / 37), atol=1e-5, rtol=0
    )
    assert state.keys() == original.keys()
    assert all(torch.equal(state[name], original[name]) for name in original)
    assert not extractor.network.training
    assert not extractor.network.pretrained_cfg.get("state_dict")  # a second copy of all weights


# features


def resized(pixels):
    """Channels resized by Pillow, whose bicubic is antialiased and, of floats, not rounded."""
    channels = [
        [np.asarray(Image.fromarray(channel, "F").resize((224, 224), Image.Resampling.BICUBIC)) for channel in image]
        for image in pixels.float().numpy()
    ]
    return torch.tensor(np.array(channels))


def by_hand(reference, pixels):
    """The forward pass step by step, by the layers of the network that was never resized."""
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]
    with torch.no_grad():
        tokens = reference.patch_embed.proj((resized(pixels) / 255 - mean) / std).flatten(2).transpose(1, 2)
        tokens = torch.cat([reference.cls_token.expand(len(pixels), -1, -1), tokens], dim=1)
        tokens = tokens + by_matrices(reference.pos_embed, 16.1 / 37)
        for block in reference.blocks:
            tokens = block(tokens)
        return reference.norm(tokens)[:, 0]


@pytest.mark.parametrize(("height", "width"), [(320, 256), (32, 48), (224, 224)])
def test_features_are_the_class_token_of_a_forward_pass_by_hand(extractor, reference, height, width):
    pixels = images(height, width)
    features = extractor(pixels)["features"]
    assert (features.shape, features.dtype) == ((2, 384), torch.float32)
    torch.testing.assert_close(features, by_hand(reference, pixels), atol=1e-4, rtol=0)


def test_features_need_no_graph_and_do_not_follow_autocast_or_tf32(extractor):
    pixels = images(64, 64)
    features = extractor(pixels)["features"]
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    seen = []
    hook = extractor.network.norm.register_forward_hook(lambda *_: seen.append(torch.get_float32_matmul_precision()))
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            again = extractor(pixels)["features"]
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        hook.remove()
        torch.set_float32_matmul_precision(before)
    assert seen == ["highest"]
    assert torch.equal(again, features)
    for parameter in extractor.network.parameters():
        assert not parameter.requires_grad
    extractor.network.norm.weight.requires_grad_(True)
    assert not extractor(pixels)["features"].requires_grad  # even so
    extractor.network.norm.weight.requires_grad_(False)


@pytest.mark.parametrize("wrong", [images(32, 32).float(), images(32, 32)[:, :1], images(32, 32)[0]])
def test_other_images_are_refused(extractor, wrong):
    refused(lambda: extractor(wrong), "features=dinov2: takes uint8 RGB images")


# torch-fidelity


class Pictures(torch.utils.data.Dataset):
    def __init__(self, seed, count=8):
        self.images = images(40, 40, count, seed)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index]


@pytest.mark.slow
def test_torch_fidelity_computes_its_metrics_in_these_features(extractor, file):
    sets = Pictures(1), Pictures(2)
    result = torch_fidelity.calculate_metrics(
        input1=sets[0], input2=sets[1], feature_extractor="dinov2-vit-s-14-timm", feature_extractor_weights_path=file,
        fid=True, prc=True, cuda=False, batch_size=5, save_cpu_ram=True, verbose=False,
    )  # fmt: skip
    a, b = (extractor(each.images)["features"].double() for each in sets)
    covariances = a.T.cov(), b.T.cov()
    root = torch.linalg.eigvals(covariances[0] @ covariances[1]).sqrt().real.sum()
    expected = (a.mean(0) - b.mean(0)).square().sum() + covariances[0].trace() + covariances[1].trace() - 2 * root
    assert result["frechet_inception_distance"] == pytest.approx(expected.item(), rel=1e-3)

    def covered(x, y):  # the share of x within the third-neighbour ball of any of y
        radii = torch.cdist(y, y).kthvalue(4, dim=1).values
        return (torch.cdist(x, y) <= radii).any(dim=1).double().mean().item()

    assert result["precision"] == pytest.approx(covered(a, b))
    assert result["recall"] == pytest.approx(covered(b, a))


def test_the_registered_extractor_is_vit_l_in_float32(file):
    registry = torch_fidelity.registry.FEATURE_EXTRACTORS_REGISTRY
    assert registry["dinov2-vit-l-14-timm"] is FeatureExtractorDINOv2
    assert FeatureExtractorDINOv2.model == DINOv2Settings().model == LARGE
    for metric in ("isc", "fid", "kid", "prc"):
        layer = FeatureExtractorDINOv2.get_default_feature_layer_for_metric(metric)
        assert (layer,) == FeatureExtractorDINOv2.get_provided_features_list() == ("class_token",)
    refused(
        lambda: SmallExtractor("s", ["class_token"], file, feature_extractor_internal_dtype="float64"),
        "feature_extractor_internal_dtype=float64",
    )
    refused(
        lambda: SmallExtractor("s", ["class_token"], "none.pth"), "feature_extractor_weights_path=none.pth: no such"
    )


# the extractor and its settings


def test_the_extractor_says_what_it_is(extractor, file):
    assert (extractor.channels, extractor.batch_size, extractor.spaces) == (3, 64, {"features": 384})
    identity = extractor.identity()
    assert json.loads(json.dumps(identity)) == identity
    tensors = identity["weights"].pop("tensors_sha256")
    assert len(tensors) == 64
    assert identity == {
        "name": "dinov2",
        "model": SMALL,
        "weights": {"path": file, "sha256": sha256(ROOT / file)},
        "resize": "bicubic to 224×224, antialiased",
        "position table": "the hub's rule: bicubic, scale (16 + 0.1)/37, not antialiased",
        "dtype": "float32",
    }
    assert extractor.identity()["weights"]["tensors_sha256"] == tensors  # what a caller does to it stays with them
    assert extractor.deviations() == [f"features.model={SMALL}: published FD-DINOv2 is of {LARGE}"]


def test_the_config_file_names_the_defaults():
    settings = instantiate(OmegaConf.load(ROOT / "conf" / "features" / "dinov2.yaml"))
    assert settings == DINOv2Settings()
    assert settings.name == DINOv2.name


def test_every_layout_of_a_file_gives_the_same_network_and_samples_nothing(extractor, file, tmp_path):
    state = load_file(file)
    torch.save({"model": state}, tmp_path / "timm.pth")
    hubs = {**state, "mask_token": torch.zeros(1, 384)}
    torch.save(hubs, tmp_path / "hub.pth")  # the hub's own names
    save_file(to_transformers(hubs), tmp_path / "transformers.safetensors")
    before = torch.get_rng_state()
    for name in ("timm.pth", "hub.pth", "transformers.safetensors"):
        other = DINOv2Settings(str(tmp_path / name), 3, SMALL).extractor(CPU)
        assert other.identity()["weights"]["tensors_sha256"] == extractor.identity()["weights"]["tensors_sha256"]
        assert other.batch_size == 3
    assert torch.equal(torch.get_rng_state(), before)

    def shift(state):
        state["blocks.3.attn.qkv.weight"] += 1e-3

    shifted = DINOv2Settings(changed(file, tmp_path, shift), model=SMALL).extractor(CPU)
    assert shifted.identity()["weights"]["tensors_sha256"] != extractor.identity()["weights"]["tensors_sha256"]


@pytest.mark.slow
def test_vit_l_gives_1024_features(tmp_path):
    save_file(random_network(LARGE).state_dict(), tmp_path / "large.safetensors")
    extractor = DINOv2Settings(str(tmp_path / "large.safetensors")).extractor(CPU)
    assert extractor.spaces == {"features": 1024}
    features = extractor(images(64, 64, batch=1))["features"]
    assert features.shape == (1, 1024)
    assert features.isfinite().all()


# what is refused


def refused(call, *words):
    with pytest.raises(UserError) as error:
        call()
    message = str(error.value)
    assert "\n" not in message
    assert len(message) < 1200
    for word in words:
        assert word in message, message


def test_impossible_settings_are_named_before_anything_is_loaded():
    words = "features.weights=nowhere.pth: no such file; ", f"huggingface.co/timm/{LARGE}", "dinov2_vitl14_pretrain.pth"
    refused(lambda: DINOv2Settings("nowhere.pth"), *words)
    refused(lambda: DINOv2Settings(batch_size=0), "features.batch_size=0: must lie in 1..10000")
    for model in ("vit_small_patch14_reg4_dinov2.lvd142m", "resnet18.a1_in1k", "vit_large_patch14_dinov2.typo", "x"):
        refused(lambda: DINOv2Settings(model=model), f"features.model={model}: ", "choose of", LARGE)  # noqa: B023
    assert DINOv2Settings(model="vit_small_patch14_dinov2").model == "vit_small_patch14_dinov2"


@pytest.mark.parametrize(
    ("change", "words"),
    thinned(
        [
            (lambda state: state.pop("blocks.2.norm1.weight"), ("Missing", "blocks.2.norm1.weight")),
            (lambda state: state.update(surplus=torch.zeros(3)), ("Unexpected", "surplus")),
            (lambda state: state.update({"norm.bias": torch.zeros(7)}), ("size mismatch", "norm.bias")),
            (
                lambda state: state.update(pos_embed=torch.zeros(1, 257, 384)),
                ("pos_embed is (1, 257, 384), not (1, 1370",),
            ),
            (
                lambda state: state.update({"patch_embed.proj.weight": torch.zeros(384, 3, 16, 16)}),
                ("patch_embed.proj.weight is (384, 3, 16, 16)",),
            ),
            (lambda state: state.clear(), ("holds no tensors",)),
        ],
        2,
    ),
)
def test_weights_must_be_exactly_the_networks(file, tmp_path, change, words):
    path = changed(file, tmp_path, change)
    settings = DINOv2Settings(path, model=SMALL)
    refused(lambda: settings.extractor(CPU), f"features.weights={path}: ", *words, "=FILE")


@pytest.mark.parametrize("suffix", ["safetensors", "pth", "bin"])
def test_a_damaged_file_is_named(tmp_path, suffix):
    path = tmp_path / f"damaged.{suffix}"
    path.write_bytes(b"\x07 no weights" * 40)
    settings = DINOv2Settings(str(path), model=SMALL)
    refused(lambda: settings.extractor(CPU), f"features.weights={path}: cannot be read", f"timm/{SMALL}")


def test_an_unreachable_hub_is_reported_with_a_fix(monkeypatch):
    def unreachable(*args, **kwargs):
        raise OSError("no route\nto the host")

    monkeypatch.setattr("ddt.hub.cached_folder", lambda *_: None)
    monkeypatch.setattr("huggingface_hub.HfApi", unreachable)
    settings = DINOv2Settings(model=SMALL)
    problem = f"features.weights=null: {SMALL}: no such file or folder here, and the hub did not give it (no route"
    refused(lambda: settings.extractor(CPU), problem, "give features.weights=FILE", f"timm/{SMALL}")
