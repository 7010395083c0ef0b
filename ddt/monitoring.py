"""What is watched while training: means of the losses, validation loss, preview grids, and whether weights are finite.

Shapes: B batch, C H W latent.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ddt.alignment import Target
from ddt.autoencoder import Autoencoder
from ddt.data import PREVIEW, draws, validation_batch
from ddt.flow import TimeDistribution, interpolate, training_times
from ddt.images import Images
from ddt.model import Denoiser
from ddt.objective import velocity_error
from ddt.pictures import image_grid, write_png
from ddt.sampling import SamplerSettings, sample

MAX_VALIDATION_IMAGES = 2048


def to_latents(
    batch: dict[str, Tensor],
    autoencoder: Autoencoder,
    accelerator: Accelerator,
    target: Target | None = None,
) -> dict[str, Tensor]:
    """Move a batch to the device and turn its images or moments into latents: the arguments of `FlowMatching.forward`.

    With a `target` its features of the images are among them.
    """
    moved = {key: value.to(accelerator.device, non_blocking=True) for key, value in batch.items()}
    images, posterior_noise = moved.pop("images", None), moved.pop("posterior_noise", None)
    moments = moved.pop("moments", None)
    if moments is None:
        assert images is not None, "a batch holds images or moments"
        moments = autoencoder.encode(images)
    moved["latents"] = autoencoder.sample(moments, posterior_noise)
    if target is not None:
        assert images is not None, "a target needs images"
        with accelerator.autocast():
            moved["features"] = target(images)
    return moved


class Meter:
    """Sums of losses on the device between two log rows: reading them is the loop's only wait for the device."""

    def __init__(self, device: torch.device, state: dict[str, Any] | None = None) -> None:
        state = state or {"sums": {}, "counts": {}}
        self.sums: dict[str, Tensor] = {key: value.to(device) for key, value in state["sums"].items()}
        self.counts: dict[str, float] = dict(state["counts"])  # steps: a loss may be switched off between two rows

    def add(self, losses: dict[str, Tensor], weight: float) -> None:
        """Add a micro-batch's losses, scalars on the device."""
        for key, value in losses.items():
            value = weight * value.detach().float()
            self.sums[key] = self.sums[key] + value if key in self.sums else value
            self.counts[key] = self.counts.get(key, 0) + weight

    def state(self, accelerator: Accelerator) -> dict[str, Any]:
        """Return what a checkpoint keeps, averaged over processes, so that a resumed run logs the same means.

        All processes call it together.
        """
        sums = {key: accelerator.reduce(value.clone(), reduction="mean").cpu() for key, value in self.sums.items()}
        return {"sums": sums, "counts": self.counts}

    def means(self, accelerator: Accelerator) -> dict[str, float]:
        """Return the means over steps and processes. All processes call it together."""
        means = accelerator.reduce(torch.stack(list(self.sums.values())), reduction="mean")
        return {key: mean / self.counts[key] for key, mean in zip(self.sums, means.tolist(), strict=True)}

    def reset(self) -> None:
        """Start again."""
        self.sums, self.counts = {}, {}


@torch.no_grad()
def validation_loss(
    model: Denoiser,
    time_distribution: TimeDistribution,
    images: Images,
    autoencoder: Autoencoder,
    accelerator: Accelerator,
    shape: tuple[int, int, int],
    batch_size: int,
) -> float:
    """Return the flow-matching loss of a network on held-out images at fixed times and noise (method.md 1).

    At most 2,048 images, evenly spread over the split, keep their labels. `shape` is (C, H, W) of a latent;
    `batch_size` does not change the result. All processes call it together, each takes its share, all get the mean.
    """
    count = min(len(images.labels), MAX_VALIDATION_IMAGES)
    chosen = np.linspace(0, len(images.labels) - 1, count).astype(np.int64)  # all classes, where they are sorted
    mine = chosen[accelerator.process_index :: accelerator.num_processes]
    total = torch.zeros((), device=accelerator.device, dtype=torch.float64)
    for start in range(0, len(mine), batch_size):
        indices = mine[start : start + batch_size]
        batch = to_latents(validation_batch(images, shape, indices), autoencoder, accelerator)
        t = training_times(batch["time_normal"], time_distribution)
        with accelerator.autocast():
            v_pred = model(interpolate(batch["latents"], batch["noise"], t), t, batch["y"])
        loss = velocity_error(v_pred, batch["latents"], batch["noise"])
        total += loss.double() * len(indices)
    return accelerator.reduce(total, reduction="sum").item() / count


@torch.no_grad()
def write_preview(
    path: Path,
    model: Denoiser,
    autoencoder: Autoencoder,
    accelerator: Accelerator,
    shape: tuple[int, int, int],
    sampler: SamplerSettings,
) -> None:
    """Draw a grid of a network's samples to `path`: up to ten classes across, four seeds down, always the same noise.

    `shape` is (C, H, W) of a latent; `sampler` says how. One process alone calls it.
    """
    columns = min(model.num_classes, 10)
    noise = np.stack([draws(0, PREVIEW, k).standard_normal(shape, dtype=np.float32) for k in range(4 * columns)])
    y = torch.arange(columns, device=accelerator.device).repeat(4)
    with accelerator.autocast():
        latents = sample(model, torch.from_numpy(noise).to(accelerator.device), y, **sampler.arguments())
        images = autoencoder.decode(latents)
    write_png(path, image_grid(images.cpu(), columns))


def all_finite(model: nn.Module) -> bool:
    """Tell whether every weight of a network is a finite number; waits for the device."""
    return bool(torch.stack([parameter.isfinite().all() for parameter in model.parameters()]).all())
