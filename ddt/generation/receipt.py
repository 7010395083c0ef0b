"""The receipt of a set of samples, bound to its `samples.npz` by SHA-256."""

from typing import Any

RECEIPT = "receipt.json"
SHA256 = "samples_sha256"  # the receipt's key


def is_receipt_of(receipt: Any, sha256: Any) -> bool:
    """Return whether a receipt is that of the samples of this SHA-256.

    Every reader of samples, or of metrics of them, asks it. False where either says nothing.
    """
    return isinstance(receipt, dict) and sha256 is not None and receipt.get(SHA256) == sha256
