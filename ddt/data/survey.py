"""A folder of images: its classes and files, the settings inferred from them, and hints before
training on it.
"""

import dataclasses
import functools
import logging
import os
import struct
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from ddt.config import Choice, locate
from ddt.errors import UserError, require
from ddt.files import SPLIT_NAMES

log = logging.getLogger(__name__)
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm"}
# what Pillow raises for a file that is no image, or a damaged one
UNREADABLE = (OSError, ValueError, SyntaxError, EOFError, struct.error, Image.DecompressionBombError)
MAX_OPENED = 20_000  # images whose header is read, evenly spread over a larger folder
SMALL = 64  # px a side: square images up to this keep their size
USUAL_SIZE = 32  # px a side of all others: what two CPU cores learn something of in ten minutes
MAX_GRID = 8  # patches a side, likewise
PATCH_OF_LATENTS = 2
GREY_MODES = ("1", "L", "I;16", "I;16B", "LA")
FEW_IMAGES, FEW_OF_A_CLASS = 1_000, 20


@dataclasses.dataclass(frozen=True)
class FolderList:
    """The files of a folder of images."""

    class_names: list[str]
    names: list[str]  # (n,) paths relative to the folder, class by class
    labels: np.ndarray  # (n,) int64
    other_files: Counter[str]  # number of files of each suffix that is no image's


def spread(count: int, limit: int) -> np.ndarray:
    """Return the indices of at most `limit` of `count` images, evenly spread."""
    return np.linspace(0, count - 1, min(count, limit)).astype(np.int64)


def suffixes_in_words(other_files: Mapping[str, int]) -> str:
    """Return how many files there are of each suffix: "1 .gif, 2 .txt"."""
    return ", ".join(f"{count} {suffix or 'without suffix'}" for suffix, count in sorted(other_files.items()))


def list_folder(root: str) -> FolderList:
    """Return the images of a folder, sorted by path; its sub-folders are the classes, sorted.
    Images without sub-folders are one class of the folder's name.

    Raises UserError for a missing folder, one whose sub-folders are splits, images beside
    sub-folders, and a class without images.
    """
    folder = Path(root)
    require(
        root != "" and folder.is_dir(),
        f"data.root={root}: no such folder; give the one with a sub-folder of images a class",
    )
    entries = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    classes = [path for path in entries if path.is_dir()]
    beside = [path.name for path in entries if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()]
    require(bool(classes or beside), f"data.root={root}: holds no images and no sub-folders of images")
    require(
        not (classes and beside),
        f"data.root={root}: holds images ({', '.join(beside[:2])}) beside its sub-folders; put them into the "
        "sub-folder of their class",
    )
    splits = [path.name for path in classes if path.name.lower() in SPLIT_NAMES]
    if splits and len(splits) == len(classes):
        raise UserError(
            f"data.root={root}: its sub-folders {', '.join(splits)} are splits, not classes; give "
            f"data.root={folder / splits[0]}"
        )
    names: list[str] = []
    labels: list[int] = []
    other_files = Counter[str]()
    for label, path in enumerate(classes or [folder]):
        images = []
        for parent, _, files in os.walk(path, followlinks=True):
            for file in (Path(parent) / name for name in files if not name.startswith(".")):
                if file.suffix.lower() in IMAGE_SUFFIXES:
                    images.append(file)
                else:
                    other_files[file.suffix.lower()] += 1
        require(bool(images), f"{path}: holds no images; add some or remove the folder")
        names += [file.relative_to(folder).as_posix() for file in sorted(images)]
        labels += [label] * len(images)
    class_names = [path.name for path in classes or [folder.resolve()]]
    return FolderList(class_names, names, np.array(labels), other_files)


def held_out(count: int, holdout_every: int) -> np.ndarray:
    """Return which of `count` images are held out, bool (count,): every so-many-th; 0: none."""
    return np.arange(count) % holdout_every == 0 if holdout_every else np.zeros(count, dtype=bool)


@dataclasses.dataclass(frozen=True)
class Survey:
    """The headers of a folder's images: counts of each (width, height) and mode, broken files."""

    listed: FolderList
    sizes: Counter[tuple[int, int]]
    modes: Counter[str]
    broken: list[str]

    @property
    def image_size(self) -> int:
        """Px a side to train at: the images' own, down to a multiple of 4, where all are small
        squares of one size; else `USUAL_SIZE`.
        """
        (width, height), *others = self.sizes
        return max(width // 4 * 4, 4) if not others and width == height <= SMALL else USUAL_SIZE

    @property
    def channels(self) -> int:
        """1 where every image is grey, else 3."""
        return 1 if all(mode in GREY_MODES for mode in self.modes) else 3


def read_header(path: Path) -> tuple[tuple[int, int], str] | None:
    """Return (width, height) and mode of an image without decoding it; None for a broken file."""
    try:
        with Image.open(path) as image:
            return image.size, image.mode
    except UNREADABLE:
        return None


@functools.cache
def survey(root: str) -> Survey:
    """Read the headers of a folder's images, once per process.

    Raises UserError as `list_folder`, and where no image can be opened.
    """
    listed = list_folder(root)
    count = len(listed.names)
    chosen = [listed.names[k] for k in spread(count, MAX_OPENED)]
    with ThreadPoolExecutor() as pool:
        headers = dict(zip(chosen, pool.map(read_header, [Path(root) / name for name in chosen]), strict=True))
    opened = [header for header in headers.values() if header is not None]
    require(bool(opened), f"data.root={root}: none of its {count} images can be opened, the first is {listed.names[0]}")
    broken = [name for name, header in headers.items() if header is None]
    return Survey(listed, Counter(size for size, _ in opened), Counter(mode for _, mode in opened), broken)


def patch_size(image_size: int) -> int:
    """Return the patch size for pixels: the least of 1, 2, 4, 8 that makes at most `MAX_GRID`
    patches a side, or else the largest that divides the size.

    Raises UserError for a size that no patch suits.
    """
    low = image_size // 4 * 4
    require(
        image_size % 4 == 0 or image_size <= 2 * MAX_GRID,
        f"data.image_size={image_size}: give a multiple of 4, {low} or {low + 4}, or a model.patch_size= that divides "
        "it",
    )
    dividing = [p for p in (1, 2, 4, 8) if image_size % p == 0]
    return next((p for p in dividing if image_size // p <= MAX_GRID), dividing[-1])


def infer_settings(model: Choice, data: Choice, autoencoder: Choice) -> tuple[Choice, Choice]:
    """Return the settings of model and data with nulls inferred from the images, and log them.

    Without nulls no file is opened: there may be a million. Raises UserError as the data set does,
    for a size that no patch suits, and for broken images.
    """
    patch, images_class, latents_class = model.settings["patch_size"], locate(data.target), locate(autoencoder.target)
    inferable: tuple[str, ...] = images_class.inferable
    if patch is not None and all(data.settings.get(name, "default") is not None for name in inferable):
        return model, data
    images = data.build(split="train")
    if patch is None:
        pixels: bool = latents_class.pixel_space
        patch = patch_size(images.image_size) if pixels else PATCH_OF_LATENTS
    images.log_summary(patch)
    return (
        Choice(model.target, {**model.settings, "patch_size": patch}),
        Choice(data.target, {**data.settings, **images.inferred}),
    )


def log_folder_summary(root: str, image_size: int, channels: int, patch_size: int, holdout_every: int) -> None:
    """Log what a folder holds and hints on it; raise UserError for a broken image."""
    surveyed = survey(root)
    if surveyed.broken:
        raise UserError(
            f"{root}/{surveyed.broken[0]}: cannot be opened, as {len(surveyed.broken)} of the images; replace or "
            "remove them"
        )
    classes = len(surveyed.listed.class_names)
    small, large = (pick(surveyed.sizes, key=lambda size: size[0] * size[1]) for pick in (min, max))
    smallest = "" if len(surveyed.sizes) == 1 else f"{small[0]}×{small[1]} to "
    log.info(
        f"data.root={root}: {len(surveyed.listed.names):,} images in {classes} "
        f"{'class' if classes == 1 else 'classes'}, {smallest}{large[0]}×{large[1]} px; trained at "
        f"data.image_size={image_size}, data.channels={channels} ({'RGB' if channels == 3 else 'grey'}), "
        f"model.patch_size={patch_size}"
    )
    for hint in hints(surveyed, image_size, channels, holdout_every):
        log.info("hint: %s", hint)


def hints(surveyed: Survey, image_size: int, channels: int, holdout_every: int) -> list[str]:
    """Return hints on training on a folder, a line each."""
    listed, lines = surveyed.listed, []
    total, class_sizes = len(listed.names), np.bincount(listed.labels)
    if total < FEW_IMAGES:
        lines.append(
            f"{total} images are few: the network will memorise them. Some thousand are a start; with fewer, begin "
            "from a trained model (experiment=finetune) and look at the nearest training images of its samples "
            "(nearest.png of evaluate.py)"
        )
    few = [k for k in np.argsort(class_sizes, kind="stable") if class_sizes[k] < FEW_OF_A_CLASS]
    if few and len(class_sizes) > 1:
        shown = ", ".join(f"{listed.class_names[k]} ({class_sizes[k]})" for k in few[:5])
        more = f" and {len(few) - 5} more" if len(few) > 5 else ""
        lines.append(f"classes of fewer than {FEW_OF_A_CLASS} images: {shown}{more}")
    trained = np.bincount(listed.labels[~held_out(total, holdout_every)], minlength=len(class_sizes))
    untrained = [listed.class_names[k] for k in np.flatnonzero(trained == 0)]
    if untrained:
        lines.append(
            f"{', '.join(untrained[:5])}: the only image is held out for validation; add images, or give "
            "data.holdout_every=0"
        )
    enlarged = sum(n for size, n in surveyed.sizes.items() if min(size) < image_size)
    if enlarged:
        lines.append(f"{enlarged} images are smaller than data.image_size={image_size} and will be enlarged")
    coloured = sum(n for mode, n in surveyed.modes.items() if mode not in GREY_MODES)
    if channels == 1 and coloured:
        lines.append(f"{coloured} images have colours, which data.channels=1 drops")
    transparent = sum(n for mode, n in surveyed.modes.items() if mode in ("RGBA", "LA", "PA"))
    if transparent:
        lines.append(f"{transparent} images have an alpha channel, which is dropped: what lies behind it is seen")
    if listed.other_files:
        lines.append(f"not read: {suffixes_in_words(listed.other_files)}")
    return lines
