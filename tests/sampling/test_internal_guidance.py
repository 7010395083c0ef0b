"""Internal guidance: away from the base head's velocity."""

import itertools

import numpy as np
import pytest
import torch
from conftest import SHARING, inputs, small_ddt, small_network

import ddt
from ddt.errors import UserError
from ddt.flow import time_grid, velocity_of
from ddt.generation.settings import SamplerOverrides
from ddt.sampling.settings import SamplerSettings

pytestmark = pytest.mark.usefixtures("one_thread")
GRID = dict(num_steps=6, last_step=None)


@pytest.mark.parametrize("cfg", [dict(cfg_scale=1.0), dict(cfg_scale=2.0, cfg_interval=(0.3, 1.0))], ids=str)
@pytest.mark.parametrize("interval", [None, (0.0, 0.5)])
@pytest.mark.parametrize("case", SHARING)
def test_each_half_is_guided_by_its_base_and_then_by_the_other(case, interval, cfg):
    model = small_network(case, base_depth=1)
    x, _, y = inputs()
    expected, null = x, torch.full_like(y, model.num_classes)

    def half(x_t, t, labels):
        with torch.no_grad():
            v, base, _ = model.forward_with_base(x_t, torch.full((len(x_t),), t), labels)
        inside = interval is None or interval[0] <= t <= np.float32(interval[1])  # both ends are guided
        return base + 1.7 * (v - base) if inside else v

    for t, t_next in itertools.pairwise(time_grid(6, None)):
        v = half(expected, t, y)
        if cfg["cfg_scale"] != 1 and t > 0.3:
            v_null = half(expected, t, null)
            v = v_null + 2 * (v - v_null)
        expected = expected + (t_next - t) * v
    guided = ddt.sample(model, x, y, internal_scale=1.7, internal_interval=interval, **GRID, **cfg)
    torch.testing.assert_close(guided, expected, rtol=1e-5, atol=1e-5)


def test_interval_and_cfg_scale_of_the_halves_matter():
    """What the loop by hand must tell apart."""
    model = small_ddt(base_depth=1)
    x, _, y = inputs()
    runs = [
        ddt.sample(model, x, y, **GRID, cfg_scale=scale, internal_scale=internal, internal_interval=interval)
        for scale, internal, interval in [(1, 1, None), (1, 1.7, None), (1, 1.7, (0.0, 0.5)), (2, 1.7, None)]
    ]
    assert all(float((a - b).abs().max()) > 1e-3 for a, b in itertools.combinations(runs, 2))


@pytest.mark.parametrize("solver", ["euler", "heun", "adams3", "sde", "adaptive"])
def test_scale_1_is_the_plain_path(solver):
    x, _, y = inputs()
    settings = dict(num_steps=4, solver=solver, last_step=None) | (dict(num_steps=100) if solver == "adaptive" else {})
    with_head, without = small_ddt(base_depth=1), small_ddt()
    without.load_state_dict({k: v for k, v in with_head.state_dict().items() if not k.startswith("base_head")})
    plain = ddt.sample(without, x, y, **settings)
    assert torch.equal(plain, ddt.sample(with_head, x, y, internal_scale=1.0, **settings))
    assert not torch.equal(plain, ddt.sample(with_head, x, y, internal_scale=1.5, **settings))


def test_a_time_for_each_image_is_guided_where_it_is_inside():
    """The adaptive solver's: the same image alone and in a batch."""
    model = small_ddt(base_depth=1)
    x, _, y = inputs()
    settings = dict(solver="adaptive", num_steps=200, last_step=None, internal_scale=1.5, internal_interval=(0.2, 0.7))
    together = ddt.sample(model, x, y, **settings)
    torch.testing.assert_close(ddt.sample(model, x[1:2], y[1:2], **settings), together[1:2], rtol=1e-3, atol=1e-4)
    settings["internal_interval"] = None
    assert float((ddt.sample(model, x, y, **settings) - together).abs().max()) > 1e-3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"internal_scale": -1.0}, r"internal_scale=-1\.0: must be"),
        ({"internal_scale": 2.0, "internal_interval": (0.6, 0.2)}, r"internal_interval=\[0\.6,0\.2\]: needs"),
        ({"internal_interval": (0.1, 0.5)}, "internal_interval=.* has no effect with internal_scale=1"),
    ],
)
def test_impossible_settings_are_named(changes, message):
    with pytest.raises(UserError, match=message):
        SamplerSettings(**changes)


def test_a_network_without_base_head_is_refused():
    x, _, y = inputs()
    with pytest.raises(UserError, match=r"internal_scale=1\.5: this model has no base head"):
        ddt.sample(small_ddt(), x, y, internal_scale=1.5)


def test_a_stored_sampler_with_chosen_scales():
    stored = {"internal_scale": 1.5, "internal_interval": [0.0, 0.9]}
    assert SamplerOverrides().resolve(stored, True, 2).internal_interval == (0.0, 0.9)
    assert SamplerOverrides(internal_scale=1.0).resolve(stored, True, 2) == SamplerSettings()
    with pytest.raises(UserError, match="no base head"):
        SamplerOverrides().resolve(stored, True)
    with pytest.raises(UserError, match=r"internal_interval=\[0\.995,1\.0\]: guides none of the 250 steps"):
        SamplerOverrides(internal_interval=(0.995, 1.0)).resolve(stored, True, 2)


def test_outputs_that_are_clean_latents_are_guided_as_velocities():
    model = small_ddt(base_depth=1, prediction="x")
    x, _, y = inputs()
    with torch.no_grad():
        v, base = (velocity_of(o, x, torch.zeros(3), "x") for o in model.forward_with_base(x, torch.zeros(3), y)[:2])
    guided = ddt.sample(model, x, y, num_steps=1, last_step=None, cfg_scale=1.0, internal_scale=1.7)
    torch.testing.assert_close(guided, x + base + 1.7 * (v - base), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("solver", ["euler", "heun"])
@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize("case", SHARING)
def test_sharing_at_every_step_is_none(case, order, solver):
    model, (x, _, y) = small_network(case, base_depth=1), inputs()
    settings = dict(num_steps=6, solver=solver, internal_scale=1.7, internal_interval=(0.2, 0.7), cfg_scale=2.0)
    plain = ddt.sample(model, x, y, **settings)
    shared = ddt.sample(model, x, y, recompute=range(6), forecast_order=order, **settings)
    torch.testing.assert_close(shared, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("prediction", ["v", "x"])
@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize("case", SHARING)
def test_the_base_stays_or_is_forecast_with_z(case, order, prediction):
    """By hand, with both halves; the interval begins inside a segment and ends in the next one."""
    model, (x, _, y) = small_network(case, base_depth=1, prediction=prediction), inputs()
    settings = dict(num_steps=8, last_step=None, cfg_scale=2.0, cfg_interval=None, recompute=[0, 3, 5])
    internal = dict(internal_scale=1.7, internal_interval=(0.5, 0.75))
    ours = ddt.sample(model, x, y, forecast_order=order, **settings, **internal)
    labels, past = torch.cat([y, torch.full_like(y, model.num_classes)]), []
    with torch.no_grad():
        for step, (t, t_next) in enumerate(itertools.pairwise(time_grid(8, None))):
            both, times = x.repeat(2, 1, 1, 1), torch.full((6,), t)
            if step in settings["recompute"]:
                _, base, _ = model.forward_with_base(both, times, labels)
                past = [*past, (t, model.condition(model.encode(both, times, labels)), base)][-order - 1 :]
            c, base = past[-1][1:]
            if len(past) == 2 and t != past[1][0]:
                (t0, c0, b0), (t1, c1, b1) = past
                share = (t - t1) / (t1 - t0)
                c, base = c1 + (c1 - c0) * share, b1 + (b1 - b0) * share
            z = torch.zeros(6, 16, 32)  # unused beside all modulations
            v = model.decode(both, z, [layer(c) for layer in model.modulation_layers])
            v = base + 1.7 * (v - base) if 0.5 <= t <= 0.75 else v
            v, v_null = velocity_of(v, both, times, prediction).chunk(2)
            x = x + (v_null + 2 * (v - v_null)) * (t_next - t)
    torch.testing.assert_close(ours, x, rtol=1e-4, atol=1e-4)


def test_the_base_head_runs_where_a_segment_reads_it():
    model, (x, _, y) = small_ddt(base_depth=1), inputs()
    runs = []
    model.base_head.register_forward_hook(lambda *_: runs.append(1))
    settings = dict(num_steps=8, last_step=None, cfg_scale=1.0, recompute=[0, 2, 4, 6])
    for order, expected in ((0, 1), (1, 2)):  # a forecast reads the base of the segment before
        runs.clear()
        ddt.sample(model, x, y, internal_scale=1.7, internal_interval=(0.5, 0.7), forecast_order=order, **settings)
        assert len(runs) == expected
