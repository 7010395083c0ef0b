"""What an objective is: the denoiser and its losses in one module, which is prepared for many
processes and compiled.

Shapes: B batch, C H W latent, N tokens, F features of the alignment target.
"""

import abc

from torch import Tensor, nn

from ddt.errors import require
from ddt.model import Denoiser
from ddt.objective.alignment import AlignmentLoss, DispersiveLoss


class Objective(nn.Module, abc.ABC):
    """A denoiser with the loss it is trained with, a function of its arguments: every random number
    comes from outside.

    Args:
        denoiser: `(x_t, t, y) → v` with `num_classes`; label `num_classes` is the null label.
        label_dropout: probability that a sample's label becomes the null label.
        alignment: the loss on the output of block `alignment.align_depth`, or None.

    Raises UserError for a dropout outside [0, 1].
    """

    def __init__(
        self, denoiser: Denoiser, label_dropout: float, alignment: AlignmentLoss | DispersiveLoss | None
    ) -> None:
        super().__init__()
        require(
            0 <= label_dropout <= 1,
            f"objective.label_dropout={label_dropout}: must lie in 0..1 (published: 0.1)",
        )
        self.denoiser = denoiser
        self.label_dropout = label_dropout
        self.alignment = alignment

    @abc.abstractmethod
    def forward(
        self,
        latents: Tensor,
        y: Tensor,
        noise: Tensor,
        time_normal: Tensor,
        dropout_uniform: Tensor,
        features: Tensor | None = None,
        align: bool = True,
    ) -> dict[str, Tensor]:
        """Return the losses of a batch: `loss`, the one to minimise, its parts, and per sample (B,)
        the times `t` and `errors`, whose mean is the loss without alignment.

        latents, noise: (B, C, H, W) float32; y: (B,) int64; time_normal: (B,) standard normal;
        dropout_uniform: (B,) uniform in [0, 1); features: (B, h·w, F) of the alignment target,
        where there is one. `align=False` leaves the alignment out.
        """

    @abc.abstractmethod
    def for_validation(self, denoiser: Denoiser) -> "Objective":
        """Return this objective around another network, without label dropout and alignment: its
        `errors` are what validation averages.
        """
