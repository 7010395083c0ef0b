"""The decoder of a representation autoencoder: a plain vision transformer from tokens to pixels.

Its names are those of the published files. Shapes: B batch, C features of a token, N tokens of a
g×g grid, D width, F width of the MLP, p pixels per side of a token's patch.
Source: Zheng et al., arXiv 2510.11690, as its published decoders were trained.
"""

import math
import re

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddt.errors import require
from ddt.model.layers import sincos_table

EPS = 1e-12  # of all norms
POSITIONS, CLASS_TOKEN = "decoder_pos_embed", "trainable_cls_token"


def named(**modules: nn.Module) -> nn.ModuleDict:
    """Return modules by name, for the levels of the published names that compute nothing."""
    return nn.ModuleDict(modules)


class DecoderLayer(nn.Module):
    """A pre-norm layer: attention, then an MLP with exact GELU."""

    def __init__(self, width: int, mlp_width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.layernorm_before = nn.LayerNorm(width, eps=EPS)
        self.attention = named(
            attention=named(**{name: nn.Linear(width, width) for name in ("query", "key", "value")}),
            output=named(dense=nn.Linear(width, width)),
        )
        self.layernorm_after = nn.LayerNorm(width, eps=EPS)
        self.intermediate = named(dense=nn.Linear(width, mlp_width))
        self.output = named(dense=nn.Linear(mlp_width, width))

    def forward(self, x: Tensor) -> Tensor:
        """Return tokens (B, 1 + N, D) of tokens (B, 1 + N, D)."""
        normed = self.layernorm_before(x)
        q, k, v = (
            linear(normed).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, heads, 1 + N, D/heads)
            for linear in self.attention.get_submodule("attention").children()
        )
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)  # (B, 1 + N, D)
        x = x + self.attention.get_submodule("output.dense")(mixed)
        hidden = F.gelu(self.intermediate["dense"](self.layernorm_after(x)))  # (B, 1 + N, F)
        return x + self.output["dense"](hidden)


class ViTDecoder(nn.Module):
    """Pixels of token maps.

    Args:
        channels: C.
        width: D.
        depth: number of layers.
        mlp_width: F.
        num_heads: attention heads.
        grid: g, tokens per side that the table of positions is for.
        patch_size: p.

    Raises UserError where the heads do not divide the width.
    """

    def __init__(
        self, channels: int, width: int, depth: int, mlp_width: int, num_heads: int, grid: int, patch_size: int
    ) -> None:
        super().__init__()
        require(
            num_heads >= 1 and width % num_heads == 0,
            f"autoencoder.decoder_heads={num_heads}: does not divide the decoder's width {width}",
        )
        self.channels, self.num_heads, self.grid, self.patch_size = channels, num_heads, grid, patch_size
        self.decoder_embed = nn.Linear(channels, width)
        self.trainable_cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.register_buffer(POSITIONS, position_table(width, grid))
        self.decoder_layers = nn.ModuleList(DecoderLayer(width, mlp_width, num_heads) for _ in range(depth))
        self.decoder_norm = nn.LayerNorm(width, eps=EPS)
        self.decoder_pred = nn.Linear(width, 3 * patch_size**2)

    @property
    def image_size(self) -> int:
        """Pixels per side of the images."""
        return self.grid * self.patch_size

    def forward(self, tokens: Tensor) -> Tensor:
        """Return normalised pixels (B, 3, g·p, g·p) of tokens (B, C, h, w), not those of the
        network's latents but denormalised. Another grid than g×g is resized bilinearly.
        """
        x = self.decoder_embed(tokens.flatten(2).transpose(1, 2))  # (B, N, D)
        if tokens.shape[2:] != (self.grid, self.grid):
            maps = x.transpose(1, 2).unflatten(2, tokens.shape[2:])  # (B, D, h, w)
            maps = F.interpolate(maps, size=(self.grid, self.grid), mode="bilinear", align_corners=False)
            x = maps.flatten(2).transpose(1, 2)
        x = torch.cat([self.trainable_cls_token.expand(len(x), -1, -1), x], dim=1) + self.get_buffer(POSITIONS)
        for layer in self.decoder_layers:
            x = layer(x)
        x = self.decoder_pred(self.decoder_norm(x)[:, 1:])  # (B, N, p²·3)
        x = x.unflatten(2, (self.patch_size, self.patch_size, 3)).unflatten(1, (self.grid, self.grid))
        return x.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)  # (B, 3, g, p, g, p) → (B, 3, g·p, g·p)


def position_table(width: int, grid: int) -> Tensor:
    """Return the positions (1, 1 + N, D) of the class token, zero, and of the grid."""
    (table,) = sincos_table(width, grid, grid)
    return torch.cat([table.new_zeros(1, width), table])[None]


def bare_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a decoder's state dict without a prefix `decoder.` that all of its names have."""
    prefix = "decoder."
    common = all(name.startswith(prefix) for name in state)
    return {name.removeprefix(prefix): value for name, value in state.items()} if common else state


def decoder_sizes(state: dict[str, Tensor], grid: int | None) -> dict[str, int]:
    """Return the sizes of a published file's decoder, without the heads, from its shapes.

    grid: tokens per side where the file has no table of positions. Raises UserError for a file of
    another network.
    """
    needed = {"decoder_embed.weight": 2, "decoder_pred.weight": 2, "decoder_layers.0.intermediate.dense.weight": 2}
    for name, ndim in needed.items():
        require(name in state and state[name].ndim == ndim, f"is no decoder of RAE (has no {name})")
    width, channels = state["decoder_embed.weight"].shape
    patch_size = math.isqrt(state["decoder_pred.weight"].shape[0] // 3)
    if POSITIONS in state:
        grid = math.isqrt(max(state[POSITIONS].shape[-2] - 1, 0)) if state[POSITIONS].ndim == 3 else 0
    require(
        grid is not None,
        f"has no {POSITIONS}, so its grid is unknown; give autoencoder.statistics, whose shape says it",
    )
    assert grid is not None
    layers = {match[1] for name in state if (match := re.match(r"decoder_layers\.(\d+)\.", name))}
    return {
        "channels": channels,
        "width": width,
        "depth": len(layers),
        "mlp_width": state["decoder_layers.0.intermediate.dense.weight"].shape[0],
        "grid": grid,
        "patch_size": patch_size,
    }


def load_decoder(state: dict[str, Tensor], num_heads: int, grid: int | None = None) -> ViTDecoder:
    """Build the decoder of a state dict with published names, strictly, float32.

    A file may lack `trainable_cls_token`, which is then zero, and `decoder_pos_embed`; grid: see
    `decoder_sizes`. Raises UserError for other missing or unexpected names, shapes that do not fit,
    and a table of positions that is not the formula's.
    """
    state = {name: value.float() for name, value in bare_names(state).items()}
    sizes = decoder_sizes(state, grid)
    width, grid = sizes["width"], sizes["grid"]
    require(width % 4 == 0 and grid > 0, f"is no decoder of RAE (width {width}, {grid}×{grid} tokens)")
    table = position_table(width, grid)
    stored = state.setdefault(POSITIONS, table)
    fits = stored.shape == table.shape and torch.allclose(stored, table, rtol=0, atol=1e-5)
    require(fits, f"its {POSITIONS} is not the sine-cosine table of its grid; give the published file")
    state.setdefault(CLASS_TOKEN, torch.zeros(1, 1, width))
    with torch.device("meta"):
        decoder = ViTDecoder(**sizes, num_heads=num_heads)
    decoder.load_state_dict(state, assign=True)
    return decoder.eval().requires_grad_(False)
