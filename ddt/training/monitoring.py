"""What is watched while training: means of the losses, validation loss, preview grids.

Shapes: B batch, C H W latent.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from ddt.autoencoder import Autoencoder
from ddt.data.images import Images, spread
from ddt.data.stream import validation_batch
from ddt.draws import PREVIEW, draws
from ddt.flow import TimeDistribution, interpolate, training_times
from ddt.model import Denoiser
from ddt.objective.alignment import Target
from ddt.objective.flow_matching import velocity_errors
from ddt.pictures import image_grid, readable, write_png
from ddt.sampling.sample import sample
from ddt.sampling.settings import SamplerSettings

MAX_VALIDATION_IMAGES = 2048
T_BINS = 10
BY_T = "fm_loss_by_t"
T_NAMES = [f"{BY_T}/{k / T_BINS:.1f}-{(k + 1) / T_BINS:.1f}" for k in range(T_BINS)]


def to_latents(
    batch: dict[str, Tensor],
    autoencoder: Autoencoder,
    accelerator: Accelerator,
    target: Target | None = None,
) -> dict[str, Tensor]:
    """Move a batch to the device and turn its images or moments into latents: the arguments of
    `FlowMatching.forward`.

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
    """Means between two log rows, summed on the device: reading them is the loop's only wait for
    it.

    state: what a checkpoint keeps, one entry a process; of another number of processes, their mean
    is gone on with.
    """

    def __init__(self, device: torch.device, rank: int = 0, num_processes: int = 1, state: Any = None) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, Tensor] = {}
        self.step: list[tuple[str, Tensor, Tensor]] = []  # of the step that is under way
        for key, (sums, counts) in (state or {}).items():
            if len(sums) == num_processes:
                mine = sums[rank], counts[rank]
            else:  # each process counts its steps, but its own samples
                parts = num_processes if key == BY_T else len(sums)
                mine = sums.sum(0) / parts, counts.sum(0) / parts
            self.sums[key], self.counts[key] = (value.to(device) for value in mine)

    def add(self, losses: dict[str, Tensor], weight: float) -> None:
        """Add what `FlowMatching` returned for a micro-batch that is `weight` of a step."""
        for key, value in losses.items():
            if key not in ("t", "errors"):
                value = weight * value.detach().float()
                self.step.append((key, value, torch.full_like(value, weight)))
        bins = torch.arange(T_BINS, device=losses["t"].device)
        # a matrix product, for adding at indices gives other last bits each time on a GPU
        inside = ((losses["t"] * T_BINS).long().clamp(max=T_BINS - 1)[:, None] == bins).float()
        self.step.append((BY_T, losses["errors"] @ inside, inside.sum(0)))

    def add_step(self, norm: Tensor, largest: float | None) -> None:
        """Add a step's gradient norm, before clipping, and whether it was above the `largest` that
        is let through.
        """
        self.step.append(("grad_norm", norm, torch.ones_like(norm)))
        if largest is not None:
            self.step.append(("clipped", (norm > largest).float(), torch.ones_like(norm)))

    def end_step(self, skipped: Tensor) -> None:
        """Take the step's values into the means, unless it was left out (1.0)."""
        for key, value, count in self.step:
            kept = torch.where(skipped > 0, 0, value), torch.where(skipped > 0, 0, count)
            known = key in self.sums
            self.sums[key] = self.sums[key] + kept[0] if known else kept[0]
            self.counts[key] = self.counts[key] + kept[1] if known else kept[1]
        self.step = []

    def state(self, accelerator: Accelerator) -> dict[str, tuple[Tensor, Tensor]]:
        """Return what a checkpoint keeps. All processes call it together."""
        everyone = {
            key: accelerator.gather(torch.stack([self.sums[key], self.counts[key]])[None]).cpu() for key in self.sums
        }
        return {key: (values[:, 0].contiguous(), values[:, 1].contiguous()) for key, values in everyone.items()}

    def means(self, accelerator: Accelerator) -> dict[str, float]:
        """Return the means over steps and processes, without those of which nothing was seen. All
        processes call it together.
        """
        flat = torch.cat([torch.stack([self.sums[key], self.counts[key]]).reshape(2, -1) for key in self.sums], dim=1)
        sums, counts = accelerator.reduce(flat, reduction="sum").tolist()
        names = [name for key in self.sums for name in (T_NAMES if key == BY_T else [key])]
        return {name: s / n for name, s, n in zip(names, sums, counts, strict=True) if n > 0}

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
    """Return the flow-matching loss of a network on held-out images at fixed times and noise
    (method.md 1).

    At most 2,048 images, evenly spread over the split, keep their labels. `shape` is (C, H, W) of a
    latent; `batch_size` does not change the result. All processes call it together, each takes its
    share, all get the mean.
    """
    chosen = spread(len(images.labels), MAX_VALIDATION_IMAGES)
    mine = chosen[accelerator.process_index :: accelerator.num_processes]
    total = torch.zeros((), device=accelerator.device, dtype=torch.float64)
    for start in range(0, len(mine), batch_size):
        indices = mine[start : start + batch_size]
        batch = to_latents(validation_batch(images, shape, indices), autoencoder, accelerator)
        t = training_times(batch["time_normal"], time_distribution)
        with accelerator.autocast():
            v_pred = model(interpolate(batch["latents"], batch["noise"], t), t, batch["y"])
        total += velocity_errors(v_pred, batch["latents"], batch["noise"]).double().sum()
    return accelerator.reduce(total, reduction="sum").item() / len(chosen)


@torch.no_grad()
def write_training_images(
    path: Path,
    images: Images,
    autoencoder: Autoencoder,
    accelerator: Accelerator,
    shape: tuple[int, int, int],
) -> None:
    """Draw training images as they come back from the autoencoder to `path`: what the network is to
    learn, four of each of the first ten classes, a class a column.

    `shape` is (C, H, W) of a latent. One process alone calls it.
    """
    of_class = [np.flatnonzero(images.labels == label)[:4] for label in np.unique(images.labels)[:10]]
    chosen = np.stack([np.resize(numbers, 4) for numbers in of_class], axis=1).ravel()  # row by row
    batch = to_latents(validation_batch(images, shape, chosen), autoencoder, accelerator)
    pictures = autoencoder.decode(batch["latents"])
    names = readable(images.class_names)
    write_png(path, image_grid(pictures.cpu(), len(of_class), [names[y] for y in batch["y"].tolist()]))


@torch.no_grad()
def write_preview(
    path: Path,
    model: Denoiser,
    autoencoder: Autoencoder,
    accelerator: Accelerator,
    shape: tuple[int, int, int],
    sampler: SamplerSettings,
) -> None:
    """Draw a grid of a network's samples to `path`: up to ten classes across, four seeds down,
    always the same noise.

    `shape` is (C, H, W) of a latent; `sampler` says how. One process alone calls it.
    """
    columns = min(model.num_classes, 10)
    noise = np.stack([draws(0, PREVIEW, k).standard_normal(shape, dtype=np.float32) for k in range(4 * columns)])
    y = torch.arange(columns, device=accelerator.device).repeat(4)
    with accelerator.autocast():
        latents = sample(model, torch.from_numpy(noise).to(accelerator.device), y, **sampler.arguments())
        images = autoencoder.decode(latents)
    write_png(path, image_grid(images.cpu(), columns))
