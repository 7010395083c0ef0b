"""The undivided diffusion transformer that DDT is compared with.

Shapes: B batch, C latent channels, H W latent size, N tokens, D width.
"""

from torch import Tensor, nn

from ddt.errors import UserError
from ddt.flow import Prediction
from ddt.model.base import Denoiser
from ddt.model.cost import NetworkMacs, modulation_macs, stack_macs, weight_macs
from ddt.model.layers import (
    AdaLNInit,
    BlockStack,
    Checkpointing,
    LabelEmbedder,
    OutputLayer,
    TimestepEmbedder,
    check_sizes,
)


class DiT(Denoiser, BlockStack):
    """The undivided baseline of the paper ("Improved-SiT", and with alignment "Improved-REPA").

    One stack of `DDT`'s blocks, conditioned on c = SiLU(t_emb + y_emb), one vector per sample; no
    z_t to share. Arguments as in `DDT`. Source: method.md 2, baseline.
    """

    label_table = "y_embedder.embedding_table.weight"

    def __init__(
        self,
        in_channels: int,
        patch_size: int | None,
        hidden_size: int,
        num_heads: int,
        depth: int,
        num_classes: int,
        adaln_init: AdaLNInit = "release",
        activation_checkpointing: Checkpointing = False,
        prediction: Prediction = "v",
    ) -> None:
        if patch_size is None:
            raise UserError("model.patch_size=null: is inferred from the images before; give a number")
        check_sizes(in_channels, patch_size, hidden_size, num_heads, depth, num_classes)
        sizes = (in_channels, patch_size, hidden_size, num_heads, depth)
        super().__init__(*sizes, "attention", adaln_init, activation_checkpointing)
        self.in_channels = in_channels
        self.hidden_size = hidden_size
        self.num_classes = num_classes
        self.prediction = prediction
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size)
        self.output = OutputLayer(hidden_size, patch_size, in_channels)

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Return the velocity (B, C, H, W) for x_t (B, C, H, W), t (B,), y (B,)."""
        return self.velocity_and_hidden(x_t, t, y, hidden_depth=0)[0]

    def forward_with_hidden(self, x_t: Tensor, t: Tensor, y: Tensor, hidden_depth: int) -> tuple[Tensor, Tensor]:
        """Return the velocity (B, C, H, W) and the output (B, N, D) of block hidden_depth ≥ 1."""
        return self.velocity_and_hidden(x_t, t, y, hidden_depth)

    def velocity_and_hidden(self, x_t: Tensor, t: Tensor, y: Tensor, hidden_depth: int) -> tuple[Tensor, Tensor]:
        """Both forwards; neither calls the other: FSDP2 gathers sharded weights in each."""
        at = self.positions(x_t)
        c = nn.functional.silu(self.t_embedder(t) + self.y_embedder(y))[:, None]  # (B, 1, D)
        h, (hidden,) = self.run(x_t, c, at, [hidden_depth])
        return self.output(h, c, at), hidden

    @property
    def stacks(self) -> list[BlockStack]:
        """The network itself."""
        return [self]

    @property
    def num_alignable_blocks(self) -> int:
        """All blocks."""
        return len(self.blocks)

    def macs(self, num_tokens: int) -> NetworkMacs:
        """Count the MACs of one forward for one image of N = num_tokens: all are the decoder's, and
        none are `modulations`, for these change with the time.
        """
        conditioning = weight_macs([self.t_embedder, self.output.adaln]) + modulation_macs(self)  # one vector per image
        output = num_tokens * weight_macs([self.output.linear])
        return NetworkMacs(0, stack_macs(self, num_tokens) + output + conditioning, 0)
