"""Files that are written whole or not at all, and what tells them apart."""

import hashlib
import json
import os
import platform
import re
from pathlib import Path
from typing import Any

from ddt.errors import require


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_writable(out: Path) -> None:
    """Raise UserError unless a file or folder `out` can be made, before anything is measured for
    it.
    """
    parent = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    folder = parent if parent.is_dir() or parent == out else None
    require(
        folder is not None and os.access(folder, os.W_OK),
        f"out={out}: cannot be written, {parent} is {'a file' if folder is None else 'read-only'}; choose another out=",
    )


def write_json(path: Path, values: Any) -> None:
    """Write plain values as indented JSON, a list of numbers or words on one line, whole or not at
    all.
    """
    text = json.dumps(values, indent=2)
    text = re.sub(r"\[\n([^\[\]{}]*)\n\s*\]", lambda match: "[" + re.sub(r"\n\s*", " ", match[1].strip()) + "]", text)
    temporary = path.with_name(f".tmp-{platform.node()}-{os.getpid()}-{path.name}")  # several may write the same
    try:
        temporary.write_text(f"{text}\n")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def share(path: Path) -> None:
    """Give a file the permissions that any new one gets: safetensors writes files that nobody else
    may read.
    """
    umask = os.umask(0)
    os.umask(umask)
    path.chmod(0o666 & ~umask)


def fsync(path: Path) -> None:
    """Force a file or folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
