"""The method in plain eager PyTorch, which the project is timed against and checked by.

Nothing is cached between calls, fused or left out; it loads the state dict of a `ddt.DDT`. Shapes:
B batch, C H W latent, p patch size, N tokens, D width, d width of a head. Source: method.md 1 to 4.
"""

import copy
import itertools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddt.errors import require
from ddt.model import DDT
from ddt.sampling.settings import SamplerSettings


class PlainNorm(nn.Module):
    """RMSNorm with weight, in float32."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        h = x.float()
        h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-6)
        return (h * self.weight).to(x.dtype)


def rotations(head_dim: int, height: int, width: int, device: torch.device) -> Tensor:
    """Return the 2-D RoPE rotations of a token grid as complex numbers (N, d/2)."""
    frequencies = 10000.0 ** (-4 * torch.arange(head_dim // 4, device=device) / head_dim)
    x = torch.linspace(0, 16, width, device=device).repeat(height)
    y = torch.linspace(0, 16, height, device=device).repeat_interleave(width)
    angles = torch.stack([x[:, None] * frequencies, y[:, None] * frequencies], dim=-1).flatten(1)
    return torch.polar(torch.ones_like(angles), angles)


def rotate(x: Tensor, turns: Tensor) -> Tensor:
    """Rotate the channel pairs of x (B, heads, N, d)."""
    pairs = x.float().unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():  # the compiler generates no code for complex numbers
        a, b = pairs.unbind(-1)
        turned = torch.stack([a * turns.real - b * turns.imag, a * turns.imag + b * turns.real], dim=-1)
    else:
        turned = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * turns)
    return turned.flatten(-2).to(x.dtype)


class PlainAttention(nn.Module):
    """Attention with normalised, rotated queries and keys."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.q_norm, self.k_norm = PlainNorm(dim // num_heads), PlainNorm(dim // num_heads)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, turns: Tensor) -> Tensor:
        b, n, dim = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        q, k = rotate(self.q_norm(q), turns), rotate(self.k_norm(k), turns)
        h = F.scaled_dot_product_attention(q, k, v)
        return self.proj(h.transpose(1, 2).reshape(b, n, dim))


class PlainSwiGLU(nn.Module):
    """w2(SiLU(w1 x)·w3 x)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        inner = int(2 * 4 * dim / 3)
        self.w1 = nn.Linear(dim, inner, bias=False)
        self.w2 = nn.Linear(inner, dim, bias=False)
        self.w3 = nn.Linear(dim, inner, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class PlainBlock(nn.Module):
    """Attention and SwiGLU, each shifted, scaled and gated by a linear of the conditioning."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.norm1, self.mixer = PlainNorm(dim), PlainAttention(dim, num_heads)
        self.norm2, self.mlp = PlainNorm(dim), PlainSwiGLU(dim)
        self.adaln = nn.Linear(dim, 6 * dim)

    def forward(self, x: Tensor, c: Tensor, turns: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaln(c).chunk(6, dim=-1)
        x = x + gate1 * self.mixer(self.norm1(x) * (1 + scale1) + shift1, turns)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class PlainInput(nn.Module):
    """Patches, channel first, through a linear."""

    def __init__(self, in_channels: int, patch_size: int, dim: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Linear(in_channels * patch_size**2, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(F.unfold(x, self.patch_size, stride=self.patch_size).transpose(1, 2))


class PlainTime(nn.Module):
    """Sinusoidal time embedding, of maximal period 10, through two linears."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t: Tensor) -> Tensor:
        angles = t[:, None] * torch.exp(-math.log(10) * torch.arange(128, device=t.device) / 128)
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1))


class PlainLabel(nn.Module):
    """The embedding of a label; the last row is the null label's."""

    def __init__(self, num_classes: int, dim: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, dim)

    def forward(self, y: Tensor) -> Tensor:
        return self.embedding_table(y)


class PlainOutput(nn.Module):
    """LayerNorm, shift and scale, a linear, and patches folded to (B, C, H, W)."""

    def __init__(self, dim: int, patch_size: int, channels: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.adaln, self.linear = nn.Linear(dim, 2 * dim), nn.Linear(dim, channels * patch_size**2)

    def forward(self, x: Tensor, z: Tensor, height: int, width: int) -> Tensor:
        shift, scale = self.adaln(z).chunk(2, dim=-1)
        patches = self.linear(F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift)
        return F.fold(patches.transpose(1, 2).float(), (height, width), self.patch_size, stride=self.patch_size)


class PlainStack(nn.Module):
    """Input and blocks."""

    def __init__(self, in_channels: int, patch_size: int, dim: int, num_heads: int, depth: int) -> None:
        super().__init__()
        self.patch_size, self.head_dim = patch_size, dim // num_heads
        self.input = PlainInput(in_channels, patch_size, dim)
        self.blocks = nn.ModuleList(PlainBlock(dim, num_heads) for _ in range(depth))

    def run(self, x: Tensor, c: Tensor) -> list[Tensor]:
        """Return the tokens after each block."""
        turns = rotations(self.head_dim, x.shape[2] // self.patch_size, x.shape[3] // self.patch_size, x.device)
        hidden = [self.input(x)]
        for block in self.blocks:
            hidden.append(block(hidden[-1], c, turns))
        return hidden


class PlainDDT(nn.Module):
    """The DDT of method.md 2, with the weights of a `ddt.DDT` whose decoder has attention."""

    def __init__(self, model: DDT) -> None:
        super().__init__()
        encoder, decoder = model.encoder, model.decoder
        dim, channels, p = model.hidden_size, model.in_channels, encoder.patch_size
        num_heads = dim // encoder.head_dim
        self.num_classes = model.num_classes
        self.encoder = PlainStack(channels, p, dim, num_heads, len(encoder.blocks))
        self.encoder.t_embedder, self.encoder.y_embedder = PlainTime(dim), PlainLabel(model.num_classes, dim)
        self.decoder = PlainStack(channels, p, dim, num_heads, len(decoder.blocks))
        self.decoder.output = PlainOutput(dim, p, channels)
        self.load_state_dict(model.state_dict(), strict=True)

    def encode(self, x_t: Tensor, t: Tensor, y: Tensor, align_depth: int = 0) -> tuple[Tensor, Tensor]:
        """Return z (B, N, D), and the tokens after `align_depth` blocks."""
        t_emb = self.encoder.t_embedder(t)[:, None]
        hidden = self.encoder.run(x_t, F.silu(t_emb + self.encoder.y_embedder(y)[:, None]))
        return F.silu(t_emb + hidden[-1]), hidden[align_depth]

    def decode(self, x_t: Tensor, z: Tensor) -> Tensor:
        """Return the velocity (B, C, H, W)."""
        return self.decoder.output(self.decoder.run(x_t, z)[-1], z, *x_t.shape[2:])

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor, align_depth: int = 0) -> tuple[Tensor, Tensor]:
        """Return the velocity (B, C, H, W), and the tokens after `align_depth` blocks."""
        z, hidden = self.encode(x_t, t, y, align_depth)
        return self.decode(x_t, z), hidden

    def compile_blocks(self) -> None:
        """Compile each block for batches of one size: as one graph XL takes minutes to compile."""
        for block in (*self.encoder.blocks, *self.decoder.blocks):
            block.compile(fullgraph=True, dynamic=False)


@torch.no_grad()
def plain_sample(model: PlainDDT, noise: Tensor, y: Tensor, settings: SamplerSettings) -> Tensor:
    """Sample latents (B, C, H, W) from noise (B, C, H, W) and classes y (B,) by Euler's method.

    As in the release, both halves run as one batch of 2B at every step, guided or not; the encoder
    runs on the settings' schedule. Raises UserError for another solver. Source: method.md 4.
    """
    require(settings.solver == "euler", f"sampler={settings.solver}: plain sampling knows euler only")
    schedule = settings.schedule()
    recompute = range(settings.num_steps) if schedule is None else schedule
    guidance = settings.guidance()
    labels = torch.cat([y, torch.full_like(y, model.num_classes)])  # (2B,)
    x = noise.float()
    z = torch.empty(0)
    for step, (t, t_next) in enumerate(itertools.pairwise(settings.grid())):
        both = torch.cat([x, x])  # (2B, C, H, W)
        if step in recompute:
            z, _ = model.encode(both, torch.full((len(both),), t, device=x.device), labels)  # (2B, N, D)
        v, v_uncond = model.decode(both, z).float().chunk(2)
        if guidance.active(t, step):
            v = v_uncond + guidance.scale * (v - v_uncond)
        x = x + v * (t_next - t)
    return x


def plain_features(network: Any, images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Return a vision transformer's patch tokens (B, N, F) of uint8 images (B, 3, H, W)."""
    pixels = (images.float() / 255 - mean) / std
    pixels = F.interpolate(pixels, scale_factor=network.patch_embed.patch_size[0] / 16, mode="bicubic")
    return network.forward_features(pixels)[:, network.num_prefix_tokens :]


class PlainTraining:
    """The training steps of method.md 1 and 3: losses, AdamW, EMA.

    dtype: "bf16" runs the networks under autocast. alignment: REPA's loss, whose projector is
    copied. target: its network. align_depth: the encoder block that it reads.
    """

    def __init__(
        self, model: PlainDDT, dtype: str, alignment: Any = None, target: Any = None, align_depth: int = 0
    ) -> None:
        self.model, self.dtype, self.target, self.align_depth = model, dtype, target, align_depth
        self.projector: nn.Module | None = None if alignment is None else copy.deepcopy(alignment.projector)
        self.weight = 0.0 if alignment is None else alignment.weight
        self.ema = copy.deepcopy(model)
        parameters = [*model.parameters(), *(() if self.projector is None else self.projector.parameters())]
        self.optimizer = torch.optim.AdamW(parameters, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.0)

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        """Return the loss of the arguments of `FlowMatching.forward` and `images` (B, 3, S, S)."""
        latents, noise = batch["latents"], batch["noise"]
        t = torch.sigmoid(batch["time_normal"])
        y = torch.where(batch["dropout_uniform"] < 0.1, self.model.num_classes, batch["y"])
        x_t = t[:, None, None, None] * latents + (1 - t)[:, None, None, None] * noise
        with torch.autocast(latents.device.type, torch.bfloat16, enabled=self.dtype == "bf16"):
            v, hidden = self.model(x_t, t, y, self.align_depth)
            if self.projector is not None:
                with torch.no_grad():
                    features = plain_features(self.target.network, batch["images"], self.target.mean, self.target.std)
                projected = self.projector(hidden)
        loss = (v.float() - (latents - noise)).square().mean()
        if self.projector is not None:
            cosine = F.cosine_similarity(projected.float(), features.float(), dim=-1)
            loss = loss + self.weight * (1 - cosine).mean()
        return loss

    def step(self, batch: dict[str, Tensor]) -> None:
        """Take a training step."""
        self.loss(batch).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.update_ema()

    @torch.no_grad()
    def update_ema(self) -> None:
        """Update the EMA weights, of decay 0.9999."""
        for ema, weight in zip(self.ema.parameters(), self.model.parameters(), strict=True):
            ema.mul_(0.9999).add_(weight, alpha=1 - 0.9999)
