"""The Decoupled Diffusion Transformer: a condition encoder and a velocity decoder.

Shapes: B batch, C latent channels, H W latent size, p patch size, N = H·W/p² tokens, D width of the
encoder, D_d of the decoder, which may be wider.
It knows no paths, guidance or losses, and computes the same in train and eval mode.
"""

import math
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ddt.errors import UserError
from ddt.flow import Prediction
from ddt.model.base import Denoiser
from ddt.model.cost import NetworkMacs, modulation_macs, stack_macs, weight_macs
from ddt.model.layers import (
    DDT_STYLE,
    AdaLNInit,
    BlockStack,
    Checkpointing,
    LabelEmbedder,
    MixerName,
    OutputLayer,
    Style,
    TimestepEmbedder,
    check_base,
    check_class_token,
    check_halves,
    check_heads,
    check_sizes,
)


class Encoding(NamedTuple):
    """What the encoder makes of x_t, t and y."""

    z_t: Tensor  # (B, N, D)
    t_emb: Tensor  # (B, 1, D)
    hidden: list[Tensor]  # (B, N, D) each, after the numbers of blocks that were asked for


class Encoder(BlockStack):
    """The condition encoder: noisy latent, time and class → self-condition z_t (method.md 2)."""

    time_embedder: ClassVar[type[nn.Module]] = TimestepEmbedder

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
        style: Style = DDT_STYLE,
        class_token: int = 0,
    ) -> None:
        sizes = (in_channels, patch_size, hidden_size, num_heads, depth)
        super().__init__(*sizes, "attention", adaln_init, activation_checkpointing, style, class_token)
        self.t_embedder = self.time_embedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size)

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor, depths: Sequence[int] = ()) -> Encoding:
        """Return z_t = SiLU(t_emb + s), (B, N, D), t_emb, and the tokens (B, N, D) after each
        number of blocks in depths, for x_t (B, C, H, W), t (B,), y (B,).
        """
        t_emb = self.t_embedder(t)[:, None]  # (B, 1, D)
        c = nn.functional.silu(t_emb + self.y_embedder(y)[:, None])  # (B, 1, D)
        s, hidden = self.run(x_t, c, self.positions(x_t), depths)  # (B, N, D)
        return Encoding(nn.functional.silu(t_emb + s), t_emb, hidden)


class Decoder(BlockStack):
    """The velocity decoder: noisy latent and z_t → velocity; no other time input (method.md 2).

    encoder_size: D of z_t; where the decoder's width is another, a Linear is between.
    """

    def __init__(
        self,
        in_channels: int,
        patch_size: int,
        encoder_size: int,
        hidden_size: int,
        num_heads: int,
        depth: int,
        mixer: MixerName = "attention",
        adaln_init: AdaLNInit = "release",
        activation_checkpointing: Checkpointing = False,
        style: Style = DDT_STYLE,
        class_token: int = 0,
    ) -> None:
        sizes = (in_channels, patch_size, hidden_size, num_heads, depth)
        super().__init__(*sizes, mixer, adaln_init, activation_checkpointing, style, class_token)
        wider = hidden_size != encoder_size
        self.projector: nn.Module = nn.Linear(encoder_size, hidden_size) if wider else nn.Identity()
        self.output = OutputLayer(hidden_size, patch_size, in_channels, style, class_token)

    @property
    def modulation_layers(self) -> list[nn.Linear]:
        """The linears condition → modulation, of the blocks, then of the output layer."""
        return [*(block.adaln for block in self.blocks), self.output.adaln]

    def condition(self, z_t: Tensor) -> Tensor:
        """Return what the modulation layers read of z_t (B, N, D): (B, N, D_d)."""
        return self.projector(z_t)

    def modulations(self, z_t: Tensor, max_bytes: float = math.inf) -> list[Tensor]:
        """Return the modulations by z_t (B, N, D): (B, N, 6D_d) of each block, then (B, N, 2D_d) of
        the output layer; the first of them that fit into max_bytes. Source: method.md 4.
        """
        modulations: list[Tensor] = []
        c: Tensor | None = None
        autocast = torch.is_autocast_enabled(z_t.device.type)
        dtype = torch.get_autocast_dtype(z_t.device.type) if autocast else self.output.adaln.weight.dtype
        for layer in self.modulation_layers:
            max_bytes -= z_t[..., 0].numel() * layer.out_features * dtype.itemsize
            if max_bytes < 0:
                break
            c = self.condition(z_t) if c is None else c
            modulations.append(layer(c))
        return modulations

    def forward(self, x_t: Tensor, z_t: Tensor, modulations: Sequence[Tensor] = ()) -> Tensor:
        """Return the velocity (B, C, H, W) for x_t (B, C, H, W) and z_t (B, N, D).

        modulations: of `modulations(z_t)`; the layers that it leaves out compute theirs.
        """
        at, depth = self.positions(x_t), len(self.blocks)
        complete = len(modulations) > depth
        c = z_t if complete else self.condition(z_t)  # nothing reads it beside all modulations
        h, _ = self.run(x_t, c, at, modulations=modulations)
        return self.output(h, c, at, modulations[depth] if complete else None)


class Decoupled(Denoiser):
    """A network of two halves, `encoder` and `decoder`, that steps can share z_t of."""

    shares_encoder: ClassVar[bool] = True
    label_table = "encoder.y_embedder.embedding_table.weight"
    encoder: Encoder
    decoder: Decoder

    def __init__(
        self,
        in_channels: int,
        patch_size: int | None,
        hidden_size: int,
        num_heads: int,
        depth: int,
        encoder_depth: int,
        num_classes: int,
        decoder_hidden_size: int | None,
        decoder_num_heads: int | None,
        prediction: Prediction,
        base_depth: int | None,
        class_token: int,
        mixer: MixerName = "attention",
    ) -> None:
        super().__init__()
        if patch_size is None:
            raise UserError("model.patch_size=null: is inferred from the images before; give a number")
        check_sizes(in_channels, patch_size, hidden_size, num_heads, depth, num_classes)
        check_halves(depth, encoder_depth)
        width = hidden_size if decoder_hidden_size is None else decoder_hidden_size
        self.decoder_sizes = (width, num_heads if decoder_num_heads is None else decoder_num_heads)
        check_heads(*self.decoder_sizes, "decoder_")
        check_class_token(class_token, patch_size, mixer, base_depth)
        self.in_channels = in_channels
        self.patch_size = patch_size
        self.hidden_size = hidden_size
        self.num_classes = num_classes
        self.prediction = prediction
        self.class_token = class_token
        self.base_head: OutputLayer | None = None

    def add_base_head(self, base_depth: int | None) -> None:
        """Give the network its base head, after block base_depth of the encoder, unless None;
        called last, so that the other weights start as without it.
        """
        if base_depth is not None:
            check_base(base_depth, len(self.encoder.blocks))
            sizes = (self.hidden_size, self.patch_size, self.in_channels)
            self.base_depth, self.base_head = base_depth, OutputLayer(*sizes, self.encoder.style)

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

    def condition(self, z_t: Tensor) -> Tensor:
        """Return `Decoder.condition` of z_t (B, N, D)."""
        return self.decoder.condition(z_t)

    def encode(self, x_t: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Return the self-condition z_t (B, N, D).

        x_t: noisy latents (B, C, H, W); t: times (B,) in [0, 1], 0 is noise; y: classes (B,) int64,
        `num_classes` is the null label. Source: paper eq. 7; method.md 2.
        """
        return self.encoder(x_t, t, y).z_t

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
        # the halves themselves here and below: behind a method of its own FSDP2 would shard again
        # what is in no block
        return self.decoder(x_t, self.encoder(x_t, t, y).z_t)

    def forward_with_hidden(self, x_t: Tensor, t: Tensor, y: Tensor, hidden_depth: int) -> tuple[Tensor, Tensor]:
        """Return the velocity (B, C, H, W) and encoder block hidden_depth's output (B, N, D)."""
        z_t, _, (hidden,) = self.encoder(x_t, t, y, [hidden_depth])
        return self.decoder(x_t, z_t), hidden

    def forward_with_base(
        self, x_t: Tensor, t: Tensor, y: Tensor, hidden_depth: int = 0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the velocity, that of the base head, both (B, C, H, W), and encoder block
        hidden_depth's output (B, N, D); UserError where there is no base head.
        """
        if self.base_head is None or self.base_depth is None:
            return super().forward_with_base(x_t, t, y, hidden_depth)
        z_t, t_emb, (base, hidden) = self.encoder(x_t, t, y, [self.base_depth, hidden_depth])
        z_b = nn.functional.silu(t_emb + base)  # (B, N, D)
        return self.decoder(x_t, z_t), self.base_velocity(self.base_head, x_t, z_b), hidden

    def encode_with_base(self, x_t: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return z_t (B, N, D) and the base head's velocity (B, C, H, W); UserError where there
        is none.
        """
        if self.base_head is None or self.base_depth is None:
            return super().encode_with_base(x_t, t, y)
        z_t, t_emb, (base,) = self.encoder(x_t, t, y, [self.base_depth])
        return z_t, self.base_velocity(self.base_head, x_t, nn.functional.silu(t_emb + base))

    def base_velocity(self, head: OutputLayer, x_t: Tensor, z_b: Tensor) -> Tensor:
        """Return the base head's velocity (B, C, H, W) by z_b (B, N, D), which modulates itself."""
        return head(z_b, z_b, self.encoder.positions(x_t))

    def macs(self, num_tokens: int) -> NetworkMacs:
        """Count the MACs of one forward for one image of N = num_tokens."""
        encoder, decoder = self.encoder, self.decoder
        modulations = num_tokens * (modulation_macs(decoder) + weight_macs([decoder.projector, decoder.output.adaln]))
        images = num_tokens - 1 if self.class_token else num_tokens  # tokens of the image
        output = images * weight_macs([decoder.output.linear]) + weight_macs(
            filter(None, [decoder.output.token_linear])
        )
        return NetworkMacs(
            encoder=stack_macs(encoder, num_tokens) + modulation_macs(encoder) + weight_macs([encoder.t_embedder]),
            decoder=stack_macs(decoder, num_tokens) + output + modulations,
            modulations=modulations,
            base=0 if self.base_head is None else num_tokens * weight_macs([self.base_head]),
        )


class DDT(Decoupled):
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
        decoder_hidden_size, decoder_num_heads: of the decoder, where they are others; a Linear
            D → D_d is between, whose output the decoder's blocks read as z_t.
        prediction: what the output is, see `Denoiser`.
        base_depth: encoder block, 1..encoder_depth, after which the base head is, a second output
            layer for internal guidance; None: no such head.
        class_token: F, features of the class token that the latents carry
            (`ddt.model.class_token`), so that the tokens, and z_t, are one more; 0: none.

    Raises UserError for impossible sizes. Source: method.md 2; arXiv 2504.05741, section 3.
    """

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
        decoder_hidden_size: int | None = None,
        decoder_num_heads: int | None = None,
        prediction: Prediction = "v",
        base_depth: int | None = None,
        class_token: int = 0,
    ) -> None:
        super().__init__(
            in_channels, patch_size, hidden_size, num_heads, depth, encoder_depth, num_classes, decoder_hidden_size,
            decoder_num_heads, prediction, base_depth, class_token, decoder_block,
        )  # fmt: skip
        sizes = (in_channels, self.patch_size, hidden_size)
        others: Any = {"adaln_init": adaln_init, "activation_checkpointing": activation_checkpointing}
        others["class_token"] = class_token
        self.encoder = Encoder(*sizes, num_heads, encoder_depth, num_classes, **others)
        self.decoder = Decoder(*sizes, *self.decoder_sizes, depth - encoder_depth, decoder_block, **others)
        self.add_base_head(base_depth)
