"""EMA of the weights over training: constant decay, and EDM2's power functions.

Source: method.md 3 for the published constant decay; Karras et al., "Analyzing and Improving the
Training Dynamics of Diffusion Models" (EDM2), section 3 and appendix C, for power functions.
"""

import copy
import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ddt.distributed.prepare import gather_network, local_part, shard
from ddt.model import Denoiser

Network = TypeVar("Network", bound=nn.Module)
Array = NDArray[np.float64]


@functools.cache  # every step asks
def power_exponent(std: float) -> float:
    """Return the exponent γ of the power-function average whose profile is `std` wide, relative to
    the length of training.

    The profile of weights over training time, ∝ t^γ on (0, 1], has the variance (γ + 1) / ((γ +
    2)²(γ + 3)); the exponent is that polynomial's largest root. std: in (0, 0.289), 0.289 = 1/√12
    being γ = 0. Source: EDM2, eq. 126.
    """
    return float(np.roots([1, 7, 16 - std**-2, 12 - std**-2]).real.max())


@dataclass(frozen=True)
class ConstantDecay:
    """`ema ← decay·ema + (1 − decay)·weights`; published 0.9999."""

    decay: float

    def rate(self, step: int) -> float:
        """Return the share of the weights in the EMA's update after step `step`, counted from 1."""
        return 1 - self.decay

    def retention(self, start: Array, end: int) -> Array:
        """Return the share of an EMA after `start` steps that is left after `end`: ∏ (1 − rate)."""
        return self.decay ** (end - start)

    def shares(self, first: int, last: int) -> Array:
        """Return the shares of steps `first` … `last`, counted from 1, in the EMA after step
        `last`: (1 − d)·d^(last−i).
        """
        return (1 - self.decay) * self.retention(np.arange(first, last + 1, dtype=np.float64), last)


@dataclass(frozen=True)
class PowerFunction:
    """An EMA whose window grows with training: weights of time t count ∝ t^γ (EDM2, eq. 121 to
    123).
    """

    std: float

    def rate(self, step: int) -> float:
        """Return the share of the weights in the update after step `step`, counted from 1: 1 at
        the first.
        """
        return 1 - (1 - 1 / step) ** (power_exponent(self.std) + 1)

    def retention(self, start: Array, end: int) -> Array:
        """Return the share of an EMA after `start` steps that is left after `end`: ∏ (1 − rate)."""
        return (start / end) ** (power_exponent(self.std) + 1)

    def shares(self, first: int, last: int) -> Array:
        """Return the shares of steps `first` … `last`, counted from 1, in the EMA after step
        `last`: (i^(γ+1) − (i−1)^(γ+1)) / last^(γ+1).
        """
        steps = np.arange(first, last + 1, dtype=np.float64)
        with np.errstate(divide="ignore"):  # log 0 at step 1, whose rate is 1
            rates = -np.expm1((power_exponent(self.std) + 1) * np.log1p(-1 / steps))
        return rates * self.retention(steps, last)


Rule = ConstantDecay | PowerFunction


def ema_rules(decay: float, decays: tuple[float, ...], powers: tuple[float, ...]) -> dict[str, Rule]:
    """Return the EMAs of a run by the name of their weights in a checkpoint; "ema" is the first."""
    return {
        "ema": ConstantDecay(decay),
        **{f"ema_{value:g}": ConstantDecay(value) for value in decays},
        **{f"power_{value:g}": PowerFunction(value) for value in powers},
    }


class EMA(Generic[Network]):
    """The EMA of a network's weights, in float32.

    Args:
        model: the network, of the same weights on all processes.
        rule: how fast the EMA follows.

    `model` is the network with EMA weights, without gradients; of a sharded one each process holds
    a part, and `network` gathers it. The update runs on the stream of the training step, so the
    next step waits for it.
    """

    def __init__(self, model: Network, rule: Rule) -> None:
        self.rule = rule
        self.model: Network = copy.deepcopy(model).float().requires_grad_(False).eval()
        self.outline: Network | None = None  # the network without weights, where `model` is sharded
        self.compiled = False

    def place(self, device: torch.device, sharded: bool, compiled: bool = False) -> None:
        """Move the EMA to the device of its updates, or shard it; compiled: as the network is, by
        Triton on GPUs.
        """
        self.compiled = compiled and device.type == "cuda"
        if sharded:
            self.outline = copy.deepcopy(self.model).to("meta")
            shard(cast(Denoiser, self.model))  # the only networks that are sharded
        else:
            self.model.to(device)

    def network(self) -> Network:
        """Return the network with EMA weights. A sharded one is gathered on every process; all call
        it together.
        """
        return self.model if self.outline is None else gather_network(self.model, self.outline)

    @functools.cached_property
    def parameters(self) -> list[nn.Parameter]:
        """The EMA weights, once they are placed; a list, for to go through the modules takes longer
        than the update of a small network.
        """
        return list(self.model.parameters())

    @torch.no_grad()
    def update(self, weights: Iterable[Tensor], step: int, skipped: Tensor | float = 0.0) -> None:
        """Update the EMA by the network's weights, float32, after step `step`, counted from 1: `ema
        ← ema + rate·(weights − ema)`.

        skipped: a scalar on the device, 1 where the step was skipped and the EMA stays. No device
        sync.
        """
        emas, parts = (list(map(local_part, parameters)) for parameters in (self.parameters, weights))
        rate = torch.as_tensor(self.rule.rate(step) * (1 - skipped), dtype=torch.float32).to(emas[0].device)
        if self.compiled:
            from ddt.training.ema_kernel import lerp_  # needs Triton

            lerp_(emas, parts, rate)
        else:
            torch._foreach_lerp_(emas, parts, [rate] * len(emas))  # a loop in C++: half of the host's time

    @torch.no_grad()
    def distance(self, weights: Iterable[Tensor]) -> Tensor:
        """Return this process's part of (‖ema − weights‖², ‖weights‖²), two float32 numbers on
        the device.
        """
        emas, weights = (list(map(local_part, parameters)) for parameters in (self.parameters, weights))
        apart = torch._foreach_norm(torch._foreach_sub(emas, weights))
        return torch.stack([torch.stack(norms).square().sum() for norms in (apart, torch._foreach_norm(weights))])
