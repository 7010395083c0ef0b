"""Which files of a folder are images, and in which order: one rule for training, latent caches and
evaluation.

- An image is a file whose suffix Pillow reads (`IMAGE_SUFFIXES`), at any depth.
- Hidden names are left out, leftovers of killed commands (`.tmp-…`) among them, and so are the
  system's own folders, pipes and devices. Links are followed, but not back to a folder above.
- Files come in the order of their paths. Sub-folders are classes, in natural order: 2 before 10.
"""

import dataclasses
import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import features

from ddt.data.source import Folder, Source
from ddt.errors import UserError, require

OPTIONAL_SUFFIXES = {".webp": "webp", ".avif": "avif", ".jp2": "jpg_2000", ".j2k": "jpg_2000"}  # Pillow's features
IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm"}
    | {suffix for suffix, feature in OPTIONAL_SUFFIXES.items() if feature in features.get_supported()}
)
SYSTEM_FOLDERS = ("__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found")
SPLIT_NAME = re.compile(
    r"(train|training|val|valid|validation|test|testing)([-_ ]?(set|images|data|split|(19|20)\d\d))?", re.IGNORECASE
)


@dataclasses.dataclass(frozen=True)
class FolderList:
    """The images of a folder.

    left_out: number of entries that are not read, by suffix or by what they are. nested: names of
    the sub-folders with images of each class that has no other images. source: where they lie.
    """

    class_names: list[str]
    names: list[str]  # (n,) paths relative to the folder, class by class
    labels: np.ndarray  # (n,) int64
    left_out: Counter[str]
    nested: dict[str, list[str]]
    source: Source


def in_words(counts: Counter[str]) -> str:
    """Return counts as text: "1 .gif, 2 .txt"."""
    return ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))


def natural_order(name: str) -> tuple[list[str | int], str]:
    """Return a sort key by which "2" comes before "10"."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)], name


def is_split(name: str) -> bool:
    """Return whether a folder's name is that of a split, such as val or train2017."""
    return SPLIT_NAME.fullmatch(name) is not None


def identity(path: str | Path) -> tuple[int, int]:
    """Return what is the same for all paths of a folder."""
    status = os.stat(path)
    return status.st_dev, status.st_ino


def folders_above(folder: Path) -> frozenset[tuple[int, int]]:
    """Return the identities of a folder and of those that hold it."""
    return frozenset(map(identity, (folder.resolve(), *folder.resolve().parents)))


def read_folder(path: str, above: frozenset[tuple[int, int]], left_out: Counter[str]) -> tuple[list[str], list[str]]:
    """Return the sorted names of a folder's sub-folders and images; count all else in `left_out`.

    above: identities of the folders that hold it.
    """
    folders, images = [], []
    with os.scandir(path) as entries:
        for entry in entries:
            suffix = os.path.splitext(entry.name)[1].lower()
            try:
                is_folder, is_file = entry.is_dir(), entry.is_file()
            except OSError:  # a link to itself
                is_folder, is_file = False, False
            if entry.name.startswith(".") or entry.name in SYSTEM_FOLDERS:
                left_out["hidden"] += 1
            elif is_folder and entry.is_symlink() and identity(entry.path) in above:
                left_out["links to a folder above them"] += 1
            elif is_folder:
                folders.append(entry.name)
            elif not is_file and os.path.exists(entry.path):  # reading a pipe waits for ever
                left_out["pipes or devices"] += 1
            elif suffix in IMAGE_SUFFIXES:  # a broken link, too: reading it names it
                images.append(entry.name)
            else:
                left_out[suffix or "without suffix"] += 1
    return sorted(folders), sorted(images)


def walk(path: str, above: frozenset[tuple[int, int]], left_out: Counter[str]) -> Iterator[str]:
    """Yield the images below a folder as paths relative to it, in order."""
    above |= {identity(path)}
    folders, images = read_folder(path, above, left_out)
    inner = set(folders)
    for name in sorted(folders + images):
        if name in inner:
            yield from (f"{name}/{inner}" for inner in walk(f"{path}/{name}", above, left_out))
        else:
            yield name


def list_folder(root: str, key: str = "data.root") -> FolderList:
    """Return the images of a folder; its sub-folders are the classes. Images without sub-folders
    are one class of the folder's name.

    key: the setting of `root`, for messages. Raises UserError for a missing folder, one whose
    sub-folders are splits, images beside sub-folders, and a class without images.
    """
    folder, left_out = Path(root), Counter[str]()
    require(
        root != "" and folder.is_dir(),
        f"{key}={root}: no such folder; give the one with a sub-folder of images per class",
    )
    above = folders_above(folder)
    classes, beside = read_folder(root, above, left_out)
    not_read = f" (not read: {in_words(left_out)})" if left_out else ""
    require(bool(classes or beside), f"{key}={root}: holds no images and no sub-folders of images{not_read}")
    require(
        not (classes and beside),
        f"{key}={root}: holds images ({', '.join(beside[:2])}) beside its sub-folders ({', '.join(classes[:2])}); put "
        "them into the sub-folder of their class, or give one of the sub-folders",
    )
    check_splits(folder, key, classes)
    classes.sort(key=natural_order)
    for name in classes:
        require(
            name == name.encode(errors="ignore").decode(),  # bytes that are not UTF-8 became surrogates
            f"{key}={root}: the name of the sub-folder {os.fsencode(name)!r} is not UTF-8; rename it",
        )
    names: list[str] = []
    sizes: list[int] = []
    nested: dict[str, list[str]] = {}
    for name in classes:
        images = list(walk(f"{root}/{name}", above, left_out))
        require(bool(images), f"{folder / name}: holds no images; add some or remove the folder")
        if all("/" in image for image in images):
            nested[name] = sorted({image.partition("/")[0] for image in images})
        names += [f"{name}/{image}" for image in images]
        sizes.append(len(images))
    if not classes:
        names, sizes = beside, [len(beside)]
    if len(classes) == 1 and classes[0] in nested:
        check_splits(folder / classes[0], key, nested[classes[0]])
    labels = np.repeat(np.arange(len(sizes)), sizes)
    return FolderList(classes or [folder.resolve().name], names, labels, left_out, nested, Folder(folder))


def walk_folder(root: str, key: str = "data.root") -> tuple[list[str], Counter[str]]:
    """Return the images of a folder at any depth, in the order of their paths, and how many entries
    are not read; raise UserError where there are none.
    """
    folder, left_out = Path(root), Counter[str]()
    require(root != "" and folder.is_dir(), f"{key}={root}: no such folder; give the one with the images")
    names = list(walk(root, folders_above(folder), left_out))
    require(bool(names), f"{key}={root}: holds no images")
    return names, left_out


def check_splits(folder: Path, key: str, names: list[str]) -> None:
    """Raise UserError where sub-folders are splits: images of train and val are no classes."""
    splits = sorted(filter(is_split, names), key=lambda name: (not name.lower().startswith("train"), name))
    if splits and (len(splits) == len(names) or len(splits) > 1):
        raise UserError(
            f"{key}={folder}: its sub-folders {', '.join(splits)} are splits, not classes; give "
            f"{key}={folder / splits[0]}"
        )


def layout_hints(listed: FolderList, num_classes: int | None = None) -> list[str]:
    """Return hints on what a folder's layout may mean, a line each. num_classes: expected."""
    lines = class_count_hints(len(listed.class_names), num_classes)
    nested = listed.nested
    if len(listed.class_names) == 1 and nested:
        (name, inner), *_ = nested.items()
        lines.append(
            f"the only class is {name}, whose sub-folders {shortened(inner)} hold the images; if they are the classes, "
            f"give the folder {name}"
        )
    mixed = [name for name, inner in nested.items() if len(inner) > 1 and all(map(is_split, inner))]
    if mixed:
        inner = nested[mixed[0]]
        lines.append(f"{shortened(mixed)}: hold the splits {', '.join(inner)}, and all of them are read")
    lines += [f"the sub-folder {name} is taken for a class" for name in listed.class_names if is_split(name)]
    if listed.left_out:
        lines.append(f"not read: {in_words(listed.left_out)}")
    return lines


def class_count_hints(found: int, expected: int | None) -> list[str]:
    """Return a hint where a data set has another number of classes than it should."""
    if expected in (None, found):
        return []
    return [f"{found} classes, where data.num_classes={expected} are expected: is it the right folder?"]


def shortened(names: list[str], count: int = 5) -> str:
    """Return the first names of a list and how many more there are."""
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return f"{', '.join(names[:count])}{more}"
