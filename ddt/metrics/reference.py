"""What samples are compared with: a reference file in ADM's format, a folder of images, or a data
set.

ADM's file holds the statistics of a whole data set, `mu` and `sigma` of pool features, `mu_s` and
`sigma_s` of spatial ones, and in `arr_0` some of its images, for precision and recall. Those of
`ddt.metrics.reference_statistics` add a receipt.
Shapes: F features.
"""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ddt.config import Choice
from ddt.data.images import Images
from ddt.errors import UserError, first_line, require
from ddt.files import MAX_JSON, sha256
from ddt.metrics.features import Extractor, check_images
from ddt.metrics.frechet import Statistics
from ddt.metrics.images import DataImages, ImageSource, NpzImages, array_header, array_names, open_images, read_array
from ddt.metrics.settings import FeatureSettings

KEYS = (("mu", "sigma"), ("mu_s", "sigma_s"))  # of the first and the second distance of an extractor
RECEIPT = "receipt"  # array of our own files: JSON
MAX_IMAGES = 200_000  # of a data set, whose features are held in memory


@dataclasses.dataclass(frozen=True)
class Reference:
    """What samples are compared with.

    name: its path, or data:NAME. statistics: by distance, those of a file. images: real images.
    held_out: other real images, what a perfect model would sample. receipt: of our own files.
    """

    name: str
    statistics: dict[str, Statistics]
    images: ImageSource | None
    held_out: ImageSource | None = None
    receipt: dict[str, Any] | None = None

    @functools.cached_property
    def sha256(self) -> str:
        """A hash of the file, of a folder's images, or of a data set's list."""
        return sha256(Path(self.name)) if self.images is None else self.images.sha256

    @property
    def count(self) -> float:
        """Number of images of its statistics; infinite for a file that does not record it."""
        if self.receipt is not None:
            return self.receipt["count"]
        return float("inf") if self.statistics or self.images is None else len(self.images)

    @property
    def is_part(self) -> bool:
        """Whether its receipt says that the statistics are of a part of the data set."""
        return self.receipt is not None and self.receipt["count"] < self.receipt["total"]

    @property
    def is_validation(self) -> bool:
        """Whether its receipt says that they are of images that no model is trained on."""
        return self.receipt is not None and self.receipt.get("split") == "test"

    def identity(self) -> dict[str, Any]:
        """Return its part of an evaluation's receipt."""
        keys = [key for pair, _ in zip(KEYS, self.statistics, strict=False) for key in pair]
        images = self.images
        return {
            "path": self.name,
            ("sha256" if images is None else images.hash_name): self.sha256,
            "statistics": f"{', '.join(keys)} of the file" if keys else "computed from its images",
            "count": None if images is None else len(images),
            "size": None if images is None else list(images.size),
            "precision_recall_count": None if images is None else len(self.pr_indices(len(images))),
            **({} if self.held_out is None else {"held_out": len(self.held_out)}),
            **({} if self.receipt is None else {"made": self.receipt}),
        }

    def pr_indices(self, count: int) -> np.ndarray:
        """Return which of its `count` images precision and recall use, evenly spread."""
        limit = None if self.images is None else self.images.max_pr_images
        used = count if limit is None else min(count, limit)
        return np.arange(used) * count // used


def load_reference(
    reference: str, data: Choice | None, features: FeatureSettings, device: torch.device
) -> tuple[Reference, Extractor]:
    """Return reference and extractor. data: the data set that `reference` names, None for a path.

    Raises UserError where either cannot be used.
    """
    if data is not None:
        train = data.build(split="train")
        return data_reference(reference, train, data.build(split="test")), features.extractor(device, train)
    extractor = features.extractor(device)
    distances = {name: extractor.spaces[space] for name, space in extractor.distances.items()}
    return read_reference(Path(reference), distances, extractor.name), extractor


def data_reference(name: str, train: Images, test: Images) -> Reference:
    """Return the training images of a data set as a reference, with its test images held out."""
    count = len(train.labels)
    require(count >= 2, f"reference={name}: has {count} images; statistics need at least 2")
    require(
        count <= MAX_IMAGES,
        f"reference={name}: has {count:,} images; write their statistics once, by scripts/reference_statistics.py, and "
        "give that file",
    )
    held_out = DataImages(name, test) if len(test.labels) >= 2 else None
    return Reference(name, {}, DataImages(name, train), held_out)


def read_reference(path: Path, distances: dict[str, int], features: str) -> Reference:
    """Open a reference npz, or a folder of a samples.npz or of images; images stay on disk.

    distances: Fréchet distance → F of features=`features`, main one first. Raises UserError for a
    damaged file, one with half a pair of statistics or those of other features, or nothing of use.
    """
    few = f"reference={path}: holds one image; statistics need at least 2"
    if path.is_dir():
        folder = open_images(path, "reference")
        if folder.path.is_dir():
            require(len(folder) >= 2, few)
            return Reference(str(path), {}, folder)
        path = folder.path
    require(path.is_file(), f"reference={path}: no such file; give ADM's reference npz of the data set")
    names = array_names(path, "reference")
    for pair in KEYS:
        present = [name for name in pair if name in names]
        require(
            len(present) != 1, f"reference={path}: holds {''.join(present)} alone; both {' and '.join(pair)} belong"
        )
    require(
        "mu" in names or "mu_s" not in names,
        f"reference={path}: holds mu_s and sigma_s without mu and sigma; give ADM's reference npz of the data set",
    )
    require(
        "mu" in names or "arr_0" in names,
        f"reference={path}: holds neither mu and sigma nor images (arr_0), only {', '.join(names) or 'nothing'}; "
        "give ADM's reference npz of the data set",
    )
    receipt = read_receipt(path) if RECEIPT in names else None
    if receipt is not None:
        theirs = receipt["features"].get("name")
        require(theirs == features, f"reference={path}: was made with features={theirs}; choose them, or another file")
    images = NpzImages(path, "reference") if "arr_0" in names else None
    require("mu" in names or (images is not None and len(images) >= 2), few)
    statistics = {
        distance: read_statistics(path, pair, size, features)
        for pair, (distance, size) in zip(KEYS, distances.items(), strict=False)
        if pair[0] in names
    }
    return Reference(str(path), statistics, images, receipt=receipt)


def read_statistics(path: Path, pair: tuple[str, str], size: int, features: str) -> Statistics:
    """Return two arrays of a reference file as statistics, float64 (F,) and (F, F), F = size."""
    values = []
    for name, shape in zip(pair, ((size,), (size, size)), strict=True):
        found, _, dtype = array_header(path, "reference", name)
        require(
            found == shape and np.issubdtype(dtype, np.floating),
            f"reference={path}: {name} must be statistics of features={features}, floats {shape}, "
            f"found {dtype} {found}",
        )
        values.append(read_array(path, "reference", name))
        require(
            bool(np.isfinite(values[-1]).all()),
            f"reference={path}: {name} holds NaN or infinite values; make or copy the file again",
        )
    mean, covariance = (value.astype(np.float64) for value in values)
    scale = np.abs(covariance).max()
    require(
        bool(np.diagonal(covariance).min() >= 0 and np.abs(covariance - covariance.T).max() <= 1e-3 * scale),
        f"reference={path}: {pair[1]} is no covariance (not symmetric, or a negative variance); make or copy the file "
        "again",
    )
    return Statistics(mean, covariance)


def read_receipt(path: Path) -> dict[str, Any]:
    """Return the receipt in a file of `ddt.metrics.reference_statistics`."""
    shape, _, dtype = array_header(path, "reference", RECEIPT)
    require(
        shape == () and dtype.kind == "U" and dtype.itemsize <= MAX_JSON,
        f"reference={path}: its {RECEIPT} is no text of a receipt, but {dtype} {shape}; make it again",
    )
    text = str(read_array(path, "reference", RECEIPT))
    try:
        receipt = json.loads(text)
        assert isinstance(receipt["features"], dict)
        assert isinstance(receipt["features"].get("weights", {}), dict)
        assert {type(receipt[key]) for key in ("count", "total")} == {int}
        assert 1 <= receipt["count"] <= receipt["total"]
    except (ValueError, KeyError, TypeError, AssertionError, RecursionError) as error:
        raise UserError(f"reference={path}: its {RECEIPT} is damaged ({first_line(error)}); make it again") from error
    return receipt


def check_reference(reference: Reference, extractor: Extractor) -> None:
    """Raise UserError where a reference has other images or weights than the extractor's."""
    if reference.images is not None:
        check_images(reference.images, "reference", extractor)
    if reference.receipt is not None:
        identities = extractor.identity(), reference.receipt["features"]
        ours, theirs = (identity.get("weights", {}).get("tensors_sha256") for identity in identities)
        require(
            ours == theirs,
            f"reference={reference.name}: was made with other weights of {extractor.name} than these; use the same "
            "weights, or make it again",
        )
