"""The only border between pixels and latents.

Pixels are uint8 (B, C, H, W) on the outside and [−1, 1] inside; latents are float32. An autoencoder here has

    latent_shape(channels, image_size)      shape (C, H, W) of the latents of images of that size
    encode(images, posterior_noise)         uint8 (B, C, H, W) → latents; the noise is used where there is a posterior
    decode(latents)                         latents → uint8 (B, C, H, W)
    stochastic                              whether encode needs posterior noise (of latent_shape)
    to(device)                              moves it there and returns it
"""

from typing import Any, Protocol

import torch
from torch import Tensor

from ddt.errors import UserError


class Autoencoder(Protocol):
    """What the rest of the project asks of an autoencoder; see the head of this file."""

    stochastic: bool

    def latent_shape(self, channels: int, image_size: int) -> tuple[int, int, int]:
        """Return (C, H, W) of the latents of images with `channels` channels and `image_size` pixels a side."""

    def encode(self, images: Tensor, posterior_noise: Tensor | None = None) -> Tensor:
        """Return latents of uint8 images (B, C, H, W)."""

    def decode(self, latents: Tensor) -> Tensor:
        """Return uint8 images (B, C, H, W) of latents."""

    def to(self, device: torch.device) -> "Autoencoder":
        """Move to a device and return itself."""


def from_uint8(images: Tensor) -> Tensor:
    """Map uint8 pixels to float32 in [−1, 1]; `to_uint8` gives them back exactly."""
    return images.float() / 127.5 - 1


def to_uint8(pixels: Tensor) -> Tensor:
    """Map pixels in [−1, 1] to uint8: floor(clip((x + 1)·127.5 + 0.5, 0, 255)). Source: method.md 4."""
    return ((pixels.float() + 1) * 127.5 + 0.5).clamp(0, 255).to(torch.uint8)


class Identity:
    """Pixels as latents, so that the same path trains on either."""

    stochastic = False

    def latent_shape(self, channels: int, image_size: int) -> tuple[int, int, int]:
        """Return (channels, image_size, image_size)."""
        return channels, image_size, image_size

    def encode(self, images: Tensor, posterior_noise: Tensor | None = None) -> Tensor:
        """Return float32 pixels in [−1, 1], (B, C, H, W), of uint8 images; there is no posterior to draw from."""
        return from_uint8(images)

    def decode(self, latents: Tensor) -> Tensor:
        """Return uint8 images (B, C, H, W)."""
        return to_uint8(latents)

    def to(self, device: torch.device) -> "Identity":
        """Return itself: there is nothing to move."""
        return self


class KLAutoencoder:
    """A diffusers `AutoencoderKL`, by hub name or local folder: SD-VAE and its relatives, frozen.

    Scale, shift, channels and downsampling are read from its config. Latents are `(sample − shift)·scale`, the
    sample drawn from the posterior with given noise, logvar clamped to [−30, 20]. Source: method.md 3.

    Raises UserError where the weights cannot be had.
    """

    stochastic = True

    def __init__(self, source: str, revision: str | None = None, decode_batch_size: int = 16) -> None:
        from diffusers import AutoencoderKL

        try:
            vae: Any = AutoencoderKL.from_pretrained(source, revision=revision, use_safetensors=True)
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(
                f"autoencoder.source={source}: cannot be loaded ({reason}); on a machine without a hub give a "
                f"local folder"
            ) from error
        self.vae = vae.eval().requires_grad_(False)
        self.scale = float(vae.config.scaling_factor)
        self.shift = float(getattr(vae.config, "shift_factor", None) or 0.0)
        self.decode_batch_size = decode_batch_size

    def latent_shape(self, channels: int, image_size: int) -> tuple[int, int, int]:
        """Return (C, H, W) of the latents; raise UserError where the image size is no multiple of the downsampling."""
        factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        if channels != self.vae.config.in_channels or image_size % factor:
            raise UserError(
                f"data: images of {channels} channels and {image_size} px do not fit this autoencoder, which takes "
                f"{self.vae.config.in_channels} channels and multiples of {factor} px"
            )
        return self.vae.config.latent_channels, image_size // factor, image_size // factor

    @torch.no_grad()
    def encode(self, images: Tensor, posterior_noise: Tensor | None = None) -> Tensor:
        """Return float32 latents (B, C, H/f, W/f) of uint8 images (B, 3, H, W), drawn with the given noise of that
        shape.
        """
        assert posterior_noise is not None, "the posterior needs noise"
        mean, logvar = self.vae.encode(from_uint8(images)).latent_dist.parameters.float().chunk(2, dim=1)
        sample = mean + torch.exp(0.5 * logvar.clamp(-30, 20)) * posterior_noise
        return (sample - self.shift) * self.scale

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Return uint8 images (B, 3, H, W), decoded `decode_batch_size` at a time under the caller's autocast."""
        chunks = (latents / self.scale + self.shift).split(self.decode_batch_size)
        return torch.cat([to_uint8(self.vae.decode(chunk).sample) for chunk in chunks])

    def to(self, device: torch.device) -> "KLAutoencoder":
        """Move the network to a device and return itself."""
        self.vae.to(device)
        return self


AUTOENCODERS = {"ddt.autoencoder.Identity": Identity, "ddt.autoencoder.KLAutoencoder": KLAutoencoder}


def build_autoencoder(settings: dict[str, Any]) -> Autoencoder:
    """Build the autoencoder that a checkpoint's settings describe: `_target_`, one of `AUTOENCODERS`, and its
    arguments.
    """
    arguments = dict(settings)
    target = arguments.pop("_target_", None)
    if target not in AUTOENCODERS:
        raise UserError(f"autoencoder._target_={target}: unknown, choose from {', '.join(AUTOENCODERS)}")
    return AUTOENCODERS[target](**arguments)
