"""The list of images of a latent cache: every file is read once, before anything is encoded.

manifest.csv has one row per image, in the order of the cache's records: training images first, then
held-out ones. broken.csv names the files that cannot be read.
"""

import csv
import functools
import itertools
import logging
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from tqdm import tqdm

from ddt.data.images import Images, read_image
from ddt.data.stream import lost_process
from ddt.data.survey import UNREADABLE, suffixes_in_words
from ddt.errors import UserError, require

log = logging.getLogger(__name__)
ORIENTATION = 0x0112  # EXIF tag
COLUMNS = ("path", "label", "split", "bytes", "width", "height", "mode", "rotated")


class Row(NamedTuple):
    """The columns of the manifest that reading needs."""

    path: str
    label: int
    split: str
    bytes: int


def read_manifest(root: Path) -> list[Row]:
    """Return the rows of a cache's manifest.csv, in the order of the records."""
    with (root / "manifest.csv").open(newline="") as file:
        return [
            Row(row["path"], int(row["label"]), sys.intern(row["split"]), int(row["bytes"]))
            for row in csv.DictReader(file)
        ]


def inspect_image(root: Path, name: str) -> dict[str, Any]:
    """Decode a file and return its manifest columns, or `broken`: why it cannot be read."""
    path = root / name
    try:
        size = path.stat().st_size
        with Image.open(path) as image:
            mode, rotated = image.mode, image.getexif().get(ORIENTATION, 1) != 1
            if "transparency" in image.info:
                mode = f"{mode}+transparency"
        decoded = read_image(path)
    except UNREADABLE as error:  # a UserError is a ValueError
        return {"broken": str(error).removeprefix(f"{path}: ")}
    return {"bytes": size, "width": decoded.width, "height": decoded.height, "mode": mode, "rotated": int(rotated)}


def inspect_images(images: Images, num_workers: int) -> Iterator[dict[str, Any]]:
    """Yield the manifest columns of each image, in order."""
    if images.files_root is None:  # images in memory
        side = images.image_size
        columns = {"bytes": images.channels * side**2, "width": side, "height": side, "mode": "", "rotated": 0}
        yield from itertools.repeat(columns, len(images.labels))
        return
    inspect = functools.partial(inspect_image, images.files_root)
    if num_workers == 0:
        yield from map(inspect, images.names)
        return
    try:
        with ProcessPoolExecutor(num_workers) as pool:
            yield from pool.map(inspect, images.names, chunksize=64)
    except BrokenProcessPool as error:
        raise lost_process() from error


def make_manifest(out: Path, splits: dict[str, Images], num_workers: int, skip_broken: bool) -> None:
    """Read every image once and write manifest.csv, unless it exists.

    Raises UserError for files that cannot be read, all named in broken.csv, unless `skip_broken`.
    """
    if (out / "manifest.csv").is_file():
        if (out / "broken.csv").is_file():
            log.warning("%s: without the images that cannot be read, named in broken.csv", out / "manifest.csv")
        return
    total = sum(len(images.labels) for images in splits.values())
    require(total > 0, "data: there are no images to cache")
    out.mkdir(parents=True, exist_ok=True)
    temporary = {name: out / f".tmp-{name}.csv" for name in ("manifest", "broken")}
    broken, modes, rotated, first_broken = 0, Counter[str](), 0, ""
    progress = tqdm(total=total, unit="img", desc="reading every image once", mininterval=1.0)
    with temporary["manifest"].open("w", newline="") as listed, temporary["broken"].open("w", newline="") as unreadable:
        good, bad = csv.DictWriter(listed, COLUMNS), csv.DictWriter(unreadable, ("path", "reason"))
        good.writeheader()
        bad.writeheader()
        for split, images in splits.items():
            inspected = inspect_images(images, num_workers)
            for name, label, columns in zip(images.names, images.labels, inspected, strict=True):
                progress.update()
                if "broken" in columns:
                    first_broken = first_broken or f"{name} ({columns['broken']})"
                    broken += 1
                    bad.writerow({"path": name, "reason": columns["broken"]})
                else:
                    modes[columns["mode"]] += 1
                    rotated += columns["rotated"]
                    good.writerow({"path": name, "label": int(label), "split": split, **columns})
    progress.close()
    if broken:
        temporary["broken"].replace(out / "broken.csv")
    else:
        temporary["broken"].unlink()
        (out / "broken.csv").unlink(missing_ok=True)  # of an earlier call, before the files were replaced
    if broken == total or (broken and not skip_broken):
        temporary["manifest"].unlink()
        raise UserError(
            f"{out / 'broken.csv'}: {broken} of {total} images cannot be read, the first is {first_broken}; replace or "
            "remove them, or leave them out with skip_broken=true"
        )
    if broken:
        log.warning("%d images that cannot be read are left out: %s", broken, out / "broken.csv")
    log_conversions(modes, rotated, splits["train"])
    temporary["manifest"].replace(out / "manifest.csv")


def log_conversions(modes: Counter[str], rotated: int, images: Images) -> None:
    """Log how many files are converted, rotated by EXIF, or not read."""
    read_as = {1: "L", 3: "RGB"}[images.channels]
    converted = [f"{count} {mode}" for mode, count in sorted(modes.items()) if mode not in ("", read_as)]
    if converted:
        log.info("converted to %s, transparency dropped: %s", read_as, ", ".join(converted))
    if rotated:
        log.info("%d images carry an EXIF rotation, which is not applied (nor was it by the published model)", rotated)
    if images.other_files:
        log.info("not read, because they are no images by their names: %s", suffixes_in_words(images.other_files))


def check_manifest(out: Path, manifest: list[Row], splits: dict[str, Images]) -> None:
    """Raise UserError where manifest.csv lists other images than the data holds now."""
    num_broken = 0
    if (out / "broken.csv").is_file():
        with (out / "broken.csv").open(newline="") as file:
            num_broken = len(list(csv.DictReader(file)))
    listed = {(row.split, row.path, row.label) for row in manifest}
    present = {
        (split, name, int(label))
        for split, images in splits.items()
        for name, label in zip(images.names, images.labels, strict=True)
    }
    require(
        listed <= present and len(listed) + num_broken == len(present),
        f"{out / 'manifest.csv'}: lists other images than the data holds now, or is damaged; choose another out=",
    )


def check_size(path: Path, size: int) -> None:
    """Raise UserError where a file is missing or not of its `size` in the manifest."""
    require(
        path.is_file() and path.stat().st_size == size,
        f"{path}: is not the file that manifest.csv was written of; give the right folder, or cache into another out=",
    )
