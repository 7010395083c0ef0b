"""Recompute schedules: uniform, optimal, and the files that carry fitted ones."""

import dataclasses
import itertools
import json

import numpy as np
import pytest
import torch
from conftest import small_ddt

import ddt
from ddt.errors import UserError
from ddt.sampling.fitting import check_fitted, fit_schedule, resolve_recompute, trajectory, z_similarity
from ddt.sampling.schedules import optimal_schedule, read_schedule, write_schedule
from ddt.sampling.settings import SamplerSettings

pytestmark = pytest.mark.usefixtures("one_thread")
FAST = SamplerSettings(num_steps=6, cfg_scale=2.0, cfg_interval=(0.3, 1.0), last_step=None)
CPU = torch.device("cpu")


def cost(similarity, steps):
    """The cost of a schedule by its definition."""
    ends = [*steps[1:], len(similarity)]
    return sum(1 - similarity[a][step] for a, b in zip(steps, ends, strict=True) for step in range(a, b))


def test_uniform_schedule():
    assert ddt.uniform_schedule(7, 3) == [0, 3, 6]
    assert ddt.uniform_schedule(5, 1) == [0, 1, 2, 3, 4]
    assert SamplerSettings(num_steps=7, recompute="uniform:3").schedule() == [0, 3, 6]


def test_optimal_schedules_cost_what_the_release_found(golden):
    for case in golden["dp_cases"]:
        steps = optimal_schedule(case["similarity"], case["k"])
        assert len(steps) == case["k"]
        assert cost(case["similarity"], steps) == pytest.approx(case["cost"], abs=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_optimal_schedules_are_found_by_trying_all(seed):
    similarity = np.random.default_rng(seed).random((9, 9))
    for budget in range(1, 10):
        best = min(cost(similarity, [0, *rest]) for rest in itertools.combinations(range(1, 9), budget - 1))
        steps = optimal_schedule(similarity, budget)
        assert steps[0] == 0
        assert len(set(steps)) == budget
        assert cost(similarity, steps) == pytest.approx(best, abs=1e-12)


def test_a_similarity_that_falls_with_distance_alone_gives_even_segments():
    steps = np.arange(20)
    similarity = 1 - np.abs(steps[:, None] - steps) / 20
    assert optimal_schedule(similarity, 4) == [0, 5, 10, 15]


@pytest.mark.parametrize(
    ("similarity", "budget", "message"),
    [
        (np.ones((4, 3)), 2, r"similarity has shape \(4, 3\)"),
        (np.ones((4, 4)), 0, r"budget=0: must lie in 1\.\.4"),
        (np.ones((4, 4)), 5, r"budget=5: must lie in 1\.\.4"),
        (np.full((4, 4), np.nan), 2, "NaN or infinite"),
    ],
)
def test_impossible_schedules_are_named(similarity, budget, message):
    with pytest.raises(UserError, match=message):
        optimal_schedule(similarity, budget)


def test_similarity_is_that_of_the_release(tiny, golden, samplers):
    case = golden["samplers"]["dp_share"]
    settings = SamplerSettings(num_steps=case["num_steps"], cfg_scale=case["guidance"], last_step=case["last_step"])
    ours = z_similarity(tiny, samplers["dp_template_noise"], samplers["dp_template_cond"], settings)
    np.testing.assert_allclose(ours, samplers["dp_similarity"].numpy(), atol=1e-6)


def test_similarity_does_not_depend_on_how_it_is_summed(monkeypatch):
    model, x = small_ddt(), torch.randn(3, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    whole = z_similarity(model, x, torch.arange(3), FAST)
    monkeypatch.setattr("ddt.sampling.fitting.GRAM_BYTES", 8 * 6 * 32 * 5)  # five tokens at once
    np.testing.assert_allclose(z_similarity(model, x, torch.arange(3), FAST), whole, atol=1e-12)
    assert np.allclose(np.diag(whole), 1)


def test_a_trajectory_holds_the_latents_at_the_start_of_each_step():
    model, x = small_ddt(), torch.randn(2, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    for solver in ("euler", "heun", "midpoint"):
        settings = SamplerSettings(solver=solver, num_steps=4, cfg_interval=None)
        states = trajectory(model, x, torch.arange(2), settings)
        assert len(states) == 4
        assert torch.equal(states[0], x)


def test_fitting_is_the_same_in_any_batches_and_on_every_call():
    settings = dict(shape=(2, 8, 8), settings=FAST, budget=3, device=CPU, num_templates=5)
    whole = fit_schedule(small_ddt(), **settings, batch_size=5)
    pieces = fit_schedule(small_ddt(), **settings, batch_size=2)
    np.testing.assert_allclose(whole["similarity"], pieces["similarity"], atol=1e-7)
    assert whole["recompute_steps"] == pieces["recompute_steps"]
    assert fit_schedule(small_ddt(), **settings, batch_size=5) == whole
    assert whole["templates"]["count"] == 5


def fitted(path, settings=FAST, budget=3, **changes):
    write_schedule(
        path, {**fit_schedule(small_ddt(), (2, 8, 8), settings, budget, device=CPU), "ema_sha256": "a", **changes}
    )
    return str(path)


def using(path, **changes):
    return dataclasses.replace(FAST, recompute=path, **changes)


def test_a_schedule_file_is_used_with_its_own_grid_only(tmp_path):
    path = fitted(tmp_path / "s.json")
    settings, warnings = resolve_recompute(small_ddt(), (2, 8, 8), using(path), CPU, "a")
    assert settings.recompute == json.loads((tmp_path / "s.json").read_text())["recompute_steps"]
    assert warnings == []
    for change in ({"num_steps": 8}, {"timeshift": 2.0}, {"last_step": 0.04}):
        with pytest.raises(UserError, match="was fitted to another time grid"):
            resolve_recompute(small_ddt(), (2, 8, 8), using(path, **change), CPU, "a")


def test_another_checkpoint_guidance_or_solver_gives_a_warning(tmp_path):
    path = fitted(tmp_path / "s.json")
    content, warning = read_schedule(tmp_path / "s.json"), f"recompute={path}: was fitted to another"
    assert check_fitted(content, using(path), "b") == [f"{warning} checkpoint"]
    assert check_fitted(content, using(path, cfg_scale=3.0), "a") == [f"{warning} guidance"]
    assert check_fitted(content, using(path, solver="heun"), "a") == [f"{warning} solver"]


def test_dp_is_fitted_on_the_spot_and_equals_the_file(tmp_path):
    settings, _ = resolve_recompute(small_ddt(), (2, 8, 8), using("dp:3"), CPU)
    fitted(tmp_path / "s.json")
    assert settings.recompute == read_schedule(tmp_path / "s.json")["recompute_steps"]
    with pytest.raises(UserError, match="recompute=dp:3: is fitted to a trained model"):
        using("dp:3").schedule()


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"recompute_steps": 3}', '{"format_version": 1, "recompute_steps": ["x"]}']
)
def test_damaged_and_missing_schedule_files_are_one_line(tmp_path, text):
    (tmp_path / "s.json").write_text(text)
    with pytest.raises(UserError, match=r"s\.json: is no schedule file"):
        read_schedule(tmp_path / "s.json")
    with pytest.raises(
        UserError, match=r"recompute=.*no\.json: no such file; python -m scripts\.studies\.sharing\.fit"
    ):
        read_schedule(tmp_path / "no.json")


def test_models_without_an_encoder_have_no_schedule():
    sizes = dict(in_channels=2, patch_size=2, hidden_size=32, num_heads=2, depth=3, num_classes=5)
    with pytest.raises(UserError, match="DiT has no encoder to share"):
        fit_schedule(ddt.DiT(**sizes), (2, 8, 8), FAST, 3, device=CPU)
