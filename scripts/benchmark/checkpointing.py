"""What a block keeps for the backward pass with and without activation checkpointing, and how long
a step takes: `python -m scripts.benchmark.checkpointing`, on one CPU core.
"""

import time
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ddt.model.layers import Block, Checkpointing, positions

KINDS: tuple[Checkpointing, ...] = (False, True, "selective")


class Made(TorchDispatchMode):
    """Remembers all memory that is made inside, wherever a reference to it is kept."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self.storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return out

    def alive(self, *besides: Tensor) -> int:
        """Return the bytes of what is still referred to, but for some tensors, of which views were
        made.
        """
        for tensor in besides:
            self.storages.pop(tensor.untyped_storage()._cdata, None)
        return sum(size for reference, size in self.storages.values() if not reference.expired())


def kept(kind: Checkpointing, per_token: bool, side: int, width: int = 1152, heads: int = 16) -> int:
    """Return the bytes that are alive after a block's forward pass under bf16 autocast: its output,
    which is the next block's input, is among them, its conditioning, which all blocks share, not.
    """
    block, tokens = Block(width, heads, activation_checkpointing=kind), side * side
    at = positions(width // heads, side, side, torch.device("cpu"))
    x = torch.randn(1, tokens, width, dtype=torch.bfloat16, requires_grad=True)
    c = torch.randn(1, tokens if per_token else 1, width, dtype=torch.bfloat16, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16), Made() as made:
        out = block(x, c, at)
    found = made.alive(x, c)
    del out
    return found


def seconds(kind: Checkpointing, depth: int = 6, width: int = 384, batch: int = 8, side: int = 16) -> float:
    """Return the processor seconds of a forward and backward pass of some decoder blocks in
    float32, the best of 5.
    """
    blocks = [Block(width, 6, activation_checkpointing=kind) for _ in range(depth)]
    at = positions(width // 6, side, side, torch.device("cpu"))
    x, c = torch.randn(2, batch, side * side, width)
    times = []
    for _ in range(5):
        began = time.process_time()
        h = x
        for block in blocks:
            h = block(h, c, at)
        h.square().mean().backward()
        times.append(time.process_time() - began)
    return min(times)


if __name__ == "__main__":
    torch.set_num_threads(1)
    plain = seconds(False)
    for kind in KINDS:
        # weights in bf16 are kept, too, so of two sizes the difference
        each = [
            (kept(kind, per_token, 24) - kept(kind, per_token, 16)) / (24**2 - 16**2) for per_token in (False, True)
        ]
        print(f"{kind}: encoder {each[0]:,.0f}, decoder {each[1]:,.0f} bytes a token and block; ", end="")
        print(f"time {seconds(kind) / plain:.2f} of {plain:.2f} s")
