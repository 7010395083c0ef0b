"""DiT^DH, the DDT of RAE latents: a wide, shallow decoder ("head") on a narrower encoder.

Shapes: B batch, C latent channels, H W latent size, p patch size, N = H·W/p² tokens, D width of the
encoder, D_d of the decoder, d width of a head. Source: arXiv 2510.11690; docs/rae.md.

Its authors write τ = 1 − t, 0 is data, and predict ε − x; here t and v = x − ε are this project's.
Weights keep their published values: the sign is turned behind the output layer.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddt.flow import Prediction
from ddt.model.ddt import Decoder, Decoupled, Encoder, Encoding
from ddt.model.layers import Checkpointing, OutputLayer, Positions, Style, integer_rope_table, sincos_table, tables

NUM_FREQUENCIES = 256  # of the time embedding


STYLE = Style(bias=True, qk_norm=False, rms_output=True, rotation=integer_rope_table)


class FourierEmbedder(nn.Module):
    """Embed times: random Fourier features, whose frequencies are frozen, Linear, SiLU, Linear."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        # a parameter, though it is never trained: checkpoints, EMA and sharding treat it as one
        self.W = nn.Parameter(torch.randn(NUM_FREQUENCIES), requires_grad=False)
        first, second = nn.Linear(2 * NUM_FREQUENCIES, hidden_size), nn.Linear(hidden_size, hidden_size)
        nn.init.normal_(first.weight, std=0.02)
        nn.init.normal_(second.weight, std=0.02)
        self.mlp = nn.Sequential(first, nn.SiLU(), second)

    def forward(self, tau: Tensor) -> Tensor:
        """Return (B, D) for τ (B,), 1 is noise; τ is not scaled."""
        angles = 2 * math.pi * tau.float()[:, None] * self.W.float()  # (B, 256)
        return self.mlp(torch.cat([angles.sin(), angles.cos()], dim=-1))


class DHEncoder(Encoder):
    """The condition encoder: noisy latent, time and class → self-condition z_t."""

    time_embedder = FourierEmbedder

    def grid_positions(self, height: int, width: int, device: torch.device) -> Positions:
        """Return the `Positions` of a token grid, with the table that is added to the tokens."""
        (table,) = tables(sincos_table, device, self.hidden_size, height, width)
        return super().grid_positions(height, width, device)._replace(table=table)

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor, depths: Sequence[int] = ()) -> Encoding:
        """Return z_t = SiLU(t_emb + s), (B, N, D), t_emb, and the tokens (B, N, D) after each
        number of blocks in depths, for x_t (B, C, H, W), t (B,), y (B,).
        """
        t_emb = self.t_embedder(1 - t.float())[:, None]  # (B, 1, D)
        c = F.silu(t_emb + self.y_embedder(y)[:, None])  # (B, 1, D)
        # every adaLN of this family has a SiLU of its own, the same for all: a second one here
        s, hidden = self.run(x_t, F.silu(c), self.positions(x_t), depths)  # (B, N, D)
        return Encoding(F.silu(t_emb + s), t_emb, hidden)


class DHDecoder(Decoder):
    """The velocity decoder, conditioned on SiLU(Linear(z_t)): z_t goes through a SiLU twice too."""

    def condition(self, z_t: Tensor) -> Tensor:
        """Return what the modulation layers read of z_t (B, N, D): (B, N, D_d)."""
        return F.silu(self.projector(z_t))

    def forward(self, x_t: Tensor, z_t: Tensor, modulations: Sequence[Tensor] = ()) -> Tensor:
        """Return the velocity x − ε, (B, C, H, W); the output layer predicts ε − x."""
        return -super().forward(x_t, z_t, modulations)


class DiTDH(Decoupled):
    """DiT^DH: `encoder_depth` blocks of width hidden_size, the others of width decoder_hidden_size.

    Args:
        in_channels: C. patch_size: p; 1 in all published models.
        hidden_size: D. num_heads: of the encoder, divides D into widths that are multiples of 4.
        depth: blocks in all. encoder_depth: of the encoder, 1..depth−1.
        num_classes: K; label K is the null label.
        decoder_hidden_size, decoder_num_heads: D_d and its heads; None: as in the encoder. A width
            of at least C is what the authors ask for.
        activation_checkpointing, prediction, base_depth, class_token: as of `DDT`.

    Raises UserError for impossible sizes. Source: arXiv 2510.11690, section 5.
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
        decoder_hidden_size: int | None = None,
        decoder_num_heads: int | None = None,
        activation_checkpointing: Checkpointing = False,
        prediction: Prediction = "v",
        base_depth: int | None = None,
        class_token: int = 0,
    ) -> None:
        super().__init__(
            in_channels, patch_size, hidden_size, num_heads, depth, encoder_depth, num_classes, decoder_hidden_size,
            decoder_num_heads, prediction, base_depth, class_token,
        )  # fmt: skip
        sizes = (in_channels, self.patch_size, hidden_size)
        self.encoder = DHEncoder(
            *sizes, num_heads, encoder_depth, num_classes, "zero", activation_checkpointing, STYLE, class_token
        )
        decoder_depth = depth - encoder_depth
        self.decoder = DHDecoder(
            *sizes,
            *self.decoder_sizes,
            decoder_depth,
            "attention",
            "zero",
            activation_checkpointing,
            STYLE,
            class_token,
        )
        self.add_base_head(base_depth)

    def base_velocity(self, head: OutputLayer, x_t: Tensor, z_b: Tensor) -> Tensor:
        """Return the base head's velocity (B, C, H, W), with the SiLU and sign of this family."""
        return -head(z_b, F.silu(z_b), self.encoder.positions(x_t))
