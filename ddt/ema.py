"""Exponential moving average of the weights."""

import copy
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

Network = TypeVar("Network", bound=nn.Module)


class EMA(Generic[Network]):
    """A float32 copy of a network that follows it: `ema ← decay·ema + (1 − decay)·weights` after each optimizer step.

    Args:
        model: the network; make the EMA after all processes hold the same weights.
        decay: constant decay in [0, 1); published 0.9999 (method.md 3).

    `model` is the averaged network itself, without gradients. The update runs on the stream of the training step,
    so the next step waits for it.
    """

    def __init__(self, model: Network, decay: float) -> None:
        self.decay = decay
        self.model: Network = copy.deepcopy(model).float().requires_grad_(False).eval()

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move the average one step towards the weights of `model`."""
        averages: list[Tensor] = list(self.model.parameters())
        weights: list[Tensor] = [parameter.detach() for parameter in model.parameters()]
        torch._foreach_lerp_(averages, weights, 1 - self.decay)
