"""Reading TensorFlow's frozen graph of Inception, written here as protobuf writes it."""

import hashlib
import json
import tracemalloc

import numpy as np
import pytest
import torch
from conftest import GOLDEN

from ddt.errors import UserError
from ddt.metrics.inception import load_network
from ddt.metrics.inception_graph import convolutions, read_graph

pytestmark = pytest.mark.usefixtures("one_thread")
# sha256 of the lines "prefix module", sorted, of the convolutions in torch-fidelity's
# util_convert_inception_weights.py
NAMES_SHA256 = "a6051bf634aaf99f8772dbb634c69a1a7c16f4ccc294fc8ae5d3b18156dbdec1"
PARTS = {
    "conv2d_params": "conv.weight",
    "batchnorm/gamma": "bn.weight",
    "batchnorm/beta": "bn.bias",
    "batchnorm/moving_mean": "bn.running_mean",
    "batchnorm/moving_variance": "bn.running_var",
}
FLOAT, INT32 = 1, 3
PACKED, UNPACKED, SPLAT = "conv_1/batchnorm/beta", "conv_2/batchnorm/gamma", "conv_3/batchnorm/moving_variance"


def varint(value):
    head = b""
    while value > 127:
        head += bytes([value & 127 | 128])
        value >>= 7
    return head + bytes([value])


def field(number, value):
    """One field: an integer, or the bytes of a string or message."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def fixed(number, value):
    """One field of 4 or 8 bytes."""
    return varint(number << 3 | {4: 5, 8: 1}[len(value)]) + value


UNKNOWN = field(1000, 2**64 - 1) + field(1001, b"unknown") + fixed(1002, b"4444") + fixed(1003, b"88888888")


def tensor(values, numbers=None, dtype=FLOAT):
    """A TensorProto: its values as one block, or as the given fields."""
    shape = b"".join(field(2, field(1, size) + field(2, b"a name")) for size in values.shape)
    content = field(4, np.asarray(values, dtype="<f4").tobytes()) if numbers is None else numbers
    return field(1, dtype) + UNKNOWN + field(2, shape) + content


def node(name, value=None, op=b"Const", key=b"value"):
    kind = field(5, field(1, b"dtype") + field(2, field(6, FLOAT)))
    constant = b"" if value is None else field(5, UNKNOWN + field(1, key) + field(2, UNKNOWN + field(8, value)))
    return field(1, field(1, name.encode()) + field(2, op) + field(3, b"input") + UNKNOWN + kind + constant + kind)


def tensorflows(state):
    """The arrays of a state dict by node, in TensorFlow's order of axes."""
    arrays = {
        f"{prefix}/{part}": state[f"{module}.{name}"].numpy()
        for prefix, (module, _) in convolutions().items()
        for part, name in PARTS.items()
    }
    arrays = {name: value.transpose(2, 3, 1, 0) if value.ndim == 4 else value for name, value in arrays.items()}
    return arrays | {"softmax/weights": state["fc.weight"].numpy().T, "softmax/biases": state["fc.bias"].numpy()}


@pytest.fixture(scope="module")
def state(inception_weights):
    """The weights, one of those that a single number stands for among them."""
    state = torch.load(inception_weights, weights_only=True)
    state["Conv2d_3b_1x1.bn.running_var"] = torch.full((80,), 0.7)
    return state


@pytest.fixture(scope="module")
def graph(state, tmp_path_factory):
    path = tmp_path_factory.mktemp("graph") / "classify_image_graph_def.pb"
    arrays = tensorflows(state)
    numbers = {
        PACKED: field(5, arrays[PACKED].tobytes()),
        UNPACKED: b"".join(fixed(5, value.tobytes()) for value in arrays[UNPACKED]),
        SPLAT: fixed(5, arrays[SPLAT][0].tobytes()),
    }
    with path.open("wb") as file:
        file.write(UNKNOWN + node("DecodeJpeg/contents", op=b"Placeholder") + node("conv/conv2d_params", op=b"Conv2D"))
        file.write(node("pool_3/_reshape/shape", tensor(np.zeros(2), field(7, b"\1\2"), INT32)))
        for name, value in reversed(arrays.items()):  # the order of nodes means nothing
            file.write(node(name, tensor(value, numbers.get(name))))
            file.write(node(f"{name}/read", op=b"Identity"))
        file.write(field(4, field(1, 21)))  # the version of the graph
    return path


def test_names_are_those_of_the_published_graph():
    lines = sorted(f"{prefix} {module}" for prefix, (module, _) in convolutions().items())
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest() == NAMES_SHA256
    assert len(lines) == 94


def test_a_graph_is_read_bit_for_bit(graph, state, tmp_path):
    result = read_graph(graph)
    shapes = {name: shape for name, shape in json.loads((GOLDEN / "eval" / "inception_param_shapes.json").read_text())}
    assert {name: list(value.shape) for name, value in result.items()} == shapes
    for name, value in result.items():
        assert value.dtype == torch.float32
        assert value.is_contiguous()
        assert torch.equal(value.view(torch.int32), state[name].view(torch.int32)), name
    torch.save(result, tmp_path / "weights.pth")
    network = load_network(tmp_path / "weights.pth").state_dict()
    assert all(torch.equal(network[name], value) for name, value in state.items())


def test_memory_holds_the_file_and_the_tensors_once(graph):
    tracemalloc.start()
    try:
        read_graph(graph)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2.2 * graph.stat().st_size


def problem(path):
    """What the refusal of a file says between its name and the fix."""
    with pytest.raises(UserError) as error:
        read_graph(path)
    text = str(error.value)
    head = f"inception_weights={path}: "
    tail = "; give ADM's classify_image_graph_def.pb, whole, or torch-fidelity's .pth"
    assert text.startswith(head)
    assert text.endswith(tail)
    assert len(text.splitlines()) == 1
    return text.removeprefix(head).removesuffix(tail)


CONV, GAMMA = "conv/conv2d_params", "conv/batchnorm/gamma"
KERNEL, NORM = np.ones((3, 3, 3, 32), dtype=np.float32), np.ones(32, dtype=np.float32)
FIRST = node(CONV, tensor(KERNEL, fixed(5, b"1234")))
BROKEN = "damaged or no TensorFlow graph, "


def test_wrong_graphs_are_named(tmp_path):
    gamma, kernel = f"{GAMMA} must be float32 of shape (32,), ", f"{CONV} must be float32 of shape (3, 3, 3, 32), "
    size = f"{CONV} must hold 3456 bytes, "
    wrong = [
        (node(GAMMA, tensor(NORM)), f"the constant {CONV} is missing"),
        (node(CONV, tensor(KERNEL), b"Identity"), f"the constant {CONV} is missing"),
        (node(CONV, tensor(KERNEL), key=b"other"), f"the constant {CONV} is missing"),
        (node(CONV), f"the constant {CONV} is missing"),
        (b"", f"the constant {CONV} is missing"),
        (FIRST, f"the constant {GAMMA} is missing"),
        (FIRST + node(GAMMA, tensor(NORM[1:])), f"{gamma}found type 1 of shape (31,)"),
        (FIRST + node(GAMMA, tensor(NORM[:, None])), f"{gamma}found type 1 of shape (32, 1)"),
        (node(CONV, tensor(KERNEL.T)), f"{kernel}found type 1 of shape (32, 3, 3, 3)"),
        (node(CONV, tensor(KERNEL, dtype=INT32)), f"{kernel}found type 3 of shape (3, 3, 3, 32)"),
        (node(CONV, b""), f"{kernel}found type None of shape ()"),
        (node(CONV, tensor(KERNEL, b"")), f"{size}found 0"),
        (node(CONV, tensor(KERNEL, field(4, b"1234"))), f"{size}found 4"),
        (node(CONV, tensor(KERNEL, field(5, bytes(8)))), f"{size}found 8"),
        (node(CONV, tensor(KERNEL, field(5, bytes(3455)))), f"{size}found 3455"),
        (bytes(100), f"{BROKEN}it holds what is no field"),
        (b"This is no graph.\n", f"{BROKEN}it holds what is no field"),
        (FIRST + varint(1 << 3 | 3), f"{BROKEN}it holds what is no field"),
        (b"\xff" * 100, f"{BROKEN}a number in it has no end"),
        (b"\x08\x80", f"{BROKEN}a number in it has no end"),
        (FIRST + fixed(2, b"88888888")[:-1], f"{BROKEN}it ends within a field"),
        (node(CONV, tensor(KERNEL)[:-1]), f"{BROKEN}it ends within a field"),
    ]
    path = tmp_path / "graph.pb"
    for content, expected in wrong:
        path.write_bytes(content)
        assert problem(path) == expected


def test_every_truncation_is_noticed(tmp_path):
    """Cut inside a node, the file is damaged; between two, the next weight is missing."""
    path = tmp_path / "graph.pb"
    second = FIRST + node(GAMMA, tensor(NORM, fixed(5, b"1234")))
    missing = {0: CONV, len(FIRST): GAMMA, len(second): "conv/batchnorm/beta"}
    for length in range(len(second) + 1):
        path.write_bytes(second[:length])
        if length in missing:
            assert problem(path) == f"the constant {missing[length]} is missing"
        else:
            assert problem(path).startswith(BROKEN)


def test_damage_raises_nothing_else(tmp_path):
    path = tmp_path / "graph.pb"
    rng = np.random.default_rng(0)
    for _ in range(300):
        path.write_bytes(rng.bytes(200))
        problem(path)
        damaged = bytearray(FIRST)
        damaged[rng.integers(len(FIRST))] = rng.integers(256)
        path.write_bytes(damaged)
        problem(path)


def test_no_file(tmp_path):
    assert problem(tmp_path / "graph.pb") == "cannot be read (No such file or directory)"
    assert problem(tmp_path) == "cannot be read (Is a directory)"
