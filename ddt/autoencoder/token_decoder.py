"""Latents of a representation autoencoder to images: its decoding half, which needs no encoder.

Shapes: B batch, C features, H W pixels, h w tokens. Source: Zheng et al., arXiv 2510.11690.
"""

from typing import Any, Self

import torch
from torch import Tensor

from ddt.autoencoder.vit_decoder import ViTDecoder
from ddt.errors import require
from ddt.model.class_token import split_token
from ddt.precision import Dtype, autocast, check_dtype

VARIANCE_EPS = 1e-5  # beside the variance


def truncate(pixels: Tensor) -> Tensor:
    """Map [0, 1] to uint8: clamped, times 255, truncated, not rounded. Source: RAE's samples."""
    return (pixels.float().clamp(0, 1) * 255).to(torch.uint8)


def decode_tokens(decoder: ViTDecoder, tokens: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Return pixels in [0, 1] (B, 3, H, W), not clamped, of raw tokens (B, C, h, w).

    mean, std: (3, 1, 1), by which the encoder normalises pixels.
    """
    return decoder(tokens) * std + mean


class TokenDecoder:
    """Decodes latents by a loaded network, which stays where it is.

    Args:
        network: has `decode`, from raw tokens to pixels in [0, 1], and `decoder`, a `ViTDecoder`.
        mean, var: of the tokens, (C, h, w) or (1, 1, 1).
        class_token: features of the class token that the latents carry; 0: none.
        chunk_size: latents decoded at once, which bounds the memory.
        decode_dtype: "fp32", or "bf16" or "fp16" autocast.
    """

    def __init__(
        self, network: Any, mean: Tensor, var: Tensor, class_token: int, chunk_size: int, decode_dtype: Dtype
    ) -> None:
        self.network, self.mean, self.var, self.class_token = network, mean, var, class_token
        self.chunk_size, self.decode_dtype = chunk_size, decode_dtype

    @property
    def latent_channels(self) -> int:
        return int(self.network.decoder.channels)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Return uint8 images (B, 3, H, W) of all but the class token, in `decode_dtype`, whatever
        the caller's autocast.

        Raises UserError for latents of another number of channels.
        """
        require(
            latents.shape[1] == self.latent_channels,
            f"autoencoder: has {self.latent_channels} latent channels, the model {latents.shape[1]}; choose the "
            "model's own",
        )
        with autocast(latents.device, self.decode_dtype):
            latents, _ = split_token(latents, self.class_token)
            chunks = (latents.float() * torch.sqrt(self.var + VARIANCE_EPS) + self.mean).split(self.chunk_size)
            return torch.cat([truncate(self.network.decode(chunk)) for chunk in chunks])

    def to(self, device: torch.device) -> Self:
        """Move to a device and return itself; raise UserError where it lacks `decode_dtype`."""
        check_dtype("autoencoder.decode_dtype", self.decode_dtype, device)
        self.network.to(device)
        self.mean, self.var = self.mean.to(device), self.var.to(device)
        return self
