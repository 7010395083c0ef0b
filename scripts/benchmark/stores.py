"""The same random moments as a latent cache and as one .pt file an image, to compare how fast they
are read.
"""

from pathlib import Path

import numpy as np
import torch

from ddt.data.cache_writer import ShardWriter
from ddt.data.latent_cache import CACHE_FORMAT_VERSION, shard_path
from ddt.files import sha256, write_json

SHARD_SIZE = 8192


def write_stores(root: Path, records: int, latent_size: int) -> None:
    """Write `records` moments (8, H, W) of SD-VAE's kind as `cache` and `files` in the folder
    `root`.
    """
    shape = (8, latent_size, latent_size)
    rng = np.random.default_rng(0)
    (root / "files").mkdir()
    shards = []
    for shard, start in enumerate(range(0, records, SHARD_SIZE)):
        count = min(SHARD_SIZE, records - start)
        writer = ShardWriter(shard_path(root / "cache", "moments", shard), "float16", (count, 1, *shape))
        for row in range(count):
            values = rng.standard_normal((1, 1, *shape), dtype=np.float32).astype(np.float16)
            writer.append(values)
            mean, logvar = torch.from_numpy(values[0, 0]).chunk(2)
            torch.save({"mean": mean.clone(), "logvar": logvar.clone()}, root / "files" / f"{start + row}.pt")
        shards.append({f"moments/{shard:05d}.npy": writer.close()})
    labels = root / "cache" / "labels.npy"
    np.save(labels, np.zeros(records, dtype=np.int64))
    checked_files = {"labels.npy": {"size": labels.stat().st_size, "sha256": sha256(labels)}}
    index = {
        "format_version": CACHE_FORMAT_VERSION, "complete": True, "count": records, "splits": {"train": records},
        "shard_size": SHARD_SIZE, "arrays": {"moments": {"dtype": "float16", "shape": [1, *shape]}}, "flips": 1,
        "channels": 3, "image_size": 8 * latent_size, "class_names": ["0"], "fingerprint": "benchmark",
        "features": None, "source_root": None, "shards": shards, "files": checked_files, "autoencoder": {},
    }  # fmt: skip
    write_json(root / "cache" / "index.json", index)
