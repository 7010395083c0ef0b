"""A batch on its way into the objective: images or moments → latents, images → target features.

Shapes: B batch, C H W latent.
"""

import torch
from torch import Tensor

from ddt.autoencoder import Autoencoder
from ddt.objective.alignment_target import Target


def to_latents(
    batch: dict[str, Tensor],
    autoencoder: Autoencoder,
    device: torch.device,
    target: Target | None = None,
) -> dict[str, Tensor]:
    """Move a batch to the device and turn its images or moments into latents: the arguments of
    `Objective.forward`.

    With a `target` its features of the images are among them, under the caller's autocast.
    """
    moved = {key: value.to(device, non_blocking=True) for key, value in batch.items()}
    images, posterior_noise = moved.pop("images", None), moved.pop("posterior_noise", None)
    moments = moved.pop("moments", None)
    if moments is None:
        assert images is not None, "a batch holds images or moments"
        moments = autoencoder.encode(images)
    moved["latents"] = autoencoder.sample(moments, posterior_noise)
    if target is not None:
        assert images is not None, "a target needs images"
        moved["features"] = target(images)
    return moved
