"""The networks' cost in multiply-accumulates (MACs, two FLOPs each), counted from shapes.

Every matrix product, convolution (padding included) and both products of attention count, the time
embedding's linears too; elementwise work and the class look-up do not. Each family counts itself
(`Denoiser.macs`). N = H·W/p² tokens, D width. Source: method.md 2 and 4.
"""

import dataclasses
from collections.abc import Iterable
from typing import TYPE_CHECKING

from torch import nn

from ddt.model.class_token import token_rows
from ddt.model.layers import Attention, BlockStack, token_grid

if TYPE_CHECKING:
    from ddt.model.base import Denoiser


@dataclasses.dataclass(frozen=True)
class NetworkMacs:
    """MACs of one forward for one image."""

    encoder: int
    decoder: int
    modulations: int  # the part of `decoder` that depends on z_t alone
    base: int = 0  # of the base head, which only training and internal guidance run

    @property
    def total(self) -> int:
        """MACs of encoder and decoder together."""
        return self.encoder + self.decoder


def weight_macs(modules: Iterable[nn.Module]) -> int:
    """Return the MACs of all linears and convolutions for one position: one per weight."""
    layers = [layer for module in modules for layer in module.modules()]
    return sum(layer.weight.numel() for layer in layers if isinstance(layer, nn.Linear | nn.Conv2d))


def modulation_macs(stack: BlockStack) -> int:
    """Return the MACs of the modulations of all blocks for one conditioning vector."""
    return weight_macs(block.get_submodule("adaln") for block in stack.blocks)


def attention_macs(module: nn.Module, num_tokens: int) -> int:
    """Return the MACs of q·k and weights·v of all attention in a module, for one image."""
    attentions = [layer for layer in module.modules() if isinstance(layer, Attention)]
    return sum(2 * num_tokens**2 * layer.qkv.in_features for layer in attentions)  # N²·D each


def stack_macs(stack: BlockStack, num_tokens: int) -> int:
    """Return the MACs of input projection and blocks, without modulations, for one image."""
    modules = [block.get_submodule(name) for block in stack.blocks for name in ("mixer", "mlp")]
    token = filter(None, [stack.token_input])
    images = num_tokens - 1 if stack.class_token else num_tokens  # tokens of the image
    weights = images * weight_macs([stack.input]) + weight_macs(token) + num_tokens * weight_macs(modules)
    return weights + attention_macs(stack, num_tokens)


def num_tokens(model: "Denoiser", height: int, width: int) -> int:
    """Return N of latents (C, height, width), a class token among them; UserError where p does not
    divide them.
    """
    height -= token_rows(model.class_token, model.in_channels, width)
    rows, columns = token_grid(model.patch_size, height, width)
    return rows * columns + bool(model.class_token)


def network_macs(model: "Denoiser", height: int, width: int) -> NetworkMacs:
    """Count the MACs of one forward for latents (C, height, width); the model may be on meta.

    UserError where the patch size does not divide the latent. Source: method.md 2, table.
    """
    return model.macs(num_tokens(model, height, width))
