"""What an objective is: the denoiser and its losses in one module, prepared for DDP and FSDP2 and
compiled as a whole.
"""

import abc
from typing import Any

from torch import Tensor, nn

from ddt.config import Choice, locate
from ddt.errors import require
from ddt.model import Denoiser
from ddt.objective.alignment import AlignmentLoss, DispersiveLoss


class Objective(nn.Module, abc.ABC):
    """A denoiser with its training loss, a function of its arguments: noise comes from outside.

    `forward(latents, y, noise, time_normal, dropout_uniform, features=None, align=True)` returns
    the losses of a batch: `loss`, the one to minimise, its parts, and per sample (B,) the times `t`
    and `errors`, whose mean is the loss without alignment and base head. latents, noise:
    (B, C, H, W) float32; y: (B,) int64; time_normal: (B,) standard normal; dropout_uniform: (B,)
    uniform in [0, 1); features: (B, h·w, F) of the alignment target. `align=False` leaves the
    alignment out.

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
        require(0 <= label_dropout <= 1, f"objective.label_dropout={label_dropout}: must lie in 0..1 (published: 0.1)")
        self.denoiser = denoiser
        self.label_dropout = label_dropout
        self.alignment = alignment

    @property
    def network(self) -> Denoiser:
        """What is trained: the denoiser."""
        return self.denoiser

    @abc.abstractmethod
    def time_normal(self, t: Tensor) -> Tensor:
        """Return the `time_normal` (B,) of which `forward` makes the times t (B,) in (0, 1)."""

    @abc.abstractmethod
    def for_validation(self, denoiser: Denoiser) -> "Objective":
        """Return this objective of another denoiser, without label dropout, alignment and the loss
        of a base head.
        """


def network_arguments(objective: Choice, model: Choice) -> dict[str, Any]:
    """Return the arguments of a network that an objective asks for: where its base head is.

    Raises UserError for a network that can have none.
    """
    depth = objective.settings.get("base_depth")
    if depth is None:
        return {}
    kind = locate(model.target)
    require(
        kind.shares_encoder,
        f"objective.base_depth={depth}: {kind.__name__} has no encoder for a base head; give null, or choose a DDT",
    )
    return {"base_depth": depth}
