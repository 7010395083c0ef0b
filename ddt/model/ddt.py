"""The Decoupled Diffusion Transformer: a condition encoder and a velocity decoder.

Shapes: B batch, C latent channels, H W latent size, p patch size, N = H·W/p² tokens, D width.
It knows no paths, guidance or losses, and computes the same in train and eval mode.
"""

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from ddt.errors import UserError, require
from ddt.model.base import Denoiser
from ddt.model.cost import NetworkMacs, modulation_macs, stack_macs, weight_macs
from ddt.model.layers import (
    AdaLNInit,
    BlockStack,
    Checkpointing,
    LabelEmbedder,
    MixerName,
    OutputLayer,
    TimestepEmbedder,
    check_sizes,
)
from ddt.model.published_names import ReleasedDDT


class Encoder(BlockStack):
    """The condition encoder: noisy latent, time and class → self-condition z_t (method.md 2)."""

    def __init__(
        self,
        in_channels: int,
        patch_size: int,
        hidden_size: int,
        num_heads: int,
        depth: int,
        num_classes: int,
        adaln_init: AdaLNInit = "release",
        activation_checkpointing: Checkpointing = False,
    ) -> None:
        sizes = (in_channels, patch_size, hidden_size, num_heads, depth)
        super().__init__(*sizes, "attention", adaln_init, activation_checkpointing)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size)

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor, hidden_depth: int = 0) -> tuple[Tensor, Tensor]:
        """Return z_t = SiLU(t_emb + s), (B, N, D), and the tokens (B, N, D) after hidden_depth
        blocks, for x_t (B, C, H, W), t (B,), y (B,).
        """
        t_emb = self.t_embedder(t)[:, None]  # (B, 1, D)
        c = nn.functional.silu(t_emb + self.y_embedder(y)[:, None])  # (B, 1, D)
        s, hidden = self.run(x_t, c, self.positions(x_t), hidden_depth)  # (B, N, D)
        return nn.functional.silu(t_emb + s), hidden


class Decoder(BlockStack):
    """The velocity decoder: noisy latent and z_t → velocity; no other time input (method.md 2)."""

    def __init__(
        self,
        in_channels: int,
        patch_size: int,
        hidden_size: int,
        num_heads: int,
        depth: int,
        mixer: MixerName = "attention",
        adaln_init: AdaLNInit = "release",
        activation_checkpointing: Checkpointing = False,
    ) -> None:
        sizes = (in_channels, patch_size, hidden_size, num_heads, depth)
        super().__init__(*sizes, mixer, adaln_init, activation_checkpointing)
        self.output = OutputLayer(hidden_size, patch_size, in_channels)

    @property
    def modulation_layers(self) -> list[nn.Linear]:
        """The linears z_t → modulation, of the blocks, then of the output layer."""
        return [*(block.adaln for block in self.blocks), self.output.adaln]

    def modulations(self, z_t: Tensor, max_bytes: float = math.inf) -> list[Tensor]:
        """Return the modulations by z_t (B, N, D): (B, N, 6D) of each block, then (B, N, 2D) of the
        output layer; the first of them that fit into max_bytes. Source: method.md 4.
        """
        modulations: list[Tensor] = []
        autocast = torch.is_autocast_enabled(z_t.device.type)
        dtype = torch.get_autocast_dtype(z_t.device.type) if autocast else self.output.adaln.weight.dtype
        for layer in self.modulation_layers:
            max_bytes -= z_t[..., 0].numel() * layer.out_features * dtype.itemsize
            if max_bytes < 0:
                break
            modulations.append(layer(z_t))
        return modulations

    def forward(self, x_t: Tensor, z_t: Tensor, modulations: Sequence[Tensor] = ()) -> Tensor:
        """Return the velocity (B, C, H, W) for x_t (B, C, H, W) and z_t (B, N, D).

        modulations: of `modulations(z_t)`; the layers that it leaves out compute theirs.
        """
        at = self.positions(x_t)
        h, _ = self.run(x_t, z_t, at, modulations=modulations)
        depth = len(self.blocks)
        return self.output(h, z_t, at, modulations[depth] if len(modulations) > depth else None)


class DDT(Denoiser):
    """Decoupled Diffusion Transformer: `encoder_depth` encoder blocks, the rest decoder blocks.

    Args:
        in_channels: C, channels of the latent (of the pixels, with the identity autoencoder).
        patch_size: p; H and W must be multiples of it.
        hidden_size: D. num_heads: divides D into widths that are multiples of 4.
        depth: blocks in all, constant over a sweep. encoder_depth: of the encoder, 1..depth−1.
        num_classes: K; label K is the null label.
        decoder_block: token mixer of the decoder: attention (published), conv or mlp (ablation).
        adaln_init: "release" (torch's default, as published) or "zero" (AdaLN-Zero).
        activation_checkpointing: True recomputes each block in the backward pass to save memory,
            "selective" its elementwise work; same numbers.

    Raises UserError for impossible sizes. Source: method.md 2; arXiv 2504.05741, section 3.
    """

    shares_encoder: ClassVar[bool] = True
    release = ReleasedDDT()
    label_table = "encoder.y_embedder.embedding_table.weight"

    def __init__(
        self,
        in_channels: int,
        patch_size: int | None,
        hidden_size: int,
        num_heads: int,
        depth: int,
        encoder_depth: int,
        num_classes: int,
        decoder_block: MixerName = "attention",
        adaln_init: AdaLNInit = "release",
        activation_checkpointing: Checkpointing = False,
    ) -> None:
        super().__init__()
        if patch_size is None:
            raise UserError("model.patch_size=null: is inferred from the images before; give a number")
        check_sizes(in_channels, patch_size, hidden_size, num_heads, depth, num_classes)
        require(
            1 <= encoder_depth <= depth - 1,
            f"model.encoder_depth={encoder_depth} leaves no encoder or no decoder: "
            f"with model.depth={depth} choose 1..{depth - 1}",
        )
        self.in_channels = in_channels
        self.patch_size = patch_size
        self.hidden_size = hidden_size
        self.num_classes = num_classes
        sizes = (in_channels, patch_size, hidden_size, num_heads)
        self.encoder = Encoder(*sizes, encoder_depth, num_classes, adaln_init, activation_checkpointing)
        self.decoder = Decoder(*sizes, depth - encoder_depth, decoder_block, adaln_init, activation_checkpointing)

    @property
    def stacks(self) -> list[BlockStack]:
        """The encoder, the decoder."""
        return [self.encoder, self.decoder]

    @property
    def num_alignable_blocks(self) -> int:
        """The encoder's blocks."""
        return len(self.encoder.blocks)

    @property
    def modulation_layers(self) -> list[nn.Module]:
        """Those of the decoder."""
        return [*self.decoder.modulation_layers]

    def encode(self, x_t: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Return the self-condition z_t (B, N, D).

        x_t: noisy latents (B, C, H, W); t: times (B,) in [0, 1], 0 is noise; y: classes (B,) int64,
        `num_classes` is the null label. Source: paper eq. 7; method.md 2.
        """
        return self.encoder(x_t, t, y)[0]

    def decode(self, x_t: Tensor, z_t: Tensor, modulations: Sequence[Tensor] = ()) -> Tensor:
        """Return the velocity (B, C, H, W) from x_t (B, C, H, W) and z_t (B, N, D), perhaps of an
        earlier step.

        modulations: of `modulations(z_t)`, for several decodings with one z_t; same result.
        Source: paper eq. 10; method.md 2 and 4.
        """
        return self.decoder(x_t, z_t, modulations)

    def modulations(self, z_t: Tensor, max_bytes: float = math.inf) -> list[Tensor]:
        """Return `Decoder.modulations` by z_t (B, N, D)."""
        return self.decoder.modulations(z_t, max_bytes)

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Return the velocity (B, C, H, W): `decode(x_t, encode(x_t, t, y))`."""
        return self.decode(x_t, self.encode(x_t, t, y))

    def forward_with_hidden(self, x_t: Tensor, t: Tensor, y: Tensor, hidden_depth: int) -> tuple[Tensor, Tensor]:
        """Return the velocity (B, C, H, W) and encoder block hidden_depth's output (B, N, D)."""
        z_t, hidden = self.encoder(x_t, t, y, hidden_depth)
        return self.decode(x_t, z_t), hidden

    def macs(self, num_tokens: int) -> NetworkMacs:
        """Count the MACs of one forward for one image of N = num_tokens."""
        encoder, decoder = self.encoder, self.decoder
        modulations = num_tokens * (modulation_macs(decoder) + weight_macs([decoder.output.adaln]))
        output = num_tokens * weight_macs([decoder.output.linear])
        return NetworkMacs(
            encoder=stack_macs(encoder, num_tokens) + modulation_macs(encoder) + weight_macs([encoder.t_embedder]),
            decoder=stack_macs(decoder, num_tokens) + output + modulations,
            modulations=modulations,
        )
