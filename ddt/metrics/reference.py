"""What samples are compared with: ADM's reference files, or any set of images.

Shapes: 2048 pool features, 2023 spatial ones (17 × 17 × 7).
"""

import dataclasses
from pathlib import Path

import numpy as np

from ddt.errors import require
from ddt.files import sha256
from ddt.metrics.folder import FolderImages, ImageSource, open_images
from ddt.metrics.npz import NpzImages, names, npz_path, readable
from ddt.metrics.statistics import Statistics

NUM_POOL, NUM_SPATIAL = 2048, 17 * 17 * 7


@dataclasses.dataclass(frozen=True)
class Reference:
    """A reference file: statistics of a whole data set (ADM: the training set), images, or both.

    `pool` and `spatial` are None where the file holds no such statistics, `images` where it holds none.
    """

    path: Path
    pool: Statistics | None
    spatial: Statistics | None
    images: ImageSource | None

    @property
    def sha256(self) -> str:
        """The SHA-256 of the file, or of a folder's images, as 64 hexadecimal digits."""
        return self.images.sha256 if self.images is not None else sha256(self.path)

    @property
    def source(self) -> str:
        """Where the statistics come from, for the receipt."""
        if self.pool is None:
            return "computed from its images"
        return "mu, sigma of the file" if self.spatial is None else "mu, sigma, mu_s, sigma_s of the file"


def read_statistics(path: Path, mean: str, covariance: str, size: int) -> Statistics:
    """Return two arrays of a reference file as statistics, float64 (size,) and (size, size)."""
    with readable(path, "reference"), np.load(path, allow_pickle=False) as file:
        values = {name: file[name] for name in (mean, covariance)}
    for name, shape in ((mean, (size,)), (covariance, (size, size))):
        value = values[name]
        require(
            value.shape == shape and np.issubdtype(value.dtype, np.floating),
            f"reference={path}: {name} must be Inception's statistics, floats {shape}, "
            f"found {value.dtype} {value.shape}",
        )
        require(bool(np.isfinite(value).all()), f"reference={path}: {name} is not finite; make or copy the file again")
    return Statistics(values[mean].astype(np.float64), values[covariance].astype(np.float64))


def read_reference(path: Path) -> Reference:
    """Open a reference npz, or a folder of a samples.npz or of images; images stay on disk.

    Raises UserError for a file that is damaged, that holds half of a pair of statistics, or nothing that can be used.
    """
    folder = open_images(path, "reference") if path.is_dir() else None
    path = npz_path(path, "reference") if folder is None else folder.path
    found = ["arr_0"] if isinstance(folder, FolderImages) else names(path, "reference")
    for pair in (("mu", "sigma"), ("mu_s", "sigma_s")):
        present = [name for name in pair if name in found]
        require(
            len(present) != 1, f"reference={path}: holds {''.join(present)} alone; both {' and '.join(pair)} belong"
        )
    require(
        "mu" in found or "arr_0" in found,
        f"reference={path}: holds neither mu and sigma nor images (arr_0), only {', '.join(found) or 'nothing'}; "
        "give ADM's reference npz of the data set",
    )
    images = folder if folder is not None else NpzImages(path, "reference") if "arr_0" in found else None
    if "mu" not in found:
        assert images is not None
        require(len(images) >= 2, f"reference={path}: holds one image; statistics need at least 2")
        return Reference(path, None, None, images)
    pool = read_statistics(path, "mu", "sigma", NUM_POOL)
    spatial = read_statistics(path, "mu_s", "sigma_s", NUM_SPATIAL) if "mu_s" in found else None
    return Reference(path, pool, spatial, images)
