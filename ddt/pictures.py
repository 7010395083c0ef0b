"""PNG files and image grids. Shapes: n images, C H W."""

import itertools
import math
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn
from torchvision.utils import make_grid

from ddt.files import atomic_file, remove_temporary_files
from ddt.logs import progress_bar

PADDING = 2


def enlarge(images: Tensor, min_side: int) -> Tensor:
    """Enlarge uint8 images (n, C, H, W) bicubically by a whole factor to a width ≥ `min_side`."""
    factor = math.ceil(min_side / images.shape[-1])
    if factor == 1:
        return images
    return nn.functional.interpolate(images.float(), scale_factor=factor, mode="bicubic").round().clamp(0, 255).byte()


Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def caption_lines(caption: str, font: Font, width: int) -> str:
    """Return a caption in one line or two, broken after a space or an underscore, none wider than
    `width` px: what does not fit ends in "…".
    """
    lines = [""]
    for word in re.findall(r"[^ _]+[ _]*|[ _]+", caption):
        if len(lines) == 1 and lines[0] and font.getlength((lines[0] + word).rstrip()) > width:
            lines.append("")
        lines[-1] += word
    for k, line in enumerate(lines):
        while font.getlength(line.rstrip()) > width and len(line) > 1:
            line = line.removesuffix("…")[:-1] + "…"
        lines[k] = line.rstrip()
    return "\n".join(lines)


def image_grid(
    images: Tensor, columns: int, captions: list[str] | None = None, rows: list[str] | None = None, min_cell: int = 48
) -> np.ndarray:
    """Return uint8 images (n, C, H, W) as one picture (H', W', 3), with captions below the images,
    in two lines where one is too short, and labels to the left of the rows.

    Images narrower than `min_cell` px are enlarged.
    """
    images = enlarge(images, min_cell)
    n, channels, height, width = images.shape
    size = max(10, width // 14)  # px, of the font
    font = ImageFont.load_default(size)
    below = [caption_lines(caption, font, width) for caption in captions or []]
    if captions is not None:
        num_lines = max(text.count("\n") + 1 for text in below)
        room = torch.full((n, channels, num_lines * size + 4, width), 255, dtype=torch.uint8)
        images = torch.cat([images, room], dim=2)
    grid = make_grid(images, nrow=columns, padding=PADDING, pad_value=255).permute(1, 2, 0).numpy()
    margin = 0 if rows is None else math.ceil(max(map(font.getlength, rows))) + 8
    picture = Image.fromarray(np.pad(grid, ((0, 0), (margin, 0), (0, 0)), constant_values=255))
    draw = ImageDraw.Draw(picture)
    edge = PADDING if n > 1 else 0  # make_grid does not pad a single image
    for k, row in enumerate(rows or []):
        middle = edge + k * (images.shape[2] + PADDING) + height / 2
        draw.text((margin - 4, middle), row, fill=(0, 0, 0), font=font, anchor="rm")
    for k, text in enumerate(below):
        left = margin + edge + (k % columns) * (width + PADDING) + width / 2
        top = edge + (k // columns) * (images.shape[2] + PADDING) + height
        draw.text((left, top), text, fill=(0, 0, 0), font=font, anchor="ma", align="center", spacing=0)
    return np.asarray(picture)


def write_png(path: Path, picture: np.ndarray) -> None:
    """Write a uint8 picture (H, W, 1 or 3) atomically, making its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path, sync=False) as temporary:
        Image.fromarray(picture[..., 0] if picture.shape[-1] == 1 else picture).save(temporary, format="PNG")


def write_pngs(folder: Path, images: Iterable[np.ndarray], count: int) -> None:
    """Write `count` images (H, W, C) as `000000.png`, `000001.png`, …; existing files stay, and
    leftovers of a killed process are removed.
    """
    if count == 0:
        return

    def write(k: int, image: np.ndarray) -> None:
        path = folder / f"{k:06d}.png"
        if not path.exists():
            write_png(path, image)

    remove_temporary_files(folder)
    images = itertools.islice(images, count)
    with ThreadPoolExecutor() as pool, progress_bar(total=count, unit="img", desc="png") as progress:
        for start in range(0, count, 256):  # images in memory at once
            batch = list(itertools.islice(images, 256))
            list(pool.map(write, range(start, start + len(batch)), batch))
            progress.update(len(batch))
