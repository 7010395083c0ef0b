"""The cost of sampling in MACs; conventions of `ddt.model.cost`."""

from ddt.errors import require
from ddt.model import Denoiser
from ddt.model.cost import network_macs
from ddt.sampling.settings import SamplerSettings, check_base_head
from ddt.sampling.sharing import require_encoder, segments


def sampling_macs(
    model: Denoiser,
    height: int,
    width: int,
    settings: SamplerSettings,
    cached: bool = True,
    skip_unconditional: bool = True,
) -> int:
    """Count the MACs of sampling one image, latents (C, height, width), without a guide.

    Args:
        settings: the sampler; its schedule must be a list of steps, `uniform:…` or None.
        cached: modulations of a z_t that several calls share are computed once (`cache_bytes` large
            enough); False computes them at each call.
        skip_unconditional: the unconditional half runs only where needed; False runs both halves at
            every call, as the release does.

    Raises UserError for the adaptive solver, a schedule yet to be fitted, a schedule on a model
    without an encoder, and internal guidance of one without a base head. Source: method.md 4;
    `sharing.GuidedVelocity`.
    """
    require(
        not settings.adaptive, f"solver={settings.solver}: chooses its own steps, so their cost is not known beforehand"
    )
    check_base_head(settings, model.base_depth)
    network, guidance, internal = network_macs(model, height, width), settings.guidance(), settings.internal()
    shared = segments(settings)
    if shared:
        require_encoder(model)
    total, saved = 0, 0  # saved: MACs of modulations cached for the segment
    for step, calls in enumerate(settings.call_times()):
        segment = shared.get(step)
        if segment is not None:
            saved = network.modulations if cached and segment.cache else 0
        for t in calls:
            guided, with_base = guidance.active(t, step), internal.active(t, step)
            if segment is not None or not shared:
                both = guided
                if segment is not None:
                    both, with_base = segment.both_halves, segment.with_base
                encoded = 2 if both or not skip_unconditional else 1
                total += encoded * (network.encoder + saved + (network.base if with_base else 0))
            decoded = 2 if guided or not skip_unconditional else 1
            total += decoded * (network.decoder - saved)
    return total
