"""The EMA's update on a GPU by one Triton kernel: one launch for all tensors, three passes over
memory.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 8192  # values that a program of the kernel updates


@triton.jit
def _lerp_kernel(table, rate, CHUNK: tl.constexpr):
    row = table + 3 * tl.program_id(0).to(tl.int64)
    ema = tl.load(row).to(tl.pointer_type(tl.float32))
    weights = tl.load(row + 1).to(tl.pointer_type(tl.float32))
    i = tl.arange(0, CHUNK)
    inside = i < tl.load(row + 2)
    share = tl.load(rate)
    a = tl.load(ema + i, inside)
    b = tl.load(weights + i, inside)
    tl.store(ema + i, tl.where(share < 0.5, a + share * (b - a), b - (1 - share) * (b - a)), inside)


@functools.lru_cache(maxsize=8)  # tensors stay where they are from step to step
def chunk_table(
    emas: tuple[int, ...], weights: tuple[int, ...], sizes: tuple[int, ...], device: torch.device
) -> Tensor:
    """Return (chunks, 3) int64 on the device: the addresses of a chunk's EMA and weights, and the
    number of its values. emas, weights: addresses of float32 tensors of `sizes` values.
    """
    rows = [
        (ema + 4 * first, weight + 4 * first, min(CHUNK, size - first))
        for ema, weight, size in zip(emas, weights, sizes, strict=True)
        for first in range(0, size, CHUNK)
    ]
    return torch.tensor(rows, dtype=torch.int64, pin_memory=device.type == "cuda").to(device, non_blocking=True)


@torch.library.custom_op("ddt::lerp_", mutates_args={"emas"})
def lerp_(emas: list[Tensor], weights: list[Tensor], rate: Tensor) -> None:
    """`ema ← ema + rate·(weights − ema)` for lists of float32 tensors of equal shapes and strides,
    without gaps; rate: a float32 scalar on their device.
    """
    places = (tuple(tensor.data_ptr() for tensor in tensors) for tensors in (emas, weights))
    table = chunk_table(*places, tuple(ema.numel() for ema in emas), rate.device)
    _lerp_kernel[(len(table),)](table, rate, CHUNK=CHUNK, num_warps=8)
