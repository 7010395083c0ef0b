"""How an image file becomes pixels: RGB of 8 bits, cropped to a square."""

import contextlib
import dataclasses
import re
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Literal

import numpy as np
from PIL import Image, ImageOps

from ddt.errors import UserError, first_line

Exif = Literal["ignore", "apply"]
ORIENTATION = 0x0112  # EXIF tag
BITS_PER_SAMPLE = 258  # TIFF tag
MAX_ASPECT = 100  # beyond it the resized picture fills the memory before it is cropped
GREY_MODES = ("1", "L", "I", "I;16", "I;16B", "LA")
# what Pillow raises for a file that is no image, or a damaged one
UNREADABLE = (
    OSError, ValueError, SyntaxError, EOFError, RuntimeError, TypeError, KeyError, IndexError, struct.error, zlib.error,
    Image.DecompressionBombError,
)  # fmt: skip


@contextlib.contextmanager
def opened(path: Path, file: IO[bytes] | None = None) -> Iterator[Image.Image]:
    """Open an image, whose pixels are not decoded yet; raise UserError naming a file that cannot be
    read or used, by then or within the block.

    file: its content, where `path` is only its name.
    """
    try:
        with Image.open(file or path) as image:
            if max(image.size) > MAX_ASPECT * min(image.size):
                raise UserError(f"{path}: is {image.width}×{image.height}, too elongated to crop; replace or remove it")
            if image.mode in ("I", "F") and num_bits(image) != 16:
                raise UserError(f"{path}: has 32-bit pixels; convert it to 8 bits")
            yield image
    except UserError:
        raise
    except UNREADABLE as error:
        problem = re.sub(r" <[^>]*>", "", first_line(error))  # Pillow's name of a file in memory
        raise UserError(f"{path}: not a readable image ({problem}); replace or remove it") from error


def num_bits(image: Image.Image) -> int:
    """Return the bits of a sample of an image that is not decoded yet."""
    if image.mode.startswith("I;16"):  # 12 bits in TIFF files of cameras and microscopes
        tags = getattr(image, "tag_v2", {})
        return tags.get(BITS_PER_SAMPLE, (16,))[0]
    if image.mode == "I" and image.format in ("PNG", "PPM"):
        return 16
    return 32 if image.mode in ("I", "F") else 8


def is_rotated(image: Image.Image) -> bool:
    """Return whether an image carries an EXIF rotation that decoding does not apply."""
    if image.format == "TIFF" or (image.format == "PNG" and "exif" not in image.info):
        return False  # Pillow rotates the former; to look for the latter's it would decode the image
    try:
        return image.getexif().get(ORIENTATION, 1) in range(2, 9)
    except UNREADABLE:  # the pixels may be sound
        return False


def read_image(path: Path, exif: Exif = "ignore", file: IO[bytes] | None = None) -> Image.Image:
    """Return a decoded image as RGB; raise UserError naming a file that cannot be read.

    Grey, palette and CMYK images are converted, deeper ones keep their upper 8 bits, transparency
    is dropped and, with exif="ignore", an EXIF rotation is not applied, as in ADM's reader: the
    reference statistics are of the same pixels. file: as for `opened`.
    """
    with opened(path, file) as image:
        bits, transparent = num_bits(image), "transparency" in image.info
        turned = ImageOps.exif_transpose(image) if exif == "apply" and is_rotated(image) else image
        if bits > 8:
            return Image.fromarray((np.asarray(turned) >> (bits - 8)).astype(np.uint8)).convert("RGB")
        return turned.convert("RGBA").convert("RGB") if transparent else turned.convert("RGB")


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """Resize the shorter side to `size` and cut the centre square, as ADM does.

    Halve by box filter while the shorter side is at least twice `size`, then one bicubic resize,
    then crop. Source: method.md 3.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def random_crop(image: Image.Image, size: int, uniform: np.ndarray) -> Image.Image:
    """Resize the shorter side to 1.5·`size`, bicubic, and cut a square; uniform: (2,) in [0, 1), of
    the row and the column where it begins. Source: RAE's stage 1.
    """
    shorter = size * 3 // 2
    width, height = (shorter * side // min(image.size) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    top, left = (int(u * (side - size + 1)) for u, side in zip(uniform, image.size[::-1], strict=True))
    return image.crop((left, top, left + size, top + size))


# --- what is found in a file without its pixels


@dataclasses.dataclass(frozen=True)
class Header:
    """Width and height in the file, mode, whether it carries an EXIF rotation."""

    size: tuple[int, int]
    mode: str  # Pillow's, with "+transparency" for a palette of which entries are transparent
    rotated: bool


def read_header(path: Path, file: IO[bytes] | None = None) -> Header:
    """Return the header of an image; raise UserError naming a file that cannot be opened or used.

    A file that was cut is only found by `read_image`. file: as for `opened`.
    """
    with opened(path, file) as image:
        mode = f"{image.mode}+transparency" if "transparency" in image.info else image.mode
        return Header(image.size, mode, is_rotated(image))
