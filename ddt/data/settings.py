"""Settings of the commands that encode a data set, parsed before torch is imported."""

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ddt.config import Choice
from ddt.errors import MAX_BATCH, MAX_WORKERS, require, require_count
from ddt.files import check_new, find_record

if TYPE_CHECKING:
    from ddt.autoencoder import Autoencoder
    from ddt.data.images import Images


@dataclasses.dataclass(frozen=True)
class CacheSettings:
    """The settings of scripts/cache_latents.py; see conf/cache_latents.yaml.

    data, autoencoder, alignment: train.py's groups. out: the cache's folder. flip: store the mirror
    image's moments too. dtype: of the moments. store_images, store_features: store the uint8
    images, the alignment target's features. skip_broken: leave out unreadable files instead of
    stopping. shard_size: records a shard. batch_size: images encoded at once. num_workers:
    processes that read image files. num_processes: that encode.

    Raises UserError for values out of range.
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
        """Number of reading processes: `num_workers`, or one a core, at most 8."""
        return min(os.cpu_count() or 1, 8) if self.num_workers is None else self.num_workers

    def __post_init__(self) -> None:
        for key in ("shard_size", "batch_size"):
            require_count(key, getattr(self, key), 1, MAX_BATCH)
        require_count("num_workers", self.num_workers, 0, MAX_WORKERS, ", or null")
        require_count("num_processes", self.num_processes, 1, MAX_BATCH, ", or null for every visible GPU")
        require(self.out != "", "out: not set; give the cache's folder")
        find_record(Path(self.out), ("index.json", "manifest.csv", "broken.csv"), "out")

    def check_images(self, images: "Images") -> None:
        """Raise UserError for images that cannot be cached in `out`."""
        require(not images.has_latents, "data: is a latent cache already; give the images")
        require(images.flips == 1, "data.horizontal_flip=true: has no effect here; give flip=true")
        require(not images.skips_broken, "data.skip_broken=true: has no effect here; give skip_broken=true")
        root = images.files_root
        require(
            root is None or root.resolve() not in Path(self.out).resolve().parents,
            f"out={self.out}: lies among the images of data.root; choose another folder",
        )


@dataclasses.dataclass(frozen=True)
class StatisticsSettings:
    """The settings of scripts/latent_statistics.py; see conf/latent_statistics.yaml.

    data, autoencoder: train.py's groups; data may be a latent cache. batch_size: images encoded at
    once. num_workers: processes that read image files. num_processes: that encode.

    Raises UserError for values out of range, an autoencoder that takes no such file, and a file
    that exists.
    """

    data: Choice
    autoencoder: Choice
    out: str
    batch_size: int
    num_workers: int | None
    num_processes: int | None

    def __post_init__(self) -> None:
        require_count("batch_size", self.batch_size, 1, MAX_BATCH)
        require_count("num_workers", self.num_workers, 0, MAX_WORKERS, ", or null")
        require_count("num_processes", self.num_processes, 1, MAX_BATCH, ", or null for every visible GPU")
        require(Path(self.out).suffix == ".safetensors", f"out={self.out}: give a .safetensors file")
        require(
            "statistics" in self.autoencoder.settings,
            f"autoencoder: {self.autoencoder.target} takes no file of statistics, but latents_mean and latents_std at "
            "most, which scripts/cache_latents.py writes; choose an RAE, such as rae_dinov2_b",
        )
        check_new(Path(self.out))

    def build_autoencoder(self) -> "Autoencoder":
        """Build the autoencoder without statistics, which do not exist yet, and are of the image's
        latents alone.
        """
        changes = {"statistics": None, "class_token": False}
        return dataclasses.replace(self.autoencoder, settings={**self.autoencoder.settings, **changes}).build()
