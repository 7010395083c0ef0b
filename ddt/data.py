"""Images, their fixed split, and the training stream: everything a step sees is a function of (seed, position).

Position p counts images since the start of training; step s of a run with global batch G holds the positions
s·G … s·G + G − 1. Which image stands at p, its noise, its time and its label dropout are drawn from counters, never
from a state, so a run resumes anywhere and on any number of processes with the same data and the same noise.
"""

import gzip
import hashlib
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from ddt.errors import UserError, require

Split = Literal["train", "test"]
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}


class Images(Protocol):
    """Labelled images of one size."""

    channels: int
    image_size: int
    class_names: list[str]
    labels: np.ndarray  # (n,) int64

    def load(self, indices: np.ndarray) -> np.ndarray:
        """Return the images at `indices` as uint8 (B, C, H, W)."""


class ArrayImages:
    """Images that fit in memory: uint8 (n, C, H, W) with labels (n,)."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, class_names: list[str]) -> None:
        self.images = np.ascontiguousarray(images)
        self.labels = labels.astype(np.int64)
        self.class_names = class_names
        self.channels, self.image_size = images.shape[1], images.shape[2]

    def load(self, indices: np.ndarray) -> np.ndarray:
        """Return the images at `indices` as uint8 (B, C, H, W)."""
        return self.images[indices]


class Digits(ArrayImages):
    """scikit-learn's handwritten digits: 1,797 grey images of 8×8 px in 10 classes, no download.

    Every 6th image is held out for "test" (300 images), the other 1,497 are "train"; grey 0..16 is scaled to 0..255.
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
    """Return the bytes of an IDX file, plain or gzipped, after its header; raise UserError naming a damaged file."""
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
    """Fashion-MNIST: 60,000 + 10,000 grey images in 10 classes, 28×28 px padded to 32×32 with zeros.

    Args:
        root: folder with `train-images-idx3-ubyte` and the other three files, plain or .gz, as Debian's package
            and torchvision lay them; None looks where these two put them.

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


def fingerprint(images: Images) -> str:
    """Return a hash of which images these are, in which order and classes: what the order of training depends on."""
    names = [path.name for path in images.paths] if isinstance(images, ImageFolder) else []
    content = repr((images.class_names, names)).encode() + images.labels.tobytes()
    return hashlib.sha256(content).hexdigest()[:16]


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """Resize the shorter side to `size` and cut the centre square, as ADM does.

    Halve by box filter while the shorter side is at least twice `size`, then one bicubic resize, then crop.
    Source: method.md 3 (ADM centre crop).
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


class ImageFolder:
    """A folder with one sub-folder of images a class, read as RGB, ADM centre crop to `image_size`.

    Args:
        root: the folder; classes are its sub-folders in sorted order, images are sorted by path.
        image_size: pixels a side.
        holdout_every: every so-many-th image is held out as "test"; 0 trains on all and has no test set.

    Raises UserError for a missing folder, a class without images, and a file that is no readable image (by name).
    """

    channels = 3

    def __init__(self, root: str, image_size: int, split: Split = "train", holdout_every: int = 20) -> None:
        require(image_size >= 1, f"data.image_size={image_size}: must be at least 1")
        require(
            holdout_every == 0 or holdout_every >= 2,
            f"data.holdout_every={holdout_every}: must be 0 or at least 2",
        )
        folder = Path(root)
        require(
            folder.is_dir(),
            f"data.root={root}: no such folder; give the one with a sub-folder of images for each class",
        )
        classes = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
        require(
            bool(classes),
            f"data.root={root}: has no sub-folders; put the images of each class into one of its own",
        )
        self.image_size = image_size
        self.class_names = [path.name for path in classes]
        self.paths: list[Path] = []
        labels: list[int] = []
        for label, path in enumerate(classes):
            files = sorted(
                p for p in path.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith(".")
            )
            require(bool(files), f"{path}: holds no images; add some or remove the folder")
            self.paths += files
            labels += [label] * len(files)
        held_out = np.zeros(len(labels), dtype=bool)
        if holdout_every:
            held_out[::holdout_every] = True
        keep = np.flatnonzero(held_out if split == "test" else ~held_out)
        self.paths = [self.paths[i] for i in keep]
        self.labels = np.array(labels, dtype=np.int64)[keep]

    def load(self, indices: np.ndarray) -> np.ndarray:
        """Return the images at `indices` as uint8 (B, 3, H, W); raise UserError naming a file that cannot be read."""
        return np.stack([self._load(self.paths[i]) for i in indices])

    def _load(self, path: Path) -> np.ndarray:
        try:
            with Image.open(path) as image:
                pixels = np.asarray(center_crop(image.convert("RGB"), self.image_size))
        except (OSError, UnidentifiedImageError) as error:
            raise UserError(f"{path}: not a readable image ({error}); replace or remove it") from error
        return pixels.transpose(2, 0, 1)


# One key space for all draws: (seed, stream, position). Streams never overlap.
PERMUTATION, TRAINING, VALIDATION, PREVIEW = range(4)


def draws(seed: int, stream: int, position: int) -> np.random.Generator:
    """Return the random generator that belongs to a position of a stream; equal arguments give equal draws."""
    return np.random.Generator(np.random.Philox(key=[seed, position], counter=[0, 0, 0, stream]))


def permutation(seed: int, epoch: int, length: int) -> np.ndarray:
    """Return the order in which an epoch visits `length` images."""
    return draws(seed, PERMUTATION, epoch).permutation(length)


class TrainingStream(Dataset):
    """The endless training stream, addressed by position.

    `stream[positions]` returns a batch, a dict of

        images          uint8 (B, C, H, W)
        y               int64 (B,)
        noise           float32 (B, *latent_shape), standard normal
        time_normal     float32 (B,), standard normal: `flow.training_times` turns it into t
        dropout_uniform float32 (B,) in [0, 1): below the dropout rate the label is dropped
        posterior_noise float32 (B, *latent_shape), only with `posterior`: for a stochastic autoencoder
    """

    def __init__(self, images: Images, seed: int, latent_shape: tuple[int, int, int], posterior: bool = False) -> None:
        require(len(images.labels) > 0, "data: there are no training images")
        self.images, self.seed, self.latent_shape, self.posterior = images, seed, latent_shape, posterior
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def index(self, position: int) -> int:
        """Return the index of the image at a position: epochs are whole permutations, one after the other."""
        epoch, offset = divmod(position, len(self.images.labels))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, permutation(self.seed, epoch, len(self.images.labels))
        return int(self._order[offset])

    def __getitem__(self, positions: list[int]) -> dict[str, Tensor]:
        """Return the batch at `positions`, in that order."""
        indices = np.array([self.index(p) for p in positions])
        shape = (len(positions), *self.latent_shape)
        noise = np.empty(shape, dtype=np.float32)
        posterior = np.empty(shape if self.posterior else (0,), dtype=np.float32)
        time_normal = np.empty(len(positions), dtype=np.float32)
        dropout = np.empty(len(positions), dtype=np.float32)
        for row, position in enumerate(positions):
            generator = draws(self.seed, TRAINING, position)
            generator.standard_normal(out=noise[row], dtype=np.float32)
            time_normal[row] = generator.standard_normal(dtype=np.float32)
            dropout[row] = generator.random(dtype=np.float32)
            if self.posterior:
                generator.standard_normal(out=posterior[row], dtype=np.float32)
        batch = {
            "images": self.images.load(indices),
            "y": self.images.labels[indices],
            "noise": noise,
            "time_normal": time_normal,
            "dropout_uniform": dropout,
        }
        if self.posterior:
            batch["posterior_noise"] = posterior
        return {key: torch.from_numpy(value) for key, value in batch.items()}


def micro_batch_positions(
    step: int, global_batch_size: int, micro_batch_size: int, rank: int, num_processes: int
) -> list[list[int]]:
    """Return the positions of each micro-batch of a process in a step; over all processes they are the step's
    positions, once.
    """
    start = step * global_batch_size
    across = micro_batch_size * num_processes
    return [
        list(range(first + rank * micro_batch_size, first + (rank + 1) * micro_batch_size))
        for first in range(start, start + global_batch_size, across)
    ]


class PositionSampler(Sampler[list[int]]):
    """Yields the micro-batches of one process from step `start` to `end`, as lists of positions."""

    def __init__(
        self,
        start: int,
        end: int,
        global_batch_size: int,
        micro_batch_size: int,
        rank: int = 0,
        num_processes: int = 1,
    ) -> None:
        self.steps = range(start, end)
        self.sizes = (global_batch_size, micro_batch_size, rank, num_processes)

    def __iter__(self) -> Iterator[list[int]]:
        for step in self.steps:
            yield from micro_batch_positions(step, *self.sizes)


def training_batches(
    stream: TrainingStream, sampler: PositionSampler, num_workers: int, pin_memory: bool
) -> Iterator[dict[str, Tensor]]:
    """Iterate over the stream's batches with `num_workers` loading processes; the global random state is left alone."""
    loader = DataLoader(
        stream,
        sampler=sampler,
        batch_size=None,  # the stream is indexed with a whole micro-batch of positions
        num_workers=num_workers,
        pin_memory=pin_memory,
        generator=torch.Generator().manual_seed(0),
    )
    try:
        yield from loader
    except UserError as error:  # a loading process hands its error over with the whole traceback as text
        raise UserError(str(error).rsplit("UserError: ", 1)[-1].strip()) from None


def validation_batch(images: Images, latent_shape: tuple[int, int, int], indices: np.ndarray) -> dict[str, Tensor]:
    """Return held-out images with fixed times and noise, whatever the run's seed, in the form of a training batch.

    Time i lies at the quantile frac((i + ½)·0.618…) of the training distribution, a golden-ratio sequence, so that
    any number of images covers all times evenly; labels are kept (dropout_uniform is 1).
    """
    quantiles = (indices + 0.5) * 0.6180339887498949 % 1
    generators = [draws(0, VALIDATION, int(i)) for i in indices]
    noise = np.stack([g.standard_normal(latent_shape, dtype=np.float32) for g in generators])
    posterior = np.stack([g.standard_normal(latent_shape, dtype=np.float32) for g in generators])
    return {
        "images": torch.from_numpy(images.load(indices)),
        "y": torch.from_numpy(images.labels[indices]),
        "noise": torch.from_numpy(noise),
        "posterior_noise": torch.from_numpy(posterior),
        "time_normal": torch.special.ndtri(torch.from_numpy(quantiles)).float(),
        "dropout_uniform": torch.ones(len(indices)),
    }
