"""A discriminator on features of a frozen DINO ViT-S/8, and its losses.

Shapes: B images of H W pixels in [−1, 1], N tokens of D features.
Source: Zheng et al., arXiv 2510.11690 (RAE), after Sauer et al., arXiv 2301.09515.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from ddt.objective.lpips import check_file, load_strictly
from ddt.tensor_files import read_state_dict

DINO_FILE = "DINO's ViT-S/8, discs/dino_vit_small_patch8_224.pth of nyu-visionx/RAE-collections"
DINO = "vit_small_patch8_224.dino"  # timm's name
DEPTHS = (3, 6, 9, 12)  # blocks whose output is looked at, counted from 1
SIDE = 224  # pixels per side that the network sees
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of pixels in [0, 1]
KERNEL = 9  # tokens


class FrozenDINO:
    """The patch tokens of some blocks of a vision transformer of timm, without the final norm. No
    nn.Module, so nothing trains or saves it.

    Args:
        state: its weights. RAE sets the keys' biases to 0, which changes nothing: a softmax over
            keys does not see them.
        name: of the network; depths: blocks, counted from 1; changes: of timm's constructor.
        label: of the file, in messages.

    Raises UserError for weights that do not fit exactly.
    """

    def __init__(
        self,
        state: dict[str, Tensor],
        name: str = DINO,
        depths: Sequence[int] = DEPTHS,
        label: str = "state",
        **changes: Any,
    ) -> None:
        import timm

        with torch.device("meta"):
            network: Any = timm.create_model(name, num_classes=0, act_layer="gelu_tanh", img_size=SIDE, **changes)
        load_strictly(network, state, label, DINO_FILE)
        self.network, self.width, self.indices = network, network.embed_dim, [depth - 1 for depth in depths]
        self.mean, self.std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))  # (3, 1, 1)

    def to(self, device: torch.device) -> "FrozenDINO":
        """Move to a device and return itself."""
        self.network.to(device)
        self.mean, self.std = self.mean.to(device), self.std.to(device)
        return self

    def __call__(self, pixels: Tensor) -> list[Tensor]:
        """Return the tokens (B, N, D) of each depth, of pixels (B, 3, H, W) in [−1, 1]."""
        pixels = F.interpolate(pixels, size=(SIDE, SIDE), mode="bilinear", align_corners=False)
        pixels = ((pixels + 1) / 2 - self.mean) / self.std
        return self.network.forward_intermediates(
            pixels, indices=self.indices, norm=False, output_fmt="NLC", intermediates_only=True
        )


def load_dino(file: str | None) -> FrozenDINO:
    """Return the network of a file; raise UserError, which names the setting, where there is none
    or it is another's.
    """
    key = "reconstruction.dino_weights"
    path = check_file(key, file, DINO_FILE)
    return FrozenDINO(read_state_dict(path, f"{key}={file}"), label=f"{key}={file}")


class NormedConv(nn.Sequential):
    """A spectral-normed circular convolution over tokens, normalised per image and channel, and
    LeakyReLU: (B, D, N) → (B, D, N).
    """

    def __init__(self, width: int, kernel: int) -> None:
        convolution = nn.Conv1d(width, width, kernel, padding=kernel // 2, padding_mode="circular")
        super().__init__(
            spectral_norm(convolution, eps=1e-12), nn.InstanceNorm1d(width, eps=1e-6, affine=True), nn.LeakyReLU(0.2)
        )


class Head(nn.Module):
    """Logits (B, N) of tokens (B, N, D)."""

    def __init__(self, width: int, kernel: int) -> None:
        super().__init__()
        self.first, self.second = NormedConv(width, 1), NormedConv(width, kernel)
        self.last = spectral_norm(nn.Conv1d(width, 1, 1), eps=1e-12)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return one logit per token."""
        x = self.first(tokens.transpose(1, 2))  # (B, D, N)
        x = (self.second(x) + x) / 2**0.5
        return self.last(x)[:, 0]


class Discriminator(nn.Module):
    """Logits of images: a head for the last depth of `features`, then one for each depth.

    In train mode a call moves the vectors of the spectral norms by one power iteration.
    """

    def __init__(self, features: FrozenDINO, kernel: int = KERNEL) -> None:
        super().__init__()
        self.features = features
        self.heads = nn.ModuleList(Head(features.width, kernel) for _ in range(len(features.indices) + 1))

    def forward(self, pixels: Tensor) -> Tensor:
        """Return logits (B, heads·N) of pixels (B, 3, H, W) in [−1, 1]."""
        tokens = self.features(pixels)
        return torch.cat([head(x) for head, x in zip(self.heads, [tokens[-1], *tokens], strict=True)], dim=1)


@contextlib.contextmanager
def judging(discriminator: Discriminator) -> Iterator[None]:
    """In this context a discriminator only judges: its weights get no gradients, and the vectors of
    its spectral norms stay.
    """
    discriminator.eval().requires_grad_(False)
    try:
        yield
    finally:
        discriminator.train().requires_grad_(True)


def quantised(pixels: Tensor) -> Tensor:
    """Return pixels in [−1, 1] rounded to the 256 values of 8 bits, as real images are."""
    return ((pixels.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1


def hinge_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Return the discriminator's loss of logits."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def generator_loss(fake: Tensor) -> Tensor:
    """Return the generator's loss of logits."""
    return -fake.mean()


def adaptive_weight(reconstruction_loss: Tensor, gan_loss: Tensor, weight: Tensor) -> Tensor:
    """Return how much larger the gradient of one loss with respect to `weight`, a decoder's last
    layer, is than that of the other: a scalar in [0, 10⁴] without graph. Both losses keep theirs.
    """
    (of_reconstruction,) = torch.autograd.grad(reconstruction_loss, weight, retain_graph=True)
    (of_gan,) = torch.autograd.grad(gan_loss, weight, retain_graph=True)
    return (of_reconstruction.norm() / (of_gan.norm() + 1e-6)).clamp(0, 1e4).detach()
