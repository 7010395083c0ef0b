"""Path, times and grids."""

import pytest
import torch

from ddt.errors import UserError
from ddt.flow import TrainingTimes, dimension_timeshift, interpolate, score, time_grid, velocity


def test_velocity_is_the_time_derivative_of_the_path():
    x, noise = torch.randn(2, 4, 3, 5, 5, dtype=torch.float64)
    t = torch.rand(4, dtype=torch.float64)
    _, derivative = torch.func.jvp(lambda t: interpolate(x, noise, t), (t,), (torch.ones_like(t),))
    torch.testing.assert_close(derivative, velocity(x, noise))


def test_path_runs_from_noise_to_data():
    x, noise = torch.randn(2, 2, 1, 2, 2)
    assert torch.equal(interpolate(x, noise, torch.zeros(2)), noise)
    assert torch.equal(interpolate(x, noise, torch.ones(2)), x)


def test_score_of_a_gaussian():
    """Data N(0, s²): x_t ~ N(0, t²s² + (1−t)²), whose score is −x/variance."""
    x_t, t, s = torch.randn(64, dtype=torch.float64), 0.3, 0.7
    variance = t**2 * s**2 + (1 - t) ** 2
    v = (t * s**2 - (1 - t)) / variance * x_t
    torch.testing.assert_close(score(v, x_t, t), -x_t / variance)


def test_time_distributions():
    normal = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    uniform, lognorm = TrainingTimes("uniform").of(normal), TrainingTimes("lognorm").of(normal)
    quantiles = torch.tensor([0.1, 0.25, 0.5, 0.75, 0.9])
    torch.testing.assert_close(uniform.quantile(quantiles), quantiles, rtol=0, atol=0.01)
    expected = torch.special.ndtri(quantiles).sigmoid()
    torch.testing.assert_close(lognorm.quantile(quantiles), expected, rtol=0, atol=0.01)


@pytest.mark.parametrize("distribution", ["lognorm", "uniform"])
@pytest.mark.parametrize(("t_min", "timeshift"), [(0.0, 1.0), (0.001, 1.0), (0.1, 1.0), (0.001, 6.9), (0.0, 0.5)])
def test_normals_are_those_that_make_the_times(distribution, t_min, timeshift):
    times = TrainingTimes(distribution, t_min, timeshift)
    normal = torch.linspace(-2.5, 3.0, 50, dtype=torch.float64)
    t = times.of(normal)
    assert bool((t.diff() > 0).all())
    torch.testing.assert_close(times.normals(t), normal)
    low, high = times.of(torch.tensor([-9.0, 9.0], dtype=torch.float64))
    assert t_min / (t_min + (1 - t_min) * timeshift) <= low < 0.11
    assert high > 0.99


def test_grids_are_those_of_the_release(golden):
    for name, case in golden["samplers"].items():
        grid = time_grid(case["num_steps"], case.get("last_step"), case.get("timeshift", 1.0))
        assert grid == case["timesteps"], name


def test_grids_are_the_same_where_another_device_is_the_default():
    with torch.device("meta"):
        grid = time_grid(7, 0.04, 2.0)
    assert grid == time_grid(7, 0.04, 2.0)


@pytest.mark.parametrize("shift", [1.0, 2.0])
def test_a_grid_that_ends_before_one_has_equal_steps_before_the_shift(shift):
    grid = torch.tensor(time_grid(7, None, shift, t_end=0.9))
    plain = grid * shift / (1 + (shift - 1) * grid)  # the shift undone
    torch.testing.assert_close(plain, torch.linspace(0, 0.9, 8))
    assert time_grid(7, None, shift, t_end=1.0) == time_grid(7, None, shift)
    whole = torch.linspace(0, 1, 8)
    torch.testing.assert_close(torch.tensor(time_grid(7)), whole)


def test_the_shift_of_a_latents_size():
    sizes = {(768, 16, 16): 48, (768, 32, 32): 192, (384, 16, 16): 24, (1024, 16, 16): 64, (4, 32, 32): 1, (1, 8, 8): 1}
    for shape, square in sizes.items():
        assert dimension_timeshift(shape) == pytest.approx(square**0.5)


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        ((0,), "num_steps=0"),
        ((4, 0.0), "last_step=0"),
        ((4, 1.5), "last_step=1.5"),
        ((4, None, 0.0), "timeshift=0"),
        ((250, 1e-9), "last_step=1e-09, timeshift=1.0: two of the 251 times are equal in float32"),
        ((250, 0.04, 1e-9), "two of the 251 times are equal in float32"),
        ((4, None, 1.0, 0.0), "t_end=0.0: must lie above 0"),
        ((4, None, 1.0, 1.1), "t_end=1.1: must lie above 0, and be at most 1"),
        ((4, 0.04, 1.0, 0.9), "last_step=0.04: has no effect with t_end=0.9, .* give last_step=null"),
        ((250, None, 1e-9, 0.9), "t_end=0.9, timeshift=1e-09: two of the 251 times are equal in float32"),
    ],
)
def test_impossible_grids_are_named(arguments, key):
    with pytest.raises(UserError, match=key):
        time_grid(*arguments)
