"""Files and folders: written atomically (under a temporary name, renamed when complete), locked,
and never written over: what makes a folder one of ours is decided here.
"""

import contextlib
import errno
import hashlib
import json
import os
import platform
import re
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import filelock
from safetensors import SafetensorError

from ddt.errors import UserError, first_line, require

LOCK = ".lock"  # in a folder that one command uses at a time
TEMPORARY = ".tmp-ddt-"  # begins the names of files that are being written
MAX_JSON = 16 * 2**20  # bytes
MAX_NESTING = 32
UMASK = os.umask(0o077)  # read here, for there is no other way than to set it, which all threads would see
os.umask(UMASK)

MAX_NAME_BYTES = 200  # of a folder's name; most file systems take 255, and temporary names are longer


def is_run_name(name: str) -> bool:
    """Return whether a name, with / between levels, is one of a folder in `runs/` that every shell
    and file system takes.
    """
    levels = name.split("/")
    return all(
        re.fullmatch(r"[\w.=,+\[\]-]+", level) and level not in (".", "..") and len(level.encode()) <= MAX_NAME_BYTES
        for level in levels
    )


def cache_folder(kind: str) -> Path:
    """Return the folder of a kind of files that are made once on a machine: `kind` in DDT_CACHE, or
    in ~/.cache/ddt.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return Path(os.environ.get("DDT_CACHE") or cache / "ddt").expanduser() / kind


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fsync(path: Path) -> None:
    """Force a file or folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def reset_permissions(path: Path) -> None:
    """Give a file the usual permissions: safetensors leaves them readable by their owner alone."""
    path.chmod(0o666 & ~UMASK)


# --- atomic writes: whoever reads finds all of a file or folder, or nothing


@contextlib.contextmanager
def file_errors(path: Path, temporary: Path | None = None) -> Iterator[None]:
    """Raise an OSError that names `path` for whatever is raised on a full or broken disk: an
    OSError without the file by Python and NumPy, a RuntimeError by torch, one of its own by
    safetensors.

    temporary: what is renamed to `path` in the end, and named as it.
    """
    try:
        yield
    except OSError as error:
        name = Path(error.filename or path)
        if temporary is not None and name.is_relative_to(temporary):
            name = path / name.relative_to(temporary)
        raise OSError(error.errno or errno.EIO, error.strerror or str(error), str(name)) from error
    except SafetensorError as error:
        raise OSError(errno.EIO, first_line(error), str(path)) from error
    except RuntimeError as error:
        if "inline_container" not in str(error):  # the file in torch's sources that writes archives
            raise
        raise OSError(errno.EIO, "could not be written to its end (a full disk?)", str(path)) from error


@contextlib.contextmanager
def atomic_file(path: Path, sync: bool = True) -> Iterator[Path]:
    """Yield a temporary path, renamed to `path` when the block ends, removed if it fails.

    sync: force the file to disk first. Raises OSError that names the file: see `file_errors`.
    """
    # several processes may write the same
    temporary = path.with_name(f"{TEMPORARY}{platform.node()}-{os.getpid()}-{path.name}")
    try:
        with file_errors(path, temporary):
            yield temporary
            if sync:
                fsync(temporary)
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def remove_temporary_files(folder: Path) -> None:
    """Remove what killed processes of this machine left in a folder within `atomic_file`."""
    for path in folder.glob(f"{TEMPORARY}{platform.node()}-*"):
        process = path.name.removeprefix(f"{TEMPORARY}{platform.node()}-").partition("-")[0]
        try:
            os.kill(int(process), 0)  # asks whether it is there
        except ProcessLookupError:
            path.unlink(missing_ok=True)
        except (ValueError, OverflowError, PermissionError):  # no name of ours, or a running process
            continue


@contextlib.contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder, renamed to `folder` when the block ends, removed if it fails.

    `folder` must not exist. What a killed command left is removed first. Raises UserError where
    another command is writing the same, or something else lies under the temporary name.
    """
    temporary = temporary_path(folder)
    require(
        not temporary.exists() or (temporary / LOCK).is_file(),
        f"{temporary}: is in the way, and is no unfinished folder of an earlier call; move it elsewhere",
    )
    busy = f"{folder}: another command is writing it; wait for it, or choose another folder"
    with lock_folder(temporary, busy):
        for left in temporary.iterdir():
            if left.name != LOCK:
                shutil.rmtree(left) if left.is_dir() else left.unlink()
        try:
            with file_errors(folder, temporary):
                yield temporary
                (temporary / LOCK).unlink()
                rename_atomically(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def temporary_path(folder: Path) -> Path:
    """Return the path under which `folder` is written before it is renamed."""
    return folder.with_name(f".tmp-{folder.name}")


def make_temporary_folder(folder: Path) -> Path:
    """Create the empty temporary folder of `folder`, inside a folder that is locked; remove what a
    killed command left there.
    """
    temporary = temporary_path(folder)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    return temporary


def rename_atomically(temporary: Path, folder: Path) -> None:
    """Rename a complete temporary folder, its files on disk, to `folder`: now it is visible."""
    fsync(temporary)
    temporary.rename(folder)
    fsync(folder.parent)


# --- whose folder


def check_writable(out: Path, key: str = "out") -> None:
    """Raise UserError unless a file or folder `out` can be written."""
    parent = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    folder = parent if parent.is_dir() or parent == out else None
    require(
        folder is not None and os.access(folder, os.W_OK),
        f"{key}={out}: cannot be written, {parent} is {'a file' if folder is None else 'read-only'}; "
        f"choose another {key}=",
    )


def check_new(out: Path, key: str = "out") -> None:
    """Raise UserError unless a file or folder `out` is new, or an empty folder, and can be
    written; call it before any work.
    """
    empty = out.is_dir() and not any(out.iterdir())
    require(not out.exists() or empty, f"{key}={out}: exists already and is not written over; choose another {key}=")
    check_writable(out, key)


def find_record(
    folder: Path, records: Collection[str], key: str, written: Collection[str] | None = None, own: Collection[str] = ()
) -> Path | None:
    """Return the record that makes a folder one of ours, None where the folder is new.

    An earlier call of a command has left one of its `records`, whose content the caller compares.
    A folder without a record is new if it holds nothing but files of the names `own` and
    temporaries; where `written` is given, if it holds none of these names, which the command would
    write over. Raises UserError for any other folder, and for a file.
    """
    require(not folder.exists() or folder.is_dir(), f"{key}={folder}: is a file; give a folder")
    names = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
    record = next((folder / name for name in records if name in names), None)
    foreign = [
        name
        for name in names
        if (name in written if written is not None else name not in (LOCK, *own) and not name.startswith(TEMPORARY))
    ]
    require(
        record is not None or not foreign,
        f"{key}={folder}: holds {', '.join(foreign[:3])}{' …' if len(foreign) > 3 else ''}, not written by this "
        f"command, and nothing is written over; choose another {key}=",
    )
    return record


def read_record(record: Path) -> dict[str, Any]:
    """Return the content of a JSON record; {} for a damaged one, which is that of no request."""
    try:
        return read_json(record)
    except UserError:
        return {}


@contextlib.contextmanager
def lock_folder(folder: Path, message: str) -> Iterator[None]:
    """Lock a folder, created if missing; raise UserError(message) where another process holds it.

    The operating system releases the lock when the process ends.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout as error:
        raise UserError(message) from error
    try:
        yield
    finally:
        lock.release()


def write_text(path: Path, text: str) -> None:
    """Write a text atomically, as UTF-8; what was no UTF-8 when it was read keeps its bytes."""
    with atomic_file(path, sync=False) as temporary:
        temporary.write_bytes(text.encode(errors="surrogateescape"))


def write_json(path: Path, values: Any) -> None:
    """Write plain values atomically as indented JSON, lists of numbers or strings on one line."""
    text = json.dumps(values, indent=2)
    text = re.sub(r"\[\n([^\[\]{}]*)\n\s*\]", lambda match: "[" + re.sub(r"\n\s*", " ", match[1].strip()) + "]", text)
    write_text(path, f"{text}\n")


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file; UserError where it is damaged, very large or deep, or holds
    something else.
    """
    require(path.is_file(), f"{path}: no such file")
    size = path.stat().st_size
    require(size <= MAX_JSON, f"{path}: is no file of settings ({size / 2**20:.0f} MiB of at most 16)")
    try:
        values = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: damaged or no JSON ({first_line(error)}); copy it again") from error
    require(isinstance(values, dict), f"{path}: holds no settings, but a {type(values).__name__}; copy it again")
    level, depth = [values], 0
    while level:
        inner = (part for each in level for part in (each.values() if isinstance(each, dict) else each))
        level, depth = [part for part in inner if isinstance(part, dict | list)], depth + 1
        require(depth <= MAX_NESTING, f"{path}: is nested more than {MAX_NESTING} deep; copy it again")
    return values
