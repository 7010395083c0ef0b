"""The discriminator, its losses and augmentation, against RAE's numbers (tests/golden/rae)."""

import copy

import pytest
import torch
from rae import CLOSE, golden
from safetensors.torch import save_file

from ddt.errors import UserError
from ddt.objective.augmentation import augment
from ddt.objective.discriminator import (
    Discriminator,
    FrozenDINO,
    adaptive_weight,
    generator_loss,
    hinge_loss,
    judging,
    load_dino,
    quantised,
)

pytestmark = pytest.mark.usefixtures("one_thread")
NAMES = {  # golden names → ours
    "0.0.": "first.0.", "0.1.": "first.1.", "1.fn.0.": "second.0.", "1.fn.1.": "second.1.", "2.": "last.",
    "weight_orig": "parametrizations.weight.original", "weight_u": "parametrizations.weight.0._u",
    "weight_v": "parametrizations.weight.0._v",
}  # fmt: skip


def head_name(name):
    _, number, rest = name.removeprefix("disc.").split(".", 2)
    for old, new in NAMES.items():
        rest = rest.replace(old, new, 1) if rest.startswith(old) or rest.endswith(old) else rest
    return f"heads.{number}.{rest}"


@pytest.fixture(scope="module")
def stage1():
    return golden("stage1")


@pytest.fixture(scope="module")
def discriminator(stage1):
    dino = {key.removeprefix("dino."): value for key, value in stage1.items() if key.startswith("dino.")}
    features = FrozenDINO(dino, depths=(1, 2, 4), depth=4, patch_size=56, embed_dim=16, num_heads=2)
    network = Discriminator(features)
    heads = {head_name(key): value for key, value in stage1.items() if key.startswith("disc.")}
    network.load_state_dict(heads)
    return network.eval()


def test_logits_and_losses_are_those_of_the_public_code(stage1, discriminator):
    fake, real = (discriminator(stage1[name]) for name in ("fake", "real"))
    torch.testing.assert_close(fake, stage1["logits_fake"], **CLOSE)
    torch.testing.assert_close(real, stage1["logits_real"], **CLOSE)
    torch.testing.assert_close(hinge_loss(real, fake), stage1["d_loss"], **CLOSE)
    torch.testing.assert_close(generator_loss(fake), stage1["g_loss"], **CLOSE)


def test_augmentation_rounding_and_the_adaptive_weight_are_those_of_the_public_code(stage1):
    found = augment(stage1["fake"], stage1["diffaug_uniform"])
    torch.testing.assert_close(found, stage1["diffaug"], **CLOSE)
    torch.testing.assert_close(quantised(stage1["quantised_input"]), stage1["quantised"], rtol=0, atol=1e-7)
    w = stage1["w"].clone().requires_grad_()
    output = stage1["hidden"] @ w.T
    reconstruction, gan = (output - stage1["target"]).abs().mean(), -(output.tanh() / 10).mean()
    weight = adaptive_weight(reconstruction, gan, w)
    torch.testing.assert_close(weight, stage1["adaptive_weight"], **CLOSE)
    assert not weight.requires_grad
    (reconstruction + weight * gan).backward()  # both graphs are still there


@pytest.mark.parametrize(
    ("of_reconstruction", "of_gan", "expected"), [(1.0, 1e-6, 1e4), (1e-3, 0.0, 1e3), (1.0, 3e-6, 2.5e5), (2.0, 0.5, 4)]
)
def test_the_adaptive_weight_is_at_most_10000_and_bounded_where_the_gan_has_no_gradient(
    of_reconstruction, of_gan, expected
):
    w = torch.ones(1, requires_grad=True)
    found = adaptive_weight((of_reconstruction * w).sum(), (of_gan * w).sum(), w)
    assert found.item() == pytest.approx(min(expected, 1e4), rel=1e-5)


def test_the_heads_norms_have_their_published_eps(discriminator):
    """Of tokens that hardly differ: variance 1e-6 beside eps 1e-6 leaves half of it."""
    tokens = 1e-3 * torch.tensor([1.0, -1.0] * 8).expand(1, 16, 16)
    for head in discriminator.heads:
        for block in (head.first, head.second):
            norm = block[1]
            plain = (norm(tokens) - norm.bias[:, None]) / norm.weight[:, None]
            torch.testing.assert_close(plain.square().mean(), torch.tensor(0.5), rtol=1e-3, atol=0)


def test_an_image_is_augmented_by_its_own_numbers(stage1):
    images, uniform = stage1["real"], stage1["diffaug_uniform"]
    both = augment(images, uniform)
    torch.testing.assert_close(augment(images[1:], uniform[:, 1:]), both[1:])
    middle = torch.full((5, 2), 0.5)  # no shift, no change of brightness, saturation and contrast
    torch.testing.assert_close(augment(images, middle), images)


def test_a_judging_discriminator_gets_no_gradients_and_its_spectral_norms_stay(stage1, discriminator):
    network = copy.copy(discriminator)
    network.heads = copy.deepcopy(discriminator.heads)
    network.train()
    pixels = stage1["fake"].clone().requires_grad_()
    before = copy.deepcopy(network.state_dict())
    with judging(network):
        generator_loss(network(pixels)).backward()
    assert pixels.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in network.parameters())
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    hinge_loss(network(stage1["real"]), network(stage1["fake"])).backward()
    assert all(parameter.grad is not None for parameter in network.parameters())
    moved = [name for name, value in network.state_dict().items() if not torch.equal(value, before[name])]
    assert moved
    assert all(name.endswith(("_u", "_v")) for name in moved)


@pytest.mark.slow
def test_the_published_discriminator_has_its_size():
    import timm

    with torch.device("meta"):
        state = timm.create_model("vit_small_patch8_224.dino", num_classes=0).state_dict()
    with torch.device("meta"):
        network = Discriminator(FrozenDINO(state))
        logits = network(torch.empty(2, 3, 256, 256))
    assert logits.shape == (2, 5 * 784)
    head = 384 * 384 * (1 + 9) + 2 * 3 * 384 + 384 + 1  # convolutions with biases, norms, the last layer
    assert sum(parameter.numel() for parameter in network.parameters()) == 5 * head


def test_a_file_of_another_network_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"reconstruction\.dino_weights: not set; give DINO's ViT-S/8"):
        load_dino(None)
    with pytest.raises(UserError, match=r"reconstruction\.dino_weights=none\.pth: no such file; give DINO's"):
        load_dino("none.pth")
    save_file({"cls_token": torch.zeros(1, 1, 384)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=r"dino_weights=.*other\.safetensors: does not fit \(.*give DINO's"):
        load_dino(str(tmp_path / "other.safetensors"))
