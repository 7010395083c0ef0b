"""Where images lie and how their bytes are reached: files of a folder, or members of shards."""

import dataclasses
import hashlib
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, ClassVar, Protocol

import numpy as np

NUM_THREADS = 16  # that ask for the sizes of files, which takes a network's round trip each
HASHED_IMAGES, HASHED_BYTES = 1_000, 2**16  # of a fingerprint: images, and bytes of each


def spread(count: int, limit: int) -> np.ndarray:
    """Return the indices of at most `limit` of `count` images, evenly spread."""
    return np.linspace(0, count - 1, min(count, limit)).astype(np.int64)


class Source(Protocol):
    """Images by name below `root`; `root / name` is what messages call them. Cheap to pickle."""

    @property
    def root(self) -> Path: ...

    @property
    def max_surveyed(self) -> int:
        """How many images are looked at before training, evenly spread."""

    def open(self, name: str) -> IO[bytes] | None:
        """Return an image as a file; None: it is the file `root / name`. Raises UserError."""

    def size(self, name: str) -> int:
        """Return the bytes of an image, −1 where it is not there."""

    def digest(self, names: list[str]) -> str:
        """Return a hash of the contents of images, quickly: of sizes, and of a sample of bytes."""


@dataclasses.dataclass(frozen=True)
class Folder:
    """The files of a folder."""

    root: Path
    max_surveyed: ClassVar[int] = 20_000

    def open(self, name: str) -> None:
        return None

    def size(self, name: str) -> int:
        return file_sizes([f"{self.root}/{name}"])[0]

    def digest(self, names: list[str]) -> str:
        """Hash the size of every file and the first 64 KiB of a thousand, evenly spread."""
        paths = [f"{self.root}/{name}" for name in names]
        shares = [paths[k::NUM_THREADS] for k in range(NUM_THREADS)]
        with ThreadPoolExecutor(NUM_THREADS) as pool:
            sizes = list(pool.map(file_sizes, shares))
            return digest_of(sizes, pool.map(file_start, [paths[k] for k in spread(len(paths), HASHED_IMAGES)]))


def digest_of(sizes: Iterable[Any], starts: Iterable[bytes]) -> str:
    """Return the hash of sizes in bytes, in any grouping, and of the first bytes of some images."""
    digest = hashlib.sha256()
    for size in sizes:
        digest.update(repr(size).encode())
    for start in starts:
        digest.update(hashlib.sha256(start).digest())
    return digest.hexdigest()[:16]


def file_sizes(paths: list[str]) -> list[int]:
    """Return the bytes of files, −1 of one that is not there: reading it will name it."""
    sizes = []
    for path in paths:
        try:
            sizes.append(os.stat(path).st_size)
        except OSError:
            sizes.append(-1)
    return sizes


def file_start(path: str) -> bytes:
    """Return the first bytes of a file, none of one that cannot be read."""
    try:
        with open(path, "rb") as file:
            return file.read(HASHED_BYTES)
    except OSError:
        return b""
