"""The common part of every receipt: command, code revision, machine, versions and time."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddt.version import __version__

if TYPE_CHECKING:
    import torch

ROOT = Path(__file__).resolve().parent.parent


def version(package: str) -> str | None:
    """Return the version of an installed package; None where it is not."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def command_line() -> str:
    """Return this process's command as typed in the repository: `python -m scripts.benchmark …`."""
    path = Path(sys.argv[0])
    path = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
    module = list(path.with_suffix("").parts)[: -1 if path.name == "__main__.py" else None]
    program = ["-m", ".".join(module)] if len(path.parts) > 2 and path.parts[0] == "scripts" else [str(path)]
    return shlex.join(["python", *program, *sys.argv[1:]])


def revision() -> str | None:
    """Return the git commit of this code; None where it is no clone, or git is missing."""
    if not (ROOT / ".git").exists():
        return None
    command = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def circumstances(device: torch.device, packages: tuple[str, ...] = ("torch", "numpy", "diffusers")) -> dict[str, Any]:
    """Return device, versions and date for a receipt."""
    import torch

    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "versions": {
            "ddt": __version__,
            "python": platform.python_version(),
            **{name: version(name) for name in packages},
        },
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def without_paths(values: Any) -> Any:
    """Return plain values without any key `path`."""
    return {k: without_paths(v) for k, v in values.items() if k != "path"} if isinstance(values, dict) else values


def nested(values: Any, *keys: str) -> Any:
    """Return the value at nested keys of plain values, None where there is none."""
    for key in keys:
        values = values.get(key) if isinstance(values, dict) else None
    return values
