"""Writing a latent cache (`ddt.data.latent_cache`) of the images in a manifest, shard by shard.

A shard's files are written under a temporary name and renamed, then its receipt
`shards/00000.json`; the same command resumes at the first shard without one. Batches never cross
shards, so a shard's bytes depend neither on interruptions nor on the number of processes.
Shapes: B batch, M moments' channels, h w latent, S pixels, N tokens, F features.
"""

import contextlib
import errno
import hashlib
import json
import logging
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from ddt.autoencoder import Autoencoder
from ddt.data.images import Images
from ddt.data.latent_cache import CACHE_FORMAT_VERSION, content_fingerprint, damaged_files, read_index, shard_path
from ddt.data.latent_statistics import STATISTICS, write_statistics
from ddt.data.manifest import Row, check_manifest, check_size, make_manifest, read_manifest
from ddt.data.settings import CacheSettings
from ddt.data.stream import check_shared_memory, load_batches
from ddt.errors import UserError, require
from ddt.files import atomic_file, fsync, read_record, remove_temporary_files, sha256, write_json
from ddt.logs import progress_bar
from ddt.objective.alignment_target import Target
from ddt.tensor_files import write_array

log = logging.getLogger(__name__)
RESERVE = 64 * 2**20  # bytes to leave free on the disk
MOST_LOGGED = 32  # channels


def describe(
    settings: CacheSettings,
    manifest: list[Row],
    splits: dict[str, Images],
    autoencoder: Autoencoder,
    target: Target | None,
) -> dict[str, Any]:
    """Return the index of a cache without shards; see `ddt.data.latent_cache`."""
    images, codec, flips = splits["train"], settings.autoencoder.plain(), 2 if settings.flip else 1
    channels, height, width = autoencoder.latent_shape(images.channels, images.image_size)
    moments = [flips, channels * (2 if autoencoder.stochastic else 1), height, width]
    arrays: dict[str, dict[str, Any]] = {"moments": {"dtype": settings.dtype, "shape": moments}}  # of one record
    if settings.store_images:
        arrays["images"] = {"dtype": "uint8", "shape": [images.channels, images.image_size, images.image_size]}
    features = None
    if target is not None:
        tokens = target.grid[0] * target.grid[1]
        arrays["features"] = {"dtype": "float16", "shape": [flips, tokens, target.num_features]}
        features = {
            "target": target.name,
            "weights_sha256": None if target.weights is None else sha256(Path(target.weights)),
            "fingerprint": target.fingerprint,
            "grid": list(target.grid),
            "num_features": target.num_features,
        }
    index: dict[str, Any] = {
        "format_version": CACHE_FORMAT_VERSION,
        "complete": False,
        "count": len(manifest),
        "splits": {split: sum(row.split == split for row in manifest) for split in splits},
        "shard_size": settings.shard_size,
        "batch_size": settings.batch_size,
        "arrays": arrays,
        "flips": flips,
        "channels": images.channels,
        "image_size": images.image_size,
        "class_names": images.class_names,
        "transform": images.transform,
        "autoencoder": {"settings": codec, "fingerprint": autoencoder.encoder_fingerprint},
        "features": features,
        "source": {**settings.data.plain(), **images.inferred},
        "source_root": None if images.files_root is None else str(images.files_root.resolve()),
        "versions": {"torch": torch.__version__},
        "shards": [],
        "files": {"manifest.csv": file_record(Path(settings.out) / "manifest.csv")},
    }
    index["fingerprint"] = content_fingerprint(index)
    return index


def file_record(path: Path) -> dict[str, Any]:
    """Return size and SHA-256 of a file, as the index holds them."""
    return {"size": path.stat().st_size, "sha256": sha256(path)}


def list_images(settings: CacheSettings, splits: dict[str, Images]) -> None:
    """Log hints on the files, then read each once and write the cache's manifest.csv, or compare it
    with the index; see `make_manifest`.
    """
    out, expected = Path(settings.out), None
    for hint in splits["train"].hints:
        log.info("hint: %s", hint)
    if (out / "index.json").is_file():
        expected = read_index(out)["files"]["manifest.csv"]["sha256"]
    make_manifest(out, splits, settings.workers, settings.skip_broken, expected)


def check_same_cache(out: Path, index: dict[str, Any]) -> None:
    """Raise UserError where the folder holds another cache; paths may differ."""
    stored, expected = read_index(out), json.loads(json.dumps(index))
    ignored = ("complete", "shards", "files", "source", "source_root", "autoencoder", "versions")
    differing = [
        f"{key} {str(stored.get(key))[:60]} -> {str(expected[key])[:60]}"
        for key in expected
        if key not in ignored and stored.get(key) != expected[key]
    ]
    require(not differing, f"out={out}: holds another cache ({', '.join(differing)}); choose another out=")


def in_words(size: int) -> str:
    """Return a number of bytes in GB or MB."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def check_space(out: Path, arrays: dict[str, dict[str, Any]], missing: int) -> None:
    """Log the bytes of `missing` records; raise UserError where the disk has less free."""
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


class Records(Dataset):
    """Batches of uint8 images (B, C, S, S), indexed by rows of the manifest."""

    def __init__(self, splits: dict[str, Images], manifest: list[Row]) -> None:
        self.splits = list(splits.values())
        numbers = {split: k for k, split in enumerate(splits)}
        indices = {split: {name: k for k, name in enumerate(images.names)} for split, images in splits.items()}
        # loading processes share the memory of arrays, but not that of a million small objects
        self.split = np.array([numbers[row.split] for row in manifest], dtype=np.int8)
        self.index = np.array([indices[row.split][row.path] for row in manifest], dtype=np.int64)
        self.bytes = np.array([row.bytes for row in manifest], dtype=np.int64)

    def check_size(self, row: int) -> None:
        """Raise UserError for a file that is not of its size in the manifest."""
        images = self.splits[self.split[row]]
        if images.source is not None:
            check_size(images.source, images.names[self.index[row]], int(self.bytes[row]))

    def __getitem__(self, rows: range) -> np.ndarray:
        """Return the images of `rows`; raise UserError for a file that has changed."""
        for row in rows:
            self.check_size(row)
        return np.concatenate([self.splits[self.split[row]].load(self.index[row : row + 1]) for row in rows])


def as_stored(values: np.ndarray, dtype: str, path: Path) -> np.ndarray:
    """Return values in the dtype of a shard; raise UserError for values beyond it."""
    with np.errstate(over="ignore"):
        stored = values.astype(dtype)
    finite = np.isfinite(stored).all()
    require(bool(finite), f"{path}: values beyond {dtype}; cache with dtype=float32, or look at the encoder")
    return stored


def receipt_path(out: Path, shard: int) -> Path:
    """Return the path of a shard's receipt, which holds size and SHA-256 of its files."""
    return out / "shards" / f"{shard:05d}.json"


def identity(index: dict[str, Any]) -> str:
    """Return what a shard's receipt says of the cache that it belongs to: index.json may have been
    removed since.
    """
    content = [index[key] for key in ("fingerprint", "arrays", "features", "shard_size", "batch_size")]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def shard_files(out: Path, shard: int, index: dict[str, Any]) -> dict[str, Any] | None:
    """Return the files of a shard with size and SHA-256; None unless it has a receipt of this cache
    and they have their sizes.
    """
    try:
        receipt = read_record(receipt_path(out, shard))
        files = receipt["files"]
        complete = all((out / name).stat().st_size == file["size"] for name, file in files.items())
        return files if complete and receipt["cache"] == identity(index) else None
    except (FileNotFoundError, KeyError, TypeError, AttributeError):
        return None


@contextlib.contextmanager
def disk_errors(out: Path) -> Iterator[None]:
    """Turn a write error into a UserError."""
    try:
        yield
    except OSError as error:
        reason = "the disk is full" if error.errno == errno.ENOSPC else error.strerror or error
        raise UserError(
            f"{error.filename or out}: cannot be written ({reason}); free the disk and run the same command again: "
            "finished shards stay"
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
    """Write one shard of `count` records, then its receipt."""
    paths = {name: shard_path(out, name, shard) for name in index["arrays"]}
    written = 0
    with contextlib.ExitStack() as stack:
        writers = {
            name: stack.enter_context(write_array(paths[name], array["dtype"], (count, *array["shape"])))
            for name, array in index["arrays"].items()
        }
        while written < count:
            pixels = next(batches)
            images = pixels.to(device)
            views = [images, images.flip(-1)] if index["flips"] == 2 else [images]
            moments = torch.stack([autoencoder.encode(view) for view in views], dim=1)  # (B, flips, M, h, w)
            values = {"moments": moments, "images": pixels}
            if target is not None:
                values["features"] = torch.stack([target(view) for view in views], dim=1)  # (B, flips, N, F)
            for name, writer in writers.items():
                writer.append(as_stored(values[name].cpu().numpy(), index["arrays"][name]["dtype"], paths[name]))
            written += len(pixels)
            progress.update(len(pixels))
    files = {str(paths[name].relative_to(out)): writer.record() for name, writer in writers.items()}
    receipt = receipt_path(out, shard)
    receipt.parent.mkdir(exist_ok=True)
    write_json(receipt, {"cache": identity(index), "files": files})


def complete(out: Path, index: dict[str, Any], manifest: list[Row], num_shards: int) -> None:
    """Wait for the shards of all processes, then write labels.npy and the complete index."""
    while None in (shards := [shard_files(out, shard, index) for shard in range(num_shards)]):
        time.sleep(0.5)
    with atomic_file(out / "labels.npy") as temporary:
        np.save(temporary, np.array([row.label for row in manifest], dtype=np.int64))
    files = {**index["files"], "labels.npy": file_record(out / "labels.npy")}
    for path in (out, *(out / name for name in index["arrays"])):
        fsync(path)
    write_json(out / "index.json", {**index, "complete": True, "files": files, "shards": shards})


def verify(out: Path, index: dict[str, Any]) -> None:
    """Compare every file of a complete cache with its checksum; raise UserError for damaged ones.

    The cache is then marked incomplete and their receipts are removed: the same command rewrites
    them.
    """
    shards = {name: shard for shard, files in enumerate(index["shards"]) for name in files}
    files = {name: file for part in (*index["shards"], index["files"]) for name, file in part.items()}
    damaged = damaged_files(out, files, again=True)
    for name in damaged:
        if name in shards:
            receipt_path(out, shards[name]).unlink(missing_ok=True)
    if damaged:
        kept = {"manifest.csv": index["files"]["manifest.csv"]}
        write_json(out / "index.json", {**index, "complete": False, "shards": [], "files": kept})
        raise UserError(
            f"{out / damaged[0]}: damaged ({len(damaged)} of the cache's files are); run the same command again to "
            "write them again"
        )


def report_statistics(out: Path) -> None:
    """Write the per-channel statistics of a complete cache, unless they are there, and log them."""
    path, index = out / STATISTICS, read_index(out)
    if index["splits"]["train"] == 0:
        return
    found = read_record(path) if path.is_file() else {}
    complete = all(isinstance(found.get(key), list) for key in ("mean", "std"))
    if not complete or found.get("fingerprint") != index["fingerprint"]:
        with disk_errors(out):
            found = write_statistics(out)
    if len(found["mean"]) > MOST_LOGGED:
        log.info("%s: mean and std of each channel of the latents before normalisation", path)
        return
    mean, std = (",".join(f"{value:.4g}" for value in found[key]) for key in ("mean", "std"))
    log.info("%s: latents before normalisation: mean [%s], std [%s] of each channel", path, mean, std)


def cache_latents(
    settings: CacheSettings,
    splits: dict[str, Images],
    autoencoder: Autoencoder,
    target: Target | None,
    accelerator: Accelerator,
) -> None:
    """Encode all `splits`, and a `target`'s features, into `settings.out`, which has its manifest.

    Every process takes its own shards; process 0 writes the index. Raises UserError for a folder
    that holds another cache, a disk too small or full, a file that has changed.
    """
    # --- describe the cache, and compare it with the folder's
    out = Path(settings.out)
    rank, num_processes, device = accelerator.process_index, accelerator.num_processes, accelerator.device
    if rank == 0:
        for folder in (out, *(path for path in out.iterdir() if path.is_dir())):
            remove_temporary_files(folder)
    manifest = read_manifest(out)
    target = target and target.to(device)
    index = describe(settings, manifest, splits, autoencoder, target)
    if rank == 0:
        check_manifest(out, manifest, splits)
        if not (out / "index.json").is_file():
            write_json(out / "index.json", index)
    accelerator.wait_for_everyone()
    check_same_cache(out, index)
    accelerator.wait_for_everyone()  # no process writes before all have checked the folder
    stored = read_index(out)
    if stored["complete"]:
        if rank == 0:
            records = Records(splits, manifest)
            for row in range(len(manifest)):
                records.check_size(row)
            verify(out, stored)
            log.info("%s: complete, %d images; every checksum is right", out, len(manifest))
            report_statistics(out)
        return
    # --- this process's shards and their batches
    starts = range(0, len(manifest), settings.shard_size)
    rows = [range(start, min(start + settings.shard_size, len(manifest))) for start in starts]  # of each shard
    missing = [shard for shard in range(len(rows)) if shard_files(out, shard, index) is None]
    mine = [shard for shard in missing if shard % num_processes == rank]
    if rank == 0:
        check_space(out, index["arrays"], sum(len(rows[shard]) for shard in missing))
    records = Records(splits, manifest)
    parts = [
        rows[shard][first : first + settings.batch_size]
        for shard in mine
        for first in range(0, len(rows[shard]), settings.batch_size)
    ]
    num_workers = 0 if splits["train"].files_root is None else settings.workers
    if parts:
        check_shared_memory(records, parts[0], num_workers, "num_workers")
    batches = load_batches(records, parts, num_workers)
    # --- encode
    autoencoder = autoencoder.to(device)
    progress = progress_bar(
        total=sum(len(rows[shard]) for shard in mine),
        unit="img",
        desc=f"encoding (process 1 of {num_processes})" if num_processes > 1 else "encoding",
        disable=rank != 0,
    )
    with progress, disk_errors(out):
        for shard in mine:
            encode_shard(out, shard, len(rows[shard]), index, batches, autoencoder, target, device, progress)
    if rank == 0:
        complete(out, index, manifest, len(rows))
        report_statistics(out)
        log.info("%s: complete, %d images; train with data.root=%s", out, len(manifest), out)
