"""Compare random batches from a latent cache with a file per image, in one run: ratios, medians, batches in turns.

python scripts/benchmark_latent_cache.py [records=20000] [out=FOLDER]
"""

import datetime
import logging
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from omegaconf import DictConfig

from ddt.caching import ShardWriter
from ddt.errors import require
from ddt.files import sha256, write_json
from ddt.latent_cache import CACHE_FORMAT_VERSION, LatentCache, shard_path
from scripts.entry import arguments_for, checked, entry_point

log = logging.getLogger(__name__)
SHAPE = (8, 32, 32)  # moments of SD-VAE at 256 px
SHARD_SIZE = 8192


def write_stores(root: Path, records: int) -> None:
    """Write the same random moments as a latent cache and as one .pt file an image."""
    rng = np.random.default_rng(0)
    (root / "files").mkdir()
    shards = []
    for shard, start in enumerate(range(0, records, SHARD_SIZE)):
        count = min(SHARD_SIZE, records - start)
        writer = ShardWriter(shard_path(root / "cache", "moments", shard), "float16", (count, 1, *SHAPE))
        for row in range(count):
            values = rng.standard_normal((1, 1, *SHAPE), dtype=np.float32).astype(np.float16)
            writer.append(values)
            mean, logvar = torch.from_numpy(values[0, 0]).chunk(2)
            torch.save({"mean": mean.clone(), "logvar": logvar.clone()}, root / "files" / f"{start + row}.pt")
        shards.append({f"moments/{shard:05d}.npy": writer.close()})
    labels = root / "cache" / "labels.npy"
    np.save(labels, np.zeros(records, dtype=np.int64))
    checked_files = {"labels.npy": {"size": labels.stat().st_size, "sha256": sha256(labels)}}
    index = {
        "format_version": CACHE_FORMAT_VERSION, "complete": True, "count": records, "splits": {"train": records},
        "shard_size": SHARD_SIZE, "arrays": {"moments": {"dtype": "float16", "shape": [1, *SHAPE]}}, "flips": 1,
        "channels": 3, "image_size": 256, "class_names": ["0"], "fingerprint": "benchmark", "features": None,
        "source_root": None, "shards": shards, "files": checked_files, "autoencoder": {},
    }  # fmt: skip
    write_json(root / "cache" / "index.json", index)


def compare(root: Path, records: int, batch_size: int, batches: int) -> dict[str, Any]:
    """Read the same random batches from both stores in turns; return seconds a batch (median) and their ratio."""
    cache = LatentCache(str(root / "cache"))
    straight = np.zeros(batch_size, dtype=bool)

    def from_cache(indices: np.ndarray) -> np.ndarray:
        return cache.load_moments(indices, straight)

    def from_files(indices: np.ndarray) -> np.ndarray:
        loaded = [torch.load(root / "files" / f"{i}.pt", weights_only=True) for i in indices]
        return torch.stack([torch.cat([entry["mean"], entry["logvar"]]) for entry in loaded]).numpy()

    ways: dict[str, Callable[[np.ndarray], np.ndarray]] = {"cache": from_cache, "files": from_files}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    rng = np.random.default_rng(1)
    for _ in range(batches):
        indices = rng.choice(records, batch_size, replace=False)
        values = {}
        for name, read in ways.items():
            start = time.perf_counter()
            values[name] = read(indices)
            seconds[name].append(time.perf_counter() - start)
        assert np.array_equal(values["cache"], values["files"]), "both stores hold the same"
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    return {
        "seconds_a_batch": medians,
        "images_per_second": {name: batch_size / median for name, median in medians.items()},
        "ratio": medians["files"] / medians["cache"],
    }


def benchmark(records: int, batch_size: int, batches: int, out: str | None) -> None:
    """Make the stores in a temporary folder, compare, print, and write latent_cache.json where asked to."""
    for key, value in {"batch_size": batch_size, "batches": batches}.items():
        require(value >= 1, f"{key}={value}: must be at least 1")
    require(records >= batch_size, f"records={records}: must be at least batch_size={batch_size}")
    require(out is None or not Path(out).is_file(), f"out={out}: is a file; give a folder")
    root = Path(tempfile.mkdtemp(prefix="latent_cache_"))
    try:
        write_stores(root, records)
        found = compare(root, records, batch_size, batches)
    finally:
        shutil.rmtree(root)
    for name, rate in found["images_per_second"].items():
        log.info("%-6s %10.0f images/s", name, rate)
    log.info("ratio  %10.1f", found["ratio"])
    if out is not None:
        settings = {"records": records, "batch_size": batch_size, "batches": batches, "record_bytes": 2 * 8 * 32 * 32}
        machine = {
            "processor": platform.machine(),
            "cores": os.cpu_count(),
            "numpy": np.__version__,
            "torch": torch.__version__,
        }
        date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        Path(out).mkdir(parents=True, exist_ok=True)
        write_json(Path(out) / "latent_cache.json", {**found, "settings": settings, "machine": machine, "date": date})


@entry_point("benchmark_latent_cache")
def main(cfg: DictConfig) -> None:
    """Check, measure."""
    benchmark(**arguments_for(benchmark, checked(cfg)))


if __name__ == "__main__":
    main()
