"""The list of images behind a latent cache: every file looked at once, before anything is encoded.

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

from ddt.data.images import FileImages, ImageFolder, Images, read_image, suffixes_in_words
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
    """Decode a file and return what the manifest says of it; under `broken` why it cannot be used."""
    path = root / name
    try:
        size = path.stat().st_size
        with Image.open(path) as image:
            mode, rotated = image.mode, image.getexif().get(ORIENTATION, 1) != 1
            if "transparency" in image.info:
                mode = f"{mode}+transparency"
        decoded = read_image(path)
    except (UserError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        return {"broken": str(error).removeprefix(f"{path}: ")}
    return {"bytes": size, "width": decoded.width, "height": decoded.height, "mode": mode, "rotated": int(rotated)}


def inspect_files(images: FileImages, num_workers: int) -> Iterator[dict[str, Any]]:
    """Yield what `inspect_image` says of each image, in order."""
    inspect = functools.partial(inspect_image, images.root)
    if num_workers == 0:
        yield from map(inspect, images.names)
        return
    with ProcessPoolExecutor(num_workers) as pool:
        yield from pool.map(inspect, images.names, chunksize=64)


def inspect_array(images: Images) -> Iterator[dict[str, Any]]:
    """Yield what the manifest says of images that lie in memory."""
    side = images.image_size
    facts = {"bytes": images.channels * side**2, "width": side, "height": side, "mode": "", "rotated": 0}
    return itertools.repeat(facts, len(images.labels))


def make_manifest(out: Path, splits: dict[str, Images], num_workers: int, skip_broken: bool) -> None:
    """Look at every image once and write manifest.csv; one that is there already is kept.

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
            found = inspect_files(images, num_workers) if isinstance(images, FileImages) else inspect_array(images)
            for name, label, facts in zip(images.names, images.labels, found, strict=True):
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
    for text in (*notable(modes, rotated, splits["train"].channels), *unread(splits)):
        log.info("%s", text)
    temporary["manifest"].replace(out / "manifest.csv")


def notable(modes: Counter[str], rotated: int, channels: int) -> list[str]:
    """Return a line for each kind of image that is not read as it is."""
    read_as = {1: "L", 3: "RGB"}[channels]
    converted = {mode: count for mode, count in modes.items() if mode not in ("", read_as)}
    lines = []
    if converted:
        kinds = ", ".join(f"{count} {mode}" for mode, count in sorted(converted.items()))
        lines.append(f"converted to {read_as}, transparency dropped: {kinds}")
    if rotated:
        lines.append(
            f"{rotated} images carry an EXIF rotation, which is not applied (nor was it by the published model)"
        )
    return lines


def unread(splits: dict[str, Images]) -> list[str]:
    """Return a line for files in the folder that are no images by their names."""
    images = splits["train"]
    others = images.others if isinstance(images, ImageFolder) else Counter[str]()
    return [f"not read, because they are no images by their names: {suffixes_in_words(others)}"] if others else []


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


def check_sizes(splits: dict[str, Images], manifest: list[Row]) -> None:
    """Raise UserError naming a file that is not of the size that the manifest says."""
    for row in manifest:
        images = splits[row.split]
        if isinstance(images, FileImages):
            check_size(images.root / row.path, row.bytes)


def check_size(path: Path, size: int) -> None:
    """Raise UserError where a file is not there or not of `size` bytes."""
    require(
        path.is_file() and path.stat().st_size == size,
        f"{path}: is not the file that manifest.csv was written of; give the right folder, or cache into another out=",
    )
