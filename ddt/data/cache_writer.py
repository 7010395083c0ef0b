"""Writing a latent cache (`ddt.data.latent_cache`): images that `ddt.data.manifest` lists are
encoded, shard by shard.

A shard's files are written under a temporary name, renamed, and then vouched for by
`shards/00000.json`; a run that was stopped goes on with the first shard that is not. Batches never
cross shards, so a shard's bytes depend neither on where an earlier run stopped nor on how many
processes share the work.
Shapes: B batch, M moments' channels, h w latent, S pixels, N tokens, F features.
"""

import contextlib
import dataclasses
import errno
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator
from torch.utils.data import Dataset
from tqdm import tqdm

from ddt.autoencoder import Autoencoder
from ddt.data.images import FileImages, Images
from ddt.data.latent_cache import CACHE_FORMAT_VERSION, read_index, shard_path
from ddt.data.manifest import Row, check_manifest, check_size, check_sizes, read_manifest
from ddt.data.stream import load_batches
from ddt.errors import UserError, require
from ddt.files import fsync, sha256, write_json
from ddt.objective.alignment import REPA, Target

log = logging.getLogger(__name__)
RESERVE = 64 * 2**20  # bytes that stay free on the disk


@dataclasses.dataclass(frozen=True)
class CacheSettings:
    """What to cache and how; see conf/cache_latents.yaml.

    out: the cache's folder. flip: store the mirror image's moments too. dtype: of the moments.
    store_images: keep the uint8 images beside them. store_features: keep the alignment target's
    features. skip_broken: leave files that cannot be read out of the list instead of stopping.
    shard_size: records a shard. batch_size: images encoded at once.
    num_workers: processes that read image files.

    Raises UserError for values that cannot be.
    """

    out: str
    flip: bool
    dtype: Literal["float16", "float32"]
    store_images: bool
    store_features: bool
    skip_broken: bool
    shard_size: int
    batch_size: int
    num_workers: int | None

    @property
    def workers(self) -> int:
        """Reading processes: as many as were asked for, or one a core, at most 8."""
        return min(os.cpu_count() or 1, 8) if self.num_workers is None else self.num_workers

    def __post_init__(self) -> None:
        for key in ("shard_size", "batch_size"):
            require(getattr(self, key) >= 1, f"{key}={getattr(self, key)}: must be at least 1")
        require(self.workers >= 0, f"num_workers={self.num_workers}: must be at least 0, or null")
        path = Path(self.out)
        require(self.out != "", "out: not set; give the cache's folder")
        require(not path.exists() or path.is_dir(), f"out={self.out}: is a file; give a folder")
        ours = ("index.json", "manifest.csv", "broken.csv", ".tmp-manifest.csv", ".lock")
        require(
            not path.is_dir() or not any(path.iterdir()) or any((path / name).exists() for name in ours),
            f"out={self.out}: holds other things than a latent cache; choose another folder",
        )


def flips(images: torch.Tensor, both: bool) -> list[torch.Tensor]:
    """Return images (B, C, S, S) as they are, and with `both` their mirror images after them."""
    return [images, images.flip(-1)] if both else [images]


class Records(Dataset):
    """Batches of uint8 images (B, C, S, S) by their place in the manifest: what the loading
    processes read.
    """

    def __init__(self, splits: dict[str, Images], manifest: list[Row]) -> None:
        self.splits = list(splits.values())
        number = {split: k for k, split in enumerate(splits)}
        places = {split: {name: k for k, name in enumerate(images.names)} for split, images in splits.items()}
        # arrays, because loading processes share their memory and not that of a million small
        # objects
        self.split = np.array([number[row.split] for row in manifest], dtype=np.int8)
        self.index = np.array([places[row.split][row.path] for row in manifest], dtype=np.int64)
        self.bytes = np.array([row.bytes for row in manifest], dtype=np.int64)

    def __getitem__(self, places: range) -> np.ndarray:
        """Return the images at `places`; raise UserError for a file that is not what the manifest
        says.
        """
        loaded = []
        for place in places:
            images, index = self.splits[self.split[place]], self.index[place]
            if isinstance(images, FileImages):
                check_size(images.root / images.names[index], int(self.bytes[place]))
            loaded.append(images.load(np.array([index])))
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


def record_bytes(array: dict[str, Any]) -> int:
    """Return the bytes of one record of an array."""
    return int(np.prod(array["shape"])) * np.dtype(array["dtype"]).itemsize


def receipt_path(out: Path, shard: int) -> Path:
    """Return the path of the file that says that a shard is complete."""
    return out / "shards" / f"{shard:05d}.json"


def finished(out: Path, shard: int) -> bool:
    """Tell whether a shard is complete: it has its receipt, and its files have their sizes."""
    receipt = receipt_path(out, shard)
    try:
        files = json.loads(receipt.read_text())
        return all((out / name).stat().st_size == file["size"] for name, file in files.items())
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        return False  # not there, or damaged: the shard is made anew


def in_words(size: int) -> str:
    """Return a number of bytes for people."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def check_space(out: Path, arrays: dict[str, dict[str, Any]], missing: int) -> None:
    """Log what `missing` records will take and raise UserError where the disk has not as much."""
    needed = {name: missing * record_bytes(array) for name, array in arrays.items()}
    free = shutil.disk_usage(out).free
    parts = ", ".join(f"{name} {in_words(size)}" for name, size in needed.items())
    log.info("%s: %d images to encode: %s; %s are free", out, missing, parts, in_words(free))
    require(
        sum(needed.values()) + RESERVE <= free,
        f"out={out}: needs {in_words(sum(needed.values()) + RESERVE)} ({parts}, and some to spare), but the disk has "
        f"{in_words(free)} free; choose another out=",
    )


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
    places: range,
    index: dict[str, Any],
    batches: Iterator[torch.Tensor],
    autoencoder: Autoencoder,
    target: Target | None,
    accelerator: Accelerator,
    progress: tqdm,
) -> None:
    """Write one shard's files and then its receipt."""
    writers: dict[str, ShardWriter] = {}
    both = index["flips"] == 2
    try:
        for name, array in index["arrays"].items():
            shape = (len(places), *array["shape"])
            with disk_errors(out):
                writers[name] = ShardWriter(shard_path(out, name, shard), array["dtype"], shape)
        written = 0
        while written < len(places):
            pixels = next(batches)
            images = pixels.to(accelerator.device)
            moments = torch.stack([autoencoder.encode(i) for i in flips(images, both)], dim=1)  # (B, flips, M, h, w)
            values = {"moments": moments, "images": pixels}
            if target is not None:
                values["features"] = torch.stack([target(i) for i in flips(images, both)], dim=1)  # (B, flips, N, F)
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


def complete(out: Path, index: dict[str, Any], manifest: list[Row], num_shards: int) -> None:
    """Wait for all shards of all processes, then write labels.npy and the complete index."""
    while not all(finished(out, shard) for shard in range(num_shards)):
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
    command makes them again.
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


def describe(
    settings: CacheSettings,
    manifest: list[Row],
    images: Images,
    splits: Iterable[str],
    source: dict[str, Any],
    autoencoder: Autoencoder,
    autoencoder_settings: dict[str, Any],
    target: Target | None,
) -> dict[str, Any]:
    """Return the index of a cache none of whose shards is written yet; see `ddt.data.latent_cache`."""
    files = isinstance(images, FileImages)
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
        "transform": f"RGB, ADM centre crop to {images.image_size} px" if files else None,
        "autoencoder": {"settings": autoencoder_settings, "fingerprint": autoencoder.fingerprint},
        "features": None
        if target is None
        else {
            "target": target.name,
            "weights_sha256": None if target.weights is None else sha256(Path(target.weights)),
            "fingerprint": target.fingerprint,
            "grid": list(target.grid),
            "num_features": target.num_features,
        },
        "source": source,
        "source_root": str(images.root.resolve()) if isinstance(images, FileImages) else None,
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
        "encode_dtype": autoencoder_settings.get("encode_dtype"),
    }
    index["fingerprint"] = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
    return index


def cache_latents(
    settings: CacheSettings,
    splits: dict[str, Images],
    source: dict[str, Any],
    autoencoder: Autoencoder,
    autoencoder_settings: dict[str, Any],
    alignment: REPA | None,
    accelerator: Accelerator,
) -> None:
    """Encode the images of all `splits` into the cache `settings.out`, whose manifest.csv is there
    already.

    Every process takes its own shards; process 0 writes the index. `source` and
    `autoencoder_settings` are kept in the index. Raises UserError for a folder that holds another
    cache, a disk too small or full, a file that has changed.
    """
    # --- what is to be made, and whether the folder holds a part of the very same
    out = Path(settings.out)
    rank, num_processes = accelerator.process_index, accelerator.num_processes
    images = splits["train"]
    target = None
    if settings.store_features:
        assert alignment is not None, "the caller has checked it"
        target = alignment.build_target(images.image_size).to(accelerator.device)
    manifest = read_manifest(out)
    index = describe(settings, manifest, images, splits, source, autoencoder, autoencoder_settings, target)
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
            check_sizes(splits, manifest)
            verify(out, stored)
            log.info("%s: complete, %d images; every checksum is right", out, len(manifest))
        return
    # --- this process's shards, and their batches, none of which crosses two
    starts = range(0, len(manifest), settings.shard_size)
    places = [range(start, min(start + settings.shard_size, len(manifest))) for start in starts]
    mine = [shard for shard in range(rank, len(places), num_processes) if not finished(out, shard)]
    if rank == 0:
        missing = [shard for shard in range(len(places)) if not finished(out, shard)]
        check_space(out, index["arrays"], sum(len(places[shard]) for shard in missing))
    batches = load_batches(
        Records(splits, manifest),
        [
            range(first, min(first + settings.batch_size, places[shard].stop))
            for shard in mine
            for first in range(places[shard].start, places[shard].stop, settings.batch_size)
        ],
        settings.workers if isinstance(images, FileImages) else 0,
    )
    # --- encode
    autoencoder = autoencoder.to(accelerator.device)
    progress = tqdm(
        total=sum(len(places[shard]) for shard in mine),
        unit="img",
        desc=f"encoding (process 1 of {num_processes})" if num_processes > 1 else "encoding",
        disable=rank != 0,
        mininterval=1.0,
    )
    try:
        for shard in mine:
            encode_shard(out, shard, places[shard], index, batches, autoencoder, target, accelerator, progress)
    finally:
        progress.close()
    if rank == 0:
        complete(out, index, manifest, len(places))
        log.info("%s: complete, %d images; train with data.root=%s", out, len(manifest), out)
