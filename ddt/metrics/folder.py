"""Images as files in a folder, read a batch at a time.

Shapes: n images, B batch, H W C.
"""

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from ddt.errors import UserError, first_line, require
from ddt.files import sha256

SUFFIXES = (".png", ".jpg", ".jpeg")
CHANNELS = {"L": 1, "RGB": 3}  # of PIL's modes


def image_files(folder: Path) -> list[Path]:
    """Return the image files in a folder, not in those below it, sorted by name."""
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)


class FolderImages:
    """The images of a folder, PNG or JPEG, all grey or all RGB and of one size, in the order of
    their names; see `sources.ImageSource`.

    Args:
        path: the folder, which holds an image. key: the setting that it came from, for messages.

    Raises UserError, before any pixel is decoded, that names the first file that cannot be used.
    """

    on_disk = True

    def __init__(self, path: Path, key: str) -> None:
        self.path, self.key = path, key
        self.files = image_files(path)
        assert self.files, "see sources.open_images"
        self.size, self.channels = (0, 0), 0
        for k, file in enumerate(self.files):
            with self._open(file) as image:
                require(image.mode in CHANNELS, f"{key}={file}: is of mode {image.mode}; convert all images to RGB")
                size, channels = (image.height, image.width), CHANNELS[image.mode]
            if k == 0:
                self.size, self.channels = size, channels
            first = self.files[0].name
            require(
                size == self.size,
                f"{key}={file}: is {size[1]}×{size[0]} px, {first} {self.size[1]}×{self.size[0]}; "
                "all images must be of one size",
            )
            require(
                channels == self.channels,
                f"{key}={file}: has {channels} channels, {first} {self.channels}; convert all images to RGB",
            )

    def _open(self, file: Path) -> Image.Image:
        try:
            return Image.open(file)
        except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
            raise UserError(f"{self.key}={file}: damaged or no image ({first_line(error)}); make it again") from error

    def _decode(self, file: Path) -> np.ndarray:
        with self._open(file) as image:
            try:
                return np.asarray(image).reshape(*self.size, self.channels)
            except (OSError, SyntaxError, ValueError) as error:  # a truncated file has a sound head
                raise UserError(f"{self.key}={file}: damaged ({error}); make it again") from error

    def __len__(self) -> int:
        return len(self.files)

    @property
    def name(self) -> str:
        """The folder's path."""
        return str(self.path)

    @property
    def sha256(self) -> str:
        """The SHA-256 of all names and contents, as 64 hexadecimal digits."""
        lines = "".join(f"{sha256(file)}  {file.name}\n" for file in self.files)
        return hashlib.sha256(lines.encode()).hexdigest()

    def labels(self) -> None:
        """Return None: files in one folder carry no classes."""

    def batches(self, batch_size: int, rank: int = 0, num_processes: int = 1) -> Iterator[np.ndarray]:
        """Yield the batches of a process, uint8 (B, H, W, C); see `sources.ImageSource.batches`."""
        with ThreadPoolExecutor(max_workers=min(16, os.cpu_count() or 1)) as workers:
            for start in range(rank * batch_size, len(self), batch_size * num_processes):
                yield np.stack(list(workers.map(self._decode, self.files[start : start + batch_size])))
