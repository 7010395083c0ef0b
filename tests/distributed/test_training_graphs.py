"""CUDA graphs of blocks in training, with an emulation of what torch captures: it has the same
memory, but its calls compute. Graphs themselves need a GPU: scripts/gpu_check.sh.
"""

import copy

import pytest
import torch
from conftest import inputs, small_ddt
from torch import nn

from ddt.distributed.compile import compile_blocks
from ddt.distributed.graphs import block_work, graph_blocks, uses_graphs
from ddt.errors import UserError
from ddt.model.layers import Block

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


class Emulation:
    """`torch.cuda.make_graphed_callables` on a CPU: inputs are copied to where they lay at the
    capture, and outputs and gradients lie in the same memory at each call.
    """

    def __init__(self):
        self.calls = self.copied = 0

    def capture(self, function, static):
        with torch.enable_grad():
            outputs = function(*static)
            gradients = torch.autograd.grad(outputs, static, torch.zeros_like(outputs))
        emulation, output = self, outputs.detach().clone()

        class Graphed(torch.autograd.Function):
            @staticmethod
            def forward(ctx, *arguments):
                emulation.calls += 1
                for own, given in zip(static, arguments, strict=True):
                    if own.data_ptr() != given.data_ptr():
                        emulation.copied += 1
                        own.data.copy_(given)
                with torch.enable_grad():
                    ctx.outputs = function(*static)
                return output.copy_(ctx.outputs.detach()).detach()

            @staticmethod
            def backward(ctx, gradient):
                for kept, new in zip(gradients, torch.autograd.grad(ctx.outputs, static, gradient), strict=True):
                    kept.copy_(new)
                return tuple(kept.detach() for kept in gradients)

        return Graphed.apply

    def __call__(self, functions, arguments):
        return tuple(map(self.capture, functions, arguments))


@pytest.fixture
def emulation(monkeypatch):
    monkeypatch.setattr(Block, "compile", lambda block, **_: nn.Module.compile(block, backend="eager"))
    torch.compiler.reset()
    emulated = Emulation()
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", emulated)
    return emulated


def captured(emulation, accumulates=False):
    model = small_ddt()
    compile_blocks(model, dynamic=False)
    graph_blocks(model, lambda: model.forward_with_hidden(*inputs(), 1), accumulates)
    emulation.calls = emulation.copied = 0
    return model


def gradients(model, scales=(1.0,)):
    """Return the gradients of a step with a micro-batch for each scale."""
    model.zero_grad(set_to_none=True)
    x, t, y = inputs()
    for scale in scales:
        v, hidden = model.forward_with_hidden(scale * x, t, y, 1)
        (v.square().mean() + hidden.square().mean()).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-8, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("scales", [(1.0,), (1.0, 0.5, -2.0)])
def test_gradients_of_steps_are_those_without_graphs(emulation, scales):
    model, plain = captured(emulation, accumulates=len(scales) > 1), small_ddt()
    assert_equal(gradients(model, scales), gradients(plain, scales))
    assert emulation.calls == len(scales) * len(model.all_blocks)
    for step in (model, plain):  # weights change in place, as the optimizer changes them
        with torch.no_grad():
            for parameter in step.parameters():
                parameter.mul_(1.5)
    assert_equal(gradients(model, scales), gradients(plain, scales))
    assert emulation.copied == emulation.calls * 2  # what comes in, and no weights


@pytest.mark.slow
def test_other_calls_run_without_graphs(emulation):
    model, plain = captured(emulation), small_ddt()
    x, t, y = inputs()
    with torch.no_grad():
        torch.testing.assert_close(model(x, t, y), plain(x, t, y))
        z = model.encode(x, t, y)
        model.decode(x, z, model.modulations(z))
    torch.testing.assert_close(model(x[:1], t[:1], y[:1]), plain(x[:1], t[:1], y[:1]))  # of another size
    assert emulation.calls == 0
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
    copied(x, t, y)
    assert emulation.calls == 0
    model(x, t, y)
    assert emulation.calls == len(model.all_blocks)


def test_names_of_weights_do_not_change(emulation):
    assert captured(emulation).state_dict().keys() == small_ddt().state_dict().keys()


@pytest.mark.parametrize(
    ("chosen", "compiled", "sharded", "images", "device", "expected"),
    [
        (None, True, False, 32, CUDA, True),
        (None, True, False, 64, CUDA, False),
        (True, True, False, 64, CUDA, True),
        (False, True, False, 1, CUDA, False),
        (None, False, False, 1, CUDA, False),
        (None, True, True, 1, CUDA, False),
        (None, True, False, 1, CPU, False),
    ],
)
def test_graphs_where_a_card_would_wait(chosen, compiled, sharded, images, device, expected):
    assert uses_graphs(chosen, compiled, sharded, 256 * images * 1152**2, device) == expected


def test_the_work_of_a_block_counts_both_widths():
    assert block_work(small_ddt(patch_size=2), (4, 8, 8), 3) == 3 * 16 * 32**2
    wide = small_ddt(patch_size=2, depth=4, encoder_depth=3, decoder_hidden_size=64, decoder_num_heads=4)
    assert block_work(wide, (4, 8, 8), 3) == 3 * 16 * (3 * 32**2 + 64**2) // 4


@pytest.mark.parametrize(
    ("compiled", "sharded", "device", "fix"),
    [(True, False, CPU, "GPU"), (False, False, CUDA, "trainer.compile"), (True, True, CUDA, "trainer.parallelism")],
)
def test_graphs_that_cannot_be_are_refused(compiled, sharded, device, fix):
    with pytest.raises(UserError, match=rf"trainer\.cuda_graphs=true: .*{fix}"):
        uses_graphs(True, compiled, sharded, 1, device)
