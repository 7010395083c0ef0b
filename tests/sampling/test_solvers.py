"""Solvers: orders on fields with known solutions, calls, the arithmetic of the stochastic ones."""

import itertools
import math

import numpy as np
import pytest
import torch
from conftest import inputs, small_ddt

from ddt.errors import UserError
from ddt.flow import time_grid
from ddt.model.cost import network_macs
from ddt.sampling.cost import sampling_macs
from ddt.sampling.sample import sample_latents
from ddt.sampling.settings import SamplerSettings
from ddt.sampling.solvers import DIFFUSIONS, SOLVERS, Solver, adams_weights, adaptive, call_times, sde

pytestmark = pytest.mark.usefixtures("one_thread")
ORDERS = {"euler": 1, "heun": 2, "midpoint": 2, "adams2": 2, "adams3": 3, "adams4": 4}


def solution(t):
    """1 + exp(1 − 1/t), flat at t = 0, where the first steps of an Adams solver have low order."""
    return 1 + math.exp(1 - 1 / t) if t else 1.0


def end_error(solver, num_steps, timeshift):
    """Error at t = 1 of dx/dt = x*'(t) − (x − x*(t)), solved by x* = `solution` from x(0) = 1."""
    t = torch.linspace(0, 1, num_steps + 1, dtype=torch.float64)
    grid = (t / (t + (1 - t) * timeshift)).tolist()

    def velocity(x, t, step):
        return ((solution(t) - 1) / t**2 if t else 0.0) - (x - solution(t))

    end = SOLVERS[solver].integrate(velocity, torch.ones(1, dtype=torch.float64), grid)
    return abs(end.item() - solution(1.0))


@pytest.mark.parametrize("timeshift", [1.0, 2.0])
@pytest.mark.parametrize("solver", ORDERS)
def test_halving_the_step_shows_the_order(solver, timeshift):
    measured = math.log2(end_error(solver, 128, timeshift) / end_error(solver, 256, timeshift))
    assert abs(measured - ORDERS[solver]) < 0.2


@pytest.mark.parametrize("solver", [*ORDERS, "adaptive"])
def test_sampling_ends_where_the_grid_does(solver, monkeypatch):
    """And calls the network nowhere beyond."""
    model, (x, _, y) = small_ddt(), inputs()
    seen = []

    def constant(x_t, t, y):
        seen.append(t.max().item())
        return torch.ones_like(x_t)

    monkeypatch.setattr(model, "forward", constant)
    settings = SamplerSettings(solver, 6, cfg_scale=1.0, last_step=None, timeshift=2.0, t_end=0.9)
    latents = sample_latents(model, x, y, settings)
    end = 0.9 / (0.9 + 0.1 * 2)
    torch.testing.assert_close(latents, x + end, rtol=1e-5, atol=1e-5)
    assert settings.grid()[-1] == pytest.approx(end, rel=1e-6)
    assert max(seen) <= end + 1e-6


@pytest.mark.parametrize("solver", ORDERS)
def test_constant_fields_are_solved_exactly(solver):
    x = torch.randn(3, 2, dtype=torch.float64)
    field = torch.randn(3, 2, dtype=torch.float64)
    for grid in (time_grid(1), time_grid(7), time_grid(5, 0.04, 2.0)):
        torch.testing.assert_close(SOLVERS[solver].integrate(lambda x_t, t, step: field, x, grid), x + field)


@pytest.mark.parametrize("solver", [*ORDERS, "sde"])
def test_call_times_are_the_times_of_the_calls(solver):
    grid, seen = [0.0, 0.25, 0.75, 1.0], []

    def velocity(x, t, step):
        seen.append((step, t))
        return torch.zeros(1)

    options = {"noise": lambda step: torch.zeros(1)} if solver == "sde" else {}
    SOLVERS[solver].integrate(velocity, torch.zeros(1), grid, **options)
    expected = [(step, t) for step, times in enumerate(call_times(SOLVERS[solver], grid)) for t in times]
    assert seen == expected
    assert len(seen) == {"heun": 5, "midpoint": 6}.get(solver, 3)


def test_adams_weights_integrate_polynomials_exactly():
    times, t_next = [0.1, 0.25, 0.3, 0.55], 0.8
    for degree in range(4):
        weights = adams_weights(times, t_next)
        integral = (t_next ** (degree + 1) - times[-1] ** (degree + 1)) / (degree + 1)
        assert (weights * np.array(times) ** degree).sum() * (t_next - times[-1]) == pytest.approx(integral, rel=1e-12)
    assert adams_weights([0.0, 0.1], 0.2) == pytest.approx([-0.5, 1.5])


def test_adams_coefficients_are_those_of_the_release_up_to_its_rounding(golden):
    """The release computes them in float32, where differences of cubes and fourth powers cancel."""
    for name, tolerance in (("adam2", 2e-7), ("adam3", 3e-4), ("adam4", 6e-4)):
        case = golden["samplers"][name]
        grid = case["timesteps"]
        for step, expected in enumerate(case["solver_coeffs"]):
            ours = adams_weights(grid[step + 1 - len(expected) : step + 1], grid[step + 1])
            assert np.abs(ours - expected).max() < tolerance


def walk(velocity, x, grid, noise, **options):
    return sde(velocity, x, grid, noise=lambda step: noise[step], **options)


def test_a_stochastic_step_is_the_formula():
    x, v, n = (torch.randn(4, dtype=torch.float64) for _ in range(3))
    t, dt, w = 0.5, 0.25, 0.5
    score = (t * v - x) / (1 - t)
    grid = [t, t + dt, 1.0]
    calls = iter([v, torch.zeros_like(v)])
    end = walk(lambda *_: next(calls), x, grid, [n], last="euler")
    torch.testing.assert_close(end, x + v * dt + score * w * dt + (2 * w * dt) ** 0.5 * n)
    calls = iter([v, torch.zeros_like(v)])
    end = walk(lambda *_: next(calls), x, grid, [n], last="euler", strength=0.5)
    torch.testing.assert_close(end, x + v * dt + 0.5 * score * w * dt + (w * dt) ** 0.5 * n)


def test_the_last_stochastic_step_adds_no_noise():
    x, v = torch.randn(4), torch.randn(4)
    score = 0.75 * v - x  # at t = 0.75: (t·v − x)/(1 − t), and w = 1 − t takes the denominator away
    torch.testing.assert_close(walk(lambda *_: v, x, [0.75, 1.0], []), x + v * 0.25 + score * 0.25)
    torch.testing.assert_close(walk(lambda *_: v, x, [0.75, 1.0], [], last="euler"), x + v * 0.25)


@pytest.mark.parametrize("diffusion", DIFFUSIONS)
def test_every_diffusion_keeps_the_distribution(diffusion):
    """Data N(0, ½²): velocity and score are linear in x, and the deviation at t = 1 is ½."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20_000, generator=generator, dtype=torch.float64)

    def velocity(x_t, t, step):
        variance = (t * 0.5) ** 2 + (1 - t) ** 2
        return x_t * (t * 0.25 - (1 - t)) / variance

    noise = torch.randn(200, 20_000, generator=generator, dtype=torch.float64)
    end = walk(velocity, x, time_grid(200), noise, diffusion=diffusion)
    assert end.std().item() == pytest.approx(0.5, rel=0.03)


def test_adaptive_meets_its_tolerance_image_by_image():
    """dx/dt = −r·x with rates that need different step sizes."""
    rates = torch.tensor([0.1, 1.0, 30.0], dtype=torch.float64)[:, None]
    x = torch.ones(3, 2, dtype=torch.float64)

    def velocity(x_t, t, step):
        return -rates[: len(x_t)] * x_t

    for tolerance in (1e-3, 1e-6):
        end = adaptive(velocity, x, [0.0, 1.0], tolerance=tolerance)
        assert (end - torch.exp(-rates)).abs().max() < 10 * tolerance
    alone = adaptive(velocity, x[:1], [0.0, 1.0], tolerance=1e-3)
    torch.testing.assert_close(alone, adaptive(velocity, x, [0.0, 1.0], tolerance=1e-3)[:1], rtol=1e-12, atol=0)


def test_adaptive_names_its_bound_on_steps():
    with pytest.raises(UserError, match="t = 1 was not reached in num_steps=2 steps; raise num_steps or tolerance"):
        adaptive(lambda x, t, step: -300 * x, torch.ones(1, 2), [0.0, 1.0], max_steps=2)


def test_a_solver_is_one_function_and_one_entry(monkeypatch):
    """Settings, sampling and cost know it by its entry."""

    def third_way(velocity_fn, x, grid, tolerance):
        assert tolerance == 0.5
        for step, (t, t_next) in enumerate(itertools.pairwise(grid)):
            x = x + velocity_fn(x, (t + t_next) / 2, step) * (t_next - t)
        return x

    own = Solver(third_way, calls=lambda t, t_next, is_last: ((t + t_next) / 2,), options={"tolerance": "tolerance"})
    monkeypatch.setitem(SOLVERS, "third_way", own)
    settings = SamplerSettings(solver="third_way", num_steps=4, cfg_interval=None, last_step=None, tolerance=0.5)
    assert settings.call_times() == [(0.125,), (0.375,), (0.625,), (0.875,)]
    model, counts, seen = small_ddt(), {}, []
    x, _, y = inputs()
    sample_latents(model, x, y, settings, counts=counts, observe=lambda step, t, x_t, v: seen.append(t))
    assert [(t,) for t in seen] == settings.call_times()
    assert counts["decoder"] == 8
    network = network_macs(model, 8, 8)
    assert sampling_macs(model, 8, 8, settings) == 8 * network.total
