"""Byte-identical images in a set of samples, which move precision and recall.

Shapes: B batch, H W C.
"""

from collections.abc import Iterator
from hashlib import blake2b

import numpy as np
from accelerate.utils import gather_object

from ddt.metrics.images import ImageBatches


class CountedImages:
    """A set of images that hashes each one when it is read; see `metrics.images.ImageBatches`."""

    def __init__(self, images: ImageBatches) -> None:
        self.images, self.on_disk, self.name = images, images.on_disk, images.name
        self.hashes: list[bytes] = []  # of the images that this process has read

    def __len__(self) -> int:
        return len(self.images)

    def batches(self, batch_size: int, rank: int = 0, num_processes: int = 1) -> Iterator[np.ndarray]:
        """Yield the batches of a process, uint8 (B, H, W, C)."""
        for batch in self.images.batches(batch_size, rank, num_processes):
            self.hashes += [blake2b(image, digest_size=8).digest() for image in batch]
            yield batch

    def copies(self) -> int:
        """Return how many images are equal to an earlier one, once all are read.

        All processes call it together.
        """
        hashes = gather_object(self.hashes)
        return len(hashes) - len(set(hashes))


def copies_reason(copies: int, count: int) -> str:
    """Return why numbers of `count` samples with copies compare with no others."""
    return (
        f"{copies:,} of the {count:,} samples are byte-identical to another one: precision and recall are those of "
        "fewer images"
    )
