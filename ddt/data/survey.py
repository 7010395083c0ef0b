"""What lies in a folder of images: its classes and files, the settings that suit them, and what a
person should know before training on it.
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

log = logging.getLogger(__name__)
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm"}
# what Pillow raises for a file that is no image, or a damaged one
UNREADABLE = (OSError, ValueError, SyntaxError, EOFError, struct.error, Image.DecompressionBombError)
MAX_OPENED = 20_000  # of more images, so many are opened, evenly spread
SMALL = 64  # pixels a side that are trained on as they are
USUAL_SIZE = 32  # of others: what two CPU cores learn something of in ten minutes
MAX_GRID = 8  # patches a side, likewise
PATCH_OF_LATENTS = 2
GREY_MODES = ("1", "L", "I;16", "I;16B", "LA")
FEW_IMAGES, FEW_OF_A_CLASS = 1_000, 20
SPLIT_NAMES = {"train", "training", "val", "valid", "validation", "test", "testing"}


@dataclasses.dataclass(frozen=True)
class FolderList:
    """What lies in a folder of images."""

    class_names: list[str]
    names: list[str]  # (n,) paths relative to the folder, class by class
    labels: np.ndarray  # (n,) int64
    others: Counter[str]  # files that are no images by their names: how many of each suffix


def spread(count: int, limit: int) -> np.ndarray:
    """Return the indices of at most `limit` of `count` images, evenly spread."""
    return np.linspace(0, count - 1, min(count, limit)).astype(np.int64)


def suffixes_in_words(others: Mapping[str, int]) -> str:
    """Return how many files there are of each suffix, for people."""
    return ", ".join(f"{count} {suffix or 'without suffix'}" for suffix, count in sorted(others.items()))


def list_folder(root: str) -> FolderList:
    """Return the images of a folder: its sub-folders are the classes, in sorted order, images are
    sorted by path. A folder of images without sub-folders is one class of its own name.

    Raises UserError for a missing folder, one whose sub-folders are splits, images beside
    sub-folders, and a class without images.
    """
    folder = Path(root)
    require(
        root != "" and folder.is_dir(),
        f"data.root={root}: no such folder; give the one with a sub-folder of images a class",
    )
    inside = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    classes = [path for path in inside if path.is_dir()]
    beside = [path.name for path in inside if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()]
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
    others = Counter[str]()
    for label, path in enumerate(classes or [folder]):
        found = [Path(at) / name for at, _, names_there in os.walk(path, followlinks=True) for name in names_there]
        visible = [file for file in found if not file.name.startswith(".")]
        files = sorted(file for file in visible if file.suffix.lower() in IMAGE_SUFFIXES)
        others.update(f.suffix.lower() for f in visible if f.suffix.lower() not in IMAGE_SUFFIXES)
        require(bool(files), f"{path}: holds no images; add some or remove the folder")
        names += [file.relative_to(folder).as_posix() for file in files]
        labels += [label] * len(files)
    class_names = [path.name for path in classes or [folder.resolve()]]
    return FolderList(class_names, names, np.array(labels), others)


def held_out(count: int, holdout_every: int) -> np.ndarray:
    """Return which of `count` images are held out: every so-many-th, none with 0. Bool (count,)."""
    return np.arange(count) % holdout_every == 0 if holdout_every else np.zeros(count, dtype=bool)


@dataclasses.dataclass(frozen=True)
class Survey:
    """What the headers of a folder's images say: how many there are of each (width, height) and
    mode, and which files cannot be opened.
    """

    listed: FolderList
    sizes: Counter[tuple[int, int]]
    modes: Counter[str]
    broken: list[str]

    @property
    def image_size(self) -> int:
        """Pixels a side to train at: that of all images, where they are square, alike and small; a
        multiple of 4.
        """
        (width, height), *others = self.sizes
        return max(width // 4 * 4, 4) if not others and width == height <= SMALL else USUAL_SIZE

    @property
    def channels(self) -> int:
        """1 where every image is grey, else 3."""
        return 1 if all(mode in GREY_MODES for mode in self.modes) else 3


def read_header(path: Path) -> tuple[tuple[int, int], str] | None:
    """Return (width, height) and mode of an image without decoding it; None for what is none."""
    try:
        with Image.open(path) as image:
            return image.size, image.mode
    except UNREADABLE:
        return None


@functools.cache
def survey(root: str) -> Survey:
    """Read the headers of a folder's images, once per process. Raises UserError as `list_folder`,
    and where none can be opened.
    """
    listed = list_folder(root)
    count = len(listed.names)
    chosen = [listed.names[k] for k in spread(count, MAX_OPENED)]
    with ThreadPoolExecutor() as pool:
        headers = dict(zip(chosen, pool.map(read_header, [Path(root) / name for name in chosen]), strict=True))
    seen = [header for header in headers.values() if header is not None]
    require(bool(seen), f"data.root={root}: none of its {count} images can be opened, the first is {listed.names[0]}")
    broken = [name for name, header in headers.items() if header is None]
    return Survey(listed, Counter(size for size, _ in seen), Counter(mode for _, mode in seen), broken)


def patch_size(image_size: int) -> int:
    """Return the patch size for images trained on as pixels: the least of 1, 2, 4, 8 that makes at
    most `MAX_GRID` patches a side, or else the largest that divides the size.

    Raises UserError for a size that none of them suits.
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
    """Return the settings of a network and its data set, what was null in them inferred from the
    images, and log it. Nothing is opened where nothing is null: it may be a million files.

    Raises UserError as the data set does, for a size that no patch suits, and for broken images.
    """
    patch, images_kind, latents_kind = model.settings["patch_size"], locate(data.target), locate(autoencoder.target)
    inferable: tuple[str, ...] = images_kind.inferable
    if patch is not None and all(data.settings.get(name, "default") is not None for name in inferable):
        return model, data
    images = data.build(split="train")
    if patch is None:
        pixels: bool = latents_kind.pixel_space
        patch = patch_size(images.image_size) if pixels else PATCH_OF_LATENTS
    images.log_summary(patch)
    return (
        Choice(model.target, {**model.settings, "patch_size": patch}),
        Choice(data.target, {**data.settings, **images.inferred}),
    )


def log_folder_summary(root: str, image_size: int, channels: int, patch_size: int, holdout_every: int) -> None:
    """Log what lies in a folder of images, what it is trained as, and what should be known before.

    Raises UserError where an image cannot be opened.
    """
    seen = survey(root)
    if seen.broken:
        raise UserError(
            f"{root}/{seen.broken[0]}: cannot be opened, as {len(seen.broken)} of the images; replace or remove them"
        )
    classes = len(seen.listed.class_names)
    small, large = (pick(seen.sizes, key=lambda size: size[0] * size[1]) for pick in (min, max))
    smallest = "" if len(seen.sizes) == 1 else f"{small[0]}×{small[1]} to "
    log.info(
        f"data.root={root}: {len(seen.listed.names):,} images in {classes} {'class' if classes == 1 else 'classes'}, "
        f"{smallest}{large[0]}×{large[1]} px; trained at data.image_size={image_size}, data.channels={channels} "
        f"({'RGB' if channels == 3 else 'grey'}), model.patch_size={patch_size}"
    )
    for hint in hints(seen, image_size, channels, holdout_every):
        log.info("hint: %s", hint)


def hints(seen: Survey, image_size: int, channels: int, holdout_every: int) -> list[str]:
    """Return what a person should know of a folder before training on it, a line each."""
    listed, lines = seen.listed, []
    total, each = len(listed.names), np.bincount(listed.labels)
    if total < FEW_IMAGES:
        lines.append(
            f"{total} images are few: the network will memorise them. Some thousand are a start; with fewer, begin "
            "from a trained model (experiment=finetune) and look at the nearest training images of its samples "
            "(nearest.png of evaluate.py)"
        )
    few = [k for k in np.argsort(each, kind="stable") if each[k] < FEW_OF_A_CLASS]
    if few and len(each) > 1:
        shown = ", ".join(f"{listed.class_names[k]} ({each[k]})" for k in few[:5])
        more = f" and {len(few) - 5} more" if len(few) > 5 else ""
        lines.append(f"classes of fewer than {FEW_OF_A_CLASS} images: {shown}{more}")
    trained = np.bincount(listed.labels[~held_out(total, holdout_every)], minlength=len(each))
    untrained = [listed.class_names[k] for k in np.flatnonzero(trained == 0)]
    if untrained:
        lines.append(
            f"{', '.join(untrained[:5])}: the only image is held out for validation; add images, or give "
            "data.holdout_every=0"
        )
    enlarged = sum(n for size, n in seen.sizes.items() if min(size) < image_size)
    if enlarged:
        lines.append(f"{enlarged} images are smaller than data.image_size={image_size} and will be enlarged")
    colours = sum(n for mode, n in seen.modes.items() if mode not in GREY_MODES)
    if channels == 1 and colours:
        lines.append(f"{colours} images have colours, which data.channels=1 drops")
    transparent = sum(n for mode, n in seen.modes.items() if mode in ("RGBA", "LA", "PA"))
    if transparent:
        lines.append(f"{transparent} images have an alpha channel, which is dropped: what lies behind it is seen")
    if listed.others:
        lines.append(f"not read: {suffixes_in_words(listed.others)}")
    return lines
