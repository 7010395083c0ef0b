"""An H100 that is not there: under `fake_gpu` tensors on `cuda` have shapes, types and a device,
but no values, and code for a GPU runs through on a machine without one.

torch's fake tensors do most of it. What asks CUDA's driver is answered here: the device's
properties, autocast, the choice of attention's kernel, and the backward pass, since torch's engine
for gradients asks for streams of the device.
"""

import contextlib
import heapq
import types
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import Node, get_gradient_edge

from ddt.model import layers

Module = TypeVar("Module", bound=nn.Module)
CUDA = torch.device("cuda", 0)
CAPABILITY = (9, 0)
H100 = types.SimpleNamespace(
    name="NVIDIA H100 80GB HBM3", major=9, minor=0, multi_processor_count=132, regs_per_multiprocessor=65_536,
    max_threads_per_multi_processor=2048, max_threads_per_block=1024, warp_size=32, total_memory=80 * 2**30,
    shared_memory_per_block=49_152, shared_memory_per_block_optin=232_448, shared_memory_per_multiprocessor=233_472,
    L2_cache_size=50 * 2**20,
)  # fmt: skip


@contextlib.contextmanager
def fake_tensors() -> Iterator[FakeTensorMode]:
    """Make tensors of the block fake, those that networks keep too."""
    layers._cached.cache_clear()
    try:
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            yield mode
    finally:
        layers._cached.cache_clear()


@contextlib.contextmanager
def fake_gpu() -> Iterator[FakeTensorMode]:
    """Make tensors of the block fake, also on `cuda`, and answer for the device."""
    torch._C._ensureCUDADeviceGuardSet()  # without a GPU: one that does nothing
    replaced = [
        (torch.cuda, "current_device", lambda: 0),
        (torch.cuda, "device_count", lambda: 1),
        (torch.cuda, "get_device_properties", lambda device=None: H100),
        (torch.cuda, "get_device_capability", lambda device=None: CAPABILITY),
        (torch.cuda, "get_device_name", lambda device=None: H100.name),
        (torch.cuda, "is_bf16_supported", lambda including_emulation=True: True),
        (torch.cuda, "_lazy_init", lambda: None),
        (torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
        (F, "scaled_dot_product_attention", attention),
        (torch.autograd, "grad", gradients),
        (Tensor, "backward", backward),
    ]
    with contextlib.ExitStack() as stack:
        for where, name, value in replaced:
            stack.enter_context(mock.patch.object(where, name, value))
        yield stack.enter_context(fake_tensors())


def place(module: Module) -> Module:
    """Give a module fake weights and buffers on the fake GPU, in place, and return it."""
    for part in module.modules():
        for own in (part._parameters, part._buffers):
            for name, value in own.items():
                if value is not None:
                    fake = torch.empty(value.shape, dtype=value.dtype, device=CUDA)
                    own[name] = nn.Parameter(fake, value.requires_grad) if own is part._parameters else fake
    return module


def attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: None = None, dropout_p: float = 0.0, is_causal: bool = False
) -> Tensor:
    """Return attention (B, heads, N, d) by the kernel that torch chooses on an H100: cuDNN's, or in
    float32 the memory-efficient one.
    """
    assert (attn_mask, dropout_p, is_causal) == (None, 0, False), "no network here asks for another"
    if torch.is_autocast_enabled("cuda"):
        dtype = torch.get_autocast_dtype("cuda")
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    for_backward, aten = torch.is_grad_enabled(), torch.ops.aten
    if query.dtype == torch.float32:
        return aten._scaled_dot_product_efficient_attention(query, key, value, None, for_backward)[0]
    return aten._scaled_dot_product_cudnn_attention(query, key, value, None, for_backward)[0]


# --- gradients


def as_list(value: Any) -> list[Any]:
    """Return a tensor as a list of one, None as an empty list."""
    return [] if value is None else [value] if isinstance(value, Tensor) else list(value)


def fitted(gradient: Tensor | None, wanted: Any) -> Tensor | None:
    """Return a gradient in the shape and dtype of what it belongs to, as torch's engine does."""
    if gradient is None:
        return None
    return gradient.sum_to_size(tuple(wanted.shape)).to(wanted.dtype)


def run_node(node: Node, grads: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
    """Return the gradients that a node of the graph makes of those of its outputs, one for each of
    its `next_functions`.
    """
    if not isinstance(node, torch.autograd.function.BackwardCFunction):
        made = node(*grads)
        return made if isinstance(made, tuple) else (made,)
    # written in Python: it answers for arguments that are no tensors too
    zeros = [torch.zeros(tuple(m.shape), dtype=m.dtype, device=m.device) for m in node._input_metadata]
    made = node.apply(*(zero if grad is None else grad for grad, zero in zip(grads, zeros, strict=True)))
    made = made if isinstance(made, tuple) else (made,)
    wanted = iter([grad for grad, needed in zip(made, node.needs_input_grad, strict=True) if needed])
    return [None if child is None else next(wanted) for child, _ in node.next_functions]


@torch.no_grad()
def gradients(outputs: Any, inputs: Any, grad_outputs: Any = None, *args: Any, **kwargs: Any) -> Any:
    """Return what `torch.autograd.grad` does, node by node from Python: the latest node first, bit
    for bit as torch's engine. Hooks do not run; an input without influence gets None.
    """
    outputs, single, inputs = as_list(outputs), isinstance(inputs, Tensor), as_list(inputs)
    seeds = as_list(grad_outputs) or [None] * len(outputs)
    roots = [get_gradient_edge(output) for output in outputs]
    leaves = [get_gradient_edge(each) if each.requires_grad else None for each in inputs]
    parents = reachable([root.node for root in roots])
    needed = {leaf.node for leaf in leaves if leaf is not None and leaf.node in parents}
    stack = list(needed)
    while stack:  # all that leads to an input
        new = [node for node in parents[stack.pop()] if node not in needed]
        needed.update(new)
        stack += new
    waiting = {node: sum(parent in needed for parent in parents[node]) for node in needed}
    sums: dict[Node, dict[int, Tensor]] = {node: {} for node in needed}

    def add(node: Node, number: int, gradient: Tensor | None) -> None:
        if gradient is not None:
            sums[node][number] = sums[node][number] + gradient if number in sums[node] else gradient

    for root, output, seed in zip(roots, outputs, seeds, strict=True):
        if root.node in needed:
            add(root.node, root.output_nr, torch.ones_like(output) if seed is None else seed)
    ready = [(-node._sequence_nr(), index, node) for index, node in enumerate(needed) if waiting[node] == 0]
    heapq.heapify(ready)
    count = len(needed)
    while ready:
        node = heapq.heappop(ready)[2]
        children = [child for child, _ in node.next_functions]
        made: Sequence[Tensor | None] = [None] * len(children)
        if sums[node] and any(child in needed for child in children):
            made = run_node(node, [sums[node].get(number) for number in range(len(node._input_metadata))])
        for (child, number), gradient in zip(node.next_functions, made, strict=True):
            if child in needed:
                add(child, number, fitted(gradient, child._input_metadata[number]))
                waiting[child] -= 1
                if waiting[child] == 0:
                    count += 1
                    heapq.heappush(ready, (-child._sequence_nr(), count, child))
        if not any(leaf is not None and leaf.node is node for leaf in leaves):
            sums[node] = {}
    results = [None if leaf is None else sums.get(leaf.node, {}).get(leaf.output_nr) for leaf in leaves]
    return results[0] if single else tuple(results)


def reachable(roots: Sequence[Node]) -> dict[Node, list[Node]]:
    """Return the nodes of a graph, each with those that it gets gradients from."""
    parents: dict[Node, list[Node]] = {node: [] for node in roots}
    stack = list(parents)
    while stack:
        node = stack.pop()
        for child, _ in node.next_functions:
            if child is not None:
                if child not in parents:
                    parents[child] = []
                    stack.append(child)
                parents[child].append(node)
    return parents


def backward(output: Tensor, gradient: Tensor | None = None) -> None:
    """Add the gradients of a tensor to `grad` of the leaves, as `Tensor.backward`."""
    nodes = reachable([get_gradient_edge(output).node])
    leaves = [node.variable for node in nodes if hasattr(node, "variable")]
    for leaf, grad in zip(leaves, gradients(output, leaves, gradient), strict=True):
        if grad is not None:
            leaf.grad = grad.detach() if leaf.grad is None else leaf.grad + grad
