"""The EMA's update on a GPU by one Triton kernel: one launch for all tensors, three passes over
memory.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 8192  # values that a program of the kernel updates
MAX_TABLES = 64  # a run has one for each of its EMAs; those of earlier runs are forgotten


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


def chunk_table(emas: list[Tensor], weights: list[Tensor]) -> Tensor:
    """Return (chunks, 3) int64 on the tensors' device: the addresses of a chunk's EMA and weights,
    and the number of its values. AssertionError for tensors that the kernel would misread.
    """
    rows = []
    for ema, weight in zip(emas, weights, strict=True):
        assert ema.dtype == weight.dtype == torch.float32, "the EMA and its weights are float32"
        assert (ema.device, ema.shape, ema.stride()) == (weight.device, weight.shape, weight.stride())
        rows += [
            (ema.data_ptr() + 4 * first, weight.data_ptr() + 4 * first, min(CHUNK, ema.numel() - first))
            for first in range(0, ema.numel(), CHUNK)
        ]
    device = emas[0].device
    table = torch.tensor(rows, dtype=torch.int64, pin_memory=device.type == "cuda").reshape(-1, 3)
    return table.to(device, non_blocking=True)


tables: dict[tuple[tuple[int, int], ...], Tensor] = {}  # tensors stay where they are from step to step


@torch.library.custom_op("ddt::lerp_", mutates_args={"emas"})
def lerp_(emas: list[Tensor], weights: list[Tensor], rate: Tensor) -> None:
    """`ema ← ema + rate·(weights − ema)` for lists of float32 tensors of equal shapes and strides,
    without gaps; rate: a float32 scalar on their device.
    """
    places = tuple((tensor.data_ptr(), tensor.numel()) for tensor in (*emas, *weights))
    if places not in tables:
        if len(tables) == MAX_TABLES:
            tables.clear()
        tables[places] = chunk_table(emas, weights)
    table = tables[places]
    if len(table):  # a process may hold no row of a sharded network
        with torch.cuda.device_of(rate):
            _lerp_kernel[(len(table),)](table, rate, CHUNK=CHUNK, num_warps=8)
