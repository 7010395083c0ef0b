"""Flow matching on the linear path: the loss is the mean squared error of the velocity. Labels are
dropped here and nowhere else.

Shapes: B batch, C H W latent, N tokens, F features of the alignment target. Source: method.md 1.
"""

import torch
from torch import Tensor

from ddt.flow import TimeDistribution, interpolate, training_times, velocity
from ddt.model import Denoiser
from ddt.objective.alignment import AlignmentLoss, DispersiveLoss
from ddt.objective.base import Objective


def velocity_errors(v_pred: Tensor, latents: Tensor, noise: Tensor) -> Tensor:
    """Return `mean((v_pred − v_t)²)` of each sample, float32 (B,), for velocities, latents and
    noise (B, C, H, W).

    Their mean is the flow-matching loss. Source: paper eq. 3; method.md 1.
    """
    return (v_pred.float() - velocity(latents, noise)).square().flatten(1).mean(1)


class FlowMatching(Objective):
    """The flow-matching objective.

    Args:
        denoiser: `(x_t, t, y) → v` with `num_classes`; label `num_classes` is the null label.
        time_distribution: of the training times, "lognorm" (published) or "uniform".
        label_dropout: probability that a sample's label becomes the null label; published 0.1.
        alignment: the loss on the output of block `alignment.align_depth`, or None.

    Raises UserError for a dropout outside [0, 1].
    """

    def __init__(
        self,
        denoiser: Denoiser,
        time_distribution: TimeDistribution = "lognorm",
        label_dropout: float = 0.1,
        alignment: AlignmentLoss | DispersiveLoss | None = None,
    ) -> None:
        super().__init__(denoiser, label_dropout, alignment)
        self.time_distribution: TimeDistribution = time_distribution

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
        """Return `loss`, `fm_loss` and, with an alignment, its loss by name; `t` and `errors` by
        sample, (B,). Arguments: see `Objective.forward`. Source: method.md 1.
        """
        t = training_times(time_normal, self.time_distribution)
        y = torch.where(dropout_uniform < self.label_dropout, self.denoiser.num_classes, y)
        x_t = interpolate(latents, noise, t)
        if self.alignment is None or not align:
            errors = velocity_errors(self.denoiser(x_t, t, y), latents, noise)
            fm_loss = loss = errors.mean()
            if self.alignment is not None:
                # the projector stays in the graph, with gradient zero: processes wait for the
                # gradient of every weight
                loss = fm_loss + 0 * sum(parameter.sum() for parameter in self.alignment.parameters())
            parts = {}
        else:
            v_pred, hidden = self.denoiser.forward_with_hidden(x_t, t, y, self.alignment.align_depth)
            errors = velocity_errors(v_pred, latents, noise)
            fm_loss = errors.mean()
            aligned = self.alignment(hidden, features)
            loss = fm_loss + self.alignment.weight * aligned
            parts = {self.alignment.name: aligned.detach()}
        return {"loss": loss, "fm_loss": fm_loss.detach(), **parts, "t": t, "errors": errors.detach()}

    def for_validation(self, denoiser: Denoiser) -> "FlowMatching":
        """See `Objective.for_validation`."""
        return FlowMatching(denoiser, self.time_distribution, label_dropout=0.0)
