"""Classes of a folder's images from files: a list of class names, and a list of images with their
labels, in place of a sub-folder per class.

    class_names: a name a line; line k, from 0, is label k
    labels:      CSV of two columns, path and class; or JSON {path: class, …}; or EDM's and ADM's
                 dataset.json, {"labels": [[path, class], …]}

A path is relative to the images' folder. A class is a name, or a number as label.
"""

import csv
import dataclasses
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from ddt.data.listing import FolderList, list_folder, natural_order, shortened, walk_folder
from ddt.data.source import Folder
from ddt.errors import UserError, brief, first_line, require

MAX_CLASSES = 1_000_000  # so that one wrong label does not fill the memory


@dataclasses.dataclass(frozen=True)
class FolderPlace:
    """A folder of images, and the files that give their classes; see `ddt.data.survey.Place`."""

    root: str
    labels: str | None = None
    class_names: str | None = None

    def list(self) -> FolderList:
        """Return the images of the folder with their classes; UserError where they do not fit."""
        names = None if self.class_names is None else read_class_names(self.class_names)
        if self.labels is not None:
            return list_labelled(self.root, self.labels, names, self.class_names)
        listed = list_folder(self.root)
        if names is None:
            return listed
        return with_class_names(listed, names, f"data.class_names={self.class_names}")


def read_text(path: str, key: str) -> str:
    """Return the text of a file, UTF-8; raise UserError that names its setting."""
    require(Path(path).is_file(), f"{key}={path}: no such file; give the path of a text file")
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        problem = error.strerror if isinstance(error, OSError) else "no UTF-8 text"
        raise UserError(f"{key}={path}: cannot be read ({problem}); give the path of a text file") from error


def read_class_names(path: str) -> list[str]:
    """Return the class names of a file, one a line; UserError where there are none, or twice."""
    names = [line.strip() for line in read_text(path, "data.class_names").rstrip().splitlines()]
    at = f"data.class_names={path}"
    require(bool(names), f"{at}: is empty; give one name a line, line k for label k")
    require("" not in names, f"{at}: line {names.index('') + 1 if '' in names else 0} is empty; give a name")
    twice = [name for name, count in Counter(names).items() if count > 1]
    require(not twice, f"{at}: names {shortened(twice)} twice; give each class one line")
    return names


def with_class_names(listed: FolderList, names: list[str], at: str) -> FolderList:
    """Return a list whose labels are the places of its class names in `names`."""
    numbers = {name: k for k, name in enumerate(names)}
    unknown = [name for name in listed.class_names if name not in numbers]
    require(not unknown, f"{at}: lacks the sub-folders {shortened(unknown)}; add a line for each, or move them away")
    mapping = np.array([numbers[name] for name in listed.class_names])
    return dataclasses.replace(listed, class_names=names, labels=mapping[listed.labels])


def read_labels(path: str) -> dict[str, Any]:
    """Return the class of each path in a file of labels; raise UserError for any other content."""
    at = f"data.labels={path}"
    text = read_text(path, "data.labels")
    pairs: Any
    if Path(path).suffix.lower() == ".json":
        try:
            pairs = json.loads(text, object_pairs_hook=lambda found: [tuple(pair) for pair in found])
        except (ValueError, RecursionError) as error:
            raise UserError(f"{at}: damaged or no JSON ({first_line(error)})") from error
        form = f'{at}: holds no labels; give {{"labels": [["a.png", 0], …]}} or {{"a.png": "cat", …}}'
        require(isinstance(pairs, list), form)
        listed = [
            value for key, value in filter(is_member, pairs) if key == "labels" and isinstance(value, list | None)
        ]
        pairs = listed[0] if listed else pairs
        require(bool(pairs), form)
    else:
        try:
            rows = [row for row in csv.reader(text.splitlines()) if row]
        except csv.Error as error:
            raise UserError(f"{at}: damaged or no CSV ({first_line(error)})") from error
        pairs = rows[1:] if rows and rows[0][0].strip().lower() in ("path", "file", "filename", "image") else rows
        require(bool(pairs), f"{at}: holds no labels; give rows of path,class")
    found: dict[str, Any] = {}
    for number, pair in enumerate(pairs, start=1):
        require(
            isinstance(pair, list | tuple) and len(pair) == 2 and isinstance(pair[0], str),
            f"{at}: entry {number} is no pair of path and class",
        )
        name, label = pair
        label = label.strip() if isinstance(label, str) else label
        require(
            label != "" and (isinstance(label, str) or (isinstance(label, int) and not isinstance(label, bool))),
            f"{at}: {name} has the class {brief(repr(label), 40)}; give a name or a number",
        )
        name = name.strip().removeprefix("./").replace("\\", "/")
        require(found.setdefault(name, label) == label, f"{at}: gives {name} two classes")
    if all(isinstance(label, str) and re.fullmatch(r"[0-9]{1,18}", label) for label in found.values()):
        return {name: int(label) for name, label in found.items()}  # numbers of a CSV
    return found


def is_member(pair: object) -> bool:
    """Whether an entry of a JSON file is the member of an object, not that of a list."""
    return isinstance(pair, tuple)


def list_labelled(root: str, path: str, class_names: list[str] | None, names_path: str | None) -> FolderList:
    """Return the images of a folder at any depth with the labels of a file.

    class_names: of the labels, or None: the file's names in natural order, or its numbers. Raises
    UserError for an image without a label, a label without an image, and labels out of range.
    """
    names, left_out = walk_folder(root)
    labels, at = read_labels(path), f"data.labels={path}"
    present = set(names)
    absent = [name for name in labels if name not in present]
    require(not absent, f"{at}: names {shortened(absent, 3)}, which data.root={root} does not hold")
    missing = [name for name in names if name not in labels]
    require(not missing, f"{at}: gives no class to {shortened(missing, 3)} in data.root={root}; add or move them")
    ordered = {name: labels[name] for name in names}
    class_names, numbers = number_classes(ordered, class_names, at, names_path)
    return FolderList(class_names, names, numbers, left_out, {}, Folder(Path(root)))


def number_classes(
    labels: dict[str, Any], class_names: list[str] | None, at: str, names_path: str | None
) -> tuple[list[str], np.ndarray]:
    """Return class names and the label of each image, int64, of their classes: names, or numbers.

    class_names: of the labels, or None: the names in natural order, or the numbers. at, names_path:
    of messages. Raises UserError for both kinds together, and classes that `class_names` lacks.
    """
    kinds = {isinstance(label, int) for label in labels.values()}
    require(len(kinds) == 1, f"{at}: holds names and numbers of classes; give one kind")
    if kinds == {True}:
        if class_names is None:
            top = max(labels.values())
            require(
                top < MAX_CLASSES,
                f"{at}: has the label {brief(str(top), 30)}; labels count from 0 to {MAX_CLASSES - 1} at most",
            )
            class_names = [str(k) for k in range(top + 1)]
        top = len(class_names) - 1
        limit = f"0..{top}" + ("" if names_path is None else f", the lines of data.class_names={names_path}")
        wrong = [f"{name} ({label})" for name, label in labels.items() if not 0 <= label <= top]
        require(not wrong, f"{at}: labels out of {limit}: {shortened(wrong, 3)}")
        return class_names, np.array([*labels.values()], dtype=np.int64)
    given = sorted(set(labels.values()), key=natural_order)
    class_names = given if class_names is None else class_names
    place = {name: k for k, name in enumerate(class_names)}
    unknown = [name for name in given if name not in place]
    require(not unknown, f"{at}: the classes {shortened(unknown)} are not in data.class_names={names_path}")
    return class_names, np.array([place[label] for label in labels.values()], dtype=np.int64)
