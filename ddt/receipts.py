"""`metrics.json`: what it says about its inputs, and which one is never written over."""

import datetime
import importlib.metadata
import json
import logging
import platform
from pathlib import Path
from typing import Any

import torch

from ddt.errors import UserError, require
from ddt.files import write_json
from ddt.version import __version__

log = logging.getLogger(__name__)
LONG_LIST = 1000  # entries of a sampling receipt's list from which on its length is kept alone


def version(package: str) -> str | None:
    """Return the version of an installed package; None where it is not."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def circumstances(device: torch.device, packages: tuple[str, ...] = ("torch", "numpy", "diffusers")) -> dict[str, Any]:
    """Return what a receipt says of machine, versions and time."""
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
    """Return plain values without what is called `path` in them."""
    return {k: without_paths(v) for k, v in values.items() if k != "path"} if isinstance(values, dict) else values


def refuse_other_evaluation(out: Path, inputs: dict[str, Any]) -> None:
    """Raise UserError where `out` is a file or holds the metrics of other samples, of another
    reference or of other features. What a file is called makes no difference.
    """
    require(not out.exists() or out.is_dir(), f"out={out}: is a file; give a folder")
    path = out / "metrics.json"
    if not path.exists():
        return
    try:
        receipt = json.loads(path.read_text())["receipt"]
        same = receipt["samples"]["sha256"] == inputs["samples"]["sha256"]
        same = same and all(
            without_paths(receipt[key]) == without_paths(inputs[key]) for key in ("reference", "features")
        )
    except (OSError, ValueError, KeyError, TypeError):
        same = False
    require(same, f"{path}: belongs to another evaluation and is not written over; choose another out=")


def write_metrics(out: Path, metrics: dict[str, Any], inputs: dict[str, Any], device: torch.device) -> None:
    """Add the receipt to the metrics and write them as `metrics.json` into `out`."""
    metrics["receipt"] = {**inputs, **circumstances(device, ("torch", "numpy", "torch-fidelity", "timm"))}
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "metrics.json", metrics)
    log.info("%s", out / "metrics.json")


def shortened(values: Any) -> Any:
    """Return plain values in which the length of a long list stands for it: 50,000 seeds tell a
    reader nothing.
    """
    if isinstance(values, dict):
        return {key: shortened(value) for key, value in values.items()}
    if isinstance(values, list):
        return f"{len(values)} values" if len(values) > LONG_LIST else [shortened(value) for value in values]
    return values


def sampling_receipt(samples: Path, count: int) -> dict[str, Any]:
    """Return `{"sampling": …}`, the receipt that sample.py wrote beside its samples.npz of `count`
    images, or nothing where there is none. Raises UserError for a damaged one, and for that of
    another set.
    """
    path = samples.with_name("receipt.json")
    if samples.name != "samples.npz" or not path.is_file():
        return {}
    try:
        receipt = json.loads(path.read_text())
        number = receipt.get("samples", count)
    except (ValueError, AttributeError) as error:
        raise UserError(f"{path}: damaged ({error}); sample again, or move the file away") from error
    require(
        number == count,
        f"{path}: is the receipt of {number} images, but {samples} holds {count}; move the file away",
    )
    return {"sampling": shortened(receipt)}
