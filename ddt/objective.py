"""The loss around the denoiser: flow matching on the linear path, with label dropout in this one place.

Shapes: B batch, C H W latent. Source: method.md 1.
"""

import torch
from torch import Tensor, nn

from ddt.errors import require
from ddt.flow import TimeDistribution, interpolate, training_times, velocity
from ddt.model import Denoiser


def flow_matching_loss(denoiser: Denoiser, latents: Tensor, y: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """Return `mean((v_pred − v_t)²)`, a float32 scalar, for latents, noise (B, C, H, W), labels y (B,), times t (B,).

    Source: paper eq. 3; method.md 1.
    """
    v_pred = denoiser(interpolate(latents, noise, t), t, y)
    return (v_pred.float() - velocity(latents, noise)).square().mean()


class FlowMatching(nn.Module):
    """Denoiser and loss in one module: the one that is prepared for many processes and compiled.

    Args:
        denoiser: `(x_t, t, y) → v` with `num_classes`; label `num_classes` is the null label.
        time_distribution: of the training times, "lognorm" (published) or "uniform".
        label_dropout: chance, a sample, that its label becomes the null label; published 0.1.

    Raises UserError for a dropout outside [0, 1].
    """

    def __init__(
        self, denoiser: Denoiser, time_distribution: TimeDistribution = "lognorm", label_dropout: float = 0.1
    ) -> None:
        super().__init__()
        require(
            0 <= label_dropout <= 1,
            f"objective.label_dropout={label_dropout}: must lie in 0..1 (published: 0.1)",
        )
        self.denoiser = denoiser
        self.time_distribution: TimeDistribution = time_distribution
        self.label_dropout = label_dropout

    def forward(
        self, latents: Tensor, y: Tensor, noise: Tensor, time_normal: Tensor, dropout_uniform: Tensor
    ) -> dict[str, Tensor]:
        """Return the scalar losses of a batch: `loss`, the one to minimise, and its parts.

        latents, noise: (B, C, H, W) float32; y: (B,) int64; time_normal: (B,) standard normal; dropout_uniform: (B,)
        uniform in [0, 1). All draws come from outside, so the result is a function of its arguments.
        Source: method.md 1.
        """
        t = training_times(time_normal, self.time_distribution)
        y = torch.where(dropout_uniform < self.label_dropout, self.denoiser.num_classes, y)
        fm_loss = flow_matching_loss(self.denoiser, latents, y, noise, t)
        return {"loss": fm_loss, "fm_loss": fm_loss.detach()}
