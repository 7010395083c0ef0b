"""What sampling costs, in multiply-accumulates; conventions of `ddt.model.cost`."""

import torch

from ddt.errors import require
from ddt.model import Denoiser
from ddt.model.cost import network_macs
from ddt.sampling.settings import SamplerSettings
from ddt.sampling.sharing import GuidedVelocity


def sampling_macs(
    model: Denoiser,
    height: int,
    width: int,
    settings: SamplerSettings,
    cached: bool = True,
    skip_unconditional: bool = True,
) -> int:
    """Count the MACs of drawing one image, latents (C, height, width), with `ddt.sample` and
    without a guide.

    Args:
        settings: the sampler; its schedule must be a list of steps, `uniform:…` or None.
        cached: the decoder's modulations are computed where z is, if other steps use it too
            (`cache_bytes` large enough for all of them); False computes them at each decoding.
        skip_unconditional: the unconditional half runs only where it is needed; False runs both
            halves at every call, as the release does.

    Raises UserError for the adaptive solver, whose calls nobody knows beforehand, for a schedule
    that is fitted to a model, and for one on a model without an encoder. Source: method.md 4;
    `sharing.GuidedVelocity`.
    """
    require(
        settings.solver != "adaptive",
        "sampler=adaptive: chooses its own steps, so their cost cannot be told beforehand",
    )
    network, times, guidance = network_macs(model, height, width), settings.call_times(), settings.guidance()
    schedule = settings.schedule()
    # the segments as sampling itself sees them; the class plays no part
    y = torch.zeros(1, dtype=torch.long)
    segments = GuidedVelocity(model, y, times, guidance, schedule, settings.forecast_order).segments
    total, kept = 0, False
    for step, calls in enumerate(times):
        reaches, several = segments.get(step, (False, False))
        if step in segments:
            kept = cached and several
        for t in calls:
            if schedule is None or step in segments:
                guided = guidance.active(t, step) if schedule is None else reaches
                halves = 2 if guided or not skip_unconditional else 1
                total += halves * (network.encoder + (network.modulations if kept else 0))
            halves = 2 if guidance.active(t, step) or not skip_unconditional else 1
            total += halves * (network.decoder - (network.modulations if kept else 0))
    return total
