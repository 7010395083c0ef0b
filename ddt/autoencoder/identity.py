"""Pixels as latents."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddt.autoencoder.base import from_uint8, to_uint8
from ddt.precision import Dtype


class Identity:
    """Pixels as latents, so that one path trains on either; see `Autoencoder`."""

    pixel_space = True
    stochastic = False
    encode_dtype = None
    network = None
    timeshift = 1.0
    class_token = 0
    sampling_dtype: Dtype | None = None
    fingerprint = None
    encoder_fingerprint = None
    latent_channels = None

    latents_by: tuple[str, ...] = ()
    parts: tuple[tuple[str, str], ...] = ()

    @classmethod
    def outline(cls, settings: dict[str, Any]) -> "Identity":
        return cls()

    @classmethod
    def on_hub(cls, settings: dict[str, Any]) -> bool:
        """Return True: there are no files."""
        return True

    @classmethod
    def moved(cls, settings: dict[str, Any], source: str) -> dict[str, Any]:
        """Return the settings; the source is unused."""
        return settings

    def save(self, folder: Path) -> None:
        """Write nothing."""

    def diffusers_network(self) -> None:
        """Return None: a pipeline of pixels has no autoencoder."""

    def latent_shape(self, channels: int, image_size: int) -> tuple[int, int, int]:
        return channels, image_size, image_size

    def image_size(self, latent_shape: tuple[int, int, int]) -> int:
        return latent_shape[-1]

    def encode(self, images: Tensor) -> Tensor:
        """Return float32 pixels in [−1, 1], (B, C, H, W), of uint8 images."""
        return from_uint8(images)

    def sample(self, moments: Tensor, posterior_noise: Tensor | None = None) -> Tensor:
        """Return the pixels unchanged; the noise is unused."""
        return moments.float()

    def decode(self, latents: Tensor) -> Tensor:
        """Return uint8 images (B, C, H, W)."""
        return to_uint8(latents)

    def to(self, device: torch.device) -> "Identity":
        return self
