"""Data sets of labelled images: what they hold, how files are read, and their fixed split.

Shapes: n images in all, B batch, C channels, H W pixels.
"""

import dataclasses
import gzip
import hashlib
import os
import struct
import zlib
from collections import Counter
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from PIL import Image

from ddt.errors import UserError, require

Split = Literal["train", "test"]
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm"}
# what Pillow raises for a file that is no picture, or a damaged one
UNREADABLE = (OSError, ValueError, SyntaxError, EOFError, struct.error, Image.DecompressionBombError)
MAX_ASPECT = 100  # beyond it the resized picture fills the memory before it is cropped


class Images(Protocol):
    """Labelled images of one size."""

    channels: int
    image_size: int
    class_names: list[str]
    labels: np.ndarray  # (n,) int64
    names: list[str]  # (n,) what tells the images apart: paths, or numbers
    transform: str  # what was done to the pictures, for receipts

    @property
    def fingerprint(self) -> str:
        """Hash of which images these are, in which order and classes: what the order of training
        depends on.
        """

    def load(self, indices: np.ndarray) -> np.ndarray:
        """Return the images at `indices` as uint8 (B, C, H, W)."""

    def require_pixels(self) -> None:
        """Raise UserError where `load` has no pixels to return."""


def list_hash(class_names: list[str], names: list[str], labels: np.ndarray) -> str:
    """Return a hash of a list of images: their classes, names and labels (n,), in order."""
    return hashlib.sha256(repr((class_names, names)).encode() + labels.tobytes()).hexdigest()[:16]


def spread(count: int, limit: int) -> np.ndarray:
    """Return the indices of at most `limit` of `count` images, evenly spread: all classes, where
    they are sorted.
    """
    return np.linspace(0, count - 1, min(count, limit)).astype(np.int64)


class ArrayImages:
    """Images that fit in memory: uint8 (n, C, H, W) with labels (n,)."""

    transform = "none"

    def __init__(self, images: np.ndarray, labels: np.ndarray, class_names: list[str]) -> None:
        self.images = np.ascontiguousarray(images)
        self.labels = labels.astype(np.int64)
        self.class_names = class_names
        self.names = [str(k) for k in range(len(labels))]
        self.channels, self.image_size = images.shape[1], images.shape[2]

    @property
    def fingerprint(self) -> str:
        """Hash of the list of images."""
        return list_hash(self.class_names, self.names, self.labels)

    def load(self, indices: np.ndarray) -> np.ndarray:
        """Return the images at `indices` as uint8 (B, C, H, W)."""
        return self.images[indices]

    def require_pixels(self) -> None:
        """Do nothing: the pixels are here."""


class Digits(ArrayImages):
    """scikit-learn's handwritten digits: 1,797 grey images of 8×8 px in 10 classes, no download.

    Every 6th image is held out for "test" (300 images), the other 1,497 are "train"; grey 0..16 is
    scaled to 0..255.
    """

    def __init__(self, split: Split = "train") -> None:
        from sklearn.datasets import load_digits

        bunch = load_digits()
        held_out = np.arange(len(bunch.target)) % 6 == 0
        keep = held_out if split == "test" else ~held_out
        images = np.round(bunch.images * (255 / 16)).astype(np.uint8)[keep, None]  # (n, 1, 8, 8)
        super().__init__(images, bunch.target[keep], [str(digit) for digit in range(10)])


FASHION_CLASSES = [
    "T-shirt", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
]  # fmt: skip
FASHION_ROOTS = (Path("/usr/share/datasets/fashion-mnist"), Path("data/FashionMNIST/raw"))


def read_idx(path: Path, header: int, magic: int) -> np.ndarray:
    """Return the bytes of an IDX file, plain or gzipped, after its header; raise UserError naming a
    damaged file.
    """
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read ({error}); install or download it again") from error
    require(
        len(content) >= header and int.from_bytes(content[:4], "big") == magic,
        f"{path}: not the IDX file it should be; install or download it again",
    )
    return np.frombuffer(content, dtype=np.uint8, offset=header)


class FashionMNIST(ArrayImages):
    """Fashion-MNIST: 60,000 + 10,000 grey images in 10 classes, 28×28 px padded to 32×32 with
    zeros.

    Args:
        root: folder with `train-images-idx3-ubyte` and the other three files, plain or .gz, as
            Debian's package and torchvision lay them; None looks where these two put them.

    Raises UserError where the files are missing.
    """

    def __init__(self, split: Split = "train", root: str | None = None) -> None:
        roots = FASHION_ROOTS if root is None else (Path(root),)
        prefix = "train" if split == "train" else "t10k"
        names = (f"{prefix}-images-idx3-ubyte", f"{prefix}-labels-idx1-ubyte")
        for folder in roots:
            paths = [next((p for p in (folder / n, folder / f"{n}.gz") if p.is_file()), None) for n in names]
            if paths[0] and paths[1]:
                labels = read_idx(paths[1], header=8, magic=2049)
                pixels = read_idx(paths[0], header=16, magic=2051)
                require(len(pixels) == len(labels) * 784, f"{paths[0]}: truncated; install or download it again")
                images = np.pad(pixels.reshape(-1, 1, 28, 28), ((0, 0), (0, 0), (2, 2), (2, 2)))
                super().__init__(images, labels, FASHION_CLASSES)
                return
        raise UserError(
            f"data=fashion_mnist: no {names[0]}[.gz] in {' or '.join(map(str, roots))}; run `apt-get install "
            "dataset-fashion-mnist`, or torchvision.datasets.FashionMNIST('data', download=True), or give "
            "data.root=FOLDER"
        )


def read_image(path: Path) -> Image.Image:
    """Return a picture as RGB, all of it decoded; raise UserError naming a file that cannot be
    read.

    Grey, palette and CMYK pictures are converted, 16-bit ones keep their high byte, transparency is
    dropped and an EXIF rotation is not applied: what ADM's own reader does, so that the reference
    statistics are of the same pixels.
    """
    try:
        with Image.open(path) as image:
            if max(image.size) > MAX_ASPECT * min(image.size):
                raise UserError(f"{path}: is {image.width}×{image.height}, too elongated to crop; replace or remove it")
            if image.mode in ("I", "F"):
                raise UserError(f"{path}: has 32-bit pixels; convert it to 8 bits")
            if image.mode.startswith("I;16"):
                return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
            if "transparency" in image.info:
                return image.convert("RGBA").convert("RGB")
            return image.convert("RGB")
    except UserError:
        raise
    except UNREADABLE as error:
        raise UserError(f"{path}: not a readable image ({error}); replace or remove it") from error


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """Resize the shorter side to `size` and cut the centre square, as ADM does.

    Halve by box filter while the shorter side is at least twice `size`, then one bicubic resize,
    then crop.
    Source: method.md 3 (ADM centre crop).
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


class FileImages:
    """Image files read as RGB or grey, ADM centre crop to `image_size`.

    Args:
        root: the folder that `names` are relative to.
        names: relative paths, (n,). labels: (n,). image_size: pixels a side. channels: C, 3 is RGB
        and 1 grey.
    """

    transform = "ADM centre crop: box halving, then bicubic to the size, then the centre square"

    def __init__(
        self, root: Path, names: list[str], labels: np.ndarray, class_names: list[str], image_size: int, channels: int
    ) -> None:
        self.root, self.names, self.class_names, self.image_size = root, names, class_names, image_size
        self.labels, self.channels = labels.astype(np.int64), channels

    @property
    def fingerprint(self) -> str:
        """Hash of the list of images."""
        return list_hash(self.class_names, self.names, self.labels)

    def load(self, indices: np.ndarray) -> np.ndarray:
        """Return the images at `indices` as uint8 (B, C, H, W); raise UserError naming a file that
        cannot be read.
        """
        pictures = [center_crop(read_image(self.root / self.names[i]), self.image_size) for i in indices]
        if self.channels == 1:
            return np.stack([np.asarray(picture.convert("L")) for picture in pictures])[:, None]
        return np.stack([np.asarray(picture) for picture in pictures]).transpose(0, 3, 1, 2)

    def require_pixels(self) -> None:
        """Do nothing: the files hold them."""


SPLIT_NAMES = {"train", "training", "val", "valid", "validation", "test", "testing"}


@dataclasses.dataclass(frozen=True)
class FolderList:
    """What lies in a folder of images."""

    class_names: list[str]
    names: list[str]  # (n,) paths relative to the folder, class by class
    labels: np.ndarray  # (n,) int64
    others: Counter[str]  # files that are no images by their names: how many of each suffix


def suffixes_in_words(others: Counter[str]) -> str:
    """Return how many files there are of each suffix, as a person reads it."""
    return ", ".join(f"{count} {suffix or 'without suffix'}" for suffix, count in sorted(others.items()))


def list_folder(root: str) -> FolderList:
    """Return the images of a folder: its sub-folders are the classes, in sorted order, images are
    sorted by path. A folder of images without sub-folders is one class of its own name.

    Raises UserError for a missing folder, one whose sub-folders are splits, images beside
    sub-folders, and a class without images.
    """
    folder = Path(root)
    require(folder.is_dir(), f"data.root={root}: no such folder; give the one with a sub-folder of images a class")
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
    """Tell of each of `count` images whether it is held out: every so-many-th, none with 0. Returns
    bool (count,).
    """
    return np.arange(count) % holdout_every == 0 if holdout_every else np.zeros(count, dtype=bool)


class ImageFolder(FileImages):
    """A folder with one sub-folder of images a class, or of images alone, which are one class
    (`list_folder`).

    Args:
        root: the folder.
        image_size: pixels a side.
        holdout_every: every so-many-th image is held out as "test"; 0 trains on all and has no test
        set.
        channels: 3 reads RGB, 1 grey.

    Raises UserError as `list_folder` does.
    """

    def __init__(
        self,
        root: str,
        image_size: int,
        split: Split = "train",
        holdout_every: int = 20,
        channels: Literal[1, 3] = 3,
    ) -> None:
        require(image_size >= 1, f"data.image_size={image_size}: must be at least 1")
        require(
            holdout_every == 0 or holdout_every >= 2,
            f"data.holdout_every={holdout_every}: must be 0 or at least 2",
        )
        listed = list_folder(root)
        self.others = listed.others
        test = held_out(len(listed.labels), holdout_every)
        keep = np.flatnonzero(test if split == "test" else ~test)
        names, labels = [listed.names[i] for i in keep], listed.labels[keep]
        super().__init__(Path(root), names, labels, listed.class_names, image_size, channels)
