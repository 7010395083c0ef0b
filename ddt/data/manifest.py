"""The list of images of a latent cache: every file is read once, before anything is encoded.

manifest.csv has one row per image, in the order of the cache's records: training images first, then
held-out ones. broken.csv names the files that cannot be read. Names that are not UTF-8 keep their
bytes in both.
"""

import csv
import functools
import itertools
import logging
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np

from ddt.data.images import Images
from ddt.data.reading import Header, read_header, read_image
from ddt.data.source import Source
from ddt.data.stream import lost_process
from ddt.data.survey import Headers, header_hints, shortened
from ddt.errors import UserError, require
from ddt.files import atomic_file, sha256
from ddt.logs import progress_bar

log = logging.getLogger(__name__)
COLUMNS = ("path", "label", "split", "bytes", "width", "height", "mode", "rotated")
DAMAGED = "is damaged; remove this file alone, and the command that made the cache writes it again in seconds"


class Row(NamedTuple):
    """The columns of the manifest that reading needs."""

    path: str
    label: int
    split: str
    bytes: int


def open_csv(path: Path, mode: str = "r") -> TextIO:
    """Open a list of files, whose names may hold bytes that are not UTF-8."""
    return path.open(mode, newline="", encoding="utf-8", errors="surrogateescape")  # type: ignore[return-value]


def read_manifest(root: Path) -> list[Row]:
    """Return the rows of a cache's manifest.csv, in the order of the records; raise UserError where
    it is damaged.
    """
    path = root / "manifest.csv"
    try:
        with open_csv(path) as file:
            return [
                Row(row["path"], int(row["label"]), sys.intern(row["split"]), int(row["bytes"]))
                for row in csv.DictReader(file)
            ]
    except (ValueError, KeyError, TypeError, csv.Error) as error:
        raise UserError(f"{path}: {DAMAGED}") from error


def read_broken(out: Path) -> set[str]:
    """Return the names in a cache's broken.csv."""
    if not (out / "broken.csv").is_file():
        return set()
    with open_csv(out / "broken.csv") as file:
        return {row["path"] for row in csv.DictReader(file)}


def inspect_image(source: Source, decode: bool, name: str) -> dict[str, Any]:
    """Return the manifest columns of a file, or `broken`: why it cannot be read.

    decode: read the pixels too, for only that finds a file that was cut.
    """
    path = source.root / name
    try:
        size, header = source.size(name), read_header(path, source.open(name))
        if decode:
            read_image(path, file=source.open(name))
    except UserError as error:
        return {"broken": str(error).removeprefix(f"{path}: ")}
    return {
        "bytes": size,
        "width": header.size[0],
        "height": header.size[1],
        "mode": header.mode,
        "rotated": int(header.rotated),
    }


def inspect_images(images: Images, num_workers: int, decode: bool) -> Iterator[dict[str, Any]]:
    """Yield the manifest columns of each image, in order."""
    if images.source is None:  # images in memory
        side = images.image_size
        columns = {"bytes": images.channels * side**2, "width": side, "height": side, "mode": "", "rotated": 0}
        yield from itertools.repeat(columns, len(images.labels))
        return
    inspect = functools.partial(inspect_image, images.source, decode)
    if num_workers == 0:
        yield from map(inspect, images.names)
        return
    try:
        with ProcessPoolExecutor(num_workers) as pool:
            yield from pool.map(inspect, images.names, chunksize=64)
    except BrokenProcessPool as error:
        raise lost_process() from error


def inspected_rows(splits: dict[str, Images], num_workers: int, decode: bool) -> Iterator[dict[str, Any]]:
    """Yield the manifest's row of each image, with `broken` where it cannot be read."""
    total = sum(len(images.labels) for images in splits.values())
    what = "reading every image once" if decode else "reading the headers"
    with progress_bar(total=total, unit="img", desc=what) as progress:
        for split, images in splits.items():
            inspected = inspect_images(images, num_workers, decode)
            for name, label, columns in zip(images.names, images.labels, inspected, strict=True):
                progress.update()
                yield {"path": name, "label": int(label), "split": split, **columns}


def make_manifest(
    out: Path, splits: dict[str, Images], num_workers: int, skip_broken: bool, expected: str | None = None
) -> None:
    """Read every image once and write manifest.csv, unless it exists.

    expected: its SHA-256 as the index gives it; then the files were read before, and a missing
    manifest is written again from their headers. Raises UserError for a damaged manifest, for files
    that cannot be read, all named in broken.csv, unless `skip_broken`, and for a class that loses
    all its images.
    """
    path = out / "manifest.csv"
    if path.is_file():
        require(expected is None or sha256(path) == expected, f"{path}: {DAMAGED}")
        if (out / "broken.csv").is_file():
            log.warning("%s: without the images that cannot be read, named in broken.csv", path)
        return
    total = sum(len(images.labels) for images in splits.values())
    require(total > 0, "data: there are no images to cache")
    out.mkdir(parents=True, exist_ok=True)
    if expected is not None:
        restore_manifest(out, splits, num_workers, expected)
        return
    with atomic_file(path) as temporary:
        write_manifest(temporary, out / "broken.csv", splits, num_workers, skip_broken)


def write_manifest(
    path: Path, broken_path: Path, splits: dict[str, Images], num_workers: int, skip_broken: bool
) -> None:
    """Read every image once; write manifest.csv as `path`, and broken.csv where some are broken."""
    total = sum(len(images.labels) for images in splits.values())
    headers, unreadable, good_labels = Headers(), list[tuple[str, str]](), set[int]()
    with open_csv(path, "w") as file:
        listed = csv.DictWriter(file, COLUMNS)
        listed.writeheader()
        for row in inspected_rows(splits, num_workers, decode=True):
            if "broken" in row:
                unreadable.append((row["path"], row["broken"]))
            else:
                headers.add(Header((row["width"], row["height"]), row["mode"], bool(row["rotated"])))
                good_labels.add(row["label"])
                listed.writerow(row)
    broken = len(unreadable)
    if broken:
        with atomic_file(broken_path) as temporary, open_csv(temporary, "w") as file:
            csv.writer(file).writerows([("path", "reason"), *unreadable])
    else:
        broken_path.unlink(missing_ok=True)  # of an earlier call, before the files were replaced
    images = splits["train"]
    labels = np.unique(np.concatenate([split.labels for split in splits.values()]))
    lost = [images.class_names[label] for label in labels if label not in good_labels]
    if broken == total or (broken and not skip_broken):
        name, problem = unreadable[0]
        raise UserError(
            f"{broken_path}: {broken} of {total} images cannot be read, the first is {name} ({problem}); replace or "
            "remove them, or leave them out with skip_broken=true"
        )
    if lost:
        raise UserError(
            f"{broken_path}: none of the images of {shortened(lost)} can be read; replace them, or remove the "
            "sub-folder"
        )
    if broken:
        log.warning("%d images that cannot be read are left out: %s", broken, broken_path)
    if images.files_root is not None:
        for hint in header_hints(headers, images.image_size, images.channels, images.exif):
            log.info("hint: %s", hint)


def restore_manifest(out: Path, splits: dict[str, Images], num_workers: int, expected: str) -> None:
    """Write a missing manifest.csv again, without the images that broken.csv names; raise UserError
    where it is not the one of SHA-256 `expected`.
    """
    broken = read_broken(out)
    with atomic_file(out / "manifest.csv") as temporary:
        with open_csv(temporary, "w") as file:
            writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
            writer.writeheader()
            rows = inspected_rows(splits, num_workers, decode=False)
            writer.writerows(row for row in rows if row["path"] not in broken)
        require(
            sha256(temporary) == expected,
            f"out={out}: was made of other images than the data holds now; give those, or choose another out=",
        )


def check_manifest(out: Path, manifest: list[Row], splits: dict[str, Images]) -> None:
    """Raise UserError where manifest.csv lists other images than the data holds now."""
    listed = {(row.split, row.path, row.label) for row in manifest}
    present = {
        (split, name, int(label))
        for split, images in splits.items()
        for name, label in zip(images.names, images.labels, strict=True)
    }
    require(
        listed <= present and len(listed) + len(read_broken(out)) == len(present),
        f"{out / 'manifest.csv'}: lists other images than the data holds now; choose another out=",
    )


def check_size(source: Source, name: str, size: int) -> None:
    """Raise UserError where an image is missing or not of its `size` in the manifest."""
    require(
        source.size(name) == size,
        f"{source.root / name}: is not the file that manifest.csv was written of; give the right folder, or cache into "
        "another out=",
    )
