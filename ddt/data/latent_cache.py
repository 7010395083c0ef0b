"""Images encoded once: a folder of fixed-size records, read at random at the speed of a memory map.

    index.json           what the records are, where they came from, checksums; `complete` when all is written
    manifest.csv         path, label, split, size of each image, in the order of the records
    moments/00000.npy    (records, flips, M, h, w): what the autoencoder's encode gives, float16 or float32
    images/00000.npy     (records, C, S, S) uint8, on request: what an alignment target needs
    features/00000.npy   (records, flips, N, F) float16, on request: what an alignment target gives

Every shard holds `shard_size` records, the last one the rest; training images come first, held-out
ones after them. `ddt/data/cache_writer.py` writes it. Shapes: B batch, M moments' channels (2C or
C), h w latent, S pixels, N tokens, F features.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from ddt.autoencoder import Autoencoder
from ddt.data.images import FileImages, Split, spread
from ddt.data.manifest import check_size, read_manifest
from ddt.errors import UserError, require
from ddt.files import sha256

CACHE_FORMAT_VERSION = 1
KEYS = {
    "complete", "count", "splits", "shard_size", "arrays", "flips", "channels", "image_size", "class_names", "features",
    "autoencoder", "source_root", "fingerprint", "shards", "files",
}  # fmt: skip


def shard_path(root: Path, array: str, shard: int) -> Path:
    """Return the path of a shard's file of one of the arrays `moments`, `images`, `features`."""
    return root / array / f"{shard:05d}.npy"


def read_index(root: Path) -> dict[str, Any]:
    """Return a cache's index.json; raise UserError naming what is missing or of another format."""
    path = root / "index.json"
    require(
        path.is_file(),
        f"data.root={root}: holds no latent cache (index.json); give the folder that scripts/cache_latents.py wrote",
    )
    try:
        index = json.loads(path.read_text())
        version = index["format_version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: damaged; remove the folder and cache again") from error
    require(isinstance(index, dict) and index.keys() >= KEYS, f"{path}: damaged; remove the folder and cache again")
    require(
        version == CACHE_FORMAT_VERSION,
        f"{path}: format version {version}, this code reads {CACHE_FORMAT_VERSION}; see CHANGELOG.md",
    )
    return index


class LatentCache:
    """A latent cache as a data set: moments instead of pixels, and pixels or features where an
    alignment needs them.

    Args:
        root: the cache's folder.
        split: "train" or "test", as the cached data set was split.
        image_size: pixels a side that the cached images must have; None takes any.
        source_root: where the image files are now, for an alignment target without cached pixels;
            None is where they were when the cache was made.
        cached_features: read the alignment target's features from the cache where it holds them,
            rather than running the target.

    Raises UserError for a cache that is missing, incomplete or damaged.
    """

    transform = "as stored in the latent cache"

    def __init__(
        self,
        root: str,
        split: Split = "train",
        image_size: int | None = None,
        source_root: str | None = None,
        cached_features: bool = True,
    ) -> None:
        self.root = Path(root)
        index = read_index(self.root)
        done, total = len(index["shards"]), -(-index["count"] // index["shard_size"])
        require(
            index["complete"],
            f"data.root={root}: the cache is incomplete; run the command that makes it again: it goes on where it "
            "stopped",
        )
        require(done == total, f"{self.root / 'index.json'}: names {done} of {total} shards; cache again")
        for files in (index["files"], *index["shards"]):
            for name, file in files.items():
                path = self.root / name
                size = path.stat().st_size if path.is_file() else None
                require(
                    size == file["size"],
                    f"{path}: {'is missing' if size is None else 'is damaged'}; run the command that made the cache "
                    "again",
                )
        require(
            image_size in (None, index["image_size"]),
            f"data.root={root}: holds images of {index['image_size']} px, not of data.image_size={image_size}; give "
            "another folder",
        )
        self.index = index
        self.channels, self.image_size = index["channels"], index["image_size"]
        self.class_names: list[str] = index["class_names"]
        self.flips: int = index["flips"]
        self.fingerprint: str = index["fingerprint"]
        self.source_root = source_root
        self.features: dict[str, Any] | None = index["features"] if cached_features else None
        self.first = 0 if split == "train" else index["splits"]["train"]
        path = self.root / "labels.npy"
        require(
            sha256(path) == index["files"]["labels.npy"]["sha256"],
            f"{path}: is damaged; run the command that made the cache again",
        )
        labels = np.load(path, allow_pickle=False)
        self.labels = labels[self.first : self.first + index["splits"][split]]
        self._maps: dict[Path, np.ndarray] = {}
        self._files: FileImages | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave the memory maps out: another process opens its own."""
        return {**self.__dict__, "_maps": {}}

    @property
    def names(self) -> list[str]:
        """Paths of the images, (n,), read from the manifest."""
        return [row.path for row in read_manifest(self.root)[self.first : self.first + len(self.labels)]]

    def check_autoencoder(self, autoencoder: Autoencoder) -> None:
        """Raise UserError where the moments were made by another autoencoder than the run's."""
        made_by = self.index["autoencoder"]
        wanted, found = getattr(autoencoder, "encode_dtype", None), made_by["settings"].get("encode_dtype")
        require(
            wanted == found or made_by["fingerprint"] != autoencoder.fingerprint,
            f"data.root={self.root}: was encoded with autoencoder.encode_dtype={found}, not {wanted}; give that, or "
            "cache again",
        )
        require(
            made_by["fingerprint"] == autoencoder.fingerprint,
            f"data.root={self.root}: was made by another autoencoder, {made_by['settings'].get('source', 'identity')} "
            f"(weights {str(made_by['fingerprint'])[:12]}), than the run's (weights "
            f"{str(autoencoder.fingerprint)[:12]}); choose that one with autoencoder=, or cache again",
        )

    def _records(self, array: str, indices: np.ndarray, flipped: np.ndarray | None = None) -> np.ndarray:
        """Return records of an array, (B, …), read shard by shard in ascending order."""
        shards, rows = np.divmod(indices + self.first, self.index["shard_size"])
        order = np.argsort(indices, kind="stable")
        result: np.ndarray | None = None
        for shard in np.unique(shards):
            where = order[shards[order] == shard]
            path = shard_path(self.root, array, shard)
            if path not in self._maps:
                self._maps[path] = self._open(path, self.index["arrays"][array])
            stored = self._maps[path]
            values = stored[rows[where]] if flipped is None else stored[rows[where], flipped[where].astype(int)]
            if result is None:
                result = np.empty((len(indices), *values.shape[1:]), dtype=values.dtype)
            result[where] = values
        assert result is not None, "a batch holds at least one image"
        return result

    def _open(self, path: Path, array: dict[str, Any]) -> np.ndarray:
        try:
            stored = np.load(path, mmap_mode="r", allow_pickle=False)
            whole = list(stored.shape[1:]) == array["shape"] and stored.dtype == array["dtype"]
        except (OSError, ValueError, EOFError):  # numpy's advice, to allow pickled objects, is not for a user
            whole = False
        require(whole, f"{path}: is damaged; run the command that made the cache again")
        return stored

    def load_moments(self, indices: np.ndarray, flipped: np.ndarray) -> np.ndarray:
        """Return the moments (B, M, h, w) at `indices`, in the stored dtype; `flipped` (B,) chooses
        mirror images.
        """
        return self._records("moments", indices, flipped)

    def load_features(self, indices: np.ndarray, flipped: np.ndarray) -> np.ndarray:
        """Return the alignment target's features (B, N, F), float16."""
        return self._records("features", indices, flipped)

    def load(self, indices: np.ndarray) -> np.ndarray:
        """Return the images at `indices` as uint8 (B, C, S, S): from the cache, or else from the
        image files.
        """
        if "images" in self.index["arrays"]:
            return self._records("images", indices)
        return self._source().load(indices)

    def require_pixels(self) -> None:
        """Raise UserError where neither the cache nor the image files can give pixels."""
        if "images" not in self.index["arrays"]:
            root = self._source().root
            require(
                root.is_dir(),
                f"data.source_root={root}: no such folder; the alignment target needs the images: give their folder, "
                "or cache with store_images=true",
            )

    def _source(self) -> FileImages:
        if self._files is None:
            stored = self.index["source_root"]
            require(
                stored is not None,
                f"data.root={self.root}: holds no pixels, which the alignment target needs; cache with "
                "store_images=true",
            )
            root = Path(self.source_root or stored)
            rows = read_manifest(self.root)[self.first : self.first + len(self.labels)]
            if root.is_dir():
                for k in spread(len(rows), 64):  # are these the pictures?
                    check_size(root / rows[k].path, rows[k].bytes)
            self._files = FileImages(
                root, [row.path for row in rows], self.labels, self.class_names, self.image_size, self.channels
            )
        return self._files
