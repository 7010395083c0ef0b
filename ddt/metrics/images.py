"""Sets of images that are measured: an npz file, a folder of image files, or a data set.

They are read a batch at a time, so that 50,000 images never sit in memory.
Shapes: n images, B batch, H W C.
"""

import contextlib
import hashlib
import math
import os
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Protocol

import numpy as np
from PIL import Image

from ddt.checkpoint.folder import find_checkpoint
from ddt.data.images import Images
from ddt.errors import UserError, first_line, require
from ddt.files import fsync, sha256

SAMPLES = "samples.npz"
SUFFIXES = (".png", ".jpg", ".jpeg")
CHANNELS = {"L": 1, "RGB": 3}  # of PIL's modes
NUM_THREADS = min(16, os.cpu_count() or 1)  # that decode images
UNREADABLE = (
    zipfile.BadZipFile, zlib.error, OSError, EOFError, ValueError, TypeError, AttributeError, NotImplementedError,
    RuntimeError, UnicodeError, KeyError,
)  # fmt: skip


class ImageBatches(Protocol):
    """Images in a fixed order, n in all. on_disk: they can be read while others are measured."""

    on_disk: bool

    def __len__(self) -> int: ...

    @property
    def name(self) -> str:
        """Where they are, for messages and receipts."""

    def batches(self, batch_size: int, rank: int = 0, num_processes: int = 1) -> Iterator[np.ndarray]:
        """Yield the batches of one of several processes, uint8 (B, H, W, C), B ≤ batch_size.

        The set is cut into slices of batch_size, dealt to the processes in turn: they are the same
        whatever the number of processes, so that no feature depends on it.
        """


class ImageSource(ImageBatches, Protocol):
    """A set of images that exists, all of one size."""

    size: tuple[int, int]  # (H, W)
    channels: int

    @property
    def sha256(self) -> str:
        """A hash of what they are."""

    def labels(self) -> np.ndarray | None:
        """Return the class of each image, int64 (n,), or None where none is known."""


class NpzImages:
    """The images `arr_0`, uint8 (n, H, W, C), of an npz file, plain or compressed.

    key: the setting that the path came from, for messages. Raises UserError for a damaged file and
    for anything else in `arr_0`.
    """

    on_disk = True

    def __init__(self, path: Path, key: str) -> None:
        self.path, self.key = path, key
        names = array_names(path, key)
        wanted = f"{key}={path}: arr_0 must be uint8 images (n, H, W, C), found"
        require("arr_0" in names, f"{wanted} only {', '.join(names) or 'nothing'}")
        with npz_errors(path, key), zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as file:
            shape, fortran, dtype = read_header(file)
        if dtype != np.uint8 or len(shape) != 4 or 0 in shape:
            raise UserError(f"{wanted} {dtype} {shape}")
        require(not fortran, f"{key}={path}: arr_0 is in Fortran's order; save np.ascontiguousarray(arr_0) instead")
        self.shape = shape
        self.size: tuple[int, int] = (shape[1], shape[2])
        self.channels: int = shape[3]
        self.has_labels = "arr_1" in names

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def name(self) -> str:
        """The file's path."""
        return str(self.path)

    @property
    def sha256(self) -> str:
        """The SHA-256 of the file."""
        return sha256(self.path)

    def labels(self) -> np.ndarray | None:
        """Return `arr_1`, int64 (n,), or None; UserError where it holds no class of each image."""
        if not self.has_labels:
            return None
        with npz_errors(self.path, self.key), np.load(self.path, allow_pickle=False) as file:
            labels = file["arr_1"]
        at = f"{self.key}={self.path}: arr_1 has"
        if labels.shape != (len(self),):
            raise UserError(f"{at} shape {labels.shape}, expected one class for each of {len(self)} images")
        if not np.issubdtype(labels.dtype, np.integer):
            raise UserError(f"{at} dtype {labels.dtype}, expected integers")
        return labels.astype(np.int64)

    def batches(self, batch_size: int, rank: int = 0, num_processes: int = 1) -> Iterator[np.ndarray]:
        """Yield the batches of a process; see `ImageBatches`."""
        size = math.prod(self.shape[1:])
        with npz_errors(self.path, self.key), zipfile.ZipFile(self.path) as archive, archive.open("arr_0.npy") as file:
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


class FolderImages:
    """The PNG and JPEG files of a folder, all grey or all RGB and of one size, sorted by name.

    key: the setting that the path came from, for messages. Raises UserError, before any pixel is
    decoded, that names the first file that cannot be used.
    """

    on_disk = True

    def __init__(self, path: Path, key: str) -> None:
        self.path, self.key = path, key
        self.files = image_files(path)
        assert self.files, "open_images has looked"
        first = self.files[0].name
        self.size, self.channels = (0, 0), 0
        for k, file in enumerate(self.files):
            with image_errors(file, key), Image.open(file) as image:
                require(image.mode in CHANNELS, f"{key}={file}: is of mode {image.mode}; convert all images to RGB")
                size, channels = (image.height, image.width), CHANNELS[image.mode]
            if k == 0:
                self.size, self.channels = size, channels
            require(
                size == self.size,
                f"{key}={file}: is {size[1]}×{size[0]} px, {first} {self.size[1]}×{self.size[0]}; "
                "all images must be of one size",
            )
            require(
                channels == self.channels,
                f"{key}={file}: has {channels} channels, {first} {self.channels}; convert all images to RGB",
            )

    def _decode(self, file: Path) -> np.ndarray:
        with image_errors(file, self.key), Image.open(file) as image:
            return np.asarray(image).reshape(*self.size, self.channels)

    def __len__(self) -> int:
        return len(self.files)

    @property
    def name(self) -> str:
        """The folder's path."""
        return str(self.path)

    @property
    def sha256(self) -> str:
        """The SHA-256 of all names and contents."""
        lines = "".join(f"{sha256(file)}  {file.name}\n" for file in self.files)
        return hashlib.sha256(lines.encode()).hexdigest()

    def labels(self) -> None:
        """Return None: files in one folder carry no classes."""

    def batches(self, batch_size: int, rank: int = 0, num_processes: int = 1) -> Iterator[np.ndarray]:
        """Yield the batches of a process; see `ImageBatches`."""
        with ThreadPoolExecutor(max_workers=NUM_THREADS) as workers:
            for start in range(rank * batch_size, len(self), batch_size * num_processes):
                yield np.stack(list(workers.map(self._decode, self.files[start : start + batch_size])))


class DataImages:
    """The images of a data set, or those at `chosen` (m,). name: `data:` and the data set's."""

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
        """Yield the batches of a process; see `ImageBatches`."""
        with ThreadPoolExecutor(max_workers=NUM_THREADS) as workers:
            for start in range(rank * batch_size, len(self), batch_size * num_processes):
                chosen = self.chosen[start : start + batch_size]
                shares = np.array_split(chosen, min(len(chosen), NUM_THREADS))
                images = np.concatenate(list(workers.map(self.images.load, shares)))  # (B, C, H, W)
                yield np.ascontiguousarray(images.transpose(0, 2, 3, 1))


def open_images(path: Path, key: str) -> NpzImages | FolderImages:
    """Open an npz file, a folder's samples.npz, those of the run or checkpoint that it is, or else
    its image files; pixels stay on disk. Raises UserError naming `key` where there is none of them.
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
    """Return the images at `indices` in that order, uint8 (len(indices), H, W, C)."""
    picked: dict[int, np.ndarray] = {}
    for number, batch in enumerate(images.batches(batch_size)):
        start = number * batch_size
        picked |= {k: batch[k - start] for k in indices if start <= k < start + len(batch)}
        if len(picked) == len(set(indices)):
            break
    return np.stack([picked[k] for k in indices])


def image_files(folder: Path) -> list[Path]:
    """Return the image files in a folder, not in those below it, sorted by name."""
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)


@contextlib.contextmanager
def image_errors(file: Path, key: str) -> Iterator[None]:
    """Turn what a damaged image file raises, a truncated one when it is decoded, into one line."""
    try:
        yield
    except UserError:
        raise
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{key}={file}: damaged or no image ({first_line(error)}); make it again") from error


@contextlib.contextmanager
def npz_errors(path: Path, key: str) -> Iterator[None]:
    """Turn what a damaged or foreign npz file raises into a UserError of one line."""
    try:
        yield
    except UserError:
        raise
    except UNREADABLE as error:
        raise UserError(f"{key}={path}: damaged or no npz file ({first_line(error)}); make or copy it again") from error


def array_names(path: Path, key: str) -> list[str]:
    """Return the names of the arrays in an npz file."""
    with npz_errors(path, key), zipfile.ZipFile(path) as archive:
        return [name.removesuffix(".npy") for name in archive.namelist()]


def read_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Read the head of a .npy file; return shape, whether it is in Fortran's order, and dtype."""
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(file)
    return np.lib.format.read_array_header_2_0(file)


def write_npz(path: Path, arrays: dict[str, np.ndarray], images: Iterable[np.ndarray], shape: tuple[int, ...]) -> None:
    """Write an npz atomically: some arrays and, as `arr_0`, uint8 images of `shape` (n, H, W, C)
    that come batch by batch. No images, no `arr_0`.
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
