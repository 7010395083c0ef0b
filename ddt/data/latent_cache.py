"""Images encoded once: a folder of fixed-size records, read at random (`ddt.tensor_files`).

    index.json           shapes, sources and checksums; `complete` when all shards are written
    manifest.csv         path, label, split, size of each image, in the order of the records
    labels.npy           (n,) int64
    latent_statistics.json  mean and std of each channel (ddt/data/latent_statistics.py)
    moments/00000.npy    (records, flips, M, h, w) float16 or float32, of the autoencoder
    images/00000.npy     (records, C, S, S) uint8, optional: inputs of an alignment target
    features/00000.npy   (records, flips, N, F) float16, optional: outputs of an alignment target

Every shard holds `shard_size` records, the last one the rest; training images come first, then
held-out ones. `ddt/data/cache_writer.py` writes it.

Before training, each shard is compared once with its SHA-256 in the index. `.verified.json` says
which were, with size and times, so that only a file that has changed or was copied is read again.

Shapes: B batch, M moments' channels (2C or C), h w latent, S pixels, N tokens, F features.
"""

import dataclasses
import functools
import hashlib
import json
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from ddt.autoencoder import Autoencoder
from ddt.data.images import FileImages, Images, Split
from ddt.data.listing import class_count_hints
from ddt.data.manifest import DAMAGED, Row, check_size, read_manifest
from ddt.data.shards import source_of
from ddt.data.source import spread
from ddt.errors import UserError, first_line, require
from ddt.files import read_record, sha256, write_json
from ddt.logs import progress_bar
from ddt.objective.alignment import CachedFeatures
from ddt.tensor_files import UnmappedArray, open_array

log = logging.getLogger(__name__)
CACHE_FORMAT_VERSION = 1
VERIFIED = ".verified.json"
NUM_HASHERS = min(8, os.cpu_count() or 1)  # threads; one hashes 0.5 to 2 GB/s


@dataclasses.dataclass
class File:
    """Size in bytes and SHA-256 of a file."""

    size: int
    sha256: str


@dataclasses.dataclass
class Array:
    """dtype and shape of a record."""

    dtype: str
    shape: list[int]


@dataclasses.dataclass
class Index:
    """What index.json must hold. shards: the files of each, by name."""

    format_version: int
    complete: bool
    count: int
    splits: dict[str, int]
    shard_size: int
    arrays: dict[str, Array]
    flips: int
    channels: int
    image_size: int
    class_names: list[str]
    transform: str | None
    features: dict[str, Any] | None
    autoencoder: dict[str, Any]
    source: dict[str, Any]
    source_root: str | None
    fingerprint: str
    shards: list[dict[str, File]]
    files: dict[str, File]


def shard_path(root: Path, array: str, shard: int) -> Path:
    """Return the file of a shard of `moments`, `images` or `features`."""
    return root / array / f"{shard:05d}.npy"


def content_fingerprint(index: dict[str, Any]) -> str:
    """Return the hash of what a training on a cache depends on, wherever it lies."""
    settings = index["autoencoder"].get("settings", {})
    content = {key: index[key] for key in ("splits", "flips", "channels", "image_size", "class_names", "transform")} | {
        "manifest": index["files"]["manifest.csv"]["sha256"],
        "moments": index["arrays"]["moments"],
        "autoencoder": index["autoencoder"]["fingerprint"],
        "encode_dtype": settings.get("encode_dtype"),
    }
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def read_index(root: Path) -> dict[str, Any]:
    """Return a cache's index.json; raise UserError where missing, damaged or of another format."""
    path = root / "index.json"
    require(
        path.is_file(),
        f"data.root={root}: holds no latent cache (index.json); give the folder that scripts/cache_latents.py wrote",
    )
    try:
        content = path.read_bytes()  # not by `read_json`: many shards make it large
        index = json.loads(content)
        version = index["format_version"]
        if version == CACHE_FORMAT_VERSION:
            TypeAdapter(Index).validate_json(content, strict=True)
            assert index["fingerprint"] == content_fingerprint(index)
            assert index["count"] == sum(index["splits"].values())
            assert index["shard_size"] >= 1
    except (OSError, ValueError, KeyError, TypeError, RecursionError, AssertionError) as error:
        raise UserError(f"{path}: {DAMAGED}") from error
    require(
        version == CACHE_FORMAT_VERSION,
        f"{path}: format version {version}, this code reads {CACHE_FORMAT_VERSION}; see CHANGELOG.md",
    )
    return index


def check_files(root: Path, index: dict[str, Any]) -> None:
    """Raise UserError unless a cache is complete, every file has its size, and the lists have their
    SHA-256.
    """
    done, total = len(index["shards"]), -(-index["count"] // index["shard_size"])
    require(
        index["complete"],
        f"data.root={root}: the cache is incomplete; run the command that makes it again: it resumes where it stopped",
    )
    require(done == total, f"{root / 'index.json'}: {DAMAGED}")
    for files in (index["files"], *index["shards"]):
        for name, file in files.items():
            path = root / name
            size = path.stat().st_size if path.is_file() else None
            require(size == file["size"], problem_of(path, missing=size is None))
    for name, file in index["files"].items():
        require(sha256(root / name) == file["sha256"], problem_of(root / name))


def problem_of(path: Path, missing: bool = False) -> str:
    """Return the message for a damaged or missing file of a cache."""
    if path.name == "manifest.csv" and not missing:
        return f"{path}: {DAMAGED}"
    return f"{path}: is {'missing' if missing else 'damaged'}; run the command that made the cache again"


def damaged_files(root: Path, files: dict[str, Any], again: bool = False) -> list[str]:
    """Return the files that are not of their SHA-256, and record the others as verified.

    again: read those, too, that were verified before and have not changed since.
    """
    known = {} if again else read_record(root / VERIFIED)
    seals = {name: seal(root / name, file["sha256"]) for name, file in files.items()}
    unknown = [name for name in files if known.get(name) != seals[name]]
    if not unknown:
        return []

    def is_intact(name: str) -> bool:
        try:
            return sha256(root / name) == files[name]["sha256"]
        except OSError:
            return False

    gigabytes = sum(files[name]["size"] for name in unknown) / 1e9
    progress = progress_bar(unit="file", desc=f"verifying {gigabytes:.1f} GB", total=len(unknown))
    damaged = []
    with progress, ThreadPoolExecutor(NUM_HASHERS) as pool:
        for name, intact in zip(unknown, pool.map(is_intact, unknown), strict=True):
            progress.update()
            if not intact:
                damaged.append(name)
    intact_seals = {name: value for name, value in seals.items() if name not in damaged}
    try:
        write_json(root / VERIFIED, {**known, **intact_seals})
    except (OSError, UserError) as error:
        log.info("%s: cannot be written (%s), so the next start verifies again", root / VERIFIED, first_line(error))
    return damaged


def seal(path: Path, digest: str) -> list[Any] | None:
    """Return what tells whether a file is still the one that was verified, None where it is
    missing: its change time is new on each write and each copy.
    """
    try:
        status = path.stat()
    except OSError:
        return None
    return [digest, status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def open_shard(path: Path, description: dict[str, Any]) -> np.ndarray | UnmappedArray:
    """Return the array of a shard; raise UserError where it is missing or not as the index says."""
    require(path.is_file(), problem_of(path, missing=True))
    try:
        stored = open_array(path)
    except (ValueError, EOFError) as error:  # numpy's advice, to allow pickled objects, is not for a user
        raise UserError(problem_of(path)) from error
    intact = list(stored.shape[1:]) == description["shape"] and stored.dtype == description["dtype"]
    require(intact, problem_of(path))
    return stored


class LatentCache(Images):
    """A latent cache as a data set: moments, and pixels or features where an alignment needs them.

    Args:
        root: the cache's folder.
        split: "train" or "test", as the cached data set was split.
        image_size: px per side that the cached images must have; None takes any.
        source_root: folder of the image files, for an alignment target without cached pixels; None:
            where they were when the cache was written.
        cached_features: read the target's features from the cache where it holds them, rather than
            running the target.
        num_classes: how many classes the cache should have, for a hint; None: any.

    Raises UserError for a cache that is missing, incomplete or damaged.
    """

    has_latents = True
    reads_files = True

    def __init__(
        self,
        root: str,
        split: Split = "train",
        image_size: int | None = None,
        source_root: str | None = None,
        cached_features: bool = True,
        num_classes: int | None = None,
    ) -> None:
        self.root, self.source_root = Path(root), source_root
        self.index = index = read_index(self.root)
        check_files(self.root, index)
        require(
            image_size in (None, index["image_size"]),
            f"data.root={root}: holds images of {index['image_size']} px, not of data.image_size={image_size}; give "
            "another folder",
        )
        self.channels, self.image_size = index["channels"], index["image_size"]
        self.class_names, self.flips = index["class_names"], index["flips"]
        self.transform = "as stored in the latent cache"
        self.hints = tuple(class_count_hints(len(self.class_names), num_classes))
        features = index["features"]
        if cached_features and features is not None:
            self.cached_features = CachedFeatures(**{**features, "grid": tuple(features["grid"])}, root=root)
        self.first = 0 if split == "train" else index["splits"]["train"]
        labels = np.load(self.root / "labels.npy", allow_pickle=False)
        self.labels = labels[self.first : self.first + index["splits"][split]]
        self._open: dict[Path, np.ndarray | UnmappedArray] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the memory maps: a loading process opens its own."""
        return {**self.__dict__, "_open": {}}

    @property
    def fingerprint(self) -> str:
        """Hash of what a training on this cache depends on, wherever it lies."""
        return self.index["fingerprint"]

    def _rows(self) -> list[Row]:
        return read_manifest(self.root)[self.first : self.first + len(self.labels)]

    @property
    def names(self) -> list[str]:  # type: ignore[override]
        """Paths of the images, (n,), read from the manifest."""
        return [row.path for row in self._rows()]

    def check_contents(self, aligned: bool, pixels: bool) -> None:
        """Raise UserError where a shard that will be read is damaged."""
        arrays = ["moments"]
        if aligned and self.cached_features is not None:
            arrays.append("features")
        if pixels or (aligned and self.cached_features is None):
            arrays.append("images")
        files = {
            name: file
            for shard in self.index["shards"]
            for name, file in shard.items()
            if name.partition("/")[0] in arrays
        }
        damaged = damaged_files(self.root, files)
        require(not damaged, problem_of(self.root / "".join(damaged[:1])))

    def check_autoencoder(self, autoencoder: Autoencoder) -> None:
        """Raise UserError where the moments are those of another autoencoder than the run's."""
        stored, settings = self.index["autoencoder"]["fingerprint"], self.index["autoencoder"]["settings"]
        name = settings.get("encoder") or settings.get("source", "identity")
        require(
            stored == autoencoder.encoder_fingerprint,
            f"data.root={self.root}: was made by another autoencoder, {name} (weights "
            f"{str(stored)[:12]}), than the run's (weights {str(autoencoder.encoder_fingerprint)[:12]}); choose that "
            "one with autoencoder=, or cache again",
        )
        encode_dtype = settings.get("encode_dtype")
        require(
            encode_dtype == autoencoder.encode_dtype,
            f"data.root={self.root}: was encoded with autoencoder.encode_dtype={encode_dtype}, not "
            f"{autoencoder.encode_dtype}; give that, or cache again",
        )

    def _records(self, array: str, indices: np.ndarray, flipped: np.ndarray | None = None) -> np.ndarray:
        """Return records of an array, (B, …), read shard by shard in ascending order."""
        shards, rows = np.divmod(indices + self.first, self.index["shard_size"])
        order = np.argsort(indices, kind="stable")
        description = self.index["arrays"][array]
        shape = description["shape"] if flipped is None else description["shape"][1:]
        result = np.empty((len(indices), *shape), dtype=description["dtype"])
        for shard in np.unique(shards):
            where = order[shards[order] == shard]
            path = shard_path(self.root, array, shard)
            if path not in self._open:
                self._open[path] = open_shard(path, description)
            stored = self._open[path]
            result[where] = stored[rows[where]] if flipped is None else stored[rows[where], flipped[where].astype(int)]
        return result

    def load_moments(self, indices: np.ndarray, flipped: np.ndarray) -> np.ndarray:
        """Return moments (B, M, h, w) in the stored dtype; `flipped` (B,) chooses mirror images."""
        return self._records("moments", indices, flipped)

    def load_features(self, indices: np.ndarray, flipped: np.ndarray) -> np.ndarray:
        """Return the alignment target's features (B, N, F), float16."""
        return self._records("features", indices, flipped)

    def load_inputs(self, indices: np.ndarray, flipped: np.ndarray, aligned: bool) -> dict[str, np.ndarray]:
        """Return `moments` and, with `aligned`, `features` where they are cached, else `images`."""
        inputs = {"moments": self.load_moments(indices, flipped)}
        if aligned and self.cached_features is not None:
            inputs["features"] = self.load_features(indices, flipped)
        elif aligned:
            pixels = self.load(indices)
            inputs["images"] = np.where(flipped[:, None, None, None], pixels[..., ::-1], pixels)
        return inputs

    def load(self, indices: np.ndarray) -> np.ndarray:
        """Return uint8 images (B, C, S, S) from the cache, or else from the image files."""
        if "images" in self.index["arrays"]:
            return self._records("images", indices)
        return self._source.load(indices)

    def require_pixels(self) -> None:
        """Raise UserError where neither cache nor image files have the pixels."""
        if "images" not in self.index["arrays"]:
            root = self._source.files_root
            require(
                root.is_dir(),
                f"data.source_root={root}: no such folder; the alignment target needs the images: give their folder, "
                "or cache with store_images=true",
            )

    @functools.cached_property
    def _source(self) -> FileImages:
        stored = self.index["source_root"]
        require(
            stored is not None,
            f"data.root={self.root}: holds no pixels, which the alignment target needs; cache with store_images=true",
        )
        root, rows = Path(self.source_root or stored), self._rows()
        names = [row.path for row in rows]
        source = source_of(root, names)
        if root.is_dir():
            for k in spread(len(rows), 64):  # a sample is enough to notice another folder
                check_size(source, rows[k].path, rows[k].bytes)
        exif = self.index["source"].get("exif", "ignore")
        return FileImages(source, names, self.labels, self.class_names, self.image_size, self.channels, exif)
