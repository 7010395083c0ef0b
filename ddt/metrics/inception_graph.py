"""Weights of Inception in the frozen TensorFlow graph of ADM's evaluator, read without TensorFlow.

The file is a protobuf message GraphDef: NodeDef → AttrValue → TensorProto. Source:
classify_image_graph_def.pb of inception-2015-12-05; names of torch-fidelity's converter of it.
"""

import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ddt.errors import UserError

ADVICE = "give ADM's classify_image_graph_def.pb, whole, or torch-fidelity's .pth"
NO_GRAPH = "damaged or no TensorFlow graph"
VARINT, DELIMITED = 0, 2  # wire types of protobuf fields
FIXED = {1: 8, 5: 4}  # wire type → bytes; groups, the other types, are in no GraphDef
DT_FLOAT = 1

# A row is a chain of convolutions: its nodes, of which those after the first get _1, _2, …; its
# module, which gets _1, _2, … if there are several; channels in; of each, channels out and kernel.
STEM = """
    conv                 Conv2d_1a_3x3     3    32:3x3
    conv_1               Conv2d_2a_3x3    32    32:3x3
    conv_2               Conv2d_2b_3x3    32    64:3x3
    conv_3               Conv2d_3b_1x1    64    80:1x1
    conv_4               Conv2d_4a_3x3    80   192:3x3
"""
MIXED_5 = """
    conv                 branch1x1        in    64:1x1
    tower/conv           branch5x5        in    48:1x1   64:5x5
    tower_1/conv         branch3x3dbl     in    64:1x1   96:3x3   96:3x3
    tower_2/conv         branch_pool      in  pool:1x1
"""
MIXED_6A = """
    conv                 branch3x3       288   384:3x3
    tower/conv           branch3x3dbl    288    64:1x1   96:3x3   96:3x3
"""
MIXED_6 = """
    conv                 branch1x1       768   192:1x1
    tower/conv           branch7x7       768   mid:1x1  mid:1x7  192:7x1
    tower_1/conv         branch7x7dbl    768   mid:1x1  mid:7x1  mid:1x7  mid:7x1  192:1x7
    tower_2/conv         branch_pool     768   192:1x1
"""
MIXED_7A = """
    tower/conv           branch3x3       768   192:1x1  320:3x3
    tower_1/conv         branch7x7x3     768   192:1x1  192:1x7  192:7x1  192:3x3
"""
MIXED_7 = """
    conv                 branch1x1        in   320:1x1
    tower/conv           branch3x3_1      in   384:1x1
    tower/mixed/conv     branch3x3_2a    384   384:1x3
    tower/mixed/conv_1   branch3x3_2b    384   384:3x1
    tower_1/conv         branch3x3dbl     in   448:1x1  384:3x3
    tower_1/mixed/conv   branch3x3dbl_3a 384   384:1x3
    tower_1/mixed/conv_1 branch3x3dbl_3b 384   384:3x1
    tower_2/conv         branch_pool      in   192:1x1
"""
BLOCKS: list[tuple[str, str, str, dict[str, int]]] = [  # folder in the graph, module, rows, sizes that rows name
    ("", "", STEM, {}),
    ("mixed/", "Mixed_5b.", MIXED_5, {"in": 192, "pool": 32}),
    ("mixed_1/", "Mixed_5c.", MIXED_5, {"in": 256, "pool": 64}),
    ("mixed_2/", "Mixed_5d.", MIXED_5, {"in": 288, "pool": 64}),
    ("mixed_3/", "Mixed_6a.", MIXED_6A, {}),
    ("mixed_4/", "Mixed_6b.", MIXED_6, {"mid": 128}),
    ("mixed_5/", "Mixed_6c.", MIXED_6, {"mid": 160}),
    ("mixed_6/", "Mixed_6d.", MIXED_6, {"mid": 160}),
    ("mixed_7/", "Mixed_6e.", MIXED_6, {"mid": 192}),
    ("mixed_8/", "Mixed_7a.", MIXED_7A, {}),
    ("mixed_9/", "Mixed_7b.", MIXED_7, {"in": 1280}),
    ("mixed_10/", "Mixed_7c.", MIXED_7, {"in": 2048}),
]
BATCH_NORM = {"gamma": "weight", "beta": "bias", "moving_mean": "running_mean", "moving_variance": "running_var"}


def convolutions() -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return module and kernel shape (HWIO) of every convolution, by the prefix of its nodes."""
    result: dict[str, tuple[str, tuple[int, ...]]] = {}
    for folder, block, rows, sizes in BLOCKS:
        for row in rows.strip().splitlines():
            node, module, channels, *chain = row.split()
            inputs = sizes.get(channels) or int(channels)
            for k, convolution in enumerate(chain):
                channels, kernel = convolution.split(":")
                outputs = sizes.get(channels) or int(channels)
                height, width = map(int, kernel.split("x"))
                name = f"{block}{module}_{k + 1}" if len(chain) > 1 else block + module
                result[folder + node + (f"_{k}" if k else "")] = (name, (height, width, inputs, outputs))
                inputs = outputs
    return result


class GraphError(ValueError):
    """The problem in a graph, without the file's name and the fix."""


def _varint(data: memoryview, start: int) -> tuple[int, int]:
    """Return the integer at `start`, seven bits per byte, and the position after it."""
    value = 0
    for i, byte in enumerate(data[start : start + 10]):  # no integer of 64 bits is longer
        value |= (byte & 127) << 7 * i
        if byte < 128:
            return value, start + i + 1
    raise GraphError(f"{NO_GRAPH}, a number in it has no end")


def _fields(data: memoryview) -> tuple[dict[int, int], dict[int, list[memoryview]]]:
    """Return a message's fields by number: the last integer, and all other contents, not copied.

    Raises GraphError where the bytes are no complete message.
    """
    integers: dict[int, int] = {}
    contents: dict[int, list[memoryview]] = {}
    position = 0
    while position < len(data):
        tag, position = _varint(data, position)
        number, kind = tag >> 3, tag & 7
        if number == 0 or kind not in (VARINT, DELIMITED, *FIXED):
            raise GraphError(f"{NO_GRAPH}, it holds what is no field")
        if kind == VARINT:
            integers[number], position = _varint(data, position)
            continue
        length, position = _varint(data, position) if kind == DELIMITED else (FIXED[kind], position)
        if length > len(data) - position:
            raise GraphError(f"{NO_GRAPH}, it ends within a field")
        contents.setdefault(number, []).append(data[position : position + length])
        position += length
    return integers, contents


def _constants(graph: memoryview) -> dict[bytes, memoryview]:
    """Return the TensorProto of every constant, by its node's name."""
    constants = {}
    for node in _fields(graph)[1].get(1, []):
        _, of_node = _fields(node)  # 1 name, 2 op, 5 attributes, which are entries of a map: 1 key, 2 value
        for entry in of_node.get(5, []) if of_node.get(2) == [b"Const"] else []:
            _, of_entry = _fields(entry)
            for value in of_entry.get(2, []) if of_entry.get(1) == [b"value"] else []:
                for tensor in _fields(value)[1].get(8, []):
                    constants[b"".join(of_node.get(1, []))] = tensor
    return constants


def _values(node: str, tensor: memoryview, shape: tuple[int, ...]) -> np.ndarray:
    """Return a TensorProto's values, a view of the file's; GraphError for another type or shape."""
    integers, contents = _fields(tensor)  # 1 dtype, 2 shape, 4 bytes, 5 numbers, in one field or in one each
    dims = [dim for part in contents.get(2, []) for dim in _fields(part)[1].get(2, [])]
    sizes = tuple(_fields(dim)[0].get(1, 0) for dim in dims)
    if integers.get(1) != DT_FLOAT or sizes != shape:
        raise GraphError(f"{node} must be float32 of shape {shape}, found type {integers.get(1)} of shape {sizes}")
    count = math.prod(shape)
    if 4 in contents:
        content = contents[4][-1]
    else:
        numbers = b"".join(contents.get(5, []))
        content = memoryview(numbers * count if len(numbers) == 4 else numbers)  # one stands for all
    if len(content) != 4 * count:
        raise GraphError(f"{node} must hold {4 * count} bytes, found {len(content)}")
    return np.frombuffer(content, dtype="<f4").reshape(shape)


def read_graph(path: Path) -> dict[str, Tensor]:
    """Return the float32 state dict of torch-fidelity's "inception-v3-compat" in a graph's file.

    Raises UserError for a file that cannot be read, is damaged or no graph, or lacks a weight.
    """
    weights: list[tuple[str, str, tuple[int, ...]]] = []  # node, name in the network, shape in the graph
    for prefix, (module, shape) in convolutions().items():
        weights.append((f"{prefix}/conv2d_params", f"{module}.conv.weight", shape))
        weights += [(f"{prefix}/batchnorm/{k}", f"{module}.bn.{name}", shape[-1:]) for k, name in BATCH_NORM.items()]
    weights += [("softmax/weights", "fc.weight", (2048, 1008)), ("softmax/biases", "fc.bias", (1008,))]
    axes = {4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}  # HWIO to OIHW, inputs × outputs to outputs × inputs
    state = {}
    try:
        constants = _constants(memoryview(path.read_bytes()))
        for node, name, shape in weights:
            if node.encode() not in constants:
                raise GraphError(f"the constant {node} is missing")
            values = _values(node, constants[node.encode()], shape).transpose(axes[len(shape)])
            state[name] = torch.from_numpy(np.array(values, dtype=np.float32, order="C"))
    except OSError as error:
        raise UserError(f"inception_weights={path}: cannot be read ({error.strerror}); {ADVICE}") from error
    except GraphError as error:
        raise UserError(f"inception_weights={path}: {error}; {ADVICE}") from error
    return state
