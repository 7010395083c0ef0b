"""Building blocks of the network. Source: method.md 2.

Shapes: B batch, C channels, H W latent size, p patch size, N = H·W/p² tokens, D width, d width of
a head.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from ddt.errors import MAX_CLASSES, UserError, require, require_count
from ddt.model.class_token import join_token, split_token, token_rows

MixerName = Literal["attention", "conv", "mlp"]
AdaLNInit = Literal["release", "zero"]
Checkpointing = bool | Literal["selective"]

MAX_SIZE = 65_536  # of channels and widths: a wrong digit, or the file of others, ends here
MAX_SIZES = {"patch_size": 1_024, "depth": 1_000, "num_classes": MAX_CLASSES}

USES_KERNELS = True  # of `ddt.model.kernels`; the code in a shared folder has none (`ddt.pipeline.one_file`)

aten = torch.ops.aten
PRODUCTS = {
    aten.mm.default,
    aten.addmm.default,
    aten.bmm.default,
    aten.convolution.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
}


# (width of a head, tokens down, tokens across) -> cosine and sine (N, d/2) of the rotation
Rotation = Callable[[int, int, int], tuple[Tensor, Tensor]]


class Positions(NamedTuple):
    """The token grid and its rotation tables, shared by all blocks of a forward pass."""

    cos: Tensor  # (N, d/2)
    sin: Tensor  # (N, d/2)
    height: int  # tokens down
    width: int  # tokens across
    table: Tensor | None = None  # (N, D), added to the image's tokens before the first block

    def after_token(self) -> "Positions":
        """Return the positions of N + 1 tokens: the first, a class token, does not turn."""
        cos, sin = (F.pad(each, (0, 0, 1, 0), value=value) for each, value in ((self.cos, 1.0), (self.sin, 0.0)))
        return self._replace(cos=cos, sin=sin)


def token_grid(patch_size: int, height: int, width: int) -> tuple[int, int]:
    """Return (H/p, W/p) of a latent; UserError where p does not divide its height and width."""
    if height < 1 or width < 1 or height % patch_size or width % patch_size:
        raise UserError(
            f"model.patch_size={patch_size} does not divide the latent size {height}×{width}: choose a divisor"
        )
    return height // patch_size, width // patch_size


def rope_table(head_dim: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Compute cosine and sine of the 2-D rotary angles of a token grid.

    Frequencies are 10000^(−4i/d), i = 0..d/4−1; positions run over `linspace(0, 16)` both ways, so
    that 512 px keeps the range of 256 px. Channel pair 2i turns by x, pair 2i+1 by y.
    Returns two float32 tensors (N, d/2), tokens row by row. Source: method.md 2, RoPE.
    """
    require(head_dim % 4 == 0, f"model.num_heads: head width {head_dim} is no multiple of 4, which 2-D RoPE needs")
    frequencies = 1.0 / (10000.0 ** (torch.arange(0, head_dim, 4, dtype=torch.float32) / head_dim))  # (d/4,)
    x = torch.linspace(0, 16, width).repeat(height)  # (N,)
    y = torch.linspace(0, 16, height).repeat_interleave(width)  # (N,)
    angles = torch.stack([torch.outer(x, frequencies), torch.outer(y, frequencies)], dim=-1)  # (N, d/4, 2)
    angles = angles.flatten(1)  # (N, d/2)
    return angles.cos(), angles.sin()


def integer_rope_table(head_dim: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Compute cosine and sine of the rotary angles of a token grid at whole positions.

    Frequencies are 10000^(−4i/d), i = 0..d/4−1. The first d/4 channel pairs turn by the row, the
    others by the column. Returns two float32 tensors (N, d/2), tokens row by row.
    """
    half = head_dim // 2
    frequencies = 1.0 / (10000.0 ** (torch.arange(0, half, 2, dtype=torch.float32) / half))  # (d/4,)
    rows = torch.outer(torch.arange(height, dtype=torch.float32), frequencies)  # (H/p, d/4)
    columns = torch.outer(torch.arange(width, dtype=torch.float32), frequencies)  # (W/p, d/4)
    angles = torch.cat([rows.repeat_interleave(width, 0), columns.repeat(height, 1)], dim=-1)  # (N, d/2)
    return angles.cos(), angles.sin()


def sincos_table(dim: int, height: int, width: int) -> tuple[Tensor]:
    """Compute the fixed embedding of a token grid's positions, float32 (N, dim), row by row.

    `[sin(q·ω), cos(q·ω), sin(r·ω), cos(r·ω)]` of row r and column q, ω_i = 10000^(−i/(dim/4)).
    """
    omega = 1.0 / 10000.0 ** (torch.arange(dim // 4, dtype=torch.float64) / (dim / 4))
    rows, columns = (torch.outer(torch.arange(n, dtype=torch.float64), omega) for n in (height, width))
    r, q = rows.repeat_interleave(width, 0), columns.repeat(height, 1)  # (N, dim/4)
    return (torch.cat([q.sin(), q.cos(), r.sin(), r.cos()], dim=-1).float(),)


@functools.lru_cache(maxsize=64)
def _cached(make: Callable[..., Any], device: torch.device, *sizes: int) -> tuple[Tensor, ...]:
    # On the CPU: every device turns by the same angles. Outside of inference mode: a table made
    # while sampling can be saved for a backward pass later.
    with torch.inference_mode(False), torch.no_grad(), torch.device("cpu"):
        made = make(*sizes)
    return tuple(table.to(device) for table in made)


def tables(make: Callable[..., Any], device: torch.device, *sizes: int) -> tuple[Tensor, ...]:
    """Return the tables `make(*sizes)` on a device. They are cached, except in a compiled graph,
    which may serve grids of any size.
    """
    if torch.compiler.is_compiling():
        return tuple(table.to(device) for table in make(*sizes))
    return _cached(make, device, *sizes)


def positions(
    head_dim: int, height: int, width: int, device: torch.device, rotation: Rotation = rope_table
) -> Positions:
    """Return the `Positions` of a token grid, without a table."""
    cos, sin = tables(rotation, device, head_dim, height, width)
    return Positions(cos, sin, height, width)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate channel pairs (2k, 2k+1) of x (..., N, d) by cos, sin (N, d/2), in float32."""
    pairs = x.float().unflatten(-1, (-1, 2))  # (..., N, d/2, 2)
    turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.complex(cos, sin))
    return turned.flatten(-2).type_as(x)  # (..., N, d)


def timestep_embedding(t: Tensor, dim: int = 256, max_period: float = 10.0) -> Tensor:
    """Embed times t (B,) in [0, 1] as `[cos(t·f), sin(t·f)]`, f_i = exp(−ln(max_period)·i/(dim/2)).

    Returns float32 (B, dim); t is not scaled. Source: method.md 2, t_emb.
    """
    half = dim // 2
    exponents = torch.arange(half, dtype=torch.float32, device=t.device) / half
    angles = t.float()[:, None] * torch.exp(-math.log(max_period) * exponents)  # (B, dim/2)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimestepEmbedder(nn.Module):
    """Embed times: sinusoid of width 256, Linear, SiLU, Linear (method.md 2)."""

    def __init__(self, hidden_size: int, frequency_dim: int = 256) -> None:
        super().__init__()
        self.frequency_dim = frequency_dim
        first, second = nn.Linear(frequency_dim, hidden_size), nn.Linear(hidden_size, hidden_size)
        nn.init.normal_(first.weight, std=0.02)
        nn.init.normal_(second.weight, std=0.02)
        self.mlp = nn.Sequential(first, nn.SiLU(), second)

    def forward(self, t: Tensor) -> Tensor:
        """Return (B, D) for t (B,)."""
        return self.mlp(timestep_embedding(t, self.frequency_dim))


class LabelEmbedder(nn.Module):
    """Embed classes; row num_classes is the null label. Label dropout is in the objective."""

    def __init__(self, num_classes: int, hidden_size: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, hidden_size)
        nn.init.normal_(self.embedding_table.weight, std=0.02)

    def forward(self, y: Tensor) -> Tensor:
        """Return (B, D) for y (B,) int64 in 0..num_classes."""
        return self.embedding_table(y)


class PatchProjection(nn.Module):
    """Project p×p patches of (B, C, H, W), flattened channel first, to (B, N, D)."""

    def __init__(self, in_channels: int, patch_size: int, hidden_size: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Linear(in_channels * patch_size**2, hidden_size)
        nn.init.xavier_uniform_(self.proj.weight)
        nn.init.zeros_(self.proj.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return tokens (B, N, D), row by row."""
        b, c, h, w = x.shape
        p = self.patch_size
        tokens = x.reshape(b, c, h // p, p, w // p, p).permute(0, 2, 4, 1, 3, 5)  # (B, H/p, W/p, C, p, p)
        return self.proj(tokens.reshape(b, (h // p) * (w // p), c * p * p))  # (B, N, D)


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis with a learned weight, computed in float32."""

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Return x (..., dim) normalised, in the dtype it came in."""
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).type_as(x)


class TokenInput(nn.Module):
    """Project a class token of F features to a token of width D, RMS-normalised."""

    def __init__(self, num_features: int, hidden_size: int) -> None:
        super().__init__()
        self.proj, self.norm = nn.Linear(num_features, hidden_size), RMSNorm(hidden_size)

    def forward(self, token: Tensor) -> Tensor:
        """Return (B, 1, D) for a token (B, F)."""
        return self.norm(self.proj(token))[:, None]


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Return `x·(1 + scale) + shift`; shift and scale are (B, 1, D) or, per token, (B, N, D)."""
    return torch.addcmul(shift, x, 1 + scale)


@dataclasses.dataclass(frozen=True)
class Style:
    """What the layers of the families do differently; by default as DDT's (method.md 2)."""

    bias: bool = False  # in q, k, v and the SwiGLU
    qk_norm: bool = True  # RMSNorm over each head of q and k
    rms_output: bool = False  # the output layer's norm: RMSNorm with weight, or LayerNorm without
    rotation: Rotation = rope_table


DDT_STYLE = Style()


def runs_kernels(x: Tensor) -> bool:
    """Whether a compiled block uses the kernels of `ddt.model.kernels` for tokens x."""
    return USES_KERNELS and x.is_cuda and torch.compiler.is_compiling()


def turn(x: Tensor, norm: nn.Module, at: Positions) -> Tensor:
    """Return `rotate(norm(x))` of queries or keys x (B, N, heads, d), in forms of which torch's
    compiler makes less traffic: qkv's layout, sums of whole rows, no pairs, no complex numbers.
    """
    y = x.float()
    if isinstance(norm, RMSNorm):
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + norm.eps) * norm.weight.float()
    cos = at.cos.repeat_interleave(2, -1)[:, None]  # (N, 1, d)
    sin = torch.stack([-at.sin, at.sin], dim=-1).flatten(-2)[:, None]
    swapped = y.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return (y * cos + swapped * sin).type_as(x)


class Attention(nn.Module):
    """Softmax attention with 2-D RoPE; style: bias in qkv, RMSNorm over each head of q and k."""

    def __init__(self, hidden_size: int, num_heads: int, style: Style = DDT_STYLE) -> None:
        super().__init__()
        self.num_heads = num_heads
        head_dim = hidden_size // num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size, bias=style.bias)
        self.q_norm = RMSNorm(head_dim) if style.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(head_dim) if style.qk_norm else nn.Identity()
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor, at: Positions) -> Tensor:
        """Return (B, N, D) for x (B, N, D)."""
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))  # (B, N, 3, heads, d)
        if runs_kernels(x) and isinstance(self.q_norm, RMSNorm):
            q, k, v = self.turned(qkv, at)
        elif torch.compiler.is_compiling():
            q, k, v = qkv.unbind(2)
            q, k, v = (each.transpose(1, 2) for each in (turn(q, self.q_norm, at), turn(k, self.k_norm, at), v))
        else:
            q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (B, heads, N, d) each
            q = rotate(self.q_norm(q), at.cos, at.sin)
            k = rotate(self.k_norm(k), at.cos, at.sin)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))  # (B, N, D)

    def turned(self, qkv: Tensor, at: Positions) -> tuple[Tensor, ...]:
        """Return `turn` of queries and keys, and values, (B, heads, N, d) each, by one kernel."""
        from ddt.model import kernels  # needs Triton

        weights, gradients = (self.q_norm.weight, self.k_norm.weight), torch.is_grad_enabled()
        q, k, v = kernels.turn(qkv, *weights, at.cos, at.sin, self.q_norm.eps, gradients)
        return tuple(each.transpose(1, 2) for each in (q, k, v if gradients else qkv[:, :, 2]))


class ConvMixer(nn.Module):
    """A 3×3 convolution over the token grid: the "conv" decoder block of the paper's ablation."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(hidden_size, hidden_size, kernel_size=3, padding=1)

    def forward(self, x: Tensor, at: Positions) -> Tensor:
        """Return (B, N, D) for x (B, N, D)."""
        grid = x.transpose(1, 2).unflatten(-1, (at.height, at.width))  # (B, D, H/p, W/p)
        return self.conv(grid).flatten(2).transpose(1, 2)  # (B, N, D)


def inner_size(hidden_size: int) -> int:
    """Return the hidden width of a SwiGLU, int(2·4D/3)."""
    return int(2 * 4 * hidden_size / 3)


def padding(x: Tensor, width: int) -> int:
    """Return by how many zeros a product's width is padded for tokens x: on a GPU to whole 16
    bytes of bf16, which its fast kernels need.
    """
    return -width % 8 if x.is_cuda else 0


def gated(ab: Tensor) -> Tensor:
    """Return `SiLU(a)·b`, (..., I), of (a, b), the halves of ab (..., 2I)."""
    if runs_kernels(ab) and torch.is_grad_enabled():
        from ddt.model import kernels  # needs Triton

        return kernels.swiglu(ab)
    a, b = ab.chunk(2, dim=-1)
    return F.silu(a) * b


class SwiGLU(nn.Module):
    """`w2(SiLU(w1 x)·w3 x)` without biases (method.md 2)."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        inner = inner_size(hidden_size)
        self.w1 = nn.Linear(hidden_size, inner, bias=False)
        self.w2 = nn.Linear(inner, hidden_size, bias=False)
        self.w3 = nn.Linear(hidden_size, inner, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return (..., D) for x (..., D)."""
        more = padding(x, self.w2.in_features)
        if more:
            a, b = (F.linear(x, F.pad(layer.weight, (0, 0, 0, more))) for layer in (self.w1, self.w3))
            return F.linear(F.silu(a) * b, F.pad(self.w2.weight, (0, more)))
        casts = x.dtype != self.w1.weight.dtype  # where weights are not, a copy of them would be kept for the gradients
        if casts and runs_kernels(x) and torch.is_grad_enabled():  # one product, and one each for its gradients
            return self.w2(gated(F.linear(x, torch.cat([self.w1.weight, self.w3.weight]))))
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class FusedSwiGLU(nn.Module):
    """`w3(SiLU(a)·b)`, (a, b) the halves of w12 x, with biases: DiT^DH's."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        inner = inner_size(hidden_size)
        self.w12 = nn.Linear(hidden_size, 2 * inner)
        self.w3 = nn.Linear(inner, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """Return (..., D) for x (..., D)."""
        more = padding(x, self.w3.in_features)
        if not more:
            return self.w3(gated(self.w12(x)))
        weight = F.pad(self.w12.weight.unflatten(0, (2, -1)), (0, 0, 0, more)).flatten(0, 1)
        bias = F.pad(self.w12.bias.unflatten(0, (2, -1)), (0, more)).flatten()
        return F.linear(gated(F.linear(x, weight, bias)), F.pad(self.w3.weight, (0, more)), self.w3.bias)


class MLPMixer(SwiGLU):
    """A SwiGLU in place of attention, no token sees another: the "mlp" block of the ablation."""

    def forward(self, x: Tensor, at: Positions) -> Tensor:  # type: ignore[override]
        """Return (B, N, D) for x (B, N, D); ignores positions."""
        return super().forward(x)


def make_mixer(name: MixerName, hidden_size: int, num_heads: int, style: Style) -> nn.Module:
    """Build a block's token mixer: attention, or one of the paper's decoder ablations."""
    if name == "attention":
        return Attention(hidden_size, num_heads, style)
    return ConvMixer(hidden_size) if name == "conv" else MLPMixer(hidden_size)


def keep_products(ctx: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Save results of products and attention for the backward pass; recompute elementwise work."""
    return CheckpointPolicy.MUST_SAVE if operator in PRODUCTS else CheckpointPolicy.PREFER_RECOMPUTE


class Block(nn.Module):
    """A transformer block: token mixer, then SwiGLU, each normalised, modulated and gated by adaLN.

    Conditioning c, its SiLU already applied: one vector per sample, (B, 1, D), in the encoder; per
    token, (B, N, D), in the decoder. adaln_init: "release" is torch's default, as the published
    weights were trained; "zero" is AdaLN-Zero, as the paper says. Source: method.md 2.

    activation_checkpointing: True saves only the block's inputs for the backward pass, "selective"
    products and attention too; same numbers. Inside the block, where a compiler sees it.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        mixer: MixerName = "attention",
        adaln_init: AdaLNInit = "release",
        activation_checkpointing: Checkpointing = False,
        style: Style = DDT_STYLE,
    ) -> None:
        super().__init__()
        self.activation_checkpointing = activation_checkpointing
        self.norm1 = RMSNorm(hidden_size)
        self.mixer = make_mixer(mixer, hidden_size, num_heads, style)
        self.norm2 = RMSNorm(hidden_size)
        self.mlp = FusedSwiGLU(hidden_size) if style.bias else SwiGLU(hidden_size)
        self.adaln = nn.Linear(hidden_size, 6 * hidden_size)
        if adaln_init == "zero":
            nn.init.zeros_(self.adaln.weight)
            nn.init.zeros_(self.adaln.bias)

    def forward(self, x: Tensor, c: Tensor, at: Positions, modulation: Tensor | None = None) -> Tensor:
        """Return (B, N, D) for tokens x (B, N, D) and c (B, 1 or N, D); modulation: `adaln(c)`,
        (B, 1 or N, 6D), where it was computed before.
        """
        if not self.activation_checkpointing or not torch.is_grad_enabled():
            return self.compute(x, c, at, modulation)
        options: dict[str, Any] = {"use_reentrant": False}
        if self.activation_checkpointing == "selective":
            options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, keep_products)
        return checkpoint(self.compute, x, c, at, modulation, **options)

    def compute(self, x: Tensor, c: Tensor, at: Positions, modulation: Tensor | None) -> Tensor:
        """The block itself; `forward` chooses what the backward pass recomputes."""
        modulation = self.adaln(c) if modulation is None else modulation
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, dim=-1)
        if runs_kernels(x):
            from ddt.model import kernels  # needs Triton

            h, stand_in = kernels.norm(x, self.norm1.weight, shift1, scale1, self.norm1.eps)
            branch, weight, eps = self.mixer(h, at), self.norm2.weight, self.norm2.eps
            x, h = kernels.add_norm(x, stand_in, branch, gate1, weight, shift2, scale2, eps)
            return x + gate2 * self.mlp(h)
        x = x + gate1 * self.mixer(modulate(self.norm1(x), shift1, scale1), at)
        return x + gate2 * self.mlp(modulate(self.norm2(x), shift2, scale2))


class OutputLayer(nn.Module):
    """Norm (of the style), shift and scale from c, Linear, patches folded back to (H, W).

    Both linears start at zero, so that a new network predicts zero velocity. Source: method.md 2.
    class_token: F, features of the class token before the image's tokens, which gets a Linear of
    its own; 0: there is none.
    """

    def __init__(
        self,
        hidden_size: int,
        patch_size: int,
        out_channels: int,
        style: Style = DDT_STYLE,
        class_token: int = 0,
    ) -> None:
        super().__init__()
        self.patch_size = patch_size
        layer_norm = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.norm = RMSNorm(hidden_size) if style.rms_output else layer_norm
        self.adaln = nn.Linear(hidden_size, 2 * hidden_size)
        self.linear = nn.Linear(hidden_size, out_channels * patch_size**2)
        self.token_linear = nn.Linear(hidden_size, class_token) if class_token else None
        for layer in filter(None, (self.adaln, self.linear, self.token_linear)):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, c: Tensor, at: Positions, modulation: Tensor | None = None) -> Tensor:
        """Return (B, C, H, W) for tokens x (B, N, D) and c (B, 1 or N, D); modulation: `adaln(c)`,
        (B, 1 or N, 2D), where it was computed before. With a class token N is one more, and r rows
        of the result hold its output (`class_token.join_token`).
        """
        modulation = self.adaln(c) if modulation is None else modulation
        shift, scale = modulation.chunk(2, dim=-1)
        x = modulate(self.norm(x), shift, scale)
        patches = self.linear(x if self.token_linear is None else x[:, 1:])  # (B, N, C·p²)
        p = self.patch_size
        grid = patches.reshape(x.shape[0], at.height, at.width, -1, p, p).permute(0, 3, 1, 4, 2, 5)
        image = grid.reshape(x.shape[0], -1, at.height * p, at.width * p)  # (B, C, H, W)
        return image if self.token_linear is None else join_token(image, self.token_linear(x[:, 0]))


class BlockStack(nn.Module):
    """Input projection and transformer blocks, common to encoder, decoder and baseline.

    class_token: F, features of the class token that x_t carries (`ddt.model.class_token`); it is
    the first of then N + 1 tokens. 0: x_t carries none.
    """

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
        style: Style = DDT_STYLE,
        class_token: int = 0,
    ) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.hidden_size = hidden_size
        self.head_dim = hidden_size // num_heads
        self.style = style
        self.class_token = class_token
        self.input = PatchProjection(in_channels, patch_size, hidden_size)
        self.token_input = TokenInput(class_token, hidden_size) if class_token else None
        sizes = (hidden_size, num_heads, mixer, adaln_init, activation_checkpointing, style)
        self.blocks: Sequence[Block] = nn.ModuleList(Block(*sizes) for _ in range(depth))  # type: ignore[assignment]

    def positions(self, x_t: Tensor) -> Positions:
        """Return the token grid of x_t (B, C, H, W); UserError where p does not divide H and W."""
        _, channels, height, width = x_t.shape
        height -= token_rows(self.class_token, channels, width)
        at = self.grid_positions(*token_grid(self.patch_size, height, width), x_t.device)
        return at.after_token() if self.class_token else at

    def grid_positions(self, height: int, width: int, device: torch.device) -> Positions:
        """Return the `Positions` of a token grid."""
        return positions(self.head_dim, height, width, device, self.style.rotation)

    def tokens(self, x_t: Tensor, at: Positions) -> Tensor:
        """Return the tokens (B, N, D) of x_t (B, C, H, W), a class token before the image's."""
        image, token = split_token(x_t, self.class_token) if self.class_token else (x_t, x_t)
        h = self.input(image)  # (B, N, D)
        if at.table is not None:
            h = h + at.table
        return h if self.token_input is None else torch.cat([self.token_input(token), h], dim=1)

    def run(
        self, x_t: Tensor, c: Tensor, at: Positions, depths: Sequence[int] = (), modulations: Sequence[Tensor] = ()
    ) -> tuple[Tensor, list[Tensor]]:
        """Return the tokens (B, N, D) after all blocks, and those after each number in depths of
        them.

        x_t: (B, C, H, W); c: (B, 1 or N, D); modulations: of the first blocks, computed before.
        """
        h = self.tokens(x_t, at)  # (B, N, D)
        hidden = {0: h}
        for number, block in enumerate(self.blocks, start=1):
            h = block(h, c, at, modulations[number - 1] if number <= len(modulations) else None)
            if number in depths:
                hidden[number] = h
        return h, [hidden[depth] for depth in depths]


def check_sizes(
    in_channels: int, patch_size: int, hidden_size: int, num_heads: int, depth: int, num_classes: int
) -> None:
    """Raise UserError for impossible sizes, naming the key and the fix."""
    sizes = dict(in_channels=in_channels, patch_size=patch_size, depth=depth, num_classes=num_classes)
    for key, value in sizes.items():
        require_count(f"model.{key}", value, 1, MAX_SIZES.get(key, MAX_SIZE))
    check_heads(hidden_size, num_heads)


def check_heads(hidden_size: int, num_heads: int, half: str = "") -> None:
    """Raise UserError for impossible heads; half: "decoder_" where it has a width of its own."""
    width, heads = f"model.{half}hidden_size", f"model.{half}num_heads"
    require_count(width, hidden_size, 1, MAX_SIZE)
    require_count(heads, num_heads, 1, MAX_SIZE)
    require(
        hidden_size % num_heads == 0, f"{heads}={num_heads} does not divide {width}={hidden_size}: choose a divisor"
    )
    require(
        (hidden_size // num_heads) % 4 == 0,
        f"{heads}={num_heads} gives heads of width {hidden_size // num_heads}: 2-D RoPE needs a multiple of 4",
    )


def check_halves(depth: int, encoder_depth: int) -> None:
    """Raise UserError where a number of encoder blocks leaves one half empty."""
    require(
        1 <= encoder_depth <= depth - 1,
        f"model.encoder_depth={encoder_depth} leaves no encoder or no decoder: "
        f"with model.depth={depth} choose 1..{depth - 1}",
    )


def check_base(base_depth: int, encoder_depth: int) -> None:
    """Raise UserError where a base head is after no block of the encoder."""
    require(
        1 <= base_depth <= encoder_depth,
        f"objective.base_depth={base_depth}: the encoder has {encoder_depth} blocks, choose 1..{encoder_depth}, or "
        "null for no base head",
    )


def check_class_token(class_token: int, patch_size: int, mixer: MixerName, base_depth: int | None) -> None:
    """Raise UserError for a class token in a network that cannot have one."""
    require_count("model.class_token", class_token, 0, MAX_SIZE)
    if class_token:
        require(patch_size == 1, f"model.patch_size={patch_size}: with a class token in the latents it must be 1")
        require(mixer != "conv", f"model.decoder_block={mixer}: a class token has no place on its grid; give attention")
        require(base_depth is None, f"objective.base_depth={base_depth}: a class token has no base head; give null")
