"""The list of images behind a latent cache: every file is read once, before anything is encoded.

manifest.csv has a row an image, in the order of the cache's records: training images first,
held-out ones after them. broken.csv names the files that cannot be read.
"""

import csv
import functools
import itertools
import logging
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from tqdm import tqdm

from ddt.data.images import Images, read_image
from ddt.data.survey import UNREADABLE, suffixes_in_words
from ddt.errors import UserError, require

log = logging.getLogger(__name__)
ORIENTATION = 0x0112  # EXIF tag
COLUMNS = ("path", "label", "split", "bytes", "width", "height", "mode", "rotated")


class Row(NamedTuple):
    """What the manifest says of an image, as far as reading needs it."""

    path: str
    label: int
    split: str
    bytes: int


def read_manifest(root: Path) -> list[Row]:
    """Return the rows of a cache's manifest.csv, one an image, in the order of the records."""
    with (root / "manifest.csv").open(newline="") as file:
        return [
            Row(row["path"], int(row["label"]), sys.intern(row["split"]), int(row["bytes"]))
            for row in csv.DictReader(file)
        ]


def inspect_image(root: Path, name: str) -> dict[str, Any]:
    """Decode a file and return what the manifest says of it, or `broken`: why it cannot be used."""
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
    """Yield what the manifest says of each image, in order."""
    if images.files_root is None:  # they lie in memory
        side = images.image_size
        facts = {"bytes": images.channels * side**2, "width": side, "height": side, "mode": "", "rotated": 0}
        yield from itertools.repeat(facts, len(images.labels))
        return
    inspect = functools.partial(inspect_image, images.files_root)
    if num_workers == 0:
        yield from map(inspect, images.names)
        return
    with ProcessPoolExecutor(num_workers) as pool:
        yield from pool.map(inspect, images.names, chunksize=64)


def make_manifest(out: Path, splits: dict[str, Images], num_workers: int, skip_broken: bool) -> None:
    """Read every image once and write manifest.csv; one that is there already is kept.

    Raises UserError where files cannot be read, after naming all of them in broken.csv, unless they
    are to be skipped.
    """
    if (out / "manifest.csv").is_file():
        if (out / "broken.csv").is_file():
            log.warning("%s: without the images that cannot be read, named in broken.csv", out / "manifest.csv")
        return
    total = sum(len(images.labels) for images in splits.values())
    require(total > 0, "data: there are no images to cache")
    out.mkdir(parents=True, exist_ok=True)
    temporary = {name: out / f".tmp-{name}.csv" for name in ("manifest", "broken")}
    broken, modes, rotated, first = 0, Counter[str](), 0, ""
    progress = tqdm(total=total, unit="img", desc="reading every image once", mininterval=1.0)
    with temporary["manifest"].open("w", newline="") as listed, temporary["broken"].open("w", newline="") as unreadable:
        good, bad = csv.DictWriter(listed, COLUMNS), csv.DictWriter(unreadable, ("path", "reason"))
        good.writeheader()
        bad.writeheader()
        for split, images in splits.items():
            inspected = inspect_images(images, num_workers)
            for name, label, facts in zip(images.names, images.labels, inspected, strict=True):
                progress.update()
                if "broken" in facts:
                    first = first or f"{name} ({facts['broken']})"
                    broken += 1
                    bad.writerow({"path": name, "reason": facts["broken"]})
                else:
                    modes[facts["mode"]] += 1
                    rotated += facts["rotated"]
                    good.writerow({"path": name, "label": int(label), "split": split, **facts})
    progress.close()
    if broken:
        temporary["broken"].replace(out / "broken.csv")
    else:
        temporary["broken"].unlink()
        (out / "broken.csv").unlink(missing_ok=True)  # of an earlier call, before the files were mended
    if broken == total or (broken and not skip_broken):
        temporary["manifest"].unlink()
        raise UserError(
            f"{out / 'broken.csv'}: {broken} of {total} images cannot be read, the first is {first}; replace or remove "
            "them, or leave them out with skip_broken=true"
        )
    if broken:
        log.warning("%d images that cannot be read are left out: %s", broken, out / "broken.csv")
    log_conversions(modes, rotated, splits["train"])
    temporary["manifest"].replace(out / "manifest.csv")


def log_conversions(modes: Counter[str], rotated: int, images: Images) -> None:
    """Log a line for each kind of file that is not read, or not as it is."""
    read_as = {1: "L", 3: "RGB"}[images.channels]
    converted = [f"{count} {mode}" for mode, count in sorted(modes.items()) if mode not in ("", read_as)]
    if converted:
        log.info("converted to %s, transparency dropped: %s", read_as, ", ".join(converted))
    if rotated:
        log.info("%d images carry an EXIF rotation, which is not applied (nor was it by the published model)", rotated)
    if images.other_files:
        log.info("not read, because they are no images by their names: %s", suffixes_in_words(images.other_files))


def check_manifest(out: Path, manifest: list[Row], splits: dict[str, Images]) -> None:
    """Raise UserError where manifest.csv, written by an earlier call, lists other images than the
    data now holds.
    """
    left_out = 0
    if (out / "broken.csv").is_file():
        with (out / "broken.csv").open(newline="") as file:
            left_out = len(list(csv.DictReader(file)))
    listed = {(row.split, row.path, row.label) for row in manifest}
    there = {
        (split, name, int(label))
        for split, images in splits.items()
        for name, label in zip(images.names, images.labels, strict=True)
    }
    require(
        listed <= there and len(listed) + left_out == len(there),
        f"{out / 'manifest.csv'}: lists other images than the data holds now, or is damaged; choose another out=",
    )


def check_size(path: Path, size: int) -> None:
    """Raise UserError where a file is not there or not of the `size` that the manifest says."""
    require(
        path.is_file() and path.stat().st_size == size,
        f"{path}: is not the file that manifest.csv was written of; give the right folder, or cache into another out=",
    )
