"""Sharing the encoder: what runs when, cached modulations, and forecasts of z_t."""

import itertools

import numpy as np
import pytest
import torch
from conftest import SHARING, inputs, small_ddt, small_network, thinned

import ddt
from ddt.errors import UserError
from ddt.flow import time_grid
from ddt.sampling.sharing import extrapolation_weights
from ddt.sampling.solvers import SOLVERS, call_times

pytestmark = pytest.mark.usefixtures("one_thread")
SHARED = dict(num_steps=8, cfg_scale=2.0, cfg_interval=(0.5, 1.0), last_step=None, recompute=[0, 3, 6])


@pytest.mark.parametrize("interval", [None, (0.3, 1.0)])
@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("case", SHARING)
def test_recomputing_at_every_step_is_no_sharing(case, interval, order):
    x, _, y = inputs()
    model = small_network(case)
    plain = ddt.sample(model, x, y, num_steps=6, cfg_interval=interval)
    every = dict(recompute=list(range(6)), forecast_order=order)
    torch.testing.assert_close(plain, ddt.sample(model, x, y, num_steps=6, cfg_interval=interval, **every))


def watch(model):
    """Record (time, rows) of every run of the encoder, and (z_t, modulations) of the decoder's."""
    encoded, decoded = [], []
    encode, decode = model.encode, model.decode
    model.encode = lambda x_t, t, y: encoded.append((t[0].item(), len(y))) or encode(x_t, t, y)
    model.decode = lambda x_t, z_t, cached: decoded.append((z_t, len(cached))) or decode(x_t, z_t, cached)
    return encoded, decoded


def test_encoder_runs_at_the_steps_of_the_schedule_and_z_t_is_reused_unchanged():
    model = small_ddt()
    x, _, y = inputs()
    encoded, decoded = watch(model)
    ddt.sample(model, x, y, **SHARED)
    grid = time_grid(8)
    # steps 5, 6, 7 are guided: the segment 0..2 never is, 3..5 reaches into the interval, 6..7 lies
    # in it
    assert encoded == [(grid[0], 3), (grid[3], 6), (grid[6], 6)]
    assert [len(z) for z, _ in decoded] == [3, 3, 3, 3, 3, 6, 6, 6]
    assert torch.equal(decoded[3][0], decoded[4][0])
    assert torch.equal(decoded[5][0][:3], decoded[4][0])


@pytest.mark.parametrize("solver", ["euler", "heun", "midpoint", "adams3", "sde"])
def test_every_call_of_a_recompute_step_runs_the_encoder_and_no_other_call(solver):
    model = small_ddt()
    x, _, y = inputs()
    encoded, decoded = watch(model)
    ddt.sample(model, x, y, solver=solver, **SHARED)
    times = call_times(SOLVERS[solver], time_grid(8))
    expected = [t for step in SHARED["recompute"] for t in times[step]]
    assert [t for t, _ in encoded] == [torch.tensor(t).item() for t in expected]
    assert len(decoded) == sum(map(len, times))
    if solver == "heun":  # a segment is guided where any of its calls is, the one at the end of step 5 at t = 0.75 too
        assert [n for _, n in encoded] == [3, 3, 6, 6, 6, 6]


@pytest.mark.parametrize("solver", ["euler", "heun", "adams2", "sde_preserve"])
@pytest.mark.parametrize(
    ("case", "changes"),
    [*(("ddt", {"decoder_block": mixer}) for mixer in ("attention", "conv", "mlp")), ("wide ddt", {}), ("ditdh", {})],
    ids=str,
)
def test_kept_modulations_change_nothing(solver, case, changes):
    model = small_network(case, depth=4, **changes)
    x, _, y = inputs()
    counts, none = {}, {}
    kept = ddt.sample(model, x, y, solver=solver, counts=counts, **SHARED)
    plain = ddt.sample(model, x, y, solver=solver, counts=none, cache_bytes=0, **SHARED)
    torch.testing.assert_close(kept, plain, rtol=1e-5, atol=1e-5)
    rows, tokens, width = 6, 16, 32 if case == "ddt" else 48
    assert counts.pop("cached_bytes") == rows * tokens * (2 * 6 * width + 2 * width) * 4
    assert none.pop("cached_bytes") == 0
    assert counts == none


def test_the_decoder_computes_its_modulations_once_a_segment():
    model = small_ddt()
    x, _, y = inputs()
    runs = []
    for layer in (*model.decoder.blocks, model.decoder.output):
        layer.adaln.register_forward_hook(lambda *_: runs.append(1))
    ddt.sample(model, x, y, **SHARED)
    assert len(runs) == 3 * 2
    runs.clear()
    ddt.sample(model, x, y, cache_bytes=0, **SHARED)
    assert len(runs) == 8 * 2


def test_memory_for_modulations_is_bounded():
    """The rest is computed at each call; nothing is cached for a z_t that one call reads."""
    model = small_ddt(depth=5)
    x, _, y = inputs()
    one_layer = 6 * 16 * 6 * 32 * 4
    full = ddt.sample(model, x, y, **SHARED)
    for limit, expected in ((one_layer, 1), (2.5 * one_layer, 2), (one_layer - 1, 0.5)):
        counts = {}
        torch.testing.assert_close(ddt.sample(model, x, y, cache_bytes=limit, counts=counts, **SHARED), full)
        assert counts["cached_bytes"] <= limit
        assert counts["cached_bytes"] == expected * one_layer  # half: a segment of one half keeps one layer of it
    counts = {}
    ddt.sample(model, x, y, num_steps=4, recompute=[0, 1, 2, 3], counts=counts)
    assert counts["cached_bytes"] == 0


def test_bf16_modulations_are_cached_in_bf16():
    model = small_ddt()
    x, _, y = inputs()
    counts, none = {}, {}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        kept = ddt.sample(model, x, y, counts=counts, **SHARED)
        plain = ddt.sample(model, x, y, counts=none, cache_bytes=0, **SHARED)
    assert torch.equal(kept, plain)
    assert counts["cached_bytes"] == 6 * 16 * (6 * 32 + 2 * 32) * 2


def test_extrapolation_weights_are_exact_for_polynomials():
    times = [0.1, 0.25, 0.3]
    for count, degree in itertools.product((1, 2, 3), range(3)):
        if degree < count:
            weights = extrapolation_weights(times[-count:], 0.5)
            assert (weights * np.array(times[-count:]) ** degree).sum() == pytest.approx(0.5**degree)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("cache_bytes", [0, 200_000, 2**30])
def test_forecasts_decode_the_polynomial_through_the_last_z(order, cache_bytes):
    """Against plain sampling, both halves at every step."""
    model = small_ddt(depth=4)
    x, _, y = inputs()
    settings = dict(num_steps=9, cfg_scale=2.0, cfg_interval=None, last_step=None, recompute=[0, 2, 4, 7])
    ours = ddt.sample(model, x, y, forecast_order=order, cache_bytes=cache_bytes, **settings)
    grid, past = time_grid(9), []
    labels = torch.cat([y, torch.full_like(y, 5)])
    with torch.no_grad():
        for step, (t, t_next) in enumerate(itertools.pairwise(grid)):
            both = x.repeat(2, 1, 1, 1)
            if step in settings["recompute"]:
                past = [*past, (t, model.encode(both, torch.full((6,), t), labels))][-order - 1 :]
            if len(past) == 1 or step in settings["recompute"]:
                z = past[-1][1]
            elif len(past) == 2:
                (t0, z0), (t1, z1) = past
                z = z1 + (z1 - z0) * (t - t1) / (t1 - t0)
            else:
                (t0, z0), (t1, z1), (t2, z2) = past
                slope = (z1 - z0) / (t1 - t0)
                bend = ((z2 - z1) / (t2 - t1) - slope) / (t2 - t0)
                z = z0 + slope * (t - t0) + bend * (t - t0) * (t - t1)
            v, v_uncond = model.decode(both, z).chunk(2)
            x = x + (v_uncond + 2 * (v - v_uncond)) * (t_next - t)
    torch.testing.assert_close(ours, x, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("solver", thinned(["euler", "heun", "midpoint", "adams3"], 3))
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("case", ["ddt", "ditdh"])
def test_forecasts_come_closer_to_the_run_at_full_cost(case, solver, order):
    """Recompute steps in a row, too, where Heun calls one time twice."""
    model, (x, _, y) = small_network(case), inputs()
    if case == "ditdh":
        model.encoder.t_embedder.W.mul_(0.05)  # else z turns by radians from step to step
    settings = dict(solver=solver, num_steps=12, cfg_scale=2.0, cfg_interval=(0.3, 1.0), last_step=None)
    full = ddt.sample(model, x, y, **settings)
    shared = ddt.sample(model, x, y, recompute=[0, 1, 2, 5, 6, 8, 10], forecast_order=order, **settings)
    held = ddt.sample(model, x, y, recompute=[0, 1, 2, 5, 6, 8, 10], **settings)
    assert (shared - full).abs().mean() < 0.7 * (held - full).abs().mean()


@pytest.mark.parametrize("case", ["wide ddt", "ditdh"])
def test_forecasts_of_a_wider_decoder_are_of_what_its_layers_read(case):
    """Of the condition, a function of z: with one SiLU more in a DiT^DH."""
    model, (x, _, y) = small_network(case), inputs()
    settings = dict(num_steps=3, cfg_scale=1.0, last_step=None, recompute=[0, 1])
    grid = time_grid(3)
    with torch.no_grad():
        first = model.encode(x, torch.zeros(3), y)
        x_1 = x + model.decode(x, first) * (grid[1] - grid[0])
        second = model.encode(x_1, torch.full((3,), grid[1]), y)
        x_2 = x_1 + model.decode(x_1, second) * (grid[2] - grid[1])
        c = 2 * model.condition(second) - model.condition(first)  # on the line through both
        v = model.decode(x_2, second, [layer(c) for layer in model.modulation_layers])
    ours = ddt.sample(model, x, y, forecast_order=1, **settings)
    torch.testing.assert_close(ours, x_2 + v * (grid[3] - grid[2]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("case", SHARING)
def test_forecasts_are_the_same_however_much_is_cached(case, order):
    """Bit for bit under bf16: how much is cached depends on the batch, the image must not."""
    model, (x, _, y) = small_network(case, depth=4), inputs()
    settings = SHARED | {"cfg_interval": None, "forecast_order": order}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        images = [ddt.sample(model, x, y, cache_bytes=size, **settings) for size in (0, 100_000, 2**30)]
    assert torch.equal(images[0], images[1])
    assert torch.equal(images[0], images[2])


def test_before_a_guided_segment_both_halves_run_for_its_forecast():
    model = small_ddt()
    x, _, y = inputs()
    encoded, _ = watch(model)
    settings = SHARED | {"num_steps": 12, "recompute": [0, 3, 6, 9], "cfg_interval": (0.6, 1.0)}
    ddt.sample(model, x, y, **settings)
    assert [n for _, n in encoded] == [3, 3, 6, 6]
    encoded.clear()
    ddt.sample(model, x, y, forecast_order=1, **settings)
    assert [n for _, n in encoded] == [3, 6, 6, 6]


def test_a_network_without_an_encoder_is_refused_but_as_a_guide_runs_whole():
    sizes = dict(in_channels=2, patch_size=2, hidden_size=32, num_heads=2, depth=3, num_classes=5)
    x, _, y = inputs()
    with pytest.raises(UserError, match="DiT has no encoder to share"):
        ddt.sample(ddt.DiT(**sizes), x, y, recompute=[0])
    counts = {}
    ddt.sample(small_ddt(), x, y, guide=ddt.DiT(**sizes), counts=counts, **SHARED)
    assert (counts["encoder"], counts["decoder"]) == (3, 8)
    assert (counts["guide_encoder"], counts["guide_decoder"]) == (3, 3)
