"""Optimizers, built from named parameters and a group of settings.

Each one honours `optimizer.found_inf`, a float32 scalar tensor, 0 or 1, on the parameters' device:
where it is 1 a step leaves weights and state as they are, and the host does not wait to know.
"""

from collections.abc import Iterable

import torch
from torch import nn

from ddt.errors import require

NamedParameters = Iterable[tuple[str, nn.Parameter]]


def adamw(
    named_parameters: NamedParameters, lr: float, betas: tuple[float, float], weight_decay: float
) -> torch.optim.AdamW:
    """Return AdamW over all parameters, one kernel for all tensors.

    lr: base learning rate, which the trainer's schedule multiplies. betas: decay of the two
    moments. weight_decay: decoupled. Published: 1e-4, (0.9, 0.95), 0 (method.md 3). Raises
    UserError for values that cannot be.
    """
    require(lr > 0, f"optimizer.lr={lr}: must be above 0 (published: 1e-4)")
    require(all(0 <= beta < 1 for beta in betas), f"optimizer.betas={list(betas)}: each must lie in 0..1, below 1")
    require(weight_decay >= 0, f"optimizer.weight_decay={weight_decay}: must be at least 0")
    return torch.optim.AdamW(named_parameters, lr=lr, betas=betas, weight_decay=weight_decay, fused=True)
