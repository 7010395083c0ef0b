"""The only border between pixels and latents: what an autoencoder is.

Pixels are uint8 (B, C, H, W) outside and [−1, 1] inside. Images are encoded into moments, which a
latent cache stores; latents, which the network sees, are sampled from them and normalised.

To add a latent space: a file here with a class that has the members of `Autoencoder`, its name in
`AUTOENCODERS` (__init__.py), and a file in conf/autoencoder whose `_target_` is that name and whose
other keys are the constructor's arguments.
"""

import hashlib
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ddt.errors import UserError
from ddt.precision import Dtype


class UnknownShape(UserError):
    """Only the hub knows the shapes of an autoencoder."""


class Autoencoder(Protocol):
    """The interface of an autoencoder. Latents have about mean 0 and variance 1."""

    pixel_space: bool  # a class attribute: whether latents are the pixels themselves
    stochastic: bool  # moments are (mean, logvar), 2C channels, and latents need noise; else the mean alone
    network: Any  # the frozen network, with `encode` and `decode` of tensors; None for pixels
    sampling_dtype: Dtype | None  # a class attribute: of the denoiser where none is chosen; None: any

    timeshift: float  # of training times and grids, that suits the latents; 1: none
    class_token: int  # features of the class token that the latents carry (`ddt.model.class_token`); 0: none

    @property
    def encode_dtype(self) -> str | None:
        """fp32, bf16 or fp16, which a latent cache must share; None for pixels."""

    @property
    def fingerprint(self) -> str | None:
        """SHA-256 of weights and normalisation; None without weights."""

    @property
    def encoder_fingerprint(self) -> str | None:
        """SHA-256 of what moments depend on, whatever normalises them; None without weights."""

    @property
    def latent_channels(self) -> int | None:
        """Channels of the latents; None: those of the images."""

    parts: tuple[tuple[str, str], ...]  # a class attribute: a name of weights, what a file with it is
    latents_by: tuple[str, ...]  # a class attribute: the settings that its latents depend on

    @classmethod
    def outline(cls, settings: dict[str, Any]) -> "Autoencoder":
        """Build one of the constructor's arguments on the meta device, without a hub, to count its
        cost and to learn its shapes. Local files are checked as the constructor does.

        Raises UnknownShape where only the hub could say the shapes, UserError as the constructor.
        """

    @classmethod
    def on_hub(cls, settings: dict[str, Any]) -> bool:
        """Return whether a name is enough to find every file of settings."""

    @classmethod
    def moved(cls, settings: dict[str, Any], source: str) -> dict[str, Any]:
        """Return settings with the files of `source`: a hub name, or a folder as `save` writes."""

    def save(self, folder: Path) -> None:
        """Write the weights into a folder; without weights nothing."""

    def diffusers_network(self) -> Any:
        """Return the component of a diffusers pipeline that decodes; None for pixels.

        One of another class than diffusers' own is in `ddt.pipeline.COMPONENTS`, and has a method
        `latent_decoder`, which returns what has the `decode` of this class.
        """

    def latent_shape(self, channels: int, image_size: int) -> tuple[int, int, int]:
        """Return (C, H, W) of latents of images of `image_size` px; UserError where they misfit."""

    def image_size(self, latent_shape: tuple[int, int, int]) -> int:
        """Return the pixels per side of the images of latents (C, H, W): `latent_shape` of them is
        this. Raises UserError, a sentence without advice, where it has other latents.
        """

    def encode(self, images: Tensor) -> Tensor:
        """Return the moments, float32 (B, 2C or C, H, W), of uint8 images."""

    def sample(self, moments: Tensor, posterior_noise: Tensor | None = None) -> Tensor:
        """Return normalised latents, float32 (B, C, H, W), sampled from moments.

        posterior_noise: (B, C, H, W), standard normal, needed where the autoencoder is stochastic.
        """

    def decode(self, latents: Tensor) -> Tensor:
        """Return uint8 images of latents (B, C, H, W), under the caller's autocast or its own."""

    def to(self, device: torch.device) -> "Autoencoder":
        """Move to a device and return itself."""


def from_uint8(images: Tensor) -> Tensor:
    """Map uint8 pixels to float32 in [−1, 1]; `to_uint8` is the exact inverse."""
    return images.float() / 127.5 - 1


def to_uint8(pixels: Tensor) -> Tensor:
    """Map [−1, 1] to uint8: floor(clip((x + 1)·127.5 + 0.5, 0, 255)). Source: method.md 4."""
    return ((pixels.float() + 1) * 127.5 + 0.5).clamp(0, 255).to(torch.uint8)


def weights_hash(network: nn.Module, **others: Tensor) -> str:
    """Return the SHA-256 of names, shapes and float32 values of weights and `others`."""
    digest = hashlib.sha256()
    for name, value in sorted({**network.state_dict(), **others}.items()):
        digest.update(f"{name} {tuple(value.shape)}".encode())
        digest.update(value.detach().float().cpu().contiguous().numpy().data)
    return digest.hexdigest()
