"""CUDA graphs of a network's calls: the kernels of a call are launched at once.

A few images leave a GPU waiting for the host, which launches kernels one by one. A graph repeats
the same kernels: the same bits.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

Function = Callable[..., Any]
MAX_ROWS = 32  # of a batch; with more, XL/2 keeps an H100 busy without graphs


def direct(function: Function, *arguments: Any) -> Any:
    """Call a function: the way without graphs."""
    return function(*arguments)


def capture(call: Callable[[], Any], pool: Any) -> tuple[Callable[[], None], Any]:
    """Capture a call as a CUDA graph; return what replays it and the outputs that it fills."""
    graph = torch.cuda.CUDAGraph()
    # a graph must not read weights that autocast has cast before, nor other code those cast in it
    torch.clear_autocast_cache()
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):  # another thread may decode
        outputs = call()
    torch.clear_autocast_cache()
    return graph.replay, outputs


class Graph:
    """A CUDA graph of one call, and the memory of its inputs and outputs."""

    def __init__(self, function: Function, arguments: tuple[Any, ...], pool: Any) -> None:
        values, spec = pytree.tree_flatten(arguments)
        self.inputs = [value.clone() if isinstance(value, Tensor) else value for value in values]
        self.sources: list[Any] = [None] * len(values)  # held, so that no other takes their memory
        self.versions = [-1] * len(values)
        static = pytree.tree_unflatten(self.inputs, spec)
        self.replay, self.outputs = capture(lambda: function(*static), pool)

    def copy(self, i: int, value: Tensor) -> None:
        """Copy an input, unless it lies there: modulations are the same over several steps."""
        source = self.sources[i]
        if (
            source is None
            or (source.data_ptr(), source.stride()) != (value.data_ptr(), value.stride())
            or self.versions[i] != value._version
        ):
            self.inputs[i].copy_(value)
            self.sources[i], self.versions[i] = value, value._version

    def __call__(self, arguments: tuple[Any, ...]) -> Any:
        """Return copies of the outputs for arguments of the shapes it was captured with."""
        for i, value in enumerate(pytree.tree_leaves(arguments)):
            if isinstance(value, Tensor):
                self.copy(i, value)
        self.replay()
        return pytree.tree_map(torch.clone, self.outputs)


def suitable(first: Tensor) -> bool:
    """Whether a call whose first argument this is gains by a graph, and can have one."""
    return first.is_cuda and len(first) <= MAX_ROWS and not torch.is_grad_enabled()


class Graphs:
    """Calls networks by CUDA graphs, captured at the second call of a function with inputs of the
    same shapes; the first one runs as it is and makes what later ones reuse.

    For tensors on a GPU, without gradients, and at most `MAX_ROWS` rows in the first one; other
    calls run as they are. Weights are read where they lie: changed in place they count at once.
    """

    def __init__(self) -> None:
        self.graphs: dict[Any, Graph | None] = {}
        self.pool: Any = None

    def __call__(self, function: Function, *arguments: Any) -> Any:
        """Return `function(*arguments)`: tensors, lists of tensors and, the same at each call of a
        graph, numbers.
        """
        if not suitable(arguments[0]):
            return function(*arguments)
        values, spec = pytree.tree_flatten(arguments)
        kinds = tuple((value.shape, value.dtype) if isinstance(value, Tensor) else value for value in values)
        key = function, spec, kinds, torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
        if key not in self.graphs:
            outputs = function(*arguments)
            if pytree.tree_leaves(outputs):  # otherwise, as with modulations that fit nowhere, it did nothing
                self.graphs[key] = None
            return outputs
        graph = self.graphs[key]
        if graph is None:
            if self.pool is None:  # shared by all: outputs are copied before another graph runs
                self.pool = torch.cuda.graph_pool_handle()
            graph = self.graphs[key] = Graph(function, arguments, self.pool)
        return graph(arguments)
