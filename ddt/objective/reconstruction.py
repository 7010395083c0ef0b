"""How the decoder of a representation autoencoder learns: L1 + LPIPS + a GAN whose weight adapts.

Shapes: B batch, C features of a token, h w tokens, H W pixels.
Source: Zheng et al., arXiv 2510.11690, as its published decoders were trained.
"""

import torch
from torch import Tensor, nn

from ddt.autoencoder.vit_decoder import ViTDecoder
from ddt.objective.augmentation import augment
from ddt.objective.discriminator import (
    Discriminator,
    adaptive_weight,
    generator_loss,
    hinge_loss,
    quantised,
)
from ddt.objective.lpips import LPIPS


class Reconstruction(nn.Module):
    """A decoder with its training loss, a function of its arguments: noise comes from outside.

    Args:
        network: the decoder, from raw tokens to normalised pixels.
        mean, std: (3, 1, 1), those of the encoder's pixels.
        lpips: None without it.
        noise: largest deviation of the noise on tokens; each image has its own, uniform from 0.
        lpips_weight: of LPIPS beside L1. gan_weight: of the GAN's loss, times the adaptive weight.
    """

    alignment = None  # no hidden layer of it is aligned
    mean: Tensor
    std: Tensor

    def __init__(
        self, network: ViTDecoder, mean: Tensor, std: Tensor, lpips: LPIPS | None, noise: float, lpips_weight: float,
        gan_weight: float,
    ) -> None:  # fmt: skip
        super().__init__()
        self.network, self.lpips = network, lpips
        self.noise, self.lpips_weight, self.gan_weight = noise, lpips_weight, gan_weight
        self.register_buffer("mean", mean.clone(), persistent=False)
        self.register_buffer("std", std.clone(), persistent=False)

    def reconstruct(self, tokens: Tensor) -> Tensor:
        """Return pixels (B, 3, H, W), about [0, 1], not clamped, of raw tokens (B, C, h, w)."""
        return self.network(tokens).float() * self.std + self.mean

    def errors(self, pixels: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Return `l1`, `lpips` and their weighted sum `reconstruction`, scalars, of pixels and
        targets (B, 3, H, W) in [0, 1].
        """
        l1 = (pixels - targets).abs().mean()
        if self.lpips is None:
            return {"reconstruction": l1, "l1": l1}
        distance = self.lpips(2 * targets - 1, 2 * pixels - 1)
        return {"reconstruction": l1 + self.lpips_weight * distance, "l1": l1, "lpips": distance}

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor,
        noise: Tensor,
        noise_uniform: Tensor,
        discriminator: Discriminator | None = None,
        augment_uniform: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Return the losses of a batch: `loss`, the one to minimise, and its parts.

        tokens, noise: (B, C, h, w), of which the noise is standard normal; targets: (B, 3, H, W) in
        [0, 1]; noise_uniform: (B,) in [0, 1), each image's share of the largest deviation.
        discriminator: None without a GAN; otherwise one that only judges
        (`ddt.objective.discriminator.judging`), and augment_uniform is (5, B) in [0, 1).
        """
        deviation = (self.noise * noise_uniform)[:, None, None, None]
        pixels = self.reconstruct(tokens + deviation * noise)
        losses = self.errors(pixels, targets)
        loss = losses.pop("reconstruction")
        if discriminator is not None:
            assert augment_uniform is not None
            gan = generator_loss(discriminator(augment(2 * pixels - 1, augment_uniform)).float())
            weight = adaptive_weight(loss, gan, self.network.decoder_pred.weight)
            loss = loss + self.gan_weight * weight * gan
            losses |= {"gan": gan, "adaptive_weight": weight}
        return {"loss": loss, **{key: value.detach() for key, value in losses.items()}}

    @torch.no_grad()
    def fakes(self, tokens: Tensor) -> Tensor:
        """Return what a discriminator learns from: pixels in [−1, 1] as 8 bits hold them, of tokens
        without noise.
        """
        return quantised(2 * self.reconstruct(tokens) - 1)


class Discrimination(nn.Module):
    """A discriminator with its training loss, in one module, prepared for DDP as a whole."""

    def __init__(self, network: Discriminator) -> None:
        super().__init__()
        self.network = network

    def forward(self, fakes: Tensor, targets: Tensor, augment_uniform: Tensor) -> Tensor:
        """Return the hinge loss of fakes in [−1, 1] and targets in [0, 1], both (B, 3, H, W).

        augment_uniform: (5, 2·B) in [0, 1), of the fakes, then of the targets. One call for both,
        which moves the vectors of the spectral norms once.
        """
        fake, real = self.network(augment(torch.cat([fakes, 2 * targets - 1]), augment_uniform)).float().chunk(2)
        return hinge_loss(real, fake)
