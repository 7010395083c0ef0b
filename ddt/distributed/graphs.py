"""CUDA graphs of a network's blocks in training: all kernels of a block's forward pass are launched
at once, and all of its backward pass.

A few images leave a GPU waiting for the host, which launches kernels one by one. Graphs repeat the
same kernels: the same bits. There is one for each block, so that under DDP the gradients of a block
are sent while the next ones are computed.
"""

import copy
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ddt.distributed.compile import compile_block
from ddt.errors import require
from ddt.model import Denoiser
from ddt.model.cost import num_tokens
from ddt.model.layers import Positions

log = logging.getLogger(__name__)
Call = Callable[..., Any]
# Of `block_work`; with more an H100 is busy without graphs: XL/2 has 1.1e10 with 32 images of
# 256 px, and gains a fifth; with 64 it loses a hundredth.
MAX_WORK = 1.5e10


def block_work(network: Denoiser, shape: tuple[int, int, int], images: int) -> int:
    """Return what a block has to do for images of latents (C, H, W): tokens times D², on average
    where the halves' widths differ.
    """
    squares = [stack.hidden_size**2 for stack in network.stacks for _ in stack.blocks]
    return images * num_tokens(network, *shape[1:]) * sum(squares) // len(squares)


def uses_graphs(chosen: bool | None, compiled: bool, sharded: bool, work: int, device: torch.device) -> bool:
    """Return whether training uses graphs: `chosen`, `trainer.cuda_graphs`, or where that is None,
    on a GPU, compiled, and where a block has little to do.

    work: `block_work` of a micro-batch. Raises UserError where they are chosen and cannot be.
    """
    for possible, advice in (
        (device.type == "cuda", "needs a GPU; leave it out"),
        (compiled, "needs compiled blocks (trainer.compile, and a compiler); leave it out"),
        (not sharded, "not with trainer.parallelism=fsdp; leave out one of them"),
    ):
        require(possible or not chosen, f"trainer.cuda_graphs=true: {advice}")
        if not possible:
            return False
    return work <= MAX_WORK if chosen is None else chosen


def arguments_of(network: Denoiser, run: Callable[[], object]) -> dict[nn.Module, tuple[Tensor, Tensor, Positions]]:
    """Return copies of the arguments of each block that `run` calls, in order."""
    arguments: dict[nn.Module, tuple[Tensor, Tensor, Positions]] = {}
    calls: dict[nn.Module, Any] = {block: block._compiled_call_impl for block in network.all_blocks}

    def noting(block: nn.Module) -> Call:
        def note(x: Tensor, c: Tensor, at: Positions, modulation: None = None) -> Tensor:
            copies = [value.detach().clone().requires_grad_() for value in (x, c)]
            arguments[block] = copies[0], copies[1], at
            return calls[block](x, c, at, modulation)

        return note

    for block in calls:
        block._compiled_call_impl = noting(block)
    try:
        run()
    finally:
        for block, call in calls.items():
            block._compiled_call_impl = call
    return arguments


def shadow(block: nn.Module) -> nn.Module:
    """Return a compiled copy of a block, with weights of its own in the memory of the block's."""
    copied = copy.deepcopy(block)
    for own, weight in zip(copied.parameters(), block.parameters(), strict=True):
        own.data = weight.data
    compile_block(copied, dynamic=False)
    return copied


def on_grid(block: nn.Module, at: Positions) -> Call:
    """Return a block on a token grid as a function of its tensors, of which a graph reads the
    weights, too.
    """

    def call(x: Tensor, c: Tensor, *weights: Tensor) -> Tensor:
        return block(x, c, at)

    return call


def graphed_call(block: nn.Module, graphed: Call, shape: torch.Size, at: Positions) -> Call:
    """Return a block's call: by its graph for gradients and what it was captured with, otherwise
    compiled.
    """
    compiled: Any = block._compiled_call_impl
    weights = tuple(block.parameters())

    def call(x: Tensor, c: Tensor, here: Positions, modulation: Tensor | None = None) -> Tensor:
        captured = modulation is None and torch.is_grad_enabled() and x.shape == shape
        if captured and (here.height, here.width) == (at.height, at.width):
            return graphed(x, c, *weights)
        return compiled(x, c, here, modulation)

    return call


def graph_blocks(network: Denoiser, run: Callable[[], object], accumulates: bool) -> None:
    """Capture the compiled blocks of a denoiser in place, forward and backward.

    run: calls the network once as training does, on a batch of its size; under its autocast, too,
    this function is called. accumulates: a step adds the gradients of several micro-batches.
    Weights are read where they lie: changed in place they count at once. Copies of the network are
    not captured.
    """
    arguments = arguments_of(network, run)
    log.info("capturing %d blocks in CUDA graphs", len(arguments))
    # Shadows, because autograd keeps a node for each weight, which belongs to one stream: of the
    # weights themselves to that of training, where DDP has hooks on it, and not to the capture's
    shadows = {block: shadow(block) for block in arguments}
    functions = tuple(on_grid(shadows[block], at) for block, (_, _, at) in arguments.items())
    inputs = tuple((x, c, *shadows[block].parameters()) for block, (x, c, _) in arguments.items())
    torch.autograd.graph.set_warn_on_accumulate_grad_stream_mismatch(False)  # of the shadows' nodes
    try:
        graphed = torch.cuda.make_graphed_callables(functions, inputs)
    finally:
        torch.autograd.graph.set_warn_on_accumulate_grad_stream_mismatch(True)
    for (block, (x, _, at)), each in zip(arguments.items(), graphed, strict=True):
        # where copies of a block leave it behind, as they do with its compilation
        block._compiled_call_impl = graphed_call(block, each, x.shape, at)
        if accumulates:  # a gradient lies where the next micro-batch's is written
            for parameter in block.parameters():
                parameter.register_hook(torch.clone)
