"""Images inside an npz file, read a batch at a time: 50,000 of them never sit in memory.

Shapes: n images, B batch, H W C.
"""

import contextlib
import math
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

import numpy as np

from ddt.errors import UserError, first_line, require
from ddt.files import fsync, sha256

UNREADABLE = (
    zipfile.BadZipFile, zlib.error, OSError, EOFError, ValueError, TypeError, AttributeError, NotImplementedError,
    RuntimeError, UnicodeError, KeyError,
)  # fmt: skip


@contextlib.contextmanager
def readable(path: Path, key: str) -> Iterator[None]:
    """Turn what a damaged or foreign file raises into a UserError of one line."""
    try:
        yield
    except UserError:
        raise
    except UNREADABLE as error:
        raise UserError(f"{key}={path}: damaged or no npz file ({first_line(error)}); make or copy it again") from error


def names(path: Path, key: str) -> list[str]:
    """Return the names of the arrays in an npz file."""
    with readable(path, key), zipfile.ZipFile(path) as archive:
        return [name.removesuffix(".npy") for name in archive.namelist()]


def read_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Read the head of a .npy file; return shape, whether it is in Fortran's order, and dtype."""
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(file)
    return np.lib.format.read_array_header_2_0(file)


def write_npz(path: Path, arrays: dict[str, np.ndarray], images: Iterable[np.ndarray], shape: tuple[int, ...]) -> None:
    """Write an npz of some arrays and, as `arr_0`, uint8 images of `shape` (n, H, W, C) that come
    batch by batch; whole or not at all. No images, no `arr_0`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp-{path.name}")  # what a kill leaves is written over by the next call
    with zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array(file, array, allow_pickle=False)
        if shape[0] > 0:
            with archive.open("arr_0.npy", "w", force_zip64=True) as file:
                header = {"descr": "|u1", "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(file, header)
                for batch in images:
                    file.write(np.ascontiguousarray(batch).data)
    fsync(temporary)
    temporary.replace(path)


class NpzImages:
    """The images `arr_0`, uint8 (n, H, W, C), of an npz file, plain or compressed; see
    `sources.ImageSource`.

    Args:
        path: the file. key: the setting that it came from, for messages.

    Raises UserError for a damaged file and for anything else in `arr_0`.
    """

    on_disk = True

    def __init__(self, path: Path, key: str) -> None:
        self.path, self.key = path, key
        found = names(path, key)
        require(
            "arr_0" in found,
            f"{key}={path}: arr_0 must be uint8 images (n, H, W, C), found only {', '.join(found) or 'nothing'}",
        )
        with readable(path, key), zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as file:
            shape, fortran, dtype = read_header(file)
        if dtype != np.uint8 or len(shape) != 4 or 0 in shape:
            raise UserError(f"{key}={path}: arr_0 must be uint8 images (n, H, W, C), found {dtype} {shape}")
        require(not fortran, f"{key}={path}: arr_0 is in Fortran's order; save np.ascontiguousarray(arr_0) instead")
        self.shape = shape
        self.size: tuple[int, int] = (shape[1], shape[2])
        self.channels: int = shape[3]
        self.has_labels = "arr_1" in found

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def name(self) -> str:
        """The file's path."""
        return str(self.path)

    @property
    def sha256(self) -> str:
        """The SHA-256 of the file, as 64 hexadecimal digits."""
        return sha256(self.path)

    def labels(self) -> np.ndarray | None:
        """Return the class of each image, `arr_1`, int64 (n,), or None; UserError where it is
        something else.
        """
        if not self.has_labels:
            return None
        with readable(self.path, self.key), np.load(self.path, allow_pickle=False) as file:
            labels = file["arr_1"]
        if labels.shape != (len(self),):
            raise UserError(
                f"{self.key}={self.path}: arr_1 has shape {labels.shape}, expected one class for each of {len(self)} "
                "images"
            )
        if not np.issubdtype(labels.dtype, np.integer):
            raise UserError(f"{self.key}={self.path}: arr_1 has dtype {labels.dtype}, expected integers")
        return labels.astype(np.int64)

    def batches(self, batch_size: int, rank: int = 0, num_processes: int = 1) -> Iterator[np.ndarray]:
        """Yield the batches of a process, uint8 (B, H, W, C); see `sources.ImageSource.batches`."""
        size = math.prod(self.shape[1:])
        with readable(self.path, self.key), zipfile.ZipFile(self.path) as archive, archive.open("arr_0.npy") as file:
            read_header(file)
            position = 0
            for start in range(rank * batch_size, len(self), batch_size * num_processes):
                file.seek((start - position) * size, 1)
                position = min(start + batch_size, len(self))
                data = file.read((position - start) * size)
                if len(data) != (position - start) * size:
                    raise EOFError("arr_0 ends early")
                yield np.frombuffer(data, dtype=np.uint8).reshape(-1, *self.shape[1:])
            if position == len(self) and file.read(1):  # past the end, where zipfile compares the checksum
                raise ValueError("arr_0 goes on after its last image")
