"""Part files of a set, a few images each, and the npz that joins them.

Shapes: n images of the set, m of a part, H W C pixels.
"""

import json
import logging
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ddt.files import atomic_file, remove_temporary_files

log = logging.getLogger(__name__)
PARTS = "[0-9]*-[0-9]*.npz"  # FIRST-END.npz
EPOCH = (1980, 1, 1, 0, 0, 0)  # time of the files inside an npz, so that equal sets are equal bytes


def write_part(folder: Path, start: int, images: np.ndarray, counts: dict[str, int]) -> None:
    """Write images start, start + 1, … (m, H, W, C) and network calls per image, atomically."""
    with atomic_file(folder / f"{start:08d}-{start + len(images):08d}.npz") as temporary:
        np.savez(temporary, images=images, counts=np.array(json.dumps(counts)))


def read_part(path: Path) -> tuple[int, np.ndarray, dict[str, int]]:
    """Return the number of a part's first image, its images (m, H, W, C) and its counts."""
    start, stop = map(int, path.stem.split("-"))
    with np.load(path, allow_pickle=False) as file:
        images, counts = file["images"], json.loads(str(file["counts"]))
    if len(images) != stop - start:
        raise ValueError(f"{path}: holds {len(images)} images")
    return start, images, counts


def remove_damaged(folder: Path) -> None:
    """Remove parts that are damaged or overlap the one before; their images are sampled again."""
    end = 0
    for path in sorted(folder.glob(PARTS)):
        try:
            start, images, _ = read_part(path)
            if start < end:
                raise ValueError("overlaps")
            end = start + len(images)
        except (ValueError, OSError, KeyError, EOFError, RuntimeError, zlib.error, zipfile.BadZipFile):
            log.warning("%s: damaged or overlapping, its images are sampled again", path)
            path.unlink()
    remove_temporary_files(folder)


def sampled_numbers(folder: Path) -> np.ndarray:
    """Return the sorted numbers of the images in part files, int64 (k,)."""
    spans = [path.stem.split("-") for path in folder.glob(PARTS)]
    return np.sort(np.concatenate([np.arange(int(a), int(b)) for a, b in spans] or [np.empty(0, dtype=np.int64)]))


def merge_parts(folder: Path, target: Path, classes: list[int]) -> dict[str, float]:
    """Join the parts, one in memory at a time, into `target`: `arr_0` uint8 (n, H, W, C) and
    `arr_1` int64 (n,). Equal images give equal bytes.

    Returns the mean of each count over images, `cached_bytes` its maximum.
    """
    total = len(classes)
    assert np.array_equal(sampled_numbers(folder), np.arange(total)), "every image of the set is there, and once"
    sums: dict[str, float] = {}
    with atomic_file(target) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
        with archive.open(zipfile.ZipInfo("arr_0.npy", EPOCH), "w", force_zip64=True) as file:
            for path in sorted(folder.glob(PARTS)):
                start, images, counts = read_part(path)
                if start == 0:
                    header = {"descr": "|u1", "fortran_order": False, "shape": (total, *images.shape[1:])}
                    np.lib.format.write_array_header_1_0(file, header)
                file.write(np.ascontiguousarray(images).data)
                for name, number in counts.items():
                    if name == "cached_bytes":
                        sums[name] = max(sums.get(name, 0), number)
                    else:
                        sums[name] = sums.get(name, 0) + number * len(images) / total
        with archive.open(zipfile.ZipInfo("arr_1.npy", EPOCH), "w", force_zip64=True) as file:
            np.lib.format.write_array(file, np.array(classes, dtype=np.int64), allow_pickle=False)
    return {name: round(number, 6) for name, number in sums.items()}


def rows(path: Path) -> Iterator[np.ndarray]:
    """Yield the images (H, W, C) of an npz that `merge_parts` wrote, one at a time."""
    with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as file:
        np.lib.format.read_magic(file)
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        size = int(np.prod(shape[1:])) * dtype.itemsize
        for _ in range(shape[0]):
            yield np.frombuffer(file.read(size), dtype=dtype).reshape(shape[1:])
