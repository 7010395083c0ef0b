"""Labelled images in shards: webdataset's tar files, or Parquet files as Hugging Face writes them.

    x/000.jpg, x/000.cls        tar: members of one name up to the first dot are a sample; its class
                                is the text of .cls, or `label` in .json
    image {bytes, path}, label  Parquet: columns, a row a sample; names of the classes stand in the
                                schema's metadata (`ClassLabel`)

A class is a number or a name. Shards lie in one folder; an image is called SHARD/MEMBER or, in
Parquet, SHARD/ROW. Images are read at random: from a tar at their offset, found in one pass over
its headers; from Parquet by reading their row group, the last few of which are kept.
"""

import bisect
import dataclasses
import functools
import io
import itertools
import json
import os
import tarfile
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, ClassVar, NamedTuple

from ddt.config import require_packages
from ddt.data.labels import number_classes, read_class_names
from ddt.data.listing import IMAGE_SUFFIXES, FolderList, in_words, is_split
from ddt.data.source import HASHED_BYTES, HASHED_IMAGES, NUM_THREADS, Folder, Source, digest_of, spread
from ddt.errors import UserError, first_line, require

GROUPS_KEPT = 4  # of Parquet, in memory: rows come in order while latents are cached


class Scan(NamedTuple):
    """What a shard holds: the label of each image, by its name in the shard; how many members are
    not read; the names of the classes, where it knows them; for reading, where each image lies.
    """

    labels: dict[str, str | int]
    left_out: Counter[str]
    class_names: list[str] | None
    where: dict[str, tuple[int, int]] | list[int]  # tar: offset and bytes; Parquet: first row of each group


def damaged(path: Path, problem: str) -> UserError:
    """Return the error of a shard that cannot be read."""
    return UserError(f"{path}: is damaged or no {path.suffix} file ({problem}); copy it again")


# --- tar


@functools.cache
def scan_tar(path: Path) -> Scan:
    """Read the headers and the classes of a tar file, once per process.

    Raises UserError for a damaged file, and for an image without a class.
    """
    where: dict[str, tuple[int, int]] = {}
    keys: dict[str, str] = {}
    classes: dict[str, str | int] = {}
    left_out = Counter[str]()
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                folder, _, base = member.name.removeprefix("./").rpartition("/")
                stem, _, suffix = base.partition(".")
                name, key, suffix = member.name.removeprefix("./"), f"{folder}/{stem}", f".{suffix.lower()}"
                if member.isdir():
                    continue
                if not member.isreg() or any(part.startswith(".") for part in name.split("/")):
                    left_out["hidden"] += 1
                elif suffix in IMAGE_SUFFIXES:
                    where[name], keys[name] = (member.offset_data, member.size), key
                elif suffix in (".cls", ".json"):
                    content = archive.extractfile(member)
                    assert content is not None
                    label = read_class(path, name, suffix, content.read())
                    if label is not None and (suffix == ".cls" or key not in classes):
                        classes[key] = label
                else:
                    left_out[suffix] += 1
        with path.open("rb") as file:
            end = os.pread(file.fileno(), tarfile.BLOCKSIZE, archive.offset)
    except UserError:
        raise
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        raise damaged(path, first_line(error)) from error
    if end != tarfile.NUL * tarfile.BLOCKSIZE:  # tarfile takes a damaged header for the end
        raise damaged(path, f"no header and no end at byte {archive.offset}")
    missing = next((name for name, key in keys.items() if key not in classes), None)
    require(
        missing is None,
        f"{path}/{missing}: has no label; the tar needs a .cls of the same name, or a .json with label",
    )
    return Scan({name: classes[key] for name, key in keys.items()}, left_out, None, where)


def read_class(path: Path, name: str, suffix: str, content: bytes) -> str | int | None:
    """Return the class in a .cls or .json member, None where a .json has none; UserError for
    anything else.
    """
    try:
        label = content.decode().strip() if suffix == ".cls" else json.loads(content).get("label")
    except (ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}/{name}: holds no class ({first_line(error)})") from error
    if isinstance(label, str) and label.isdecimal():
        return int(label)
    valid = (isinstance(label, str) and label != "") or (isinstance(label, int) and not isinstance(label, bool))
    require(valid or (label is None and suffix == ".json"), f"{path}/{name}: the class {label!r} is no name or number")
    return label


@dataclasses.dataclass(frozen=True)
class TarShards:
    """Members of the tar files in a folder; see `Source`."""

    root: Path
    max_surveyed: ClassVar[int] = Folder.max_surveyed

    def _where(self, name: str) -> tuple[Path, int, int]:
        shard, _, member = name.partition("/")
        where = scan_tar(self.root / shard).where
        assert isinstance(where, dict)
        return self.root / shard, *where.get(member, (0, -1))

    def _read(self, name: str, most: int | None = None) -> bytes:
        path, offset, size = self._where(name)
        require(size >= 0, f"{path}: holds no {name.partition('/')[2]} any more; put the shards back as they were")
        try:
            with path.open("rb") as file:
                return os.pread(file.fileno(), size if most is None else min(size, most), offset)
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}); copy it again") from error

    def open(self, name: str) -> IO[bytes]:
        return io.BytesIO(self._read(name))

    def size(self, name: str) -> int:
        return self._where(name)[2]

    def digest(self, names: list[str]) -> str:
        """Hash the place and size of each member, and the first 64 KiB of a thousand."""
        chosen = (names[k] for k in spread(len(names), HASHED_IMAGES))
        return digest_of((self._where(name)[1:] for name in names), (self._read(k, HASHED_BYTES) for k in chosen))


# --- Parquet


@functools.cache
def scan_parquet(path: Path) -> Scan:
    """Read the labels of a Parquet file and where its row groups begin, once per process.

    Raises UserError for a damaged file, other columns, and a row without a class.
    """
    import pyarrow
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(path)
        columns, metadata = file.schema_arrow.names, file.schema_arrow.metadata or {}
        absent = [name for name in ("image", "label") if name not in columns]
        require(not absent, f"{path}: has no column {' and no column '.join(absent)}, but {', '.join(columns)}")
        labels = file.read(columns=["label"], use_threads=False).column("label").to_pylist()
        info = json.loads(metadata.get(b"huggingface", b"{}"))
    except UserError:
        raise
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise damaged(path, first_line(error)) from error
    for row, label in enumerate(labels):
        valid = isinstance(label, str | int) and not isinstance(label, bool) and label != "" and label != -1
        require(valid, f"{path}/{row}: has no label ({label!r}); images need one")
    class_names = stored_names(info, path)
    sizes = (file.metadata.row_group(k).num_rows for k in range(file.metadata.num_row_groups))
    starts = [0, *itertools.accumulate(sizes)][:-1]
    return Scan({str(row): label for row, label in enumerate(labels)}, Counter(), class_names, starts)


def stored_names(info: Any, path: Path) -> list[str] | None:
    """Return the class names in the metadata that Hugging Face's datasets write, None without any.

    Raises UserError for what is no list of different names.
    """
    for key in ("info", "features", "label", "names"):
        info = info.get(key) if isinstance(info, dict) else None
    if info is None:
        return None
    valid = isinstance(info, list) and all(isinstance(name, str) for name in info) and len(set(info)) == len(info)
    require(valid, f"{path}: its metadata holds no list of different class names; give data.class_names=FILE")
    return info


@functools.lru_cache(maxsize=GROUPS_KEPT)
def read_group(path: Path, group: int) -> Any:
    """Return the images of a row group, a column of pyarrow's; UserError for a damaged file."""
    import pyarrow
    from pyarrow import parquet

    try:
        return parquet.ParquetFile(path).read_row_group(group, columns=["image"], use_threads=False).column("image")
    except (pyarrow.ArrowException, OSError) as error:
        raise damaged(path, first_line(error)) from error


@dataclasses.dataclass(frozen=True)
class ParquetShards:
    """Rows of the Parquet files in a folder; see `Source`. The size of an image is its shard's."""

    root: Path
    max_surveyed: ClassVar[int] = 200  # each may cost the reading of a row group

    def open(self, name: str) -> IO[bytes]:
        shard, _, row = name.partition("/")
        starts = scan_parquet(self.root / shard).where
        assert isinstance(starts, list)
        group = bisect.bisect_right(starts, int(row)) - 1
        value = read_group(self.root / shard, group)[int(row) - starts[group]].as_py()
        content = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(content, bytes):
            raise UserError(f"{self.root / name}: holds no bytes of an image; write them into the shard")
        return io.BytesIO(content)

    def size(self, name: str) -> int:
        return Folder(self.root).size(name.partition("/")[0])

    def digest(self, names: list[str]) -> str:
        """Hash the size and the end of each shard, where Parquet describes its columns."""
        shards = sorted({name.partition("/")[0] for name in names})
        sizes = [self.size(f"{shard}/") for shard in shards]
        return digest_of([sizes], (end_of_file(self.root / shard) for shard in shards))


def end_of_file(path: Path) -> bytes:
    """Return the last bytes of a file, none of one that cannot be read."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - HASHED_BYTES))
            return file.read()
    except OSError:
        return b""


# --- both


SCANS: dict[str, Callable[[Path], Scan]] = {".tar": scan_tar, ".parquet": scan_parquet}
SOURCES: dict[str, Callable[[Path], Source]] = {".tar": TarShards, ".parquet": ParquetShards}


def source_of(root: Path, names: list[str]) -> Source:
    """Return where images of these names lie: in the shards of a folder, or as its files."""
    shard = names[0].partition("/")[0] if names else ""
    if Path(shard).suffix == ".parquet":
        require_packages(("pyarrow",), f"{root / shard}")
    return SOURCES.get(Path(shard).suffix, Folder)(root) if (root / shard).is_file() else Folder(root)


@dataclasses.dataclass(frozen=True)
class ShardsPlace:
    """Shards in a folder; see `ddt.data.survey.Place`. root: the folder, or FOLDER/PATTERN of some
    of them, such as FOLDER/train-*. class_names: a file, see `ddt.data.labels`.
    """

    root: str
    class_names: str | None = None

    def list(self) -> FolderList:
        """Return the images of the shards; UserError where there are none, or of two splits."""
        folder, shards, left_out = find_shards(self.root)
        suffix = shards[0].suffix
        if suffix == ".parquet":
            require_packages(("pyarrow",), f"data.root={self.root}")
        with ThreadPoolExecutor(NUM_THREADS) as pool:
            scans = list(pool.map(SCANS[suffix], shards))
        labels = {
            f"{shard.name}/{name}": label
            for shard, scan in zip(shards, scans, strict=True)
            for name, label in scan.labels.items()
        }
        require(bool(labels), f"data.root={self.root}: its {len(shards)} {suffix} files hold no images")
        names = None if self.class_names is None else read_class_names(self.class_names)
        at = f"data.root={self.root}"
        others = [shard for shard, scan in zip(shards, scans, strict=True) if scan.class_names != scans[0].class_names]
        require(
            not others or names is not None,
            f"{others[0] if others else ''}: has other class names than {shards[0]}; give data.class_names=FILE",
        )
        class_names, numbers = number_classes(labels, names or scans[0].class_names, at, self.class_names)
        for scan in scans:
            left_out += scan.left_out
        return FolderList(class_names, [*labels], numbers, left_out, {}, SOURCES[suffix](folder))


def find_shards(root: str) -> tuple[Path, list[Path], Counter[str]]:
    """Return the folder of `root`, its shards in the order of their names, and what is not read.

    Raises UserError where there are none, of two kinds, or of several splits.
    """
    path, pattern = Path(root), "*"
    if not path.is_dir():
        path, pattern = path.parent, path.name
    found = [file for file in sorted(path.glob(pattern)) if not file.name.startswith(".") and file.is_file()]
    require(
        root != "" and (pattern == "*" or bool(found)),
        f"data.root={root}: no such folder or files; give the folder with the shards, or FOLDER/train-*",
    )
    shards = [file for file in found if file.suffix in SCANS]
    left_out = Counter(file.suffix or "without suffix" for file in found if file.suffix not in SCANS)
    kinds = sorted({file.suffix for file in shards})
    not_read = f" (not read: {in_words(left_out)})" if left_out else ""
    require(bool(shards), f"data.root={root}: holds no .tar or .parquet files{not_read}")
    require(len(kinds) == 1, f"data.root={root}: holds {' and '.join(kinds)} files; give {root}/*{kinds[0]}")
    splits = sorted(filter(is_split, {file.name.partition("-")[0].partition(".")[0] for file in shards}))
    require(
        len(splits) < 2,
        f"data.root={root}: holds shards of the splits {', '.join(splits)}; give one, such as {path}/"
        f"{next((name for name in splits if name.lower().startswith('train')), splits[0] if splits else '')}-*",
    )
    return path, shards, left_out
