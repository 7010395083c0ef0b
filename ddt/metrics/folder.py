"""Images as files in a folder, read a batch at a time; and the choice between them and an npz file.

Shapes: n images, B batch, H W C.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from ddt.errors import UserError, first_line, require
from ddt.files import sha256
from ddt.metrics.npz import NpzImages, npz_path

SUFFIXES = (".png", ".jpg", ".jpeg")


def image_files(folder: Path) -> list[Path]:
    """Return the image files in a folder, not in those below it, sorted by name."""
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)


class FolderImages:
    """The RGB images of a folder, PNG or JPEG, all of one size, in the order of their names.

    Args:
        path: the folder. key: the setting that it came from, for messages.

    `len()` is n and `size` is (H, W). Raises UserError, before any pixel is decoded, that names the first file that
    cannot be used.
    """

    def __init__(self, path: Path, key: str) -> None:
        self.path, self.key = path, key
        self.files = image_files(path)
        assert self.files, "see open_images"
        self.size: tuple[int, int] = (0, 0)
        for k, file in enumerate(self.files):
            with self._open(file) as image:
                require(image.mode == "RGB", f"{key}={file}: is of mode {image.mode}; convert all images to RGB")
                size = (image.height, image.width)
            self.size = size if k == 0 else self.size
            require(
                size == self.size,
                f"{key}={file}: is {size[1]}×{size[0]} px, {self.files[0].name} {self.size[1]}×{self.size[0]}; "
                "all images must be of one size",
            )

    def _open(self, file: Path) -> Image.Image:
        try:
            return Image.open(file)
        except (UnidentifiedImageError, OSError) as error:
            raise UserError(f"{self.key}={file}: damaged or no image ({first_line(error)}); make it again") from error

    def __len__(self) -> int:
        return len(self.files)

    @property
    def sha256(self) -> str:
        """The SHA-256 of all names and contents, as 64 hexadecimal digits."""
        lines = "".join(f"{sha256(file)}  {file.name}\n" for file in self.files)
        return hashlib.sha256(lines.encode()).hexdigest()

    def batches(self, batch_size: int) -> Iterator[np.ndarray]:
        """Yield the images in the order of their names, uint8 (B, H, W, 3), B at most batch_size."""
        for start in range(0, len(self), batch_size):
            batch = []
            for file in self.files[start : start + batch_size]:
                with self._open(file) as image:
                    try:
                        batch.append(np.asarray(image))
                    except (OSError, SyntaxError, ValueError) as error:  # a truncated file has a sound head
                        raise UserError(f"{self.key}={file}: damaged ({error}); make it again") from error
            yield np.stack(batch)


ImageSource = NpzImages | FolderImages


def open_images(path: Path, key: str) -> ImageSource:
    """Open an npz file, the samples.npz of a folder, or else the image files of that folder; pixels stay on disk."""
    if path.is_dir() and not (path / "samples.npz").is_file() and image_files(path):
        return FolderImages(path, key)
    return NpzImages(npz_path(path, key), key)
