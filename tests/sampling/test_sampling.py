"""Sampling: the release's trajectories, guidance, the public function and its errors."""

import dataclasses
import inspect

import pytest
import torch
from conftest import inputs, small_ddt

import ddt
from ddt.errors import UserError
from ddt.flow import time_grid
from ddt.sampling.guidance import Guidance
from ddt.sampling.sample import sample_latents
from ddt.sampling.settings import SamplerSettings
from ddt.sampling.sharing import GuidedVelocity
from ddt.sampling.solvers import euler
from scripts.benchmark.golden import CLOSE, sampler_settings, trajectories

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", trajectories()[0])
def test_trajectories_are_those_of_the_release(name, tiny, golden, samplers):
    settings = sampler_settings(name, golden["samplers"][name], samplers)
    latents = ddt.sample(tiny, samplers["noise"], samplers["cond"], **settings)
    torch.testing.assert_close(latents, samplers[name], rtol=1e-4, atol=CLOSE.get(name, 1e-5))


def test_guidance_one_is_the_conditional_run_at_half_the_cost():
    model = small_ddt()
    x, _, y = inputs()
    counts = {}
    guided = ddt.sample(model, x, y, num_steps=4, cfg_scale=1.0, cfg_interval=None, counts=counts)
    grid = time_grid(4, 0.04)
    alone = euler(lambda x_t, t, step: model(x_t, torch.full((3,), t), y), x, grid)
    torch.testing.assert_close(guided, alone)
    assert counts == {"encoder": 4, "decoder": 4, "cached_bytes": 0}


def test_guidance_combines_the_two_halves():
    model = small_ddt()
    x, _, y = inputs()
    velocity = GuidedVelocity(model, y, SamplerSettings(cfg_scale=3.0, cfg_interval=None))
    t = torch.full((3,), 0.5)
    cond, uncond = model(x, t, y), model(x, t, torch.full_like(y, 5))
    torch.testing.assert_close(velocity(x, 0.5, 0), uncond + 3 * (cond - uncond))


def test_interval_is_strict_and_rounded_to_float32():
    guidance = Guidance(2.0, (0.3, 1.0))
    edge = time_grid(10)[3]
    assert edge == pytest.approx(0.3)
    assert edge != 0.3  # in float64 they are not equal, and above or below decides
    assert not guidance.active(edge)
    assert guidance.active(0.31)
    assert not guidance.active(1.0)
    assert not Guidance(2.0, (0.0, 1.0)).active(0.0)
    assert Guidance(2.0, None).active(0.0)
    times = torch.tensor([0.0, edge, 0.31, 1.0])
    assert guidance.mask(times).tolist() == [guidance.active(t) for t in times.tolist()]


def test_outside_the_interval_the_unconditional_half_does_not_run():
    x, _, y = inputs()
    counts = {}
    ddt.sample(small_ddt(), x, y, num_steps=10, cfg_interval=(0.3, 0.7), last_step=None, counts=counts)
    guided = sum(Guidance(2.0, (0.3, 0.7)).active(t) for t in time_grid(10)[:-1])
    assert 0 < guided < 10
    assert counts == {"encoder": 10 + guided, "decoder": 10 + guided, "cached_bytes": 0}


def test_sampling_is_deterministic_and_leaves_no_trace():
    model = small_ddt().train()
    x, t, y = inputs()
    model(x, t, y).sum().backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    state = torch.get_rng_state()
    first = ddt.sample(model, x, y, num_steps=3)
    assert torch.equal(first, ddt.sample(model, x, y, num_steps=3))
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert not first.requires_grad
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))


def test_an_image_does_not_depend_on_its_batch():
    model = small_ddt()
    x, _, y = inputs(batch=5)
    together = ddt.sample(model, x, y, num_steps=4)
    torch.testing.assert_close(
        torch.cat([ddt.sample(model, x[k : k + 1], y[k : k + 1], num_steps=4) for k in range(5)]), together
    )


def test_sample_takes_each_setting_by_its_name():
    parameters = inspect.signature(ddt.sample).parameters
    for field in dataclasses.fields(SamplerSettings):
        assert parameters[field.name].default == field.default, field.name
    model, (x, _, y) = small_ddt(), inputs()
    shared = SamplerSettings(
        solver="sde", num_steps=5, cfg_scale=1.5, cfg_interval=(0.1, 0.9), cfg_steps=[1, 2, 3], last_step=0.1,
        timeshift=1.5, recompute=[0, 2], sde_diffusion="constant", sde_last="euler",
    )  # fmt: skip
    for settings in (shared, SamplerSettings(num_steps=5, recompute=[0, 1, 3], forecast_order=1)):
        same = ddt.sample(model, x, y, **dataclasses.asdict(settings))
        assert torch.equal(sample_latents(model, x, y, settings), same)
    uniform = dataclasses.asdict(shared) | {"recompute": ddt.uniform_schedule(5, 2)}
    written = dataclasses.replace(shared, recompute="uniform:2")
    assert torch.equal(sample_latents(model, x, y, written), ddt.sample(model, x, y, **uniform))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"cfg_interval": (0.7, 0.3)}, r"cfg_interval=\[0.7,0.3\]"),
        ({"cfg_interval": (0.3, 1.2)}, r"cfg_interval=\[0.3,1.2\]"),
        ({"cfg_scale": -1.0}, "cfg_scale=-1"),
        ({"cfg_scale": float("inf")}, "cfg_scale=inf: must be a finite number"),
        ({"solver": "rk9"}, "solver=rk9: unknown solver, choose from euler, heun"),
        ({"recompute": [1, 2]}, "step 0 must be among them"),
        ({"recompute": [0, 9], "num_steps": 4}, "step 9 does not exist"),
        ({"recompute": "often"}, "recompute=often: write uniform:5"),
        ({"recompute": "uniform:0"}, "recompute=uniform:0: choose 1..num_steps="),
        ({"recompute": "uniform:100", "num_steps": 3}, "recompute=uniform:100: choose 1..num_steps=3"),
        ({"recompute": "dp:251"}, "recompute=dp:251: the encoder runs at 1..num_steps=250"),
        ({"cfg_steps": [3, 250]}, r"cfg_steps=\[250\]: steps are 0..249"),
        ({"sde_last": "euler"}, "sde_last=euler: has no effect with solver=euler; leave it out, or use sde or"),
        ({"sde_diffusion": "constant", "solver": "heun"}, "sde_diffusion=constant: has no effect with solver=heun"),
        ({"sde_diffusion": "much", "solver": "sde"}, "sde_diffusion=much: unknown schedule, choose from sigma"),
        ({"tolerance": 0.1}, "tolerance=0.1: has no effect with solver=euler; leave it out, or use adaptive"),
        ({"tolerance": 0.0, "solver": "adaptive"}, "tolerance=0.0: must be above 0"),
        ({"solver": "adaptive", "recompute": "uniform:5"}, "recompute=uniform:5: solver=adaptive chooses its own"),
        ({"solver": "adaptive", "cfg_steps": [0]}, r"cfg_steps=\[0\]: solver=adaptive chooses its own steps"),
        ({"solver": "sde", "recompute": [0], "forecast_order": 1}, "forecast_order=1: the noise of solver=sde makes"),
        ({"forecast_order": 1}, "forecast_order=1: has no effect without recompute="),
        ({"recompute": [0], "forecast_order": 3}, "forecast_order=3: choose from 0, 1, 2"),
        ({"num_steps": 0}, "num_steps=0"),
    ],
)
def test_impossible_samplers_are_named(arguments, message):
    with pytest.raises(UserError, match=message):
        SamplerSettings(**arguments)


@pytest.mark.parametrize(
    ("change", "settings", "message"),
    [
        ({"noise": (3, 1, 8, 8)}, {}, r"noise has shape \(3, 1, 8, 8\): expected \(B, 2, H, W\)"),
        ({"y": torch.zeros(3)}, {}, r"dtype torch\.float32: expected"),
        ({"y": torch.tensor([9, 1, 2])}, {}, r"classes must lie in 0\.\.4"),
        ({"y": torch.tensor([0, 1])}, {}, "noise has 3 rows and y has 2"),
        ({"step_noise": (1, 3, 2, 8, 8)}, {}, "the solver euler takes no noise"),
        (
            {"step_noise": (3, 2, 8, 8)},
            {"solver": "sde", "num_steps": 4},
            r"step_noise has shape \(3, 2, 8, 8\): expected \(3 or 4, 3, 2, 8, 8\)",
        ),
        ({}, {"recompute": "uniform:2"}, "recompute=uniform:2: give the list"),
        ({"guide": {}}, {"cfg_scale": 1.0}, "guide: has no effect with cfg_scale=1"),
        ({"guide": {"num_classes": 4}}, {}, "guide: has num_classes=4, the model 5"),
    ],
)
def test_inputs_that_do_not_agree_are_named(change, settings, message):
    x, _, y = inputs()
    arguments = {"noise": x, "y": y, **{k: torch.zeros(v) if isinstance(v, tuple) else v for k, v in change.items()}}
    if "guide" in change:
        arguments["guide"] = small_ddt(**change["guide"])
    with pytest.raises(UserError, match=message):
        ddt.sample(small_ddt(), **arguments, **settings)


def test_step_noise_belongs_to_the_image_not_to_the_batch():
    model = small_ddt()
    x, _, y = inputs(batch=5)
    state = torch.get_rng_state()
    settings = dict(solver="sde", num_steps=6, cfg_interval=None)
    together = ddt.sample(model, x, y, **settings)
    assert torch.equal(together, ddt.sample(model, x, y, **settings))
    alone = torch.cat([ddt.sample(model, x[k : k + 1], y[k : k + 1], **settings) for k in range(5)])
    torch.testing.assert_close(alone, together)
    assert torch.equal(torch.get_rng_state(), state)
    noiseless = ddt.sample(model, x, y, **settings, step_noise=torch.zeros(5, *x.shape))
    assert (together - noiseless).abs().mean() > 0.1


def test_adaptive_sampling_agrees_with_many_small_steps_and_knows_no_batch():
    model = small_ddt()
    x, _, y = inputs(batch=4)
    exact = ddt.sample(model, x, y, num_steps=400, cfg_scale=1.5, cfg_interval=None, last_step=None, solver="adams4")
    counts = {}
    settings = dict(solver="adaptive", cfg_scale=1.5, cfg_interval=None, tolerance=1e-5)
    ours = ddt.sample(model, x, y, counts=counts, **settings)
    torch.testing.assert_close(ours, exact, rtol=1e-3, atol=1e-3)
    assert 0 < counts["encoder"] == counts["decoder"] < 400
    alone = ddt.sample(model, x[1:2], y[1:2], **settings)
    torch.testing.assert_close(alone, ours[1:2], rtol=1e-4, atol=1e-5)


def test_adaptive_guides_each_image_by_its_own_time():
    """While one image is inside the interval and another outside, each gets its own velocity."""
    model = small_ddt()
    x, _, y = inputs()
    velocity = GuidedVelocity(model, y, SamplerSettings(cfg_scale=3.0, cfg_interval=(0.3, 0.7), solver="adaptive"))
    t = torch.tensor([0.2, 0.5, 0.9])
    cond, uncond = model(x, t, y), model(x, t, torch.full_like(y, 5))
    expected = cond.clone()
    expected[1] = uncond[1] + 3 * (cond[1] - uncond[1])
    torch.testing.assert_close(velocity(x, t, 0), expected)
    assert velocity.calls == {"encoder": 2, "decoder": 2}
    velocity(x, torch.full((3,), 0.1), 0)
    assert velocity.calls == {"encoder": 3, "decoder": 3}


def test_guidance_on_chosen_steps():
    x, _, y = inputs()
    model, counts = small_ddt(), {}
    settings = dict(num_steps=6, cfg_interval=None, last_step=None)
    some = ddt.sample(model, x, y, cfg_steps=[1, 4], counts=counts, **settings)
    assert counts["decoder"] == 6 + 2
    everywhere = ddt.sample(model, x, y, cfg_steps=range(6), **settings)
    torch.testing.assert_close(everywhere, ddt.sample(model, x, y, **settings))
    assert not torch.allclose(some, everywhere, atol=1e-3)


def test_autoguidance_leads_away_from_the_weaker_network():
    model, weaker = small_ddt(), small_ddt(depth=2, encoder_depth=1)
    x, _, y = inputs()
    counts = {}
    settings = dict(num_steps=5, cfg_scale=2.0, cfg_interval=(0.3, 1.0), last_step=None)
    ours = ddt.sample(model, x, y, guide=weaker, counts=counts, **settings)

    def velocity(x_t, t, step):
        times = torch.full((3,), t)
        v, v_weak = model(x_t, times, y), weaker(x_t, times, y)
        return v_weak + 2 * (v - v_weak) if 0.3 < t < 1 else v

    torch.testing.assert_close(ours, euler(velocity, x, time_grid(5)))
    assert counts == {"encoder": 5, "decoder": 5, "guide_encoder": 3, "guide_decoder": 3, "cached_bytes": 0}
    shared = {}
    ddt.sample(model, x, y, guide=weaker, recompute=[0, 2, 4], counts=shared, **settings)
    assert (shared["encoder"], shared["guide_encoder"], shared["guide_decoder"]) == (3, 2, 3)
    same = ddt.sample(model, x, y, guide=model, **settings)
    torch.testing.assert_close(same, ddt.sample(model, x, y, **settings | {"cfg_scale": 1.0}))


@pytest.mark.parametrize("solver", ["euler", "heun", "adams4", "sde", "adaptive"])
def test_an_observer_cannot_change_the_result(solver):
    model, (noise, _, y), kept = small_ddt(), inputs(), []

    def meddle(step, t, x_t, v):
        kept.append((x_t, v))
        for tensor in (x_t, v, *([t] if isinstance(t, torch.Tensor) else [])):
            tensor.fill_(0.5)

    settings = {"solver": solver, "num_steps": 4, "last_step": 0.25, "cfg_interval": None}
    if solver == "adaptive":
        settings |= {"num_steps": 200, "tolerance": 0.1}
    before = noise.clone()
    expected = ddt.sample(model, noise, y, **settings)
    assert torch.equal(ddt.sample(model, noise, y, **settings, observe=meddle), expected)
    assert torch.equal(noise, before)
    assert len(kept) >= 4
