"""Where the images come from that are measured: an npz file, a folder of pictures, or a data set.

Shapes: n images, B batch, H W C.
"""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import numpy as np

from ddt.checkpoint.folder import find_checkpoint
from ddt.data.images import Images
from ddt.errors import require
from ddt.metrics.folder import SUFFIXES, FolderImages, image_files
from ddt.metrics.npz import NpzImages

SAMPLES = "samples.npz"
NUM_THREADS = min(16, os.cpu_count() or 1)  # that decode pictures


class ImageBatches(Protocol):
    """Images in a fixed order. `len()` is n. on_disk: reading them can go on while others are
    measured.
    """

    on_disk: bool

    def __len__(self) -> int: ...

    @property
    def name(self) -> str:
        """Where they are, for people."""

    def batches(self, batch_size: int, rank: int = 0, num_processes: int = 1) -> Iterator[np.ndarray]:
        """Yield the batches of one of several processes, uint8 (B, H, W, C), B at most batch_size.

        The set is cut into slices of batch_size, dealt to the processes in turn: they are the same
        whatever the number of processes, so that no feature depends on it.
        """


class ImageSource(ImageBatches, Protocol):
    """A set of images that exists, of one size."""

    size: tuple[int, int]  # (H, W)
    channels: int

    @property
    def sha256(self) -> str:
        """A hash of what they are."""

    def labels(self) -> np.ndarray | None:
        """Return the class of each image, int64 (n,), or None where none is known."""


class DataImages:
    """The images of a data set, or those at `chosen` (m,); see `ImageSource`. name: `data:` and the
    data set's.
    """

    on_disk = True

    def __init__(self, name: str, images: Images, chosen: np.ndarray | None = None) -> None:
        self.name, self.images = name, images
        self.chosen = np.arange(len(images.labels)) if chosen is None else chosen
        self.size, self.channels = (images.image_size, images.image_size), images.channels

    def __len__(self) -> int:
        return len(self.chosen)

    @property
    def sha256(self) -> str:
        """The fingerprint of the list of images, not of a choice from it."""
        return self.images.fingerprint

    def labels(self) -> np.ndarray:
        """Return the class of each image, int64 (n,)."""
        return self.images.labels[self.chosen]

    def batches(self, batch_size: int, rank: int = 0, num_processes: int = 1) -> Iterator[np.ndarray]:
        """Yield the batches of a process, uint8 (B, H, W, C)."""
        with ThreadPoolExecutor(max_workers=NUM_THREADS) as workers:
            for start in range(rank * batch_size, len(self), batch_size * num_processes):
                chosen = self.chosen[start : start + batch_size]
                shares = np.array_split(chosen, min(len(chosen), NUM_THREADS))
                images = np.concatenate(list(workers.map(self.images.load, shares)))
                yield np.ascontiguousarray(images.transpose(0, 2, 3, 1))


def open_images(path: Path, key: str) -> NpzImages | FolderImages:
    """Open an npz file, a folder's samples.npz, those of the run or checkpoint that it is, or else
    its image files; pixels stay on disk.

    Raises UserError naming `key` where there is none of them.
    """
    if not path.is_dir():
        require(
            path.is_file(),
            f"{key}={path}: no such file; give an npz file, a folder of a {SAMPLES} or of images, or a run that was "
            "sampled from",
        )
        require(
            path.suffix.lower() not in SUFFIXES, f"{key}={path}: is a single picture; give the folder that it lies in"
        )
        return NpzImages(path, key)
    if (path / SAMPLES).is_file():
        return NpzImages(path / SAMPLES, key)
    if (path / "checkpoints").is_dir() or (path / "manifest.json").is_file():
        samples = find_checkpoint(path) / "samples" / SAMPLES
        require(samples.is_file(), f"{key}={path}: {samples} is missing; sample first, or give the folder of a set")
        return NpzImages(samples, key)
    require(
        bool(image_files(path)),
        f"{key}={path}: holds no {SAMPLES}, no images (.png, .jpg) and no checkpoints; give a folder that does",
    )
    return FolderImages(path, key)


def pick(images: ImageSource, indices: list[int], batch_size: int = 64) -> np.ndarray:
    """Return some images of a set, in the order of `indices`, uint8 (len(indices), H, W, C); reads
    the set up to the last of them.
    """
    found: dict[int, np.ndarray] = {}
    for number, batch in enumerate(images.batches(batch_size)):
        start = number * batch_size
        found |= {k: batch[k - start] for k in indices if start <= k < start + len(batch)}
        if len(found) == len(set(indices)):
            break
    return np.stack([found[k] for k in indices])
