"""Solvers, guidance and encoder sharing."""

import pytest
import torch
from conftest import inputs, small_ddt

import ddt
from ddt.errors import UserError
from ddt.flow import time_grid
from ddt.guidance import Guidance
from ddt.sampling import SamplerSettings
from ddt.sharing import GuidedVelocity
from ddt.solvers import euler

EULER_RUNS = ["euler_plain", "euler_cfg", "euler_cfg_mid", "euler_edge", "euler_shift", "euler_share3"]


def golden_settings(case):
    """Translate a golden run's settings; where the release names no interval, its own default is (0, 1)."""
    every = case.get("state_refresh_rate")
    return dict(
        num_steps=case["num_steps"],
        cfg_scale=case["guidance"],
        cfg_interval=(case.get("guidance_interval_min", 0.0), case.get("guidance_interval_max", 1.0)),
        last_step=case.get("last_step"),
        timeshift=case.get("timeshift", 1.0),
        recompute=ddt.uniform_schedule(case["num_steps"], every) if every else None,
    )


@pytest.mark.parametrize("name", EULER_RUNS)
def test_trajectories_are_those_of_the_release(name, tiny, golden, samplers):
    latents = ddt.sample(tiny, samplers["noise"], samplers["cond"], **golden_settings(golden["samplers"][name]))
    torch.testing.assert_close(latents, samplers[name], rtol=1e-4, atol=1e-5)


def test_all_euler_runs_of_the_release_are_covered(golden):
    assert [name for name in golden["samplers"] if name.startswith("euler")] == EULER_RUNS


def test_euler_is_exact_on_constant_fields():
    x = torch.randn(3, 2, dtype=torch.float64)
    field = torch.randn(3, 2, dtype=torch.float64)
    for grid in (time_grid(1), time_grid(7), time_grid(5, 0.04, 2.0)):
        torch.testing.assert_close(euler(lambda x_t, t, step: field, x, grid), x + field)


def test_euler_has_order_one():
    """dx/dt = −x + t, with a known solution; halving the step halves the error."""
    errors = []
    for num_steps in (64, 128):
        grid = [i / num_steps for i in range(num_steps + 1)]
        end = euler(lambda x, t, step: t - x, torch.ones(1, dtype=torch.float64), grid)
        errors.append(abs(end.item() - 2 * torch.exp(torch.tensor(-1.0, dtype=torch.float64)).item()))
    assert 1.9 < errors[0] / errors[1] < 2.1


def test_solver_calls_once_a_step_with_times_and_steps():
    seen = []
    euler(lambda x, t, step: seen.append((t, step)) or torch.zeros(1), torch.zeros(1), [0.0, 0.25, 0.75, 1.0])
    assert seen == [(0.0, 0), (0.25, 1), (0.75, 2)]


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
    velocity = GuidedVelocity(model, y, [(0.5,)], Guidance(3.0, None))
    t = torch.full((3,), 0.5)
    cond, uncond = model(x, t, y), model(x, t, torch.full_like(y, 5))
    torch.testing.assert_close(velocity(x, 0.5, 0), uncond + 3 * (cond - uncond))


def test_interval_is_strict_and_rounded_to_float32():
    guidance = Guidance(2.0, (0.3, 1.0))
    edge = time_grid(10)[3]  # 0.3 in float32, a little below 0.3 in float64
    assert edge == torch.tensor(0.3).item() or edge < 0.3
    assert not guidance.active(torch.tensor(0.3).item())
    assert guidance.active(0.31)
    assert not guidance.active(1.0)
    assert not Guidance(2.0, (0.0, 1.0)).active(0.0)
    assert Guidance(2.0, None).active(0.0)


def test_outside_the_interval_the_unconditional_half_does_not_run():
    x, _, y = inputs()
    counts = {}
    ddt.sample(small_ddt(), x, y, num_steps=10, cfg_interval=(0.3, 0.7), last_step=None, counts=counts)
    guided = sum(Guidance(2.0, (0.3, 0.7)).active(t) for t in time_grid(10)[:-1])
    assert 0 < guided < 10
    assert counts == {"encoder": 10 + guided, "decoder": 10 + guided, "cached_bytes": 0}


@pytest.mark.parametrize("interval", [None, (0.3, 1.0)])
def test_recomputing_at_every_step_is_no_sharing(interval):
    x, _, y = inputs()
    model = small_ddt()
    plain = ddt.sample(model, x, y, num_steps=6, cfg_interval=interval)
    shared = ddt.sample(model, x, y, num_steps=6, cfg_interval=interval, recompute=list(range(6)))
    torch.testing.assert_close(plain, shared)


def test_encoder_runs_at_the_steps_of_the_schedule_and_z_is_used_as_it_is():
    model = small_ddt()
    x, _, y = inputs()
    runs, decoded = [], []
    encode, decode = model.encode, model.decode
    model.encode = lambda x_t, t, y: runs.append((t[0].item(), len(y))) or encode(x_t, t, y)
    model.decode = lambda x_t, z_t, kept: decoded.append(z_t) or decode(x_t, z_t, kept)
    ddt.sample(model, x, y, num_steps=8, cfg_scale=2.0, cfg_interval=(0.5, 1.0), last_step=None, recompute=[0, 3, 6])
    grid = time_grid(8)
    assert [t for t, _ in runs] == [grid[0], grid[3], grid[6]]
    # steps 5, 6, 7 are guided: the segment 0..2 never is, 3..5 reaches into the interval, 6..7 lies in it
    assert [n for _, n in runs] == [3, 6, 6]
    assert [len(z) for z in decoded] == [3, 3, 3, 3, 3, 6, 6, 6]
    assert torch.equal(decoded[3], decoded[4])
    assert torch.equal(decoded[5][:3], decoded[4])


def test_uniform_schedule():
    assert ddt.uniform_schedule(7, 3) == [0, 3, 6]
    assert ddt.uniform_schedule(5, 1) == [0, 1, 2, 3, 4]
    assert SamplerSettings(num_steps=7, recompute="uniform:3").schedule() == [0, 3, 6]


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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"cfg_interval": (0.7, 0.3)}, r"cfg_interval=\[0.7,0.3\]"),
        ({"cfg_interval": (0.3, 1.2)}, r"cfg_interval=\[0.3,1.2\]"),
        ({"cfg_scale": -1.0}, "cfg_scale=-1"),
        ({"solver": "rk9"}, "sampler=rk9"),
        ({"recompute": [1, 2]}, "step 0 must be among them"),
        ({"recompute": [0, 9], "num_steps": 4}, "step 9 does not exist"),
        ({"recompute": "often"}, "recompute=often: write uniform:5"),
        ({"recompute": "uniform:0"}, "must be at least 1"),
        ({"num_steps": 0}, "num_steps=0"),
    ],
)
def test_impossible_samplers_are_named(arguments, message):
    with pytest.raises(UserError, match=message):
        SamplerSettings(**arguments)


def test_noise_and_classes_must_agree():
    x, _, y = inputs()
    with pytest.raises(UserError, match=r"noise has shape \(3, 1, 8, 8\): expected \(B, 2, H, W\)"):
        ddt.sample(small_ddt(), x[:, :1], y)
    with pytest.raises(UserError, match=r"dtype torch\.float32: expected"):
        ddt.sample(small_ddt(), x, y.float())
    with pytest.raises(UserError, match=r"classes must lie in 0\.\.4"):
        ddt.sample(small_ddt(), x, y + 9)
    with pytest.raises(UserError, match="the solver euler draws no noise"):
        ddt.sample(small_ddt(), x, y, step_noise=x[None])
    with pytest.raises(UserError, match="recompute=uniform:2: give the list"):
        ddt.sample(small_ddt(), x, y, recompute="uniform:2")
    with pytest.raises(UserError, match="noise has 3 rows and y has 2"):
        ddt.sample(small_ddt(), x, y[:2])
