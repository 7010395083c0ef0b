"""The bookkeeping of CUDA graphs, with a stand-in for the capture, which needs a GPU."""

import dataclasses
from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree

import ddt
from ddt.sampling import graphs
from ddt.sampling.sample import sample_latents
from ddt.sampling.settings import SamplerSettings

SIZES = {"in_channels": 2, "patch_size": 1, "hidden_size": 16, "num_heads": 2, "num_classes": 5}


def network(seed: int, **changes: Any) -> ddt.DDT:
    torch.manual_seed(seed)
    model = ddt.DDT(**SIZES, **{"depth": 3, "encoder_depth": 2} | changes).requires_grad_(False).eval()
    for parameter in model.parameters():
        parameter.normal_(std=0.3)
    return model


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let every call have a graph: as on a GPU, a replay reads the inputs and fills the outputs
    where they lie. Returns a list with an entry for each replay.
    """
    made: list[int] = []

    def capture(call: Any, pool: Any) -> Any:
        outputs = pytree.tree_map(torch.clone, call())

        def replay() -> None:
            made.append(1)
            for held, value in zip(pytree.tree_leaves(outputs), pytree.tree_leaves(call()), strict=True):
                held.copy_(value)

        return replay, pytree.tree_map(lambda held: held.zero_(), outputs)

    monkeypatch.setattr(graphs, "capture", capture)
    monkeypatch.setattr(graphs, "suitable", lambda first: True)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    return made


@pytest.mark.parametrize(
    "changes",
    [
        {},
        pytest.param({"recompute": [0, 2, 4]}, marks=pytest.mark.slow),
        {"recompute": [0, 3, 5], "forecast_order": 1},
        pytest.param({"recompute": [0, 2, 4], "solver": "heun"}, marks=pytest.mark.slow),
        pytest.param({"recompute": [0, 4], "cfg_interval": (0.0, 0.5)}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_calls_by_graphs_change_no_bit(replays: list[int], changes: dict[str, Any]) -> None:
    model, settings = network(0), SamplerSettings(**{"num_steps": 8, "cfg_interval": None} | changes)
    call = graphs.Graphs()
    for seed, rows in ((1, 3), (2, 3), (3, 2), (4, 3)):
        torch.manual_seed(seed)
        noise, y = torch.randn(rows, 2, 4, 4), torch.randint(5, (rows,))
        expected = sample_latents(model, noise, y, settings)
        assert torch.equal(sample_latents(model, noise, y, settings, call=call), expected)
    assert len(replays) > 20


def test_calls_of_a_guide_and_of_a_base_head_are_told_apart(replays: list[int]) -> None:
    model, guide = network(0, base_depth=1), network(1)
    torch.manual_seed(1)
    noise, y, call = torch.randn(3, 2, 4, 4), torch.randint(5, (3,)), graphs.Graphs()
    settings = SamplerSettings(num_steps=6, cfg_interval=None, internal_scale=1.5, internal_interval=(0.2, 0.6))
    expected = sample_latents(model, noise, y, settings, guide=guide)
    assert torch.equal(sample_latents(model, noise, y, settings, guide=guide, call=call), expected)
    assert replays
    shared = dataclasses.replace(settings, recompute=[0, 2, 4])
    expected = sample_latents(model, noise, y, shared, guide=guide)
    for _ in range(2):
        assert torch.equal(sample_latents(model, noise, y, shared, guide=guide, call=call), expected)


def test_a_graph_reads_weights_where_they_lie_and_inputs_anew(replays: list[int]) -> None:
    model, call = network(0), graphs.Graphs()
    x, t, y = torch.randn(2, 2, 4, 4), torch.rand(2), torch.tensor([1, 2])
    with torch.no_grad():
        for change in range(4):
            x += change  # in place: the same memory holds other values
            model.encoder.blocks[0].adaln.weight.mul_(1.1)
            assert torch.equal(call(model, x, t, y), model(x, t, y))
    assert len(replays) == 3, "the first call runs as it is"


def test_on_a_cpu_or_with_gradients_nothing_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "capture", lambda call, pool: pytest.fail("captured"))
    model, call = network(0), graphs.Graphs()
    arguments = torch.randn(2, 2, 4, 4), torch.rand(2), torch.tensor([1, 2])
    for _ in range(3):
        assert torch.equal(call(model, *arguments), model(*arguments))
