"""Pictures for people: PNG files, grids, and one style of figures. Shapes: n images, C H W."""

import math
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn
from torchvision.utils import make_grid
from tqdm import tqdm

PADDING = 2
FIGURE_STYLE: Any = {
    "figure.constrained_layout.use": True, "savefig.dpi": 120, "axes.grid": True, "grid.alpha": 0.3,
    "legend.frameon": False, "legend.fontsize": "small", "axes.titlesize": "medium",
}  # fmt: skip


def imagenet_synsets() -> list[str]:
    """Return ImageNet's 1000 class names ("n01440764", …) in the order of the labels, from timm."""
    from timm.data import ImageNetInfo

    return ImageNetInfo().label_names()


def readable(class_names: list[str]) -> list[str]:
    """Return class names as people read them: ImageNet's synsets by their first name in timm."""
    from timm.data import ImageNetInfo

    info = ImageNetInfo()
    known = set(info.label_names())
    return [
        info.label_name_to_description(name, detailed=False).split(",")[0] if name in known else name
        for name in class_names
    ]


def enlarged(images: Tensor, min_side: int) -> Tensor:
    """Return uint8 images (n, C, H, W) enlarged bicubically by a whole number to ≥ `min_side`."""
    factor = math.ceil(min_side / images.shape[-1])
    if factor == 1:
        return images
    larger = nn.functional.interpolate(images.float(), scale_factor=factor, mode="bicubic")
    return larger.round().clamp(0, 255).byte()


def image_grid(images: Tensor, columns: int, captions: list[str] | None = None, min_cell: int = 48) -> np.ndarray:
    """Lay uint8 images (n, C, H, W) out as one picture (H', W', 3), with a caption under each where
    given.

    Images smaller than `min_cell` px are `enlarged`.
    """
    images = enlarged(images, min_cell)
    if captions is None:
        return make_grid(images, nrow=columns, padding=PADDING, pad_value=255).permute(1, 2, 0).numpy()
    n, channels, height, width = images.shape
    size = max(10, width // 14)
    room = torch.full((n, channels, size + 4, width), 255, dtype=torch.uint8)
    grid = make_grid(torch.cat([images, room], dim=2), nrow=columns, padding=PADDING, pad_value=255)
    picture = Image.fromarray(np.ascontiguousarray(grid.permute(1, 2, 0).numpy()))
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(size)
    edge = PADDING if n > 1 else 0  # make_grid gives one image back as it is
    for k, caption in enumerate(captions):
        left = edge + (k % columns) * (width + PADDING) + width / 2
        top = edge + (k // columns) * (height + size + 4 + PADDING) + height
        text = caption
        while font.getlength(text) > width and len(text) > 1:
            text = text.removesuffix("…")[:-1] + "…"
        draw.text((left, top), text, fill=(0, 0, 0), font=font, anchor="ma")
    return np.asarray(picture)


def write_png(path: Path, picture: np.ndarray) -> None:
    """Write a uint8 picture (H, W, 1 or 3) atomically, making its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    Image.fromarray(picture[..., 0] if picture.shape[-1] == 1 else picture).save(temporary, format="PNG")
    temporary.replace(path)


def write_pngs(folder: Path, images: Iterable[np.ndarray], count: int) -> None:
    """Write `count` images (H, W, C) as `000000.png`, `000001.png`, …; an existing file stays."""
    if count == 0:
        return
    folder.mkdir(parents=True, exist_ok=True)

    def write(numbered: tuple[int, np.ndarray]) -> None:
        path = folder / f"{numbered[0]:06d}.png"
        if not path.exists():
            write_png(path, numbered[1])

    with ThreadPoolExecutor() as pool, tqdm(total=count, unit="img", desc="png", mininterval=1.0) as progress:
        waiting: list[tuple[int, np.ndarray]] = []
        for k, image in zip(range(count), images, strict=False):
            waiting.append((k, image))
            if len(waiting) == 256 or k == count - 1:  # so that the images wait in memory a few at a time
                list(pool.map(write, waiting))
                progress.update(len(waiting))
                waiting.clear()


def pyplot() -> Any:
    """Return matplotlib's pyplot without a display, in the style of all figures."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update(FIGURE_STYLE)
    return plt


def save_figure(figure: Any, path: Path) -> None:
    """Write a matplotlib figure and close it."""
    figure.savefig(path)
    pyplot().close(figure)
