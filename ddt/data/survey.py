"""What a folder of images is like: the settings that suit it, and what a person should know before
training on it.
"""

import dataclasses
import functools
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from ddt.data.images import UNREADABLE, FolderList, held_out, list_folder, spread, suffixes_in_words
from ddt.errors import require

MAX_OPENED = 20_000  # more pictures than that are known by so many of them, evenly spread
SMALL = 64  # pixels a side that are trained on as they are
USUAL_SIZE = 32  # of others: what two CPU cores learn something of in ten minutes
MAX_GRID = 8  # patches a side, likewise
GREY_MODES = ("1", "L", "I;16", "I;16B", "LA")
FEW_IMAGES, FEW_OF_A_CLASS = 1_000, 20


@dataclasses.dataclass(frozen=True)
class Survey:
    """What was found in a folder: its list, how many pictures there are of each (width, height) and
    mode, and which files cannot be opened.
    """

    listed: FolderList
    sizes: Counter[tuple[int, int]]
    modes: Counter[str]
    broken: list[str]

    @property
    def image_size(self) -> int:
        """Pixels a side to train at: that of all pictures, where they are square, alike and small;
        a multiple of 4.
        """
        (width, height), *others = self.sizes
        return max(width // 4 * 4, 4) if not others and width == height <= SMALL else USUAL_SIZE

    @property
    def channels(self) -> int:
        """1 where every picture is grey, else 3."""
        return 1 if all(mode in GREY_MODES for mode in self.modes) else 3


def head(path: Path) -> tuple[tuple[int, int], str] | None:
    """Return (width, height) and mode of a picture, of which only the head is read; None for what
    is no picture.
    """
    try:
        with Image.open(path) as image:
            return image.size, image.mode
    except UNREADABLE:
        return None


@functools.cache
def survey(root: str) -> Survey:
    """Look at a folder of images, once a process. Raises UserError as `list_folder`, and where none
    can be opened.
    """
    listed = list_folder(root)
    count = len(listed.names)
    chosen = [listed.names[k] for k in spread(count, MAX_OPENED)]
    with ThreadPoolExecutor() as pool:
        heads = dict(zip(chosen, pool.map(head, [Path(root) / name for name in chosen]), strict=True))
    seen = [each for each in heads.values() if each is not None]
    require(bool(seen), f"data.root={root}: none of its {count} images can be opened, the first is {listed.names[0]}")
    broken = [name for name, each in heads.items() if each is None]
    return Survey(listed, Counter(size for size, _ in seen), Counter(mode for _, mode in seen), broken)


def patch_size(image_size: int) -> int:
    """Return the patch size for pictures trained on as pixels: the least of 1, 2, 4, 8 that makes
    at most `MAX_GRID` patches a side, or else the largest that divides the size.

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


def sizes_in_words(sizes: Counter[tuple[int, int]]) -> str:
    """Return the sizes of pictures as a person says them: one, or from the smallest to the largest."""
    small, large = (pick(sizes, key=lambda size: size[0] * size[1]) for pick in (min, max))
    span = f"{small[0]}×{small[1]}"
    return f"{span} px" if len(sizes) == 1 else f"{span} to {large[0]}×{large[1]} px"


def found(survey: Survey, image_size: int, channels: int, patch_size: int) -> str:
    """Return the line that tells what was found in a folder and what it is trained as."""
    listed = survey.listed
    classes = len(listed.class_names)
    return (
        f"{len(listed.names):,} images in {classes} {'class' if classes == 1 else 'classes'}, "
        f"{sizes_in_words(survey.sizes)}; trained at data.image_size={image_size}, data.channels={channels} "
        f"({'RGB' if channels == 3 else 'grey'}), model.patch_size={patch_size}"
    )


def hints(survey: Survey, image_size: int, channels: int, holdout_every: int) -> list[str]:
    """Return what a person should know of a folder before training on it, a line each."""
    listed, lines = survey.listed, []
    total, each = len(listed.names), np.bincount(listed.labels)
    if total < FEW_IMAGES:
        lines.append(
            f"{total} images are few: the network will repeat them rather than draw new ones. Some thousand are a "
            "start; with fewer, begin from a trained model (experiment=finetune) and look at the nearest training "
            "images of its samples (nearest.png of evaluate.py)"
        )
    small = [
        f"{listed.class_names[k]} ({each[k]})" for k in np.argsort(each, kind="stable") if each[k] < FEW_OF_A_CLASS
    ]
    if small and len(each) > 1:
        more = f" and {len(small) - 5} more" if len(small) > 5 else ""
        lines.append(f"classes of fewer than {FEW_OF_A_CLASS} images: {', '.join(small[:5])}{more}")
    trained = np.bincount(listed.labels[~held_out(total, holdout_every)], minlength=len(each))
    untrained = [listed.class_names[k] for k in np.flatnonzero(trained == 0)]
    if untrained:
        lines.append(
            f"{', '.join(untrained[:5])}: the only image is held out for validation; add images, or give "
            "data.holdout_every=0"
        )
    enlarged = sum(n for size, n in survey.sizes.items() if min(size) < image_size)
    if enlarged:
        lines.append(f"{enlarged} images are smaller than data.image_size={image_size} and will be enlarged")
    colours = sum(n for mode, n in survey.modes.items() if mode not in GREY_MODES)
    if channels == 1 and colours:
        lines.append(f"{colours} images have colours, which data.channels=1 drops")
    transparent = sum(n for mode, n in survey.modes.items() if mode in ("RGBA", "LA", "PA"))
    if transparent:
        lines.append(f"{transparent} images have an alpha channel, which is dropped: what lies behind it is seen")
    if listed.others:
        lines.append(f"not read: {suffixes_in_words(listed.others)}")
    return lines
