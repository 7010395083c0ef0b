"""Images → features, on one process or several: what a feature extractor is, and `extract`.

Shapes: n images, B batch, C channels, H W pixels, F features.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from ddt.errors import UserError, require
from ddt.logs import progress_bar
from ddt.metrics.frechet import Moments
from ddt.metrics.images import ImageBatches, ImageSource


class Extractor(Protocol):
    """A network that turns images into features: per image one vector in each of some spaces."""

    name: str  # as in `features=`
    channels: int  # of its input images
    image_size: int | None  # pixels per side of its input images, None where any
    batch_size: int  # images at once
    spaces: dict[str, int]  # name of a space → F
    rows: tuple[str, ...]  # spaces whose vectors are stored image by image
    distances: dict[str, str]  # Fréchet distance → its space; the first is the main one
    pr_space: str  # of precision and recall
    nearest_space: str  # of the nearest training images
    own_classes: bool  # whether its probabilities are of the samples' own classes

    def identity(self) -> dict[str, Any]:
        """Return what its features depend on, for receipts: plain values, including `name`."""

    def deviations(self) -> list[str]:
        """Return one line for each way it may differ from the network of published numbers."""

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """Return float32 features (B, F) by space of uint8 images (B, C, H, W)."""


def check_images(images: ImageSource, key: str, extractor: Extractor) -> None:
    """Raise UserError where an extractor reads no images of this size or channels."""
    require(
        images.channels == extractor.channels,
        f"{key}={images.name}: images of {images.channels} channels, but features={extractor.name} reads "
        f"{extractor.channels}; choose other features or other images",
    )
    side = extractor.image_size
    require(
        side is None or images.size == (side, side),
        f"{key}={images.name}: images of {images.size[0]}×{images.size[1]} pixels, but features={extractor.name} "
        f"reads {side}×{side}; choose other features or other images",
    )


@dataclasses.dataclass(frozen=True)
class FeatureSet:
    """Features of `count` images by space: stored vectors (n, F), and moments of all."""

    count: int
    rows: dict[str, Tensor]
    moments: dict[str, Moments]


def extract(
    images: ImageBatches, extractor: Extractor, accelerator: Accelerator, desc: str, batch_size: int | None = None
) -> FeatureSet | None:
    """Read a set of images once and return its features on the main process, None on the others.

    All processes call it together. Each measures its share; rows and sums are gathered batch by
    batch in the order of the set, so that the result is bit-equal for any number of processes.
    batch_size: images at once; None is the extractor's. Raises UserError for non-finite features,
    and for some so large that float32 holds no distance between them.
    """
    rank, world, device = accelerator.process_index, accelerator.num_processes, accelerator.device
    main, count, batch_size = rank == 0, len(images), batch_size or extractor.batch_size
    needed = {*extractor.rows, *extractor.distances.values()}
    spaces = {name: size for name, size in extractor.spaces.items() if name in needed}  # one order on all processes
    widths = list(spaces.values())
    rows = {name: torch.empty(count, spaces[name], device=device) for name in extractor.rows if main}
    moments = {name: Moments(spaces[name], device) for name in dict.fromkeys(extractor.distances.values()) if main}
    finite = torch.ones((), dtype=torch.bool, device=device)
    batches = images.batches(batch_size, rank, world)
    batches = prefetch(batches) if images.on_disk else batches
    start = 0
    with progress_bar(total=count, unit="img", desc=desc, disable=not main) as progress:
        for _ in range(0, count, batch_size * world):
            batch = next(batches, None)
            features = None if batch is None else extractor(to_device(batch, device))
            own = None if features is None else torch.cat([features[name] for name in spaces], dim=1)
            for values in gather(own, accelerator, batch_size, sum(widths)):
                values = values[: count - start]  # all but the set's last batch are full
                if len(values) == 0:
                    break
                for name, part in zip(spaces, values.split(widths, dim=1), strict=True):
                    if name in rows:
                        rows[name][start : start + len(part)] = part
                    if name in moments:
                        moments[name].add(part)
                finite &= (4 * values.square().sum(dim=1)).isfinite().all()  # bounds each squared distance
                start += len(values)
                progress.update(len(values))
    if not bool(finite):  # one device sync for the whole set
        raise UserError(
            f"features={extractor.name}: the features of {images.name} are NaN, infinite or too large; check the "
            "weights"
        )
    return FeatureSet(count, rows, moments) if main else None


def gather(values: Tensor | None, accelerator: Accelerator, batch_size: int, width: int) -> tuple[Tensor, ...]:
    """Return the vectors (B, F) of a step by process, those of several padded to batch_size.

    values: this process's own, None after the end of the set.
    """
    if accelerator.num_processes > 1:
        padded = torch.zeros(batch_size, width, device=accelerator.device)
        if values is not None:
            padded[: len(values)] = values
        values = accelerator.gather(padded)
    assert values is not None, "a step has a batch"
    return values.split(batch_size)


def prefetch(batches: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    """Yield batches, reading each while the one before it is processed."""
    with ThreadPoolExecutor(max_workers=1) as worker:
        upcoming = worker.submit(next, batches, None)
        while (batch := upcoming.result()) is not None:
            upcoming = worker.submit(next, batches, None)
            yield batch


def to_device(batch: np.ndarray, device: torch.device) -> Tensor:
    """Return images (B, H, W, C) as a tensor (B, C, H, W) on a device, without a device sync."""
    pixels = torch.tensor(batch)
    if device.type == "cuda":
        pixels = pixels.pin_memory()
    return pixels.to(device, non_blocking=True).permute(0, 3, 1, 2)


@contextlib.contextmanager
def exact_arithmetic() -> Iterator[None]:
    """Turn off TF32 and cuDNN's benchmark, and restore the flags afterwards."""
    before, cudnn = torch.get_float32_matmul_precision(), torch.backends.cudnn
    torch.set_float32_matmul_precision("highest")
    try:
        with cudnn.flags(enabled=cudnn.enabled, benchmark=False, deterministic=True, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)
