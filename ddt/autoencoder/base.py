"""The only border between pixels and latents: what an autoencoder is.

Pixels are uint8 (B, C, H, W) on the outside and [−1, 1] inside. Images are encoded into moments,
which are what a cache stores; latents, what the network sees, are drawn from them and normalised.
An autoencoder here has

    latent_shape(channels, image_size)   shape (C, H, W) of the latents of images of that size
    stochastic                           whether moments are (mean, logvar), or the mean alone
    encode(images)                       uint8 (B, C, H, W) → moments, float32 (B, 2C or C, H, W)
    sample(moments, posterior_noise)     moments → normalised latents, float32 (B, C, H, W)
    decode(latents)                      latents → uint8 (B, C, H, W)
    fingerprint                          SHA-256 of the weights; None where there are none
    to(device)                           moves it there and returns it
"""

import hashlib
from typing import Protocol

import torch
from torch import Tensor, nn


class Autoencoder(Protocol):
    """What the rest of the project asks of an autoencoder; see the head of this file."""

    stochastic: bool

    @property
    def fingerprint(self) -> str | None:
        """SHA-256 of the weights; None where there are none."""

    @property
    def latent_channels(self) -> int | None:
        """Channels of the latents; None where they are those of the images."""

    def latent_shape(self, channels: int, image_size: int) -> tuple[int, int, int]:
        """Return (C, H, W) of the latents of images with `channels` channels and `image_size`
        pixels a side.
        """

    def encode(self, images: Tensor) -> Tensor:
        """Return the moments of uint8 images (B, C, H, W)."""

    def sample(self, moments: Tensor, posterior_noise: Tensor | None = None) -> Tensor:
        """Return normalised latents (B, C, H, W) drawn from moments."""

    def decode(self, latents: Tensor) -> Tensor:
        """Return uint8 images (B, C, H, W) of latents."""

    def to(self, device: torch.device) -> "Autoencoder":
        """Move to a device and return itself."""


def from_uint8(images: Tensor) -> Tensor:
    """Map uint8 pixels to float32 in [−1, 1]; `to_uint8` gives them back exactly."""
    return images.float() / 127.5 - 1


def to_uint8(pixels: Tensor) -> Tensor:
    """Map pixels in [−1, 1] to uint8: floor(clip((x + 1)·127.5 + 0.5, 0, 255)). Source: method.md
    4.
    """
    return ((pixels.float() + 1) * 127.5 + 0.5).clamp(0, 255).to(torch.uint8)


def weights_hash(network: nn.Module, **others: Tensor) -> str:
    """Return the SHA-256 of a network's names, shapes and float32 values, wherever they came from,
    and of `others`.
    """
    digest = hashlib.sha256()
    for name, value in sorted({**network.state_dict(), **others}.items()):
        digest.update(f"{name} {tuple(value.shape)}".encode())
        digest.update(value.detach().float().cpu().contiguous().numpy().data)
    return digest.hexdigest()
