"""Networks that predict the clean latent: sampled by the velocity that leads there."""

import itertools
import math

import pytest
import torch
from conftest import inputs, small_network

import ddt
from ddt.flow import time_grid
from ddt.sampling.guidance import Guidance
from ddt.sampling.solvers import SOLVERS

pytestmark = pytest.mark.usefixtures("one_thread")


def by_hand(output, x_t, t):
    """The velocity of a predicted latent."""
    return (output - x_t) / max(1 - t, 0.05)


class Answer(torch.nn.Module):
    """Stands in for a network: its output is a function of x_t, t and y."""

    in_channels, num_classes, shares_encoder, base_depth = 2, 5, False, None

    def __init__(self, function, prediction):
        super().__init__()
        self.function, self.prediction = function, prediction

    def forward(self, x_t, t, y):
        return self.function(x_t, t, y)


@pytest.mark.parametrize("grid", [{"num_steps": 7}, {"num_steps": 30, "last_step": None, "timeshift": 0.25}], ids=str)
def test_the_exact_latent_is_approached_as_the_floor_allows(grid):
    noise, _, y = inputs()
    x = torch.randn(noise.shape, generator=torch.Generator().manual_seed(3))
    found = ddt.sample(Answer(lambda *_: x, "x"), noise, y, cfg_scale=1.0, **grid)
    times = time_grid(grid["num_steps"], grid.get("last_step", 0.04), grid.get("timeshift", 1.0))
    left = math.prod(1 - (b - a) / max(1 - a, 0.05) for a, b in itertools.pairwise(times))
    assert left > 1e-4  # with no floor, nothing of the noise would be left
    torch.testing.assert_close(found, x + left * (noise - x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("solver", SOLVERS)
def test_each_solver_takes_the_velocity_of_the_latent(solver):
    if SOLVERS[solver].adaptive:
        pytest.importorskip("torchode")
    model, (noise, _, y) = small_network("ddt", prediction="x"), inputs()

    def velocity(x_t, t, labels):
        return (model(x_t, t, labels) - x_t) / (1 - t).clamp(min=0.05)[:, None, None, None]

    settings = dict(solver=solver, num_steps=80 if SOLVERS[solver].adaptive else 5, cfg_interval=(0.1, 0.9))
    found = ddt.sample(model, noise, y, **settings)
    torch.testing.assert_close(found, ddt.sample(Answer(velocity, "v"), noise, y, **settings), rtol=1e-5, atol=1e-5)
    model.prediction = "v"
    assert not torch.allclose(found, ddt.sample(model, noise, y, **settings), atol=1e-2)


@pytest.mark.parametrize("case", ["ddt", "ditdh"])
@pytest.mark.parametrize("forecast_order", [0, 1])
def test_a_shared_z_is_decoded_to_a_latent_at_the_present_time(case, forecast_order):
    model, (x_t, _, y) = small_network(case, prediction="x"), inputs()
    labels, grid = torch.cat([y, torch.full_like(y, 5)]), time_grid(5, 0.04)
    shared = dict(recompute=[0, 1, 3], forecast_order=forecast_order, num_steps=5, cfg_scale=3.0, cfg_interval=(0.3, 1))
    found = ddt.sample(model, x_t, y, **shared)
    layers, kept = model.modulation_layers, []
    with torch.no_grad():
        for step, (t, t_next) in enumerate(itertools.pairwise(grid)):
            both = x_t.repeat(2, 1, 1, 1)
            if step in shared["recompute"]:
                kept = [*kept, (t, model.encode(both, torch.full((6,), t), labels))][-1 - forecast_order :]
            (before, z), (last, z_last) = kept[0], kept[-1]
            weight = 1.0 if len(kept) == 1 else (t - before) / (last - before)
            mixed = [
                weight * layer(model.condition(z_last)) + (1 - weight) * layer(model.condition(z)) for layer in layers
            ]
            v, v_null = by_hand(model.decode(both, z_last, mixed), both, t).chunk(2)
            x_t = x_t + (t_next - t) * (v_null + 3 * (v - v_null) if Guidance(3.0, (0.3, 1)).active(t) else v)
    torch.testing.assert_close(found, x_t, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("recompute", [None, [0, 2]])
def test_a_guide_may_predict_the_other(recompute):
    model, guide = small_network("ddt", prediction="x"), small_network("wide ddt")
    noise, _, y = inputs()
    settings = dict(num_steps=4, cfg_scale=1.7, cfg_interval=None, recompute=recompute)
    for ours, theirs in ((model, guide), (guide, model)):
        calls = []
        ddt.sample(ours, noise, y, guide=theirs, observe=lambda *call, calls=calls: calls.append(call), **settings)
        encoded = {}
        for step, t, x_t, v in calls:
            each = []
            for network in (ours, theirs):
                if recompute is None or step in recompute:
                    encoded[network] = network.encode(x_t, torch.full((3,), t), y)
                output = network.decode(x_t, encoded[network])
                each.append(by_hand(output, x_t, t) if network.prediction == "x" else output)
            torch.testing.assert_close(v, each[1] + 1.7 * (each[0] - each[1]), rtol=1e-4, atol=1e-4)
