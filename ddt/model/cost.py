"""What the network and sampling cost, counted in multiply-accumulates (MAC) and not measured.

Convention: every matrix product, every convolution (padding included) and both products of
attention count, the two linears of the time embedding among them. Elementwise work does not (norms,
rotations, gates, softmax, guidance, the solver's arithmetic), nor does the look-up of a class. One
MAC is two floating-point operations. Each network family counts itself (`Denoiser.macs`) with the
pieces below.
Shapes: H W latent size, p patch size, N = H·W/p² tokens, D width. Source: method.md 2 and 4.
"""

import dataclasses
from collections.abc import Iterable
from typing import TYPE_CHECKING

from torch import nn

from ddt.errors import require
from ddt.model.layers import Attention, BlockStack

if TYPE_CHECKING:
    from ddt.model.base import Denoiser


@dataclasses.dataclass(frozen=True)
class NetworkMacs:
    """MACs of one forward for one image. modulations: the part of `decoder` that is the same as
    long as z is.
    """

    encoder: int
    decoder: int
    modulations: int

    @property
    def total(self) -> int:
        """MACs of encoder and decoder together."""
        return self.encoder + self.decoder


def weight_macs(modules: Iterable[nn.Module]) -> int:
    """Return the MACs of all linears and convolutions in `modules` for one position: as many as
    they have weights.
    """
    layers = [layer for module in modules for layer in module.modules()]
    return sum(layer.weight.numel() for layer in layers if isinstance(layer, nn.Linear | nn.Conv2d))


def parts(stack: BlockStack, name: str) -> list[nn.Module]:
    """Return the module `name` of each block."""
    return [block.get_submodule(name) for block in stack.blocks]


def modulation_weights(stack: BlockStack) -> int:
    """Return the MACs of the modulations of all blocks for one conditioning vector."""
    return weight_macs(parts(stack, "adaln"))


def attention_macs(module: nn.Module, tokens: int) -> int:
    """Return the MACs of both products of all attentions in `module`, for one image of N =
    `tokens`.

    q·k and weights·v are N·N·d a head each, so N·N·D over all heads: what grows with N².
    """
    return sum(2 * tokens**2 * layer.qkv.in_features for layer in module.modules() if isinstance(layer, Attention))


def stack_macs(stack: BlockStack, tokens: int) -> int:
    """Return the MACs of input projection and blocks without their modulations, for one image of N
    = `tokens`.
    """
    weights = weight_macs([stack.input, *parts(stack, "mixer"), *parts(stack, "mlp")])
    return tokens * weights + attention_macs(stack, tokens)


def num_tokens(model: "Denoiser", height: int, width: int) -> int:
    """Return N of latents (C, height, width); raise UserError where the patch size does not divide
    them.
    """
    p = model.patch_size
    require(
        height > 0 and width > 0 and height % p == 0 and width % p == 0,
        f"model.patch_size={p} does not divide the latent size {height}×{width}",
    )
    return (height // p) * (width // p)


def network_macs(model: "Denoiser", height: int, width: int) -> NetworkMacs:
    """Count the MACs of one forward for one image, latents (C, height, width).

    Reads shapes only, so the model may lie on the meta device. Raises UserError where the patch
    size does not divide the latent. Source: method.md 2, last column of the table.
    """
    return model.macs(num_tokens(model, height, width))
