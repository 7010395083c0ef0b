"""Sets of images to measure, read in batches: an npz file, a folder of image files, or a data set.

Shapes: n images, B batch, H W C.
"""

import contextlib
import hashlib
import logging
import math
import os
import tokenize
import zipfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Protocol

import numpy as np
from PIL import Image

from ddt.checkpoint.format import find_checkpoint
from ddt.data import reading
from ddt.data.images import Images
from ddt.data.listing import IMAGE_SUFFIXES, layout_hints, list_folder
from ddt.errors import UserError, brief, first_line, require
from ddt.files import atomic_file, remove_temporary_files, sha256
from ddt.metrics.settings import check_samples

log = logging.getLogger(__name__)
SAMPLES = "samples.npz"
BESIDE_SAMPLES = ("grid.png", "nearest.png")  # what sample.py and evaluate.py write beside it
CHANNELS = {"L": 1, "RGB": 3}  # of PIL's modes
NUM_THREADS = min(16, os.cpu_count() or 1)  # that decode images
UNREADABLE = (  # what Pillow, zipfile and numpy raise for damaged files
    *reading.UNREADABLE, zipfile.BadZipFile, TypeError, AttributeError, RuntimeError, KeyError, tokenize.TokenError,
    ArithmeticError, MemoryError,
)  # fmt: skip


class ImageBatches(Protocol):
    """Images in a fixed order, n in all. on_disk: they can be read while others are measured."""

    on_disk: bool

    def __len__(self) -> int: ...

    @property
    def name(self) -> str:
        """Their path, for messages and receipts."""

    def batches(self, batch_size: int, rank: int = 0, num_processes: int = 1) -> Iterator[np.ndarray]:
        """Yield the batches of one of several processes, uint8 (B, H, W, C), B ≤ batch_size.

        Slices of batch_size go to the processes in turn: no feature depends on their number.
        """


class ImageSource(ImageBatches, Protocol):
    """A set of images that exists, all of one size."""

    size: tuple[int, int]  # (H, W)
    channels: int
    hash_name: str  # of `sha256` in a receipt
    max_pr_images: int | None  # of a reference, for precision and recall; None: all, as in ADM's evaluator

    @property
    def sha256(self) -> str:
        """A hash of the images."""

    def labels(self) -> np.ndarray | None:
        """Return the class of each image, int64 (n,), or None where unknown."""


class StoredImages(ImageSource, Protocol):
    """Images in a file or folder at `path`."""

    path: Path

    @property
    def default_out(self) -> Path:
        """Where metrics of them are written."""


class NpzImages:
    """The images `arr_0`, uint8 (n, H, W, C), of an npz file, plain or compressed.

    key: the setting of the path, for messages. Raises UserError for a damaged file or other arrays.
    """

    on_disk = True
    hash_name = "sha256"
    max_pr_images: int | None = None

    def __init__(self, path: Path, key: str) -> None:
        self.path, self.key = path, key
        names = array_names(path, key)
        problem = f"{key}={path}: arr_0 must be uint8 images (n, H, W, C), found"
        require("arr_0" in names, f"{problem} only {', '.join(names) or 'nothing'}")
        shape, fortran, dtype = array_header(path, key, "arr_0")
        require(dtype == np.uint8 and len(shape) == 4 and 0 not in shape, f"{problem} {dtype} {shape}")
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
    def default_out(self) -> Path:
        """The file's folder."""
        return self.path.parent

    @property
    def sha256(self) -> str:
        """The SHA-256 of the file."""
        return sha256(self.path)

    def labels(self) -> np.ndarray | None:
        """Return `arr_1`, int64 (n,), or None; UserError where it is not a class per image."""
        if not self.has_labels:
            return None
        shape, _, dtype = array_header(self.path, self.key, "arr_1")
        at, n = f"{self.key}={self.path}: arr_1 has", len(self)
        require(shape == (n,), f"{at} shape {shape}, expected one class for each of {n} images")
        require(np.issubdtype(dtype, np.integer), f"{at} dtype {dtype}, expected integers")
        return read_array(self.path, self.key, "arr_1").astype(np.int64)

    def batches(self, batch_size: int, rank: int = 0, num_processes: int = 1) -> Iterator[np.ndarray]:
        """Yield the batches of a process; see `ImageBatches`."""
        size = math.prod(self.shape[1:])
        with read_errors(self.path, self.key), zipfile.ZipFile(self.path) as archive, archive.open("arr_0.npy") as file:
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
                raise ValueError("arr_0 continues after its last image")


class FolderImages:
    """The image files of a folder (`ddt.data.listing`), all grey or all RGB and of one size, in the
    order of their paths.

    key: the setting of the path, for messages. Raises UserError that names the first unusable file,
    before any pixel is decoded.
    """

    on_disk = True
    hash_name = "sha256"
    max_pr_images: int | None = None

    def __init__(self, path: Path, key: str) -> None:
        self.path, self.key = path, key
        listed = list_folder(str(path), key)
        self.names = listed.names
        self.files = [path / name for name in self.names]
        first, num_rotated = self.names[0], 0
        for file in self.files:
            with read_errors(file, key, "image"), Image.open(file) as image:
                require(image.mode in CHANNELS, f"{key}={file}: is of mode {image.mode}; convert all images to RGB")
                size, channels = (image.height, image.width), CHANNELS[image.mode]
                num_rotated += reading.is_rotated(image)
            if file is self.files[0]:
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
        for hint in layout_hints(listed):
            log.info("%s=%s: %s", key, path, hint)
        if num_rotated:
            log.info("%s=%s: %d images carry an EXIF rotation, which is not applied", key, path, num_rotated)

    def _decode(self, file: Path) -> np.ndarray:
        with read_errors(file, self.key, "image"), Image.open(file) as image:
            return np.asarray(image).reshape(*self.size, self.channels)

    def __len__(self) -> int:
        return len(self.files)

    @property
    def name(self) -> str:
        """The folder's path."""
        return str(self.path)

    @property
    def default_out(self) -> Path:
        """A folder beside: a folder of images is not written to."""
        return self.path.with_name(f"{self.path.resolve().name}_evaluation")

    @property
    def sha256(self) -> str:
        """The SHA-256 of all names and contents."""
        lines = "".join(f"{sha256(file)}  {name}\n" for file, name in zip(self.files, self.names, strict=True))
        return hashlib.sha256(lines.encode(errors="surrogateescape")).hexdigest()

    def labels(self) -> None:
        """Return None: the files carry no classes."""

    def batches(self, batch_size: int, rank: int = 0, num_processes: int = 1) -> Iterator[np.ndarray]:
        """Yield the batches of a process; see `ImageBatches`."""
        with ThreadPoolExecutor(max_workers=NUM_THREADS) as workers:
            for start in range(rank * batch_size, len(self), batch_size * num_processes):
                yield np.stack(list(workers.map(self._decode, self.files[start : start + batch_size])))


class DataImages:
    """The images of a data set, or those at `indices` (m,). name: `data:` and the data set's."""

    on_disk = True
    hash_name = "fingerprint"
    max_pr_images: int | None = 10_000  # as many as ADM's files hold

    def __init__(self, name: str, images: Images, indices: np.ndarray | None = None) -> None:
        self.name, self.images = name, images
        self.indices = np.arange(len(images.labels)) if indices is None else indices
        self.size, self.channels = (images.image_size, images.image_size), images.channels

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def sha256(self) -> str:
        """The fingerprint of the whole data set, whatever the indices."""
        return self.images.fingerprint

    def labels(self) -> np.ndarray:
        """Return the class of each image, int64 (n,)."""
        return self.images.labels[self.indices]

    def batches(self, batch_size: int, rank: int = 0, num_processes: int = 1) -> Iterator[np.ndarray]:
        """Yield the batches of a process; see `ImageBatches`."""
        with ThreadPoolExecutor(max_workers=NUM_THREADS) as workers:
            for start in range(rank * batch_size, len(self), batch_size * num_processes):
                indices = self.indices[start : start + batch_size]
                shares = np.array_split(indices, min(len(indices), NUM_THREADS))
                images = np.concatenate(list(workers.map(self.images.load, shares)))  # (B, C, H, W)
                yield np.ascontiguousarray(images.transpose(0, 2, 3, 1))


def open_images(path: Path, key: str) -> StoredImages:
    """Open an npz, or a folder: its samples.npz, that of a run or checkpoint, or its image files.

    Pixels stay on disk. Raises UserError naming `key` where there is none of them, or two.
    """
    check_samples(path, key)
    if not path.is_dir():
        is_image = path.suffix.lower() in IMAGE_SUFFIXES
        require(not is_image, f"{key}={path}: is a single image; give the folder that it lies in")
        return NpzImages(path, key)
    arrays = sorted(inner.name for inner in path.glob("[!.]*.npz"))
    images = sorted(
        inner.name
        for inner in path.glob("[!.]*.*")
        if inner.suffix.lower() in IMAGE_SUFFIXES and not (SAMPLES in arrays and inner.name in BESIDE_SAMPLES)
    )
    require(
        not (arrays and images),
        f"{key}={path}: holds {''.join(arrays[:1])} and {len(images)} images ({', '.join(images[:2])}); give the "
        "file, or a folder of the images alone",
    )
    if SAMPLES in arrays:
        return NpzImages(path / SAMPLES, key)
    if (path / "checkpoints").is_dir() or (path / "manifest.json").is_file():
        samples = find_checkpoint(path) / "samples" / SAMPLES
        require(samples.is_file(), f"{key}={path}: {samples} is missing; sample first, or give the folder of a set")
        return NpzImages(samples, key)
    require(not arrays, f"{key}={path}: holds no {SAMPLES}; give one of its files: {', '.join(arrays[:3])}")
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


@contextlib.contextmanager
def read_errors(path: Path, key: str, kind: str = "npz file") -> Iterator[None]:
    """Turn what a damaged or other file raises into a UserError of one line."""
    try:
        yield
    except UserError:
        raise
    except UNREADABLE as error:
        raise UserError(f"{key}={path}: damaged or no {kind} ({first_line(error)}); make or copy it again") from error


def array_names(path: Path, key: str) -> list[str]:
    """Return the names of the arrays in an npz file."""
    with read_errors(path, key), zipfile.ZipFile(path) as archive:
        return [name.removesuffix(".npy") for name in archive.namelist()]


def read_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Read the header of a .npy file; return shape, whether in Fortran's order, and dtype."""
    if np.lib.format.read_magic(file) == (1, 0):
        return np.lib.format.read_array_header_1_0(file)
    return np.lib.format.read_array_header_2_0(file)


def array_header(path: Path, key: str, name: str) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Return shape, whether in Fortran's order, and dtype of an array of an npz, which is not read.

    Raises UserError where the file does not hold as many bytes as they ask for: a header may name
    any size.
    """
    with read_errors(path, key), zipfile.ZipFile(path) as archive:
        size = archive.getinfo(f"{name}.npy").file_size
        with archive.open(f"{name}.npy") as file:
            shape, fortran, dtype = read_header(file)
            size -= file.tell()
        expected = math.prod(shape) * dtype.itemsize
        if min(shape, default=0) < 0 or (size != expected and not dtype.hasobject):
            raise ValueError(f"{name} holds {size} bytes, its header names {brief(str(shape), 40)} of {dtype}")
    return shape, fortran, dtype


def read_array(path: Path, key: str, name: str) -> np.ndarray:
    """Return an array of an npz whose header was found to be right."""
    with read_errors(path, key), np.load(path, allow_pickle=False) as file:
        return file[name]


def write_npz(path: Path, arrays: dict[str, np.ndarray], images: Iterable[np.ndarray], shape: tuple[int, ...]) -> None:
    """Write an npz atomically: arrays, and images, uint8 batches (B, H, W, C), as one `arr_0`.

    shape: (n, H, W, C) of all images; no `arr_0` where n = 0.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_temporary_files(path.parent)  # of a killed call: they may be large
    with atomic_file(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array(file, array, allow_pickle=False)
        if shape[0] > 0:
            with archive.open("arr_0.npy", "w", force_zip64=True) as file:
                header = {"descr": "|u1", "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(file, header)
                for batch in images:
                    file.write(np.ascontiguousarray(batch).data)
