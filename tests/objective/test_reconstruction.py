"""What a decoder minimises, term by term."""

import dataclasses

import pytest
import torch
from rae import golden

from ddt.autoencoder.vit_decoder import ViTDecoder
from ddt.errors import UserError
from ddt.objective.augmentation import augment
from ddt.objective.discriminator import Discriminator, FrozenDINO, judging
from ddt.objective.reconstruction import Discrimination, Reconstruction
from ddt.training.decoder.settings import ReconstructionSettings

pytestmark = pytest.mark.usefixtures("one_thread")
MEAN, STD = torch.tensor([0.4, 0.5, 0.6])[:, None, None], torch.tensor([0.2, 0.25, 0.3])[:, None, None]
SETTINGS = ReconstructionSettings(
    noise=0.8, lpips_weight=2.0, gan_weight=0.75, discriminator_start=0, gan_start=0, vgg_weights="a",
    lpips_weights="b", dino_weights="c",
)  # fmt: skip


def distance(a, b):
    """In place of LPIPS: of a, then b, both in [−1, 1]."""
    return (a - 2 * b).square().mean()


@pytest.fixture(scope="module")
def objective():
    torch.manual_seed(0)
    network = ViTDecoder(6, 16, 2, 32, num_heads=2, grid=3, patch_size=4)
    return Reconstruction(network, MEAN, STD, distance, noise=0.8, lpips_weight=2.0, gan_weight=0.75)


@pytest.fixture(scope="module")
def judge():
    torch.manual_seed(1)
    state = {key.removeprefix("dino."): v for key, v in golden("stage1").items() if key.startswith("dino.")}
    return Discriminator(FrozenDINO(state, depths=(2, 4), depth=4, patch_size=56, embed_dim=16, num_heads=2))


@pytest.fixture(scope="module")
def batch():
    generator = torch.Generator().manual_seed(2)
    return {
        "tokens": torch.randn(2, 6, 3, 3, generator=generator),
        "targets": torch.rand(2, 3, 12, 12, generator=generator),
        "noise": torch.randn(2, 6, 3, 3, generator=generator),
        "noise_uniform": torch.tensor([0.25, 0.75]),
    }


def pixels_of(objective, tokens):
    return objective.network(tokens) * STD + MEAN


def test_without_a_gan_it_is_l1_and_lpips_of_noisy_tokens(objective, batch):
    deviation = torch.tensor([0.2, 0.6])[:, None, None, None]
    pixels = pixels_of(objective, batch["tokens"] + deviation * batch["noise"])
    losses = objective(**batch)
    l1 = (pixels - batch["targets"]).abs().mean()
    perceptual = distance(2 * batch["targets"] - 1, 2 * pixels - 1)
    torch.testing.assert_close(losses["l1"], l1)
    torch.testing.assert_close(losses["lpips"], perceptual)
    torch.testing.assert_close(losses["loss"], l1 + 2 * perceptual)
    assert not losses["l1"].requires_grad


def test_the_gan_counts_as_much_as_the_reconstruction_at_the_last_layer(objective, judge, batch):
    uniform = torch.rand(5, 2, generator=torch.Generator().manual_seed(3))
    weight = objective.network.decoder_pred.weight
    with judging(judge):
        losses = objective(**batch, discriminator=judge, augment_uniform=uniform)
        deviation = torch.tensor([0.2, 0.6])[:, None, None, None]
        pixels = pixels_of(objective, batch["tokens"] + deviation * batch["noise"])
        gan = -judge(augment(2 * pixels - 1, uniform)).mean()
    rest = (pixels - batch["targets"]).abs().mean() + 2 * distance(2 * batch["targets"] - 1, 2 * pixels - 1)
    (of_rest,) = torch.autograd.grad(rest, weight, retain_graph=True)
    (of_gan,) = torch.autograd.grad(gan, weight, retain_graph=True)
    (of_loss,) = torch.autograd.grad(losses["loss"], weight)
    ratio = of_rest.norm() / of_gan.norm()
    torch.testing.assert_close(losses["adaptive_weight"], ratio, rtol=1e-4, atol=0)
    torch.testing.assert_close(losses["gan"], gan)
    torch.testing.assert_close(losses["loss"], rest + 0.75 * ratio * gan, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(of_loss, of_rest + 0.75 * ratio * of_gan, rtol=1e-4, atol=1e-6)


def test_fakes_are_made_without_noise_and_of_8_bits(objective, batch):
    fakes = objective.fakes(batch["tokens"])
    levels = (fakes + 1) * 127.5
    torch.testing.assert_close(levels, levels.round(), rtol=0, atol=1e-3)
    assert (fakes.min() >= -1) & (fakes.max() <= 1)
    expected = (2 * pixels_of(objective, batch["tokens"]) - 1).clamp(-1, 1)
    assert (fakes - expected).abs().max() <= 0.5 / 127.5 + 1e-6
    assert not fakes.requires_grad


def test_the_discriminators_loss_is_of_fakes_and_targets(objective, judge, batch):
    uniform = torch.rand(5, 4, generator=torch.Generator().manual_seed(4))
    fakes = objective.fakes(batch["tokens"])
    module = Discrimination(judge).eval()
    found = module(fakes, batch["targets"], uniform)
    fake = judge(augment(fakes, uniform[:, :2]))
    real = judge(augment(2 * batch["targets"] - 1, uniform[:, 2:]))
    expected = 0.5 * (torch.relu(1 - real).mean() + torch.relu(1 + fake).mean())
    torch.testing.assert_close(found, expected)
    assert {name.split(".")[1] for name in module.state_dict()} == {"heads"}  # the frozen network is not trained


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"noise": -0.1}, r"reconstruction\.noise=-0\.1: must be at least 0"),
        ({"lpips_weight": 0.0}, r"reconstruction\.vgg_weights=a: has no effect with reconstruction\.lpips_weight=0"),
        ({"gan_weight": 0.0}, r"reconstruction\.dino_weights=c: has no effect with reconstruction\.gan_weight=0"),
        (
            {"gan_weight": 0.0, "dino_weights": None, "gan_start": 7},
            r"reconstruction\.gan_start=7: has no effect with reconstruction\.gan_weight=0",
        ),
        ({"discriminator_start": 9, "gan_start": 8}, r"gan_start=8: is before reconstruction\.discriminator_start=9"),
    ],
)
def test_settings_without_effect_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(SETTINGS, **changes)
