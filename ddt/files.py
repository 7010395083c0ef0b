"""Files and folders written atomically (under a temporary name, renamed when complete); locks."""

import contextlib
import hashlib
import json
import os
import platform
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import filelock

from ddt.errors import UserError, require

SPLIT_NAMES = {"train", "training", "val", "valid", "validation", "test", "testing"}  # folders that name no data set
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
    umask = os.umask(0)
    os.umask(umask)
    path.chmod(0o666 & ~umask)


def check_writable(out: Path) -> None:
    """Raise UserError unless a file or folder `out` can be written; call it before any work."""
    parent = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    folder = parent if parent.is_dir() or parent == out else None
    require(
        folder is not None and os.access(folder, os.W_OK),
        f"out={out}: cannot be written, {parent} is {'a file' if folder is None else 'read-only'}; choose another out=",
    )


# --- atomic writes: whoever reads finds all of a file or folder, or nothing


@contextlib.contextmanager
def atomic_file(path: Path, sync: bool = True) -> Iterator[Path]:
    """Yield a temporary path, renamed to `path` when the block ends, removed if it fails.

    sync: force the file to disk first.
    """
    temporary = path.with_name(f".tmp-{platform.node()}-{os.getpid()}-{path.name}")  # several may write the same
    try:
        yield temporary
        if sync:
            fsync(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder, renamed to `folder` when the block ends, removed if it fails.

    `folder` must not exist.
    """
    temporary = make_temporary_folder(folder)
    try:
        yield temporary
        rename_atomically(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def temporary_path(folder: Path) -> Path:
    """Return the path under which `folder` is written before it is renamed."""
    return folder.with_name(f".tmp-{folder.name}")


def make_temporary_folder(folder: Path) -> Path:
    """Create the empty temporary folder of `folder`; remove what a killed command left there."""
    temporary = temporary_path(folder)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    return temporary


def rename_atomically(temporary: Path, folder: Path) -> None:
    """Rename a complete temporary folder, its files on disk, to `folder`: now it is visible."""
    fsync(temporary)
    temporary.rename(folder)
    fsync(folder.parent)


@contextlib.contextmanager
def lock_folder(folder: Path, message: str) -> Iterator[None]:
    """Lock a folder, created if missing; raise UserError(message) where another process holds it.

    The operating system releases the lock when the process ends.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout as error:
        raise UserError(message) from error
    try:
        yield
    finally:
        lock.release()


def write_json(path: Path, values: Any) -> None:
    """Write plain values atomically as indented JSON, lists of numbers or strings on one line."""
    text = json.dumps(values, indent=2)
    text = re.sub(r"\[\n([^\[\]{}]*)\n\s*\]", lambda match: "[" + re.sub(r"\n\s*", " ", match[1].strip()) + "]", text)
    with atomic_file(path, sync=False) as temporary:
        temporary.write_text(f"{text}\n")
