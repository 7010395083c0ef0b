"""Files and folders on disk: written atomically, under a temporary name and renamed when complete;
locked against other commands; told apart by their SHA-256.
"""

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
    """Give a file the permissions of any new one: safetensors writes files that nobody else may
    read.
    """
    umask = os.umask(0)
    os.umask(umask)
    path.chmod(0o666 & ~umask)


def check_writable(out: Path) -> None:
    """Raise UserError unless a file or folder `out` can be made, before any work is done for it."""
    parent = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    folder = parent if parent.is_dir() or parent == out else None
    require(
        folder is not None and os.access(folder, os.W_OK),
        f"out={out}: cannot be written, {parent} is {'a file' if folder is None else 'read-only'}; choose another out=",
    )


@contextlib.contextmanager
def atomic_file(path: Path, sync: bool = True) -> Iterator[Path]:
    """Yield a temporary path beside `path`, which replaces `path` when the block ends and is
    removed when it fails. sync: force it to disk first.
    """
    temporary = path.with_name(f".tmp-{platform.node()}-{os.getpid()}-{path.name}")  # several may write the same
    try:
        yield temporary
        if sync:
            fsync(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def temporary_folder(folder: Path) -> Path:
    """Make the empty folder in which `folder` is written, without what a killed command left."""
    temporary = folder.with_name(f".tmp-{folder.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    return temporary


def rename_atomically(temporary: Path, folder: Path) -> None:
    """Give a complete temporary folder its name, on disk: before, nobody sees any of it."""
    fsync(temporary)
    temporary.rename(folder)
    fsync(folder.parent)


@contextlib.contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder, which becomes `folder` when the block ends and is removed when it
    fails. `folder` must not exist.
    """
    temporary = temporary_folder(folder)
    try:
        yield temporary
        rename_atomically(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def lock_folder(folder: Path, message: str) -> Iterator[None]:
    """Hold a folder, made where it is missing, for this process; raise UserError(message) where
    another holds it. The lock is the operating system's and ends with the process.
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
    """Write plain values atomically as indented JSON, a list of numbers or words on one line."""
    text = json.dumps(values, indent=2)
    text = re.sub(r"\[\n([^\[\]{}]*)\n\s*\]", lambda match: "[" + re.sub(r"\n\s*", " ", match[1].strip()) + "]", text)
    with atomic_file(path, sync=False) as temporary:
        temporary.write_text(f"{text}\n")
