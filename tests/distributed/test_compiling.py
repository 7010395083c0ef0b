"""Compiled blocks: the numbers of eager ones, one compilation per kind, no silent fallback."""

import copy
import logging
import os

import pytest
import torch
import torch._inductor.config
from conftest import inputs, rows, run_inside, small_ddt
from safetensors.torch import load_file
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition

import ddt
from ddt.distributed.compile import compile_block, compile_blocks, compiles, missing_compiler
from ddt.errors import UserError
from ddt.model.layers import Block, positions

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
GUIDED = dict(num_steps=5, last_step=None, cfg_interval=(0.0, 0.7))
PRODUCTS = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default}


class Counting:
    """A compiler that counts graphs and returns them unchanged."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, example):
        self.graphs += 1
        return graph.forward


def use(monkeypatch, backend):
    """Compile by another backend than torch's own, which takes ten times as long."""

    def compile_(block, fullgraph, dynamic, options):
        nn.Module.compile(block, backend=backend, fullgraph=fullgraph, dynamic=dynamic)

    monkeypatch.setattr(Block, "compile", compile_)


@pytest.fixture(autouse=True)
def compiled_here_alone():
    """Reset the compiler's caches and counters; start no compile workers."""
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    with torch._inductor.config.patch(compile_threads=1):
        yield


@pytest.fixture
def counting(monkeypatch):
    use(monkeypatch, counter := Counting())
    return counter


def loss_and_gradients(model):
    x, t, y = inputs()
    v, hidden = model.forward_with_hidden(x, t, y, 1)
    loss = v.square().mean() + hidden.square().mean()
    loss.backward()
    return {"loss": loss.detach()} | {name: parameter.grad for name, parameter in model.named_parameters()}


def test_all_blocks_of_a_kind_share_a_compilation(counting):
    plain, model = small_ddt(depth=5), small_ddt(depth=5)
    compile_blocks(model, dynamic=False)
    copied = copy.deepcopy(model)
    expected, found = loss_and_gradients(plain), loss_and_gradients(model)
    assert counting.graphs == 2  # encoder: a vector per image; decoder: one per token
    assert found.keys() == expected.keys()
    assert model.state_dict().keys() == plain.state_dict().keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-7, msg=lambda m, name=name: f"{name}: {m}")
    for parameter in model.parameters():
        parameter.data.zero_()
    x, t, y = inputs(batch=2)  # another size would be another graph
    torch.testing.assert_close(copied(x, t, y), plain(x, t, y))
    assert counting.graphs == 2


@pytest.mark.slow
def test_checkpointed_blocks_recompute_what_their_setting_says(monkeypatch):
    x, c = torch.randn(2, 3, 16, 32, generator=torch.Generator().manual_seed(0))
    products, gradients = {}, {}
    for checkpointing in (False, True, "selective"):
        found = []

        def counted(graph, _, found=found):
            found.append(sum(node.target in PRODUCTS for node in graph.graph.nodes))
            return make_boxed_func(graph.forward)

        backend = aot_autograd(fw_compiler=counted, partition_fn=min_cut_rematerialization_partition)
        use(monkeypatch, backend)
        torch.manual_seed(0)
        block = Block(32, 2, activation_checkpointing=checkpointing)
        compile_block(block, dynamic=False)
        block(x, c, positions(16, 4, 4, CPU)).square().mean().backward()
        _, products[checkpointing] = found  # of the forward and of the backward pass
        gradients[checkpointing] = [parameter.grad for parameter in block.parameters()]
    assert products["selective"] == products[False] < products[True]
    for checkpointing in (True, "selective"):
        torch.testing.assert_close(gradients[checkpointing], gradients[False])


@pytest.mark.slow
def test_sampling_with_a_guide_takes_more_graphs_than_torch_allows_by_default(counting):
    sizes = {"model": dict(depth=4), "guide": dict(hidden_size=16, depth=2, encoder_depth=1)}
    plain, compiled = ({name: small_ddt(**size) for name, size in sizes.items()} for _ in range(2))
    for network in compiled.values():
        compile_blocks(network, dynamic=True)
    shared = {"recompute": [0, 2, 3]}
    forecast = shared | {"forecast_order": 1}
    for batch, guided, options in (
        (6, False, {}), (6, False, shared), (6, False, forecast), (6, True, shared), (5, True, shared),
    ):  # fmt: skip
        before = counting.graphs
        x, _, y = inputs(batch)
        found, expected = (
            ddt.sample(nets["model"], x, y, guide=nets["guide"] if guided else None, **GUIDED, **options)
            for nets in (compiled, plain)
        )
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert counting.graphs == before  # one graph serves batches of any size
    assert counting.graphs > 8


def test_what_cannot_be_compiled_whole_is_an_error(counting):
    class Breaking(nn.Module):
        def forward(self, x, at):
            torch._dynamo.graph_break()
            return x

    block = Block(8, 2)
    block.mixer = Breaking()
    compile_block(block, dynamic=False)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        block(torch.zeros(1, 4, 8), torch.zeros(1, 1, 8), None)


@pytest.mark.slow
def test_torchs_own_compiler_gives_the_same_numbers_for_batches_of_any_size():
    block, at = Block(32, 2), positions(16, 4, 4, CPU)
    plain = copy.deepcopy(block)
    compile_block(block, dynamic=True)
    with torch.no_grad():
        for batch in (5, 3):
            x, c = torch.randn(2, batch, 16, 32, generator=torch.Generator().manual_seed(0))
            torch.testing.assert_close(block(x, c, at), plain(x, c, at), rtol=1e-4, atol=1e-6)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


TRAINED = [
    "model=dit_nano", "model.hidden_size=16", "model.num_heads=2", "model.depth=2", "sampler.num_steps=2",
    "alignment=dispersive", "alignment.align_depth=1", "model.activation_checkpointing=selective",
    "trainer.micro_batch_size=3", "trainer.global_batch_size=6", "trainer.clip_norm=1.0", "trainer.warmup_steps=0",
    "trainer.lr_schedule=constant", "trainer.log_every=2", "trainer.validate_every=0", "trainer.preview_every=0",
    "trainer.save_every=0",
]  # fmt: skip


@pytest.mark.slow
def test_a_compiled_run_is_the_eager_one_to_rounding_and_resumes_bit_for_bit(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def train(name, *options):
        done = run_inside("train", *TRAINED, f"name={name}", *options)
        assert done.returncode == 0, done.stderr
        newest = ddt.checkpoint.format.newest_checkpoint(tmp_path / "runs" / name)
        weights = {key: load_file(newest / f"{key}.safetensors") for key in ("model", "ema")}
        return rows(tmp_path / "runs" / name), weights, done.stderr

    eager, plain, said = train("eager", "trainer.max_steps=6")
    assert "compiling" not in said
    straight, weights, said = train("straight", "trainer.max_steps=6", "trainer.compile=true")
    assert "compiling 1 kind of block at first use" in said
    train("resumed", "trainer.max_steps=3", "trainer.compile=true")
    resumed, again, _ = train("resumed", "trainer.max_steps=6", "trainer.compile=true")
    assert resumed == straight
    for name in ("model", "ema"):
        assert weights[name].keys() == plain[name].keys()
        assert all(torch.equal(weights[name][key], again[name][key]) for key in plain[name])
    for a, b in zip(straight, eager, strict=True):
        assert a.keys() == b.keys()
        assert all(a[key] == pytest.approx(b[key], rel=1e-4, abs=1e-5) for key in a)
    _, _, said = train("resumed", "trainer.max_steps=7", "trainer.compile=false")
    assert "changed since the checkpoint: trainer.compile True -> False" in said


def test_a_missing_compiler_is_named(monkeypatch, caplog, tmp_path):
    caplog.set_level(logging.INFO)
    assert not compiles("compile", False, True, CPU)
    assert not compiles("compile", None, False, CPU)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not compiles("compile", None, True, CPU)
    assert caplog.messages == [
        "blocks are not compiled: torch's compiler needs a C++ compiler (g++), which is not found"
    ]
    with pytest.raises(
        UserError, match=r"^trainer\.compile=true: .*a C\+\+ compiler.*; install it, or give trainer\.compile=false$"
    ):
        compiles("trainer.compile", True, False, CPU)
    for name in ("g++", "gcc"):
        (tmp_path / name).touch(mode=0o755)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert missing_compiler(torch.device("cuda")) == "Triton"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    assert missing_compiler(torch.device("cuda")) == missing_compiler(CPU) == "Python's headers (Python.h)"
    (tmp_path / "Python.h").touch()
    assert missing_compiler(torch.device("cuda")) is None
    assert compiles("compile", None, True, CPU)
    monkeypatch.setenv("CC", "other")
    assert missing_compiler(torch.device("cuda")) == "a C compiler (other)"


def test_a_command_without_a_compiler_is_refused_in_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CXX", "no-such-compiler")
    done = run_inside("train", *TRAINED, "name=refused", "trainer.max_steps=1", "trainer.compile=true")
    assert done.returncode == 1
    assert done.stderr.strip().startswith(
        "trainer.compile=true: torch's compiler needs a C++ compiler (no-such-compiler)"
    )
    assert not os.path.exists("runs")
