"""`DDTRAEDecoder`: the decoding half of a representation autoencoder as a diffusers model.

Shapes: B batch, C features, H W pixels, h w tokens of a g×g grid.
"""

from collections.abc import Callable
from typing import Any, ClassVar, get_args

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor

from ddt.autoencoder.token_decoder import TokenDecoder, decode_tokens
from ddt.autoencoder.vit_decoder import ViTDecoder
from ddt.errors import require, require_count
from ddt.precision import Dtype

MAX_SIZE = 65_536  # of any number in a config.json


class DDTRAEDecoder(ModelMixin, ConfigMixin):
    """The `vae` of a pipeline on RAE latents: decoder and statistics, without the encoder.

    Arguments are those of `ViTDecoder`, and of `TokenDecoder`. Weights are float32 whatever `dtype`
    the pipeline is loaded in: `decode_dtype` is the precision of decoding.
    """

    code: ClassVar[Callable[[], str]]  # returns the text of this class's file in a shared folder
    decoder: ViTDecoder
    latents_mean: Tensor
    latents_var: Tensor
    pixels_mean: Tensor
    pixels_std: Tensor

    @register_to_config
    def __init__(
        self,
        channels: int,
        width: int,
        depth: int,
        mlp_width: int,
        num_heads: int,
        grid: int,
        patch_size: int,
        class_token: int = 0,
        decode_dtype: Dtype = "fp32",
    ) -> None:
        super().__init__()
        sizes = dict(channels=channels, width=width, depth=depth, mlp_width=mlp_width, grid=grid, patch_size=patch_size)
        for name, size in sizes.items():
            require_count(name, size, most=MAX_SIZE)
        require_count("class_token", class_token, 0, MAX_SIZE)
        dtypes = get_args(Dtype)
        require(decode_dtype in dtypes, f"decode_dtype={decode_dtype}: choose from {', '.join(dtypes)}")
        self.decoder = ViTDecoder(num_heads=num_heads, **sizes)
        self.register_buffer("latents_mean", torch.zeros(channels, grid, grid))
        self.register_buffer("latents_var", torch.ones(channels, grid, grid))
        self.register_buffer("pixels_mean", torch.zeros(3, 1, 1))
        self.register_buffer("pixels_std", torch.ones(3, 1, 1))

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Load a folder or model of the hub; arguments of diffusers, of which no dtype counts."""
        return super().from_pretrained(
            *args, **{name: value for name, value in kwargs.items() if name not in ("torch_dtype", "dtype")}
        )

    @apply_forward_hook
    def decode(self, tokens: Tensor) -> Tensor:
        """Return pixels (B, 3, H, W), not clamped, of raw tokens (B, C, h, w)."""
        return decode_tokens(self.decoder, tokens, self.pixels_mean, self.pixels_std)

    def latent_decoder(self, chunk_size: int) -> TokenDecoder:
        """Return what decodes latents by this network, so many at once."""
        require(
            self.dtype == torch.float32,
            f"vae: is {self.dtype}; it decodes by float32 weights, so cast the transformer alone, or load the pipeline "
            "in that dtype",
        )
        config = self.config
        return TokenDecoder(
            self, self.latents_mean, self.latents_var, config.class_token, chunk_size, config.decode_dtype
        )
