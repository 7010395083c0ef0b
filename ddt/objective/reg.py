"""REG: the class token of the latents' encoder, denoised beside the image with the same network.

Shapes: B batch, C H W latent (H with the token's rows), F features of the token.
Source: arXiv 2507.01467, without its alignment loss; docs/method.md, "Class token".
"""

from typing import ClassVar

from torch import Tensor

from ddt.errors import require
from ddt.flow import Prediction, TimeDistribution
from ddt.model import Denoiser
from ddt.model.class_token import split_token
from ddt.objective.alignment import AlignmentLoss, DispersiveLoss
from ddt.objective.flow_matching import FlowMatching, velocity_loss


class REG(FlowMatching):
    """Flow matching of latents with a class token (`ddt.model.class_token`): the image's error as
    in `FlowMatching`, plus token_weight times the mean squared error of the token's velocity.

    Args:
        token_weight: published 0.03. The others: as of `FlowMatching`.

    Raises UserError for latents without a class token, an alignment, and a weight without effect.
    """

    class_token: ClassVar[bool] = True
    takes_alignment: ClassVar[bool] = False

    def __init__(
        self,
        denoiser: Denoiser,
        time_distribution: TimeDistribution = "lognorm",
        label_dropout: float = 0.1,
        alignment: AlignmentLoss | DispersiveLoss | None = None,
        t_min: float = 0.0,
        timeshift: float | None = 1.0,
        prediction: Prediction = "v",
        token_weight: float = 0.03,
    ) -> None:
        super().__init__(denoiser, time_distribution, label_dropout, alignment, t_min, timeshift, prediction)
        require(token_weight > 0, f"objective.token_weight={token_weight}: must be above 0 (published: 0.03)")
        self.token_weight = token_weight

    def losses(self, v_pred: Tensor, v_t: Tensor) -> tuple[Tensor, dict[str, tuple[float, Tensor]]]:
        """Return the errors (B,) of the image's velocities, and `token_loss` with its weight."""
        (image, token), (image_t, token_t) = (split_token(v, self.denoiser.class_token) for v in (v_pred, v_t))
        return velocity_loss(image, image_t), {"token_loss": (self.token_weight, velocity_loss(token, token_t).mean())}

    def for_validation(self, denoiser: Denoiser) -> "REG":
        times = self.times
        return REG(
            denoiser, times.distribution, label_dropout=0.0, t_min=times.t_min, timeshift=times.timeshift,
            prediction=self.prediction, token_weight=self.token_weight,
        )  # fmt: skip
