"""Data sets of labelled images: in memory, or files in folders.

To add one: a subclass of `Images` (of `ArrayImages`, where it fits in memory) whose constructor
takes `split`, and a file in conf/data that names it.

Shapes: n images in all, B batch, C channels, H W pixels.
"""

import abc
import dataclasses
import functools
import gzip
import hashlib
import logging
import zlib
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from PIL import Image

from ddt.data.labels import FolderPlace
from ddt.data.reading import Exif, center_crop, random_crop, read_image
from ddt.data.shards import ShardsPlace
from ddt.data.source import Source
from ddt.data.survey import (
    Place,
    header_hints,
    held_out,
    listing_hints,
    log_folder_summary,
    report_broken,
    survey,
)
from ddt.errors import MANY, UserError, require, require_count

if TYPE_CHECKING:
    from ddt.autoencoder import Autoencoder
    from ddt.objective.alignment import CachedFeatures

log = logging.getLogger(__name__)
Split = Literal["train", "test"]
MAX_IMAGE_SIZE = 8192  # px per side


@dataclasses.dataclass(frozen=True)
class Outline:
    """The sizes of a data set that is not opened, None where unknown. num_images: for training."""

    channels: int
    image_size: int | None
    num_classes: int | None = None
    num_images: int | None = None


class Images(abc.ABC):
    """Labelled images of one size. A subclass sets the attributes without a value, and `load`."""

    channels: int
    image_size: int  # pixels per side
    class_names: list[str]
    labels: np.ndarray  # (n,) int64
    names: list[str]  # (n,) unique: paths, or numbers

    inferable: tuple[str, ...] = ()  # settings that are inferred from the images where they are null …
    inferred: Mapping[str, Any] = MappingProxyType({})  # … and the inferred values
    reads_files = False  # files that may be damaged, and are looked at before training
    source: Source | None = None  # where the files `names` lie …
    files_root: Path | None = None  # … and its folder; None in memory
    hints: tuple[str, ...] = ()  # on the files' layout and number, a line each
    transform: str | None = None  # how files become images
    exif: Exif = "ignore"  # what becomes of an EXIF rotation
    skips_broken = False  # another image of its class stands in for one that cannot be read
    has_latents = False  # `load_inputs` returns moments of an autoencoder instead of pixels
    packages: tuple[str, ...] = ()  # that opening it needs
    flips = 1  # 2: the training stream chooses between each image and its mirror image
    cached_features: "CachedFeatures | None" = None

    @classmethod
    def outline(cls, settings: Mapping[str, Any]) -> Outline:
        """Return the sizes that the settings of a data set imply, without opening it."""
        return Outline(settings.get("channels") or 3, settings.get("image_size"), settings.get("num_classes"))

    @abc.abstractmethod
    def load(self, indices: np.ndarray) -> np.ndarray:
        """Return the images at `indices` as uint8 (B, C, H, W)."""

    def load_crops(self, indices: np.ndarray, uniform: np.ndarray) -> np.ndarray:
        """Return crops of the images at `indices`, uint8 (B, C, H, W), whose places are uniform
        (B, 2) in [0, 1): of files, which are larger. Others are returned as they are.
        """
        return self.load(indices)

    def load_inputs(self, indices: np.ndarray, flipped: np.ndarray, aligned: bool) -> dict[str, np.ndarray]:
        """Return the inputs of a training step: `images`, uint8 (B, C, H, W), or `moments` and,
        with `aligned`, `images` or `features`. flipped: (B,) bool, which mirror images.
        """
        images = self.load(indices)
        if flipped.any():
            images = np.where(flipped[:, None, None, None], images[..., ::-1], images)
        return {"images": images}

    @property
    def fingerprint(self) -> str:
        """Hash of classes, names and labels in order, on which the order of training depends; after
        a hyphen one of the files' contents, where there are files.
        """
        listed = repr((self.class_names, self.names)).encode() + self.labels.tobytes()
        return hashlib.sha256(listed).hexdigest()[:16]

    def check_autoencoder(self, autoencoder: "Autoencoder") -> None:  # noqa: B027
        """Raise UserError where stored latents are those of another autoencoder."""

    def require_pixels(self) -> None:  # noqa: B027
        """Raise UserError where `load` has no pixels."""

    def log_summary(self, patch_size: int) -> None:  # noqa: B027
        """Log what was inferred from the images."""

    def log_hints(self) -> None:
        """Log hints on the files, a line each."""
        for hint in self.hints:
            log.info("hint: %s", hint)

    def check_contents(self, aligned: bool, pixels: bool) -> None:  # noqa: B027
        """Look at the files in one process, before any reads them; raise UserError for broken ones.

        aligned: `load_inputs` is called with it. pixels: `load` is called, too.
        """


class ArrayImages(Images):
    """Images that fit in memory: uint8 (n, C, H, W) with labels (n,)."""

    def __init__(
        self, images: np.ndarray, labels: np.ndarray, class_names: list[str], names: list[str] | None = None
    ) -> None:
        self.images = np.ascontiguousarray(images)
        self.labels = labels.astype(np.int64)
        self.class_names = class_names
        self.names = [str(k) for k in range(len(labels))] if names is None else names
        self.channels, self.image_size = images.shape[1], images.shape[2]

    def load(self, indices: np.ndarray) -> np.ndarray:
        return self.images[indices]


class Digits(ArrayImages):
    """scikit-learn's handwritten digits: grey images of 8×8 px in 10 classes, no download.

    Every 6th image is "test" (300), the other 1,497 are "train"; grey 0..16 is scaled to 0..255.
    """

    packages = ("sklearn",)

    @classmethod
    def outline(cls, settings: Mapping[str, Any]) -> Outline:
        return Outline(1, 8, num_classes=10, num_images=1497)

    def __init__(self, split: Split = "train") -> None:
        from sklearn.datasets import load_digits

        bunch = load_digits()
        chosen = held_out(len(bunch.target), 6) == (split == "test")
        images = np.round(bunch.images * (255 / 16)).astype(np.uint8)[chosen, None]  # (n, 1, 8, 8)
        super().__init__(images, bunch.target[chosen], [str(digit) for digit in range(10)])


FASHION_CLASSES = [
    "T-shirt", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
]  # fmt: skip
FASHION_ROOTS = (Path("/usr/share/datasets/fashion-mnist"), Path("data/FashionMNIST/raw"))


def read_idx(path: Path, header: int, magic: int) -> np.ndarray:
    """Return the bytes of an IDX file, plain or .gz, after its header, or raise UserError."""
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
    """Fashion-MNIST: 60,000 + 10,000 grey images in 10 classes, 28×28 px zero-padded to 32×32.

    root: folder with `train-images-idx3-ubyte` and the other three files, plain or .gz; None looks
    where Debian's package and torchvision put them. Raises UserError where the files are missing.
    """

    @classmethod
    def outline(cls, settings: Mapping[str, Any]) -> Outline:
        return Outline(1, 32, num_classes=10, num_images=60_000)

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


class FileImages(Images):
    """Images of the source at `names`, read as RGB (3 channels) or grey (1) and
    centre-cropped to `image_size` px.

    exif: whether an EXIF rotation is applied. skip_broken: let the next image of its class stand in
    for one that cannot be read.
    """

    reads_files = True
    source: Source
    files_root: Path

    def __init__(
        self,
        source: Source,
        names: list[str],
        labels: np.ndarray,
        class_names: list[str],
        image_size: int,
        channels: int,
        exif: Exif = "ignore",
        skip_broken: bool = False,
    ) -> None:
        self.source, self.files_root, self.names = source, source.root, names
        self.class_names, self.image_size = class_names, image_size
        self.labels, self.channels, self.exif, self.skips_broken = labels.astype(np.int64), channels, exif, skip_broken
        turned = ", EXIF rotation applied" if exif == "apply" else ""
        self.transform = f"RGB, ADM centre crop to {image_size} px{turned}"
        self._reported = set[int]()

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hash of the list of images, and one of their contents, `Source.digest`."""
        return f"{super().fingerprint}-{self.source.digest(self.names)}"

    def load(self, indices: np.ndarray) -> np.ndarray:
        """Return uint8 (B, C, H, W); raise UserError naming a file that cannot be read."""
        return self._stacked([center_crop(self._read(int(i)), self.image_size) for i in indices])

    def load_crops(self, indices: np.ndarray, uniform: np.ndarray) -> np.ndarray:
        pairs = zip(indices, uniform, strict=True)
        return self._stacked([random_crop(self._read(int(i)), self.image_size, place) for i, place in pairs])

    def _stacked(self, pictures: list[Image.Image]) -> np.ndarray:
        if self.channels == 1:
            return np.stack([np.asarray(picture.convert("L")) for picture in pictures])[:, None]
        return np.stack([np.asarray(picture) for picture in pictures]).transpose(0, 3, 1, 2)

    def _read_file(self, name: str) -> Image.Image:
        return read_image(self.files_root / name, self.exif, self.source.open(name))

    def _read(self, index: int) -> Image.Image:
        """Return an image, or what stands in for it, which depends on the files alone."""
        try:
            return self._read_file(self.names[index])
        except UserError as error:
            if not self.skips_broken:
                raise
            problem = error
        of_class = np.flatnonzero(self.labels == self.labels[index])
        for other in np.roll(of_class, -1 - int(np.searchsorted(of_class, index)))[:-1]:
            try:
                image = self._read_file(self.names[other])
            except UserError:
                continue
            if index not in self._reported:
                log.warning("warning: %s; %s stands in for it", problem, self.names[other])
                self._reported.add(index)
            return image
        raise UserError(f"{problem}; no image of its class can be read")


class ListedImages(FileImages):
    """A split of the images of a place.

    Args:
        image_size: px per side; None is inferred from the images (`ddt.data.survey`).
        holdout_every: every so-many-th image is held out as "test"; 0: none.
        channels: 3 reads RGB, 1 grey; None is inferred.
        num_classes: how many classes there should be, for a hint; None: any.
        exif: whether an EXIF rotation is applied; ADM and the published models ignore it.
        horizontal_flip: train on mirror images, too, each with probability ½.
        skip_broken: let the next image of its class stand in for one that cannot be read.

    Raises UserError as `Place.list` does.
    """

    inferable = ("image_size", "channels")

    def __init__(
        self,
        place: Place,
        image_size: int | None,
        split: Split = "train",
        holdout_every: int = 20,
        channels: Literal[1, 3] | None = 3,
        num_classes: int | None = None,
        exif: Exif = "ignore",
        horizontal_flip: bool = False,
        skip_broken: bool = False,
    ) -> None:
        require_count("data.image_size", image_size, 1, MAX_IMAGE_SIZE)
        require(
            holdout_every == 0 or 2 <= holdout_every <= MANY,
            f"data.holdout_every={holdout_every}: must be 0 or at least 2, and at most {MANY:,}",
        )
        self.place, listed = place, place.list()
        sizes = {"image_size": image_size, "channels": channels}
        self.inferred = {name: getattr(survey(place), name) for name, value in sizes.items() if value is None}
        self.hints = tuple(listing_hints(listed, holdout_every, num_classes))
        self.flips = 2 if horizontal_flip else 1
        chosen = np.flatnonzero(held_out(len(listed.labels), holdout_every) == (split == "test"))
        names, labels = [listed.names[i] for i in chosen], listed.labels[chosen]
        super().__init__(
            listed.source, names, labels, listed.class_names, **{**sizes, **self.inferred}, exif=exif,
            skip_broken=skip_broken,
        )  # fmt: skip

    def log_summary(self, patch_size: int) -> None:
        if self.inferred:
            log_folder_summary(self.place, self.image_size, self.channels, patch_size)

    def log_hints(self) -> None:
        super().log_hints()
        seen = survey(self.place)
        if seen.num_opened < len(seen.listed.names):
            log.info("of %s images, evenly spread:", f"{seen.num_opened:,}")
        for hint in header_hints(seen.headers, self.image_size, self.channels, self.exif):
            log.info("hint: %s", hint)

    def check_contents(self, aligned: bool, pixels: bool) -> None:
        report_broken(self.place, self.skips_broken)


class ImageFolder(ListedImages):
    """A folder with one sub-folder of images per class, or of images alone, which are one class.

    labels, class_names: files that give the classes in place of the sub-folders, and their order
    (`ddt.data.labels`). The other arguments are those of `ListedImages`.
    """

    def __init__(
        self,
        root: str,
        image_size: int | None,
        split: Split = "train",
        holdout_every: int = 20,
        channels: Literal[1, 3] | None = 3,
        num_classes: int | None = None,
        exif: Exif = "ignore",
        horizontal_flip: bool = False,
        skip_broken: bool = False,
        labels: str | None = None,
        class_names: str | None = None,
    ) -> None:
        super().__init__(
            FolderPlace(root, labels, class_names), image_size, split, holdout_every, channels, num_classes, exif,
            horizontal_flip, skip_broken,
        )  # fmt: skip


class ImageShards(ListedImages):
    """Images in tar or Parquet files (`ddt.data.shards`).

    root: their folder, or FOLDER/PATTERN. class_names: a file with the names of the classes. The
    other arguments are those of `ListedImages`.
    """

    def __init__(
        self,
        root: str,
        image_size: int | None,
        split: Split = "train",
        holdout_every: int = 20,
        channels: Literal[1, 3] | None = 3,
        num_classes: int | None = None,
        exif: Exif = "ignore",
        horizontal_flip: bool = False,
        skip_broken: bool = False,
        class_names: str | None = None,
    ) -> None:
        super().__init__(
            ShardsPlace(root, class_names), image_size, split, holdout_every, channels, num_classes, exif,
            horizontal_flip, skip_broken,
        )  # fmt: skip
