"""The receipt of a set of samples, bound to its `samples.npz` by SHA-256."""

import json
from pathlib import Path
from typing import Any

from ddt.errors import UserError, require

RECEIPT = "receipt.json"
SHA256 = "samples_sha256"  # the receipt's key


def read_receipt(path: Path) -> dict[str, Any]:
    """Return a receipt; raise UserError where it is damaged."""
    try:
        receipt = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: damaged ({error}); sample again, or move the file away") from error
    require(isinstance(receipt, dict), f"{path}: damaged (no receipt); sample again, or move the file away")
    return receipt


def is_receipt_of(receipt: Any, sha256: Any) -> bool:
    """Return whether a receipt is that of the samples of this SHA-256.

    Every reader of samples, or of metrics of them, asks it. False where either says nothing.
    """
    return isinstance(receipt, dict) and sha256 is not None and receipt.get(SHA256) == sha256
