"""What samples are compared with: a reference file in ADM's format, a folder of images, or a data
set.

ADM's file holds the statistics of a whole data set, `mu` and `sigma` in pool features, `mu_s` and
`sigma_s` in spatial ones, and in `arr_0` some of its images, for precision and recall. Ours
(`ddt.metrics.reference_statistics`) is one that also says how it was made.
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
from ddt.files import sha256
from ddt.metrics.features import Extractor, FeatureSettings, check_images
from ddt.metrics.frechet import Statistics
from ddt.metrics.images import DataImages, ImageSource, NpzImages, array_names, npz_errors, open_images

DATA = "data:"  # before the name of a data set
KEYS = (("mu", "sigma"), ("mu_s", "sigma_s"))  # of the first and the second distance of an extractor
MADE = "receipt"  # how a file of ours was made: JSON
MAX_PR_IMAGES = 10_000  # images of a data set that precision and recall are of
MAX_IMAGES = 200_000  # whose features are held in memory


@dataclasses.dataclass(frozen=True)
class Reference:
    """A reference. statistics: by distance, those that the file holds. images: real images, or None
    where it has none. held_out: other real images, what a perfect model would sample. made: how a
    file of ours was made.
    """

    name: str
    statistics: dict[str, Statistics]
    images: ImageSource | None
    held_out: ImageSource | None = None
    made: dict[str, Any] | None = None

    @functools.cached_property
    def sha256(self) -> str:
        """A hash of the file, of a folder's images, or of a data set's list."""
        return sha256(Path(self.name)) if self.images is None else self.images.sha256

    @property
    def count(self) -> float:
        """How many images its statistics are of; of a file that does not say, infinitely many."""
        if self.made is not None:
            return self.made["count"]
        return float("inf") if self.statistics or self.images is None else len(self.images)

    @property
    def is_part(self) -> bool:
        """Whether a file of ours holds the statistics of a part of its data set alone."""
        return self.made is not None and self.made["count"] < self.made["total"]

    @property
    def is_validation(self) -> bool:
        """Whether a file of ours was made of images that no model is trained on."""
        return self.made is not None and self.made.get("split") == "test"

    def identity(self) -> dict[str, Any]:
        """Return what a receipt says of it."""
        if not self.statistics:
            source = "computed from its images"
        else:
            pairs = [", ".join(pair) for pair, _ in zip(KEYS, self.statistics, strict=False)]
            source = f"{', '.join(pairs)} of the file"
        return {
            "path": self.name,
            ("fingerprint" if isinstance(self.images, DataImages) else "sha256"): self.sha256,
            "statistics": source,
            "count": None if self.images is None else len(self.images),
            "size": None if self.images is None else list(self.images.size),
            "precision_recall_count": None if self.images is None else len(self.pr_indices(len(self.images))),
            **({} if self.held_out is None else {"held_out": len(self.held_out)}),
            **({} if self.made is None else {"made": self.made}),
        }

    def pr_indices(self, count: int) -> np.ndarray:
        """Return which of its `count` images precision and recall are of: all of a file's, as in
        ADM's evaluator, of a data set as many as ADM's files hold.
        """
        if not isinstance(self.images, DataImages) or count <= MAX_PR_IMAGES:
            return np.arange(count)
        return np.arange(MAX_PR_IMAGES) * count // MAX_PR_IMAGES


def load_reference(
    reference: str, data: Choice | None, features: FeatureSettings, device: torch.device
) -> tuple[Reference, Extractor]:
    """Return the reference and the extractor. data: the data set that `reference` names, None where
    it is a path. Raises UserError where either cannot be used.
    """
    if data is not None:
        train = data.build(split="train")
        return data_reference(reference, train, data.build(split="test")), features.extractor(device, train)
    require(
        Path(reference).exists(),
        f"reference={reference}: no such file; give ADM's reference npz of the data set, a file of "
        "scripts/reference_statistics.py, or a folder of images",
    )
    extractor = features.extractor(device)
    distances = {name: extractor.spaces[space] for name, space in extractor.distances.items()}
    return read_reference(Path(reference), distances, extractor.name), extractor


def data_reference(name: str, train: Images, test: Images) -> Reference:
    """Return the training images of a data set as a reference, with its test images held out."""
    require(len(train.labels) >= 2, f"reference={name}: has {len(train.labels)} images; statistics need at least 2")
    require(
        len(train.labels) <= MAX_IMAGES,
        f"reference={name}: has {len(train.labels):,} images; write their statistics once, by "
        "scripts/reference_statistics.py, and give that file",
    )
    held_out = DataImages(name, test) if len(test.labels) >= 2 else None
    return Reference(name, {}, DataImages(name, train), held_out)


def read_reference(path: Path, distances: dict[str, int], features: str) -> Reference:
    """Open a reference npz, or a folder of a samples.npz or of images; images stay on disk.

    distances: the Fréchet distances of features=`features`, main one first, and the F of each.
    Raises UserError for a file that is damaged, that holds half of a pair of statistics or those of
    other features, or nothing that can be used.
    """
    images: ImageSource | None = open_images(path, "reference") if path.is_dir() else None
    if images is not None and not isinstance(images, NpzImages):
        require(len(images) >= 2, f"reference={path}: holds one image; statistics need at least 2")
        return Reference(str(path), {}, images)
    path = images.path if isinstance(images, NpzImages) else path
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
    made = read_made(path) if MADE in names else None
    if made is not None:
        require(
            made["features"].get("name") == features,
            f"reference={path}: was made with features={made['features'].get('name')}; choose them, or another file",
        )
    images = NpzImages(path, "reference") if "arr_0" in names else None
    if "mu" not in names:
        assert images is not None
        require(len(images) >= 2, f"reference={path}: holds one image; statistics need at least 2")
    statistics = {
        distance: read_statistics(path, pair, size, features)
        for pair, (distance, size) in zip(KEYS, distances.items(), strict=False)
        if pair[0] in names
    }
    return Reference(str(path), statistics, images, made=made)


def read_statistics(path: Path, pair: tuple[str, str], size: int, features: str) -> Statistics:
    """Return two arrays of a reference file as statistics, float64 (F,) and (F, F), F = size."""
    with npz_errors(path, "reference"), np.load(path, allow_pickle=False) as file:
        values = [file[name] for name in pair]
    for name, value, shape in zip(pair, values, ((size,), (size, size)), strict=True):
        require(
            value.shape == shape and np.issubdtype(value.dtype, np.floating),
            f"reference={path}: {name} must be statistics of features={features}, floats {shape}, "
            f"found {value.dtype} {value.shape}",
        )
        require(bool(np.isfinite(value).all()), f"reference={path}: {name} is not finite; make or copy the file again")
    mean, covariance = (value.astype(np.float64) for value in values)
    scale = np.abs(covariance).max()
    require(
        bool(np.diagonal(covariance).min() >= 0 and np.abs(covariance - covariance.T).max() <= 1e-3 * scale),
        f"reference={path}: {pair[1]} is no covariance (not symmetric, or a negative variance); make or copy the file "
        "again",
    )
    return Statistics(mean, covariance)


def read_made(path: Path) -> dict[str, Any]:
    """Return what a file of ours says of how it was made."""
    with npz_errors(path, "reference"), np.load(path, allow_pickle=False) as file:
        text = str(file[MADE])
    try:
        made = json.loads(text)
        assert isinstance(made["features"], dict)
        assert {type(made[key]) for key in ("count", "total")} == {int}
    except (ValueError, KeyError, TypeError, AssertionError) as error:
        raise UserError(f"reference={path}: its {MADE} is damaged ({first_line(error)}); make it again") from error
    return made


def check_reference(reference: Reference, extractor: Extractor) -> None:
    """Raise UserError where a reference and an extractor do not belong together."""
    if reference.images is not None:
        check_images(reference.images, "reference", extractor)
    if reference.made is not None:
        ours, theirs = (
            identity.get("weights", {}).get("tensors_sha256")
            for identity in (extractor.identity(), reference.made["features"])
        )
        require(
            ours == theirs,
            f"reference={reference.name}: was made with other weights of {extractor.name} than these; use the same "
            "weights, or make it again",
        )
