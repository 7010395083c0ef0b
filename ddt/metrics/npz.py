"""Images inside an npz file, read a batch at a time: 50,000 of them never sit in memory.

Shapes: n images, B batch, H W C.
"""

import contextlib
import math
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np

from ddt.errors import UserError, first_line, require
from ddt.files import sha256

UNREADABLE = (
    zipfile.BadZipFile, zlib.error, OSError, EOFError, ValueError, TypeError, AttributeError, NotImplementedError,
    RuntimeError, UnicodeError,
)  # fmt: skip


def npz_path(path: Path, key: str) -> Path:
    """Return the npz file that `path` is, or the `samples.npz` of the folder that it is; UserError where there is
    none.
    """
    path = path / "samples.npz" if path.is_dir() else path
    require(path.is_file(), f"{key}={path}: no such file; give an npz file, or a folder of a samples.npz or of images")
    return path


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


class NpzImages:
    """The RGB images `arr_0`, uint8 (n, H, W, 3), of an npz file, plain or compressed.

    Args:
        path: the file. key: the setting that it came from, for messages.

    `len()` is n and `size` is (H, W). Raises UserError for a damaged file and for anything else in `arr_0`.
    """

    def __init__(self, path: Path, key: str) -> None:
        self.path, self.key = path, key
        found = names(path, key)
        require(
            "arr_0" in found,
            f"{key}={path}: arr_0 must be uint8 images (n, H, W, 3), found only {', '.join(found) or 'nothing'}",
        )
        with readable(path, key), zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as file:
            shape, fortran, dtype = read_header(file)
        if dtype != np.uint8 or len(shape) != 4 or shape[-1] != 3 or 0 in shape:
            raise UserError(f"{key}={path}: arr_0 must be uint8 images (n, H, W, 3), found {dtype} {shape}")
        require(not fortran, f"{key}={path}: arr_0 is in Fortran's order; save np.ascontiguousarray(arr_0) instead")
        self.shape = shape
        self.size = shape[1:3]

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def sha256(self) -> str:
        """The SHA-256 of the file, as 64 hexadecimal digits."""
        return sha256(self.path)

    def batches(self, batch_size: int) -> Iterator[np.ndarray]:
        """Yield the images in file order, uint8 (B, H, W, 3), B at most batch_size."""
        with readable(self.path, self.key), zipfile.ZipFile(self.path) as archive, archive.open("arr_0.npy") as file:
            read_header(file)
            for start in range(0, len(self), batch_size):
                shape = (min(batch_size, len(self) - start), *self.shape[1:])
                data = file.read(math.prod(shape))
                if len(data) != math.prod(shape):
                    raise EOFError("arr_0 ends early")
                yield np.frombuffer(data, dtype=np.uint8).reshape(shape)
            file.read(1)  # past the end, where zipfile compares the checksum
