"""Flow matching on the linear path: the velocity loss. Labels are dropped here and nowhere else.

Shapes: B batch, C H W latent, N tokens, F features of the alignment target. Source: method.md 1.
"""

from typing import ClassVar

import torch
from torch import Tensor

from ddt.errors import require
from ddt.flow import Prediction, TimeDistribution, TrainingTimes, interpolate, velocity, velocity_of
from ddt.model import Denoiser
from ddt.objective.alignment import AlignmentLoss, DispersiveLoss
from ddt.objective.base import Objective


def velocity_loss(v_pred: Tensor, v_t: Tensor) -> Tensor:
    """Return `mean((v_pred − v_t)²)` of each sample, float32 (B,). Source: paper eq. 3."""
    return (v_pred - v_t).square().flatten(1).mean(1)


class FlowMatching(Objective):
    """The flow-matching objective; see `Objective`.

    Args:
        time_distribution, t_min, timeshift: of the training times (`TrainingTimes`). In settings
            None is the time shift of the latents, which training puts in its place.
        label_dropout: published 0.1.
        prediction: what the network learns to return, "v" as published; the network is marked with
            it, so that sampling and checkpoints know. "x", the clean latent: output and target are
            the velocities that `velocity_of` makes of it and of the latent.
        base_depth: encoder block of the denoiser's base head, whose loss is added; None: no head.
        base_weight: of that loss.

    Raises UserError for a network that predicts x, with another `prediction`, for a weight without
    effect, and for latents with a class token, which `REG` is for.
    """

    class_token: ClassVar[bool] = False  # whether the latents hold one

    def __init__(
        self,
        denoiser: Denoiser,
        time_distribution: TimeDistribution = "lognorm",
        label_dropout: float = 0.1,
        alignment: AlignmentLoss | DispersiveLoss | None = None,
        t_min: float = 0.0,
        timeshift: float | None = 1.0,
        prediction: Prediction = "v",
        base_depth: int | None = None,
        base_weight: float = 1.0,
    ) -> None:
        super().__init__(denoiser, label_dropout, alignment)
        require(
            bool(denoiser.class_token) == self.class_token,
            "objective: the latents hold a class token (autoencoder.class_token=true); give objective=reg"
            if denoiser.class_token
            else "objective=reg: the latents hold no class token; give autoencoder.class_token=true",
        )
        known = denoiser.prediction
        require(known in ("v", prediction), f"objective.prediction={prediction}: the network predicts {known}; give it")
        denoiser.prediction = self.prediction = prediction
        require(base_weight > 0, f"objective.base_weight={base_weight}: must be above 0; base_depth=null has no head")
        require(
            base_depth is not None or base_weight == 1,
            f"objective.base_weight={base_weight}: has no effect without objective.base_depth=; leave it out",
        )
        self.base_depth, self.base_weight = base_depth, base_weight
        require(timeshift is not None, "objective.timeshift=null: is of latents that are not known here; give a number")
        assert timeshift is not None
        self.times = TrainingTimes(time_distribution, t_min, timeshift)

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
        """Return `loss`, `fm_loss`, `base_loss`, the alignment's loss, `t` and `errors`; see
        `Objective`.
        """
        t = self.times.of(time_normal)  # (B,)
        y = torch.where(dropout_uniform < self.label_dropout, self.denoiser.num_classes, y)
        x_t = interpolate(latents, noise, t)
        hidden_depth = self.alignment.align_depth if self.alignment is not None and align else 0
        base = None
        if self.base_depth is not None:
            output, base, hidden = self.denoiser.forward_with_base(x_t, t, y, hidden_depth)
        elif hidden_depth:
            output, hidden = self.denoiser.forward_with_hidden(x_t, t, y, hidden_depth)
        else:
            output = self.denoiser(x_t, t, y)  # (B, C, H, W)
        v_pred = velocity_of(output.float(), x_t, t, self.prediction)  # (B, C, H, W)
        v_t = velocity(latents, noise) if self.prediction == "v" else velocity_of(latents, x_t, t, "x")
        errors, others = self.losses(v_pred, v_t)
        loss = fm_loss = errors.mean()
        parts = {}
        for name, (weight, value) in others.items():
            loss = loss + weight * value
            parts[name] = value.detach()
        if base is not None:
            base_loss = velocity_loss(velocity_of(base.float(), x_t, t, self.prediction), v_t).mean()
            loss = loss + self.base_weight * base_loss
            parts["base_loss"] = base_loss.detach()
        if self.alignment is not None and align:
            alignment_loss = self.alignment(hidden, features)
            loss = loss + self.alignment.weight * alignment_loss
            parts[self.alignment.name] = alignment_loss.detach()
        elif self.alignment is not None:
            # gradient zero keeps the projector in the graph: DDP waits for every weight's gradient
            loss = loss + 0 * sum(parameter.sum() for parameter in self.alignment.parameters())
        return {"loss": loss, "fm_loss": fm_loss.detach(), **parts, "t": t, "errors": errors.detach()}

    def losses(self, v_pred: Tensor, v_t: Tensor) -> tuple[Tensor, dict[str, tuple[float, Tensor]]]:
        """Return the errors (B,) of velocities (B, C, H, W), and other losses by name, each with
        the weight beside their mean; here there are none.
        """
        return velocity_loss(v_pred, v_t), {}

    def time_normal(self, t: Tensor) -> Tensor:
        return self.times.normals(t)

    def for_validation(self, denoiser: Denoiser) -> "FlowMatching":
        times = self.times
        return FlowMatching(
            denoiser, times.distribution, label_dropout=0.0, t_min=times.t_min, timeshift=times.timeshift,
            prediction=self.prediction,
        )  # fmt: skip
