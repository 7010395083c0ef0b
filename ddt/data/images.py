"""Data sets of labelled images: in memory, or files in folders.

To add one: a subclass of `Images` (of `ArrayImages`, where it fits in memory) whose constructor
takes `split`, and a file in conf/data that names it.

Shapes: n images in all, B batch, C channels, H W pixels.
"""

import abc
import dataclasses
import gzip
import hashlib
import zlib
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from PIL import Image

from ddt.data.survey import UNREADABLE, held_out, list_folder, log_folder_summary, survey
from ddt.errors import MANY, UserError, require, require_count

if TYPE_CHECKING:
    from ddt.autoencoder import Autoencoder
    from ddt.objective.alignment import CachedFeatures

Split = Literal["train", "test"]
MAX_IMAGE_SIZE = 8192  # px a side
MAX_ASPECT = 100  # beyond it the resized picture fills the memory before it is cropped


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
    image_size: int  # pixels a side
    class_names: list[str]
    labels: np.ndarray  # (n,) int64
    names: list[str]  # (n,) unique: paths, or numbers

    inferable: tuple[str, ...] = ()  # settings that are inferred from the images where they are null …
    inferred: Mapping[str, Any] = MappingProxyType({})  # … and the inferred values
    files_root: Path | None = None  # the folder of the image files `names`; None in memory
    other_files: Mapping[str, int] = MappingProxyType({})  # in that folder: number of non-images of each suffix
    transform: str | None = None  # how files become images
    has_latents = False  # `load_inputs` returns moments of an autoencoder instead of pixels
    packages: tuple[str, ...] = ()  # that opening it needs
    flips = 1  # 2: mirror images are stored too, and the training stream chooses between them
    cached_features: "CachedFeatures | None" = None

    @classmethod
    def outline(cls, settings: Mapping[str, Any]) -> Outline:
        """Return the sizes that the settings of a data set imply, without opening it."""
        return Outline(settings.get("channels") or 3, settings.get("image_size"))

    @abc.abstractmethod
    def load(self, indices: np.ndarray) -> np.ndarray:
        """Return the images at `indices` as uint8 (B, C, H, W)."""

    def load_inputs(self, indices: np.ndarray, flipped: np.ndarray, aligned: bool) -> dict[str, np.ndarray]:
        """Return the inputs of a training step: `images`, uint8 (B, C, H, W), or `moments` and,
        with `aligned`, `images` or `features`. flipped: (B,) bool, which mirror images.
        """
        return {"images": self.load(indices)}

    @property
    def fingerprint(self) -> str:
        """Hash of classes, names and labels in order, on which the order of training depends."""
        listed = repr((self.class_names, self.names)).encode() + self.labels.tobytes()
        return hashlib.sha256(listed).hexdigest()[:16]

    def check_autoencoder(self, autoencoder: "Autoencoder") -> None:  # noqa: B027
        """Raise UserError where stored latents are those of another autoencoder."""

    def require_pixels(self) -> None:  # noqa: B027
        """Raise UserError where `load` has no pixels."""

    def log_summary(self, patch_size: int) -> None:  # noqa: B027
        """Log what was inferred from the images, and hints; raise UserError for broken files."""


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


def read_image(path: Path) -> Image.Image:
    """Return a decoded image as RGB; raise UserError naming a file that cannot be read.

    Grey, palette and CMYK images are converted, 16-bit ones keep their high byte, transparency is
    dropped and an EXIF rotation is not applied, as in ADM's reader: the reference statistics are of
    the same pixels.
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
    then crop. Source: method.md 3.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


class FileImages(Images):
    """Image files at `names`, relative to `root`, read as RGB (3 channels) or grey (1) and
    centre-cropped to `image_size` px.
    """

    files_root: Path

    def __init__(
        self, root: Path, names: list[str], labels: np.ndarray, class_names: list[str], image_size: int, channels: int
    ) -> None:
        self.files_root, self.names, self.class_names, self.image_size = root, names, class_names, image_size
        self.labels, self.channels = labels.astype(np.int64), channels
        self.transform = f"RGB, ADM centre crop to {image_size} px"

    def load(self, indices: np.ndarray) -> np.ndarray:
        """Return uint8 (B, C, H, W); raise UserError naming a file that cannot be read."""
        pictures = [center_crop(read_image(self.files_root / self.names[i]), self.image_size) for i in indices]
        if self.channels == 1:
            return np.stack([np.asarray(picture.convert("L")) for picture in pictures])[:, None]
        return np.stack([np.asarray(picture) for picture in pictures]).transpose(0, 3, 1, 2)


class ImageFolder(FileImages):
    """A folder with one sub-folder of images a class, or of images alone, which are one class.

    Args:
        image_size: px a side; None is inferred from the images (`ddt.data.survey`).
        holdout_every: every so-many-th image is held out as "test"; 0: none.
        channels: 3 reads RGB, 1 grey; None is inferred.

    Raises UserError as `list_folder` does.
    """

    inferable = ("image_size", "channels")

    def __init__(
        self,
        root: str,
        image_size: int | None,
        split: Split = "train",
        holdout_every: int = 20,
        channels: Literal[1, 3] | None = 3,
    ) -> None:
        require_count("data.image_size", image_size, 1, MAX_IMAGE_SIZE)
        require(
            holdout_every == 0 or 2 <= holdout_every <= MANY,
            f"data.holdout_every={holdout_every}: must be 0 or at least 2, and at most {MANY:,}",
        )
        self.holdout_every = holdout_every
        listed = list_folder(root)
        sizes = {"image_size": image_size, "channels": channels}
        self.inferred = {name: getattr(survey(root), name) for name, value in sizes.items() if value is None}
        self.other_files = listed.other_files
        chosen = np.flatnonzero(held_out(len(listed.labels), holdout_every) == (split == "test"))
        names, labels = [listed.names[i] for i in chosen], listed.labels[chosen]
        super().__init__(Path(root), names, labels, listed.class_names, **{**sizes, **self.inferred})

    def log_summary(self, patch_size: int) -> None:
        """See `Images.log_summary`; opens no file where nothing is inferred."""
        if self.inferred:
            root = str(self.files_root)
            log_folder_summary(root, self.image_size, self.channels, patch_size, self.holdout_every)
