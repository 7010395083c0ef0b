"""Writing a latent cache (`ddt.data.latent_cache`): images that `ddt.data.manifest` lists are
encoded, shard by shard.

A shard's files are written under a temporary name, renamed, and then vouched for by
`shards/00000.json`; a run that was stopped resumes at the first shard without one. Batches never
cross shards, so a shard's bytes depend neither on where an earlier run stopped nor on how many
processes share the work.
Shapes: B batch, M moments' channels, h w latent, S pixels, N tokens, F features.
"""

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from ddt.autoencoder import Autoencoder
from ddt.config import Choice
from ddt.data.images import Images
from ddt.data.latent_cache import CACHE_FORMAT_VERSION, read_index, shard_path
from ddt.data.manifest import Row, check_manifest, check_size, read_manifest
from ddt.data.stream import load_batches
from ddt.errors import UserError, require
from ddt.files import fsync, sha256, write_json

log = logging.getLogger(__name__)
RESERVE = 64 * 2**20  # bytes that stay free on the disk


@dataclasses.dataclass(frozen=True)
class CacheSettings:
    """What to cache and how; see conf/cache_latents.yaml.

    data, autoencoder, alignment: train.py's groups. out: the cache's folder. flip: store the mirror
    image's moments too. dtype: of the moments. store_images: keep the uint8 images beside them.
    store_features: keep the alignment target's features. skip_broken: leave files that cannot be
    read out of the list instead of stopping. shard_size: records a shard. batch_size: images
    encoded at once. num_workers: processes that read image files. num_processes: that encode.

    Raises UserError for values that cannot be.
    """

    data: Choice
    autoencoder: Choice
    alignment: Choice | None
    out: str
    flip: bool
    dtype: Literal["float16", "float32"]
    store_images: bool
    store_features: bool
    skip_broken: bool
    shard_size: int
    batch_size: int
    num_workers: int | None
    num_processes: int | None

    @property
    def workers(self) -> int:
        """Reading processes: as many as were asked for, or one a core, at most 8."""
        return min(os.cpu_count() or 1, 8) if self.num_workers is None else self.num_workers

    def __post_init__(self) -> None:
        for key in ("shard_size", "batch_size"):
            require(getattr(self, key) >= 1, f"{key}={getattr(self, key)}: must be at least 1")
        require(self.workers >= 0, f"num_workers={self.num_workers}: must be at least 0, or null")
        number = self.num_processes
        require(
            number is None or number >= 1, f"num_processes={number}: must be at least 1, or null for every visible GPU"
        )
        path = Path(self.out)
        require(self.out != "", "out: not set; give the cache's folder")
        require(not path.exists() or path.is_dir(), f"out={self.out}: is a file; give a folder")
        ours = ("index.json", "manifest.csv", "broken.csv", ".tmp-manifest.csv", ".lock")
        require(
            not path.is_dir() or not any(path.iterdir()) or any((path / name).exists() for name in ours),
            f"out={self.out}: holds other things than a latent cache; choose another folder",
        )

    def check_images(self, images: Images) -> None:
        """Raise UserError for images that cannot be cached in `out`."""
        require(not images.has_latents, "data: is a latent cache already; give the images")
        root = images.files_root
        require(
            root is None or root.resolve() not in Path(self.out).resolve().parents,
            f"out={self.out}: lies among the images of data.root; choose another folder",
        )


class Target(Protocol):
    """What an alignment target is here: features (B, N, F) of uint8 images (B, C, S, S)."""

    name: str
    weights: str | None
    num_features: int
    grid: tuple[int, int]

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the weights."""

    def to(self, device: torch.device) -> "Target":
        """Move to a device and return itself."""

    def __call__(self, images: Tensor) -> Tensor:
        """Return the features."""


# --- the folder


@contextlib.contextmanager
def lock_folder(out: Path) -> Iterator[None]:
    """Hold the folder against a second command; raise UserError where another one holds it."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / ".lock").open("a") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # of this process alone: loading processes do not keep it
        except (BlockingIOError, PermissionError) as error:
            raise UserError(f"out={out}: another process is writing this cache; wait for it") from error
        yield


def array_shapes(
    settings: CacheSettings, autoencoder: Autoencoder, target: Target | None, images: Images
) -> dict[str, dict[str, Any]]:
    """Return dtype and shape of a record of each array."""
    channels, height, width = autoencoder.latent_shape(images.channels, images.image_size)
    both = 2 if settings.flip else 1
    moments = [both, channels * (2 if autoencoder.stochastic else 1), height, width]
    arrays: dict[str, dict[str, Any]] = {"moments": {"dtype": settings.dtype, "shape": moments}}
    if settings.store_images:
        arrays["images"] = {"dtype": "uint8", "shape": [images.channels, images.image_size, images.image_size]}
    if target is not None:
        tokens = target.grid[0] * target.grid[1]
        arrays["features"] = {"dtype": "float16", "shape": [both, tokens, target.num_features]}
    return arrays


def describe(
    settings: CacheSettings,
    manifest: list[Row],
    splits: dict[str, Images],
    autoencoder: Autoencoder,
    target: Target | None,
) -> dict[str, Any]:
    """Return the index of a cache of which no shard is written yet; see `ddt.data.latent_cache`."""
    images, codec = splits["train"], settings.autoencoder.plain()
    index: dict[str, Any] = {
        "format_version": CACHE_FORMAT_VERSION,
        "complete": False,
        "count": len(manifest),
        "splits": {split: sum(row.split == split for row in manifest) for split in splits},
        "shard_size": settings.shard_size,
        "batch_size": settings.batch_size,
        "arrays": array_shapes(settings, autoencoder, target, images),
        "flips": 2 if settings.flip else 1,
        "channels": images.channels,
        "image_size": images.image_size,
        "class_names": images.class_names,
        "transform": images.transform,
        "autoencoder": {"settings": codec, "fingerprint": autoencoder.fingerprint},
        "features": None
        if target is None
        else {
            "target": target.name,
            "weights_sha256": None if target.weights is None else sha256(Path(target.weights)),
            "fingerprint": target.fingerprint,
            "grid": list(target.grid),
            "num_features": target.num_features,
        },
        "source": {**settings.data.plain(), **images.inferred},
        "source_root": None if images.files_root is None else str(images.files_root.resolve()),
        "versions": {"torch": torch.__version__},
        "shards": [],
        "files": {},
    }
    # what a training on this cache depends on, wherever it lies
    decisive = ("splits", "flips", "channels", "image_size", "class_names", "transform")
    content = {key: index[key] for key in decisive} | {
        "manifest": sha256(Path(settings.out) / "manifest.csv"),
        "moments": index["arrays"]["moments"],
        "autoencoder": autoencoder.fingerprint,
        "encode_dtype": codec.get("encode_dtype"),
    }
    index["fingerprint"] = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
    return index


def check_same_cache(out: Path, index: dict[str, Any]) -> None:
    """Raise UserError where the folder holds another cache than `index` describes. Where things lie
    may differ.
    """
    there, wanted = read_index(out), json.loads(json.dumps(index))
    ignored = ("complete", "shards", "files", "source", "source_root", "autoencoder", "versions")
    differing = [
        f"{key} {str(there.get(key))[:60]} -> {str(wanted[key])[:60]}"
        for key in wanted
        if key not in ignored and there.get(key) != wanted[key]
    ]
    require(not differing, f"out={out}: holds another cache ({', '.join(differing)}); choose another out=")


def in_words(size: int) -> str:
    """Return a number of bytes for people."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def check_space(out: Path, arrays: dict[str, dict[str, Any]], missing: int) -> None:
    """Log what `missing` records will take and raise UserError where the disk has not as much."""
    needed = {
        name: missing * int(np.prod(array["shape"])) * np.dtype(array["dtype"]).itemsize
        for name, array in arrays.items()
    }
    free = shutil.disk_usage(out).free
    parts = ", ".join(f"{name} {in_words(size)}" for name, size in needed.items())
    log.info("%s: %d images to encode: %s; %s are free", out, missing, parts, in_words(free))
    total = sum(needed.values()) + RESERVE
    require(
        total <= free,
        f"out={out}: needs {in_words(total)} ({parts}, and some to spare), but the disk has {in_words(free)} free; "
        "choose another out=",
    )


# --- shards


class Records(Dataset):
    """Batches of uint8 images (B, C, S, S) by place in the manifest, for loading processes."""

    def __init__(self, splits: dict[str, Images], manifest: list[Row]) -> None:
        self.splits = list(splits.values())
        number = {split: k for k, split in enumerate(splits)}
        places = {split: {name: k for k, name in enumerate(images.names)} for split, images in splits.items()}
        # loading processes share the memory of arrays, but not that of a million small objects
        self.split = np.array([number[row.split] for row in manifest], dtype=np.int8)
        self.index = np.array([places[row.split][row.path] for row in manifest], dtype=np.int64)
        self.bytes = np.array([row.bytes for row in manifest], dtype=np.int64)

    def check_size(self, place: int) -> None:
        """Raise UserError for a file that is not of the size that the manifest says."""
        images = self.splits[self.split[place]]
        if images.files_root is not None:
            check_size(images.files_root / images.names[self.index[place]], int(self.bytes[place]))

    def __getitem__(self, places: range) -> np.ndarray:
        """Return the images at `places`; raise UserError for a file that has changed."""
        loaded = []
        for place in places:
            self.check_size(place)
            loaded.append(self.splits[self.split[place]].load(self.index[place : place + 1]))
        return np.concatenate(loaded)


class ShardWriter:
    """Writes one .npy file record by record, under a temporary name until `close`; knows its size
    and SHA-256.
    """

    def __init__(self, path: Path, dtype: str, shape: tuple[int, ...]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.dtype = path, np.dtype(dtype)
        self.temporary = path.with_name(f".tmp-{path.name}")
        self.file = self.temporary.open("wb")
        self.digest, self.size = hashlib.sha256(), 0
        header = {"descr": np.lib.format.dtype_to_descr(self.dtype), "fortran_order": False, "shape": shape}
        try:
            np.lib.format.write_array_header_1_0(self, header)  # written through `write`, so that the hash covers it
        except OSError:
            self.abandon()
            raise

    def write(self, data: bytes) -> None:
        """Append bytes."""
        self.file.write(data)
        self.digest.update(data)
        self.size += len(data)

    def append(self, values: np.ndarray) -> None:
        """Append records (B, …), converted to the file's dtype; raise UserError where they do not
        fit into it.
        """
        with np.errstate(over="ignore"):
            stored = values.astype(self.dtype)
        if not np.isfinite(stored).all():
            raise UserError(
                f"{self.path}: values beyond {self.dtype}; cache with dtype=float32, or look at the encoder"
            )
        self.write(stored.tobytes())

    def close(self) -> dict[str, Any]:
        """Force the file to disk under its final name; return its size and SHA-256."""
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        self.temporary.replace(self.path)
        return {"size": self.size, "sha256": self.digest.hexdigest()}

    def abandon(self) -> None:
        """Remove what was written."""
        self.file.close()
        self.temporary.unlink(missing_ok=True)


def receipt_path(out: Path, shard: int) -> Path:
    """Return the path of the file that says that a shard is complete."""
    return out / "shards" / f"{shard:05d}.json"


def is_complete(out: Path, shard: int) -> bool:
    """Return whether a shard has its receipt, and its files have their sizes."""
    try:
        files = json.loads(receipt_path(out, shard).read_text())
        return all((out / name).stat().st_size == file["size"] for name, file in files.items())
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        return False  # not there, or damaged: the shard is written anew


@contextlib.contextmanager
def disk_errors(out: Path) -> Iterator[None]:
    """Turn an error of writing into a UserError."""
    try:
        yield
    except OSError as error:
        reason = "the disk is full" if error.errno == errno.ENOSPC else error.strerror or error
        raise UserError(
            f"{out}: cannot be written ({reason}); free the disk and run the same command again: finished shards stay"
        ) from error


def encode_shard(
    out: Path,
    shard: int,
    count: int,
    index: dict[str, Any],
    batches: Iterator[Tensor],
    autoencoder: Autoencoder,
    target: Target | None,
    device: torch.device,
    progress: tqdm,
) -> None:
    """Write one shard's files, of `count` records, and then its receipt."""
    writers: dict[str, ShardWriter] = {}
    try:
        for name, array in index["arrays"].items():
            with disk_errors(out):
                writers[name] = ShardWriter(shard_path(out, name, shard), array["dtype"], (count, *array["shape"]))
        written = 0
        while written < count:
            pixels = next(batches)
            images = pixels.to(device)
            views = [images, images.flip(-1)] if index["flips"] == 2 else [images]
            values = {
                "moments": torch.stack([autoencoder.encode(view) for view in views], dim=1)
            }  # (B, flips, M, h, w)
            values["images"] = pixels
            if target is not None:
                values["features"] = torch.stack([target(view) for view in views], dim=1)  # (B, flips, N, F)
            with disk_errors(out):
                for name, writer in writers.items():
                    writer.append(values[name].cpu().numpy())
            written += len(pixels)
            progress.update(len(pixels))
        with disk_errors(out):
            files = {str(writer.path.relative_to(out)): writer.close() for writer in writers.values()}
            receipt = receipt_path(out, shard)
            receipt.parent.mkdir(exist_ok=True)
            write_json(receipt, files)
    finally:
        for writer in writers.values():
            writer.abandon()


# --- the whole


def complete(out: Path, index: dict[str, Any], manifest: list[Row], num_shards: int) -> None:
    """Wait for all shards of all processes, then write labels.npy and the complete index."""
    while not all(is_complete(out, shard) for shard in range(num_shards)):
        time.sleep(0.5)
    labels = np.array([row.label for row in manifest], dtype=np.int64)
    temporary = out / ".tmp-labels.npy"
    np.save(temporary, labels)
    temporary.replace(out / "labels.npy")
    shards = [json.loads(receipt_path(out, shard).read_text()) for shard in range(num_shards)]
    files = {
        name: {"size": (out / name).stat().st_size, "sha256": sha256(out / name)}
        for name in ("labels.npy", "manifest.csv")
    }
    for path in (out, *(out / name for name in index["arrays"])):
        fsync(path)
    write_json(out / "index.json", {**index, "complete": True, "files": files, "shards": shards})


def verify(out: Path, index: dict[str, Any]) -> None:
    """Compare every file of a complete cache with its checksum; raise UserError naming the damaged
    ones. The cache is then incomplete, and their shards' receipts are removed, so that the same
    command writes them again.
    """
    damaged = []
    parts = [*enumerate(index["shards"]), (None, index["files"])]
    for shard, files in tqdm(parts, unit="shard", desc="verifying", mininterval=1.0):
        for name, file in files.items():
            path = out / name
            if not path.is_file() or path.stat().st_size != file["size"] or sha256(path) != file["sha256"]:
                damaged.append(name)
                if shard is not None:
                    receipt_path(out, shard).unlink(missing_ok=True)
    if damaged:
        write_json(out / "index.json", {**index, "complete": False, "shards": [], "files": {}})
        raise UserError(
            f"{out / damaged[0]}: damaged ({len(damaged)} of the cache's files are); run the same command again to "
            "make them anew"
        )


def cache_latents(
    settings: CacheSettings,
    splits: dict[str, Images],
    autoencoder: Autoencoder,
    target: Target | None,
    accelerator: Accelerator,
) -> None:
    """Encode the images of all `splits` into the cache `settings.out`, whose manifest.csv is there
    already, and the `target`'s features of them where there is one.

    Every process takes its own shards; process 0 writes the index. Raises UserError for a folder
    that holds another cache, a disk too small or full, a file that has changed.
    """
    # --- what is to be made, and whether the folder holds a part of the very same
    out = Path(settings.out)
    rank, num_processes, device = accelerator.process_index, accelerator.num_processes, accelerator.device
    manifest = read_manifest(out)
    target = target and target.to(device)
    index = describe(settings, manifest, splits, autoencoder, target)
    if rank == 0:
        check_manifest(out, manifest, splits)
        if not (out / "index.json").is_file():
            write_json(out / "index.json", index)
    accelerator.wait_for_everyone()
    check_same_cache(out, index)
    accelerator.wait_for_everyone()  # nobody writes before all agree that it is theirs to write
    stored = read_index(out)
    if stored["complete"]:
        if rank == 0:
            records = Records(splits, manifest)
            for place in range(len(manifest)):
                records.check_size(place)
            verify(out, stored)
            log.info("%s: complete, %d images; every checksum is right", out, len(manifest))
        return
    # --- this process's shards, and their batches, none of which crosses two
    starts = range(0, len(manifest), settings.shard_size)
    places = [range(start, min(start + settings.shard_size, len(manifest))) for start in starts]
    missing = [shard for shard in range(len(places)) if not is_complete(out, shard)]
    mine = [shard for shard in missing if shard % num_processes == rank]
    if rank == 0:
        check_space(out, index["arrays"], sum(len(places[shard]) for shard in missing))
    batches = load_batches(
        Records(splits, manifest),
        [
            range(first, min(first + settings.batch_size, places[shard].stop))
            for shard in mine
            for first in range(places[shard].start, places[shard].stop, settings.batch_size)
        ],
        0 if splits["train"].files_root is None else settings.workers,
    )
    # --- encode
    autoencoder = autoencoder.to(device)
    progress = tqdm(
        total=sum(len(places[shard]) for shard in mine),
        unit="img",
        desc=f"encoding (process 1 of {num_processes})" if num_processes > 1 else "encoding",
        disable=rank != 0,
        mininterval=1.0,
    )
    with progress:
        for shard in mine:
            encode_shard(out, shard, len(places[shard]), index, batches, autoencoder, target, device, progress)
    if rank == 0:
        complete(out, index, manifest, len(places))
        log.info("%s: complete, %d images; train with data.root=%s", out, len(manifest), out)
