"""Optimizers, built from named parameters and a group of settings.

Each one honours `optimizer.found_inf`, a float32 scalar tensor, 0 or 1, on the parameters' device: where it is 1 a step
leaves weights and state as they are, and the host does not wait to know.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ddt.errors import require

NamedParameters = Iterable[tuple[str, nn.Parameter]]


def check_values(lr: float, betas: tuple[float, float], weight_decay: float) -> None:
    """Raise UserError for settings that cannot be."""
    require(lr > 0, f"optimizer.lr={lr}: must be above 0 (published: 1e-4)")
    require(all(0 <= beta < 1 for beta in betas), f"optimizer.betas={list(betas)}: each must lie in 0..1, below 1")
    require(weight_decay >= 0, f"optimizer.weight_decay={weight_decay}: must be at least 0")


def adamw(
    named_parameters: NamedParameters, lr: float, betas: tuple[float, float], weight_decay: float
) -> torch.optim.AdamW:
    """Return AdamW over all parameters, one kernel for all tensors.

    lr: base learning rate, which the trainer's schedule multiplies. betas: decay of the two moments. weight_decay:
    decoupled. Published: 1e-4, (0.9, 0.95), 0 (method.md 3). Raises UserError for values that cannot be.
    """
    check_values(lr, betas, weight_decay)
    return torch.optim.AdamW(named_parameters, lr=lr, betas=betas, weight_decay=weight_decay, fused=True)


class MuonAdamW(torch.optim.Optimizer):
    """Muon over the first group of parameters, AdamW over the second, as one optimizer.

    Args:
        matrices, others: (name, parameter) pairs; the matrices are 2-D, there is at least one of each.
        lr: base learning rate of both: a step of Muon is scaled to 0.2 lr for each weight (rms), about AdamW's.
        betas: of AdamW. weight_decay: of both. momentum: of Muon.

    Groups and state have torch's usual layout. Parameters may be sharded (DTensor): torch gathers a matrix where it
    orthogonalises it, in bfloat16, so that steps agree with those of whole matrices to its rounding alone.
    """

    def __init__(
        self,
        matrices: list[tuple[str, nn.Parameter]],
        others: list[tuple[str, nn.Parameter]],
        lr: float,
        betas: tuple[float, float],
        weight_decay: float,
        momentum: float,
    ) -> None:
        self.muon = torch.optim.Muon(
            matrices, lr=lr, weight_decay=weight_decay, momentum=momentum, adjust_lr_fn="match_rms_adamw"
        )
        self.adamw = torch.optim.AdamW(others, lr=lr, betas=betas, weight_decay=weight_decay, fused=True)
        super().__init__([*self.muon.param_groups, *self.adamw.param_groups], {})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update both groups, or neither where `found_inf` is 1."""
        assert closure is None, "gradients are there before the step"
        for optimizer, group in zip((self.muon, self.adamw), self.param_groups, strict=True):
            optimizer.param_groups, optimizer.state = [group], self.state  # loading a checkpoint replaces both
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        self.adamw.found_inf = found_inf  # type: ignore[attr-defined]
        self.adamw.step()
        if found_inf is None:
            self.muon.step()
            return
        # torch's Muon does not know found_inf: it steps, and what it touched is put back on the device
        touched = [tensor for parameter in self.param_groups[0]["params"] for tensor in self._touched(parameter)]
        before = [tensor.clone() for tensor in touched]
        self.muon.step()
        for tensor, kept in zip(touched, before, strict=True):
            tensor.copy_(torch.where(found_inf.bool(), kept, tensor))

    def _touched(self, parameter: nn.Parameter) -> list[Tensor]:
        """Return what a step of Muon writes: nothing without a gradient, else the weights and their momentum."""
        if parameter.grad is None:
            return []
        state = self.state[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter)  # as Muon begins
        return [parameter, state["momentum_buffer"]]


def muon(
    named_parameters: NamedParameters, lr: float, betas: tuple[float, float], weight_decay: float, momentum: float
) -> MuonAdamW:
    """Return Muon over the matrices of the denoiser's blocks and AdamW over all else.

    The matrices are qkv, the output projection, w1, w2, w3 and adaln; q, k and v, and the six parts of adaln, are each
    orthogonalised as the one matrix they are stored as. Embedders, the output layer, norms, biases, convolutions and
    the alignment's projector go to AdamW. lr, betas, weight_decay: as for `adamw`, for all parameters. momentum: of
    Muon, published 0.95. Raises UserError for values that cannot be.
    """
    check_values(lr, betas, weight_decay)
    require(0 <= momentum < 1, f"optimizer.momentum={momentum}: must lie in 0..1, below 1 (published: 0.95)")
    matrices: list[tuple[str, nn.Parameter]] = []
    others: list[tuple[str, nn.Parameter]] = []
    for name, parameter in named_parameters:
        in_block = name.startswith("denoiser.") and ".blocks." in name
        (matrices if in_block and parameter.ndim == 2 else others).append((name, parameter))
    return MuonAdamW(matrices, others, lr, betas, weight_decay, momentum)
