"""What an objective is: the denoiser and its losses in one module, prepared for DDP and FSDP2 and
compiled as a whole.
"""

import abc
from typing import Any, ClassVar

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

    Raises UserError for a dropout outside [0, 1], and for an alignment that it does not take.
    """

    takes_alignment: ClassVar[bool] = True

    def __init__(
        self, denoiser: Denoiser, label_dropout: float, alignment: AlignmentLoss | DispersiveLoss | None
    ) -> None:
        super().__init__()
        check_alignment(type(self), alignment)
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


def check_alignment(kind: type[Objective], alignment: Any) -> None:
    """Raise UserError where a kind of objective takes no alignment, and there is one."""
    require(
        alignment is None or kind.takes_alignment,
        f"alignment: {kind.__name__} aligns by the class token alone; give alignment=none",
    )


def network_arguments(objective: Choice, model: Choice, class_token: int) -> dict[str, Any]:
    """Return the arguments of a network that objective and latents ask for: where its base head is,
    and the features of a class token.

    Raises UserError for a network that can have none.
    """
    depth, kind = objective.settings.get("base_depth"), locate(model.target)
    asked = {"base_depth": depth} if depth is not None else {}
    require(
        kind.shares_encoder or not asked,
        f"objective.base_depth={depth}: {kind.__name__} has no encoder for a base head; give null, or choose a DDT",
    )
    require(
        kind.shares_encoder or not class_token,
        f"autoencoder.class_token=true: {kind.__name__} takes no class token; give false, or choose a DDT",
    )
    return asked | ({"class_token": class_token} if class_token else {})
