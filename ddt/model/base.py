"""What a network family offers to training, sampling and counting.

Shapes: B batch, C channels, H W latent size, N tokens, D width.
"""

import abc
import math
from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor, nn

from ddt.errors import UserError
from ddt.flow import Prediction
from ddt.model.cost import NetworkMacs
from ddt.model.layers import Block, BlockStack
from ddt.model.published_names import Release


class Denoiser(nn.Module, abc.ABC):
    """A network that predicts the velocity of x_t at time t for a class y.

    With `prediction` "x" its output is an estimate of the clean latent, called the velocity below
    all the same: `decode` knows no time, so sampler and loss convert it (`ddt.flow.velocity_of`).
    """

    shares_encoder: ClassVar[bool] = False  # has `encode`, `decode` and `modulations`; steps can share z_t
    release: ClassVar[Release | None] = None  # names of its published weights; set where it is registered
    in_channels: int  # C
    num_classes: int  # K; label K is the null label
    prediction: Prediction = "v"  # what the output is; an objective may set it
    hidden_size: int  # D of the blocks that alignment reads; a decoder may be wider
    patch_size: int  # p; H and W must be multiples of it
    base_depth: int | None = None  # block after which the base head is, None: it has none
    class_token: int = 0  # features of the class token that the latents carry; 0: they carry none
    label_table: ClassVar[str]  # name of the weights (K + 1, D) of the classes

    @property
    @abc.abstractmethod
    def stacks(self) -> list[BlockStack]:
        """Condition encoder and velocity decoder, or the one stack of an undivided network."""

    @property
    def all_blocks(self) -> list[Block]:
        """The blocks of all stacks, which are sharded and compiled one by one."""
        return [block for stack in self.stacks for block in stack.blocks]

    @property
    @abc.abstractmethod
    def num_alignable_blocks(self) -> int:
        """The number of blocks that alignment can choose from."""

    @property
    def modulation_layers(self) -> list[nn.Module]:
        """The decoder's layers that read `condition` alone, in the order of `modulations`."""
        return []

    @abc.abstractmethod
    def forward(self, x_t: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Return the velocity (B, C, H, W) for x_t (B, C, H, W), t (B,), y (B,)."""

    @abc.abstractmethod
    def forward_with_hidden(self, x_t: Tensor, t: Tensor, y: Tensor, hidden_depth: int) -> tuple[Tensor, Tensor]:
        """Return the velocity (B, C, H, W) and the output (B, N, D) of block hidden_depth ≥ 1."""

    def forward_with_base(
        self, x_t: Tensor, t: Tensor, y: Tensor, hidden_depth: int = 0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the velocity, that of the base head, both (B, C, H, W), and the output (B, N, D)
        of block hidden_depth; UserError where there is no base head. Source: method.md 4.
        """
        raise UserError(f"{type(self).__name__} has no base head here: build it with base_depth=")

    def encode(self, x_t: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Return the self-condition z_t (B, N, D); UserError where there is no encoder."""
        raise UserError(f"{type(self).__name__} has no encoder to share: use recompute=null, or a DDT model")

    def encode_with_base(self, x_t: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return z_t (B, N, D) and the base head's velocity (B, C, H, W); UserError where there
        is none.
        """
        raise UserError(f"{type(self).__name__} has no base head here: build it with base_depth=")

    def decode(self, x_t: Tensor, z_t: Tensor, modulations: Sequence[Tensor] = ()) -> Tensor:
        """Return the velocity (B, C, H, W) from x_t (B, C, H, W) and z_t (B, N, D), perhaps of an
        earlier step. modulations: of `modulations(z_t)`. UserError where there is no decoder.
        """
        raise UserError(f"{type(self).__name__} has no separate decoder: call the model itself")

    def modulations(self, z_t: Tensor, max_bytes: float = math.inf) -> list[Tensor]:
        """Return the decoder's modulations by z_t (B, N, D): of the first layers, those that fit
        into max_bytes. UserError where there is no decoder.
        """
        raise UserError(f"{type(self).__name__} has no separate decoder: call the model itself")

    def condition(self, z_t: Tensor) -> Tensor:
        """Return what the modulation layers read of z_t (B, N, D). UserError as `modulations`."""
        raise UserError(f"{type(self).__name__} has no separate decoder: call the model itself")

    @abc.abstractmethod
    def macs(self, num_tokens: int) -> NetworkMacs:
        """Count the MACs of one forward for one image of N = num_tokens."""
