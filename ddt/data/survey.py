"""What the files of a folder of images say before training: settings inferred from them, hints on
them, and which of them cannot be read.
"""

import dataclasses
import functools
import logging
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import numpy as np

from ddt.config import Choice, locate
from ddt.data.listing import FolderList, in_words, layout_hints, shortened
from ddt.data.reading import GREY_MODES, Exif, Header, read_header, read_image
from ddt.data.source import spread
from ddt.errors import UserError, require

log = logging.getLogger(__name__)
MAX_PIXELS = 300e6  # of the images that are decoded, evenly spread: seconds
SMALL = 64  # px per side: square images up to this keep their size
USUAL_SIZE = 32  # px per side of all others: what two CPU cores learn something of in ten minutes
MAX_GRID = 8  # patches per side, likewise
PATCH_OF_LATENTS = 2
FEW_IMAGES, FEW_OF_A_CLASS = 1_000, 20


def held_out(count: int, holdout_every: int) -> np.ndarray:
    """Return which of `count` images are held out, bool (count,): every so-many-th; 0: none."""
    return np.arange(count) % holdout_every == 0 if holdout_every else np.zeros(count, dtype=bool)


class Headers:
    """What is counted over headers of images: sizes (width, height), modes, EXIF rotations."""

    def __init__(self) -> None:
        self.sizes, self.modes, self.num_rotated = Counter[tuple[int, int]](), Counter[str](), 0

    def add(self, header: Header) -> None:
        """Count an image."""
        self.sizes[header.size] += 1
        self.modes[header.mode] += 1
        self.num_rotated += header.rotated


@dataclasses.dataclass(frozen=True)
class Survey:
    """A data set's images, the headers of up to `Source.max_surveyed` of them, and the problem of
    each that cannot be read, by name. num_decoded: images whose pixels were read.
    """

    listed: FolderList
    headers: Headers
    broken: dict[str, str]
    num_opened: int
    num_decoded: int

    @property
    def image_size(self) -> int:
        """Px per side to train at: the images' own, down to a multiple of 4, where all are small
        squares of one size; else `USUAL_SIZE`.
        """
        (width, height), *others = self.headers.sizes
        return max(width // 4 * 4, 4) if not others and width == height <= SMALL else USUAL_SIZE

    @property
    def channels(self) -> int:
        """1 where every image is grey, else 3."""
        return 1 if all(mode in GREY_MODES for mode in self.headers.modes) else 3


class Place(Protocol):
    """The settings that say which images there are. Hashable: a place is surveyed once."""

    @property
    def root(self) -> str: ...

    def __hash__(self) -> int: ...

    def list(self) -> FolderList:
        """Return the images with their classes; UserError where there are none."""


@functools.cache
def survey(place: Place) -> Survey:
    """Read headers of a data set's images, and pixels of as many as take seconds, once per process.

    Raises UserError as `Place.list`, and where no image can be opened.
    """
    listed, root = place.list(), place.root
    source = listed.source

    def header_or_problem(name: str) -> Header | str:
        try:
            return read_header(source.root / name, source.open(name))
        except UserError as error:
            return str(error)

    def problem(name: str) -> str | None:
        try:
            read_image(source.root / name, file=source.open(name))
        except UserError as error:
            return str(error)
        return None

    chosen = [listed.names[k] for k in spread(len(listed.names), source.max_surveyed)]
    headers, broken = Headers(), {}
    with ThreadPoolExecutor() as pool:
        found = dict(zip(chosen, pool.map(header_or_problem, chosen), strict=True))
        for name, header in found.items():
            if isinstance(header, Header):
                headers.add(header)
            else:
                broken[name] = header
        sound = [name for name in chosen if name not in broken]
        require(
            bool(sound),
            f"data.root={root}: none of its {len(listed.names)} images can be opened, the first is {listed.names[0]}",
        )
        pixels = sum(width * height * count for (width, height), count in headers.sizes.items())
        decoded = [sound[k] for k in spread(len(sound), max(1, int(len(sound) * min(1, MAX_PIXELS / pixels))))]
        broken |= {name: text for name, text in zip(decoded, pool.map(problem, decoded), strict=True) if text}
    return Survey(listed, headers, broken, len(chosen), len(decoded))


def patch_size(image_size: int) -> int:
    """Return the patch size for pixels: the least of 1, 2, 4, 8 that makes at most `MAX_GRID`
    patches per side, or else the largest that divides the size.

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

    Without nulls no file is opened. Raises UserError as the data set does, and for a size that no
    patch suits.
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


def log_folder_summary(place: Place, image_size: int, channels: int, patch_size: int) -> None:
    """Log what a folder holds and what is trained on it."""
    surveyed, root = survey(place), place.root
    listed, sizes = surveyed.listed, surveyed.headers.sizes
    classes = len(listed.class_names)
    small, large = (pick(sizes, key=lambda size: size[0] * size[1]) for pick in (min, max))
    smallest = "" if len(sizes) == 1 else f"{small[0]}×{small[1]} to "
    log.info(
        f"data.root={root}: {len(listed.names):,} images in {classes} "
        f"{'class' if classes == 1 else 'classes'}, {smallest}{large[0]}×{large[1]} px; trained at "
        f"data.image_size={image_size}, data.channels={channels} ({'RGB' if channels == 3 else 'grey'}), "
        f"model.patch_size={patch_size}"
    )


def report_broken(place: Place, skip_broken: bool) -> None:
    """Raise UserError where the survey of a folder found images that cannot be read; with
    `skip_broken` warn.
    """
    surveyed = survey(place)
    if not surveyed.broken:
        return
    count, first = len(surveyed.broken), next(iter(surveyed.broken.values()))
    looked_at = f"{count} of the {surveyed.num_opened:,} images looked at cannot be read"
    if not skip_broken:
        raise UserError(f"{first}; {looked_at}. To train without them: data.skip_broken=true")
    log.warning("warning: %s, and others of their class stand in for them; the first: %s", looked_at, first)


# --- hints, a line each: the same for training and for a latent cache


def listing_hints(listed: FolderList, holdout_every: int, num_classes: int | None) -> list[str]:
    """Return hints on a folder's layout and its number of images. num_classes: expected."""
    lines = layout_hints(listed, num_classes)
    total, class_sizes = len(listed.names), np.bincount(listed.labels, minlength=len(listed.class_names))
    if total < FEW_IMAGES:
        lines.append(
            f"{total} images are few: the network will memorise them. Some thousand are a start; with fewer, begin "
            "from a trained model (experiment=finetune) and look at the nearest training images of its samples "
            "(nearest.png of evaluate.py)"
        )
    empty = [listed.class_names[k] for k in np.flatnonzero(class_sizes == 0)]  # of a list of classes
    if empty:
        lines.append(f"{len(empty)} of {len(class_sizes)} classes have no images: {shortened(empty)}")
    few = [k for k in np.argsort(class_sizes, kind="stable") if 0 < class_sizes[k] < FEW_OF_A_CLASS]
    if few and len(class_sizes) > 1:
        shown = shortened([f"{listed.class_names[k]} ({class_sizes[k]})" for k in few])
        lines.append(f"classes of fewer than {FEW_OF_A_CLASS} images: {shown}")
    trained = np.bincount(listed.labels[~held_out(total, holdout_every)], minlength=len(class_sizes))
    untrained = [listed.class_names[k] for k in np.flatnonzero((trained == 0) & (class_sizes > 0))]
    if untrained:
        lines.append(
            f"{shortened(untrained)}: the only image is held out for validation; add images, or give "
            "data.holdout_every=0"
        )
    return lines


def header_hints(headers: Headers, image_size: int, channels: int, exif: Exif) -> list[str]:
    """Return hints on how the files become the images that are trained on."""
    lines = []
    read_as = {1: "L", 3: "RGB"}[channels]
    enlarged = sum(n for size, n in headers.sizes.items() if min(size) < image_size)
    if enlarged:
        lines.append(f"{enlarged} images are smaller than data.image_size={image_size} and will be enlarged")
    coloured = sum(n for mode, n in headers.modes.items() if mode.partition("+")[0] not in GREY_MODES)
    if channels == 1 and coloured:
        lines.append(f"{coloured} images have colours, which data.channels=1 drops")
    converted = Counter({mode: n for mode, n in headers.modes.items() if mode != read_as})
    if converted:
        lines.append(f"converted to {read_as}: {in_words(converted)}")
    transparent = sum(n for mode, n in headers.modes.items() if mode in ("LA", "PA", "RGBA") or "+" in mode)
    if transparent:
        lines.append(f"{transparent} images are transparent in part, which is dropped: what lies behind it is seen")
    deep = sum(n for mode, n in headers.modes.items() if mode.startswith("I"))
    if deep:
        lines.append(f"{deep} images have more than 8 bits, of which the upper 8 are read")
    if headers.num_rotated and exif == "apply":
        lines.append(f"{headers.num_rotated} images carry an EXIF rotation, which is applied")
    elif headers.num_rotated:
        lines.append(
            f"{headers.num_rotated} images carry an EXIF rotation, which is not applied (nor was it by the published "
            "models); data.exif=apply applies it"
        )
    return lines
