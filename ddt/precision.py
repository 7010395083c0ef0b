"""The precisions of networks: float32, or autocast to a 16-bit type over float32 weights."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, Any, Literal

from ddt.errors import require

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

Dtype = Literal["bf16", "fp16", "fp32"]
HALF_TYPES = ("bf16", "fp16")


def torch_dtype(dtype: str) -> torch.dtype:
    """Return torch's type of a precision."""
    import torch

    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]


def autocast(device: torch.device, dtype: str) -> torch.autocast:
    """Return the autocast context of a precision, which for fp32 switches an outer one off.

    Casts of weights are not kept: a pass reads each weight once, and CUDA graphs must not read what
    was cast outside of them.
    """
    import torch

    is_half = dtype in HALF_TYPES
    half_type = torch_dtype(dtype) if is_half else None
    return torch.autocast(device.type, dtype=half_type, enabled=is_half, cache_enabled=False)


@contextlib.contextmanager
def products(device: torch.device, dtype: str) -> Iterator[None]:
    """Run float32 products on a GPU in TF32 where the precision is "tf32", else in float32."""
    import torch

    before = torch.get_float32_matmul_precision()
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high" if dtype == "tf32" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextlib.contextmanager
def deterministic(chosen: bool) -> Iterator[None]:
    """Where `chosen`, let torch use its deterministic algorithms alone: an operation that has none
    raises RuntimeError. To be entered before the process first uses a GPU.
    """
    if not chosen:
        yield
        return
    import torch

    memory: Any = torch.utils.deterministic
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it is first used
    before = torch.are_deterministic_algorithms_enabled(), memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    memory.fill_uninitialized_memory = False  # nothing here reads what it has not written
    try:
        yield
    finally:
        enabled, memory.fill_uninitialized_memory = before
        torch.use_deterministic_algorithms(enabled)


def has_bf16(device: torch.device) -> bool:
    """Return whether a device computes in bf16: GPUs before Ampere (V100, T4, 2080 Ti) do not."""
    import torch

    return device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)


def choose_dtype(dtype: Dtype | None, device: torch.device) -> Dtype:
    """Return the precision to sample in: `dtype` or, where it is None, bf16 on GPUs that have it,
    fp32 elsewhere. Raises UserError for a dtype that the device does not have.
    """
    if dtype is None:
        return "bf16" if device.type == "cuda" and has_bf16(device) else "fp32"
    check_dtype("dtype", dtype, device)
    return dtype


def check_dtype(key: str, dtype: str, device: torch.device) -> None:
    """Raise UserError where a device does not compute in the precision of setting `key`."""
    require(dtype != "bf16" or has_bf16(device), f"{key}=bf16: this GPU has no bf16; give {key}=fp16, or fp32")
