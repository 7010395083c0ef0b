"""Sampling written down plainly, to time `ddt.sample` against and to check it by."""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from ddt.errors import require
from ddt.model import DDT
from ddt.sampling import SamplerSettings


@torch.no_grad()
def plain_sample(
    model: DDT, noise: Tensor, y: Tensor, settings: SamplerSettings, cache_modulations: bool = False
) -> Tensor:
    """Draw latents (B, C, H, W) from noise (B, C, H, W) and classes y (B,) by Euler's method, as the release does.

    Conditional and unconditional half run as one batch of 2B at every step, guided or not; the encoder runs on the
    settings' schedule. cache_modulations: keep the decoder's modulations as long as z. Raises UserError for another
    solver than Euler. Source: method.md 4.
    """
    require(settings.solver == "euler", f"sampler={settings.solver}: plain sampling knows euler only")
    schedule = settings.schedule()
    recompute = range(settings.num_steps) if schedule is None else schedule
    guidance = settings.guidance()
    labels = torch.cat([y, torch.full_like(y, model.num_classes)])  # (2B,)
    x = noise.float()
    z = torch.empty(0)
    modulations: Sequence[Tensor] = ()
    for step, (t, t_next) in enumerate(itertools.pairwise(settings.grid())):
        both = x.repeat(2, 1, 1, 1)  # (2B, C, H, W)
        if step in recompute:
            z = model.encode(both, torch.full((len(both),), t, device=x.device), labels)  # (2B, N, D)
            modulations = model.decoder.modulations(z) if cache_modulations else ()
        v, v_uncond = model.decode(both, z, modulations).float().chunk(2)
        if guidance.active(t, step):
            v = guidance.combine(v, v_uncond)
        x = x + v * (t_next - t)
    return x
