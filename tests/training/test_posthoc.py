"""EMA weights of any length from snapshots of others."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import refusal, succeed

from ddt.checkpoint import format as ckpt
from ddt.errors import UserError
from ddt.training.ema import EMA, ConstantDecay, PowerFunction, power_exponent
from ddt.training.posthoc import (
    PosthocSettings,
    Profile,
    Reconstruction,
    check_residual,
    combine,
    find_snapshots,
    inner_products,
    posthoc_ema,
    reconstruct,
)

pytestmark = pytest.mark.usefixtures("one_thread")
RULES = [PowerFunction(0.05), PowerFunction(0.2), ConstantDecay(0.97)]


def walk(steps):
    """A random walk of some weights, away from zero as weights are."""
    return 3 + np.cumsum(np.random.default_rng(0).standard_normal((steps + 1, 20)), axis=0) / 10


def tracked(rule, weights, at=()):
    """The float64 EMA of a sequence of weights, after its last step and after those of `at`."""
    ema, emas = weights[0], {}
    for step, current in enumerate(weights[1:], start=1):
        ema = ema + rule.rate(step) * (current - ema)
        emas[step] = ema
    return ema, [emas[step] for step in at]


@pytest.mark.parametrize(("std", "exponent"), [(0.05, 16.97), (0.10, 6.94)])
def test_exponents_are_the_published_ones(std, exponent):
    assert power_exponent(std) == pytest.approx(exponent, abs=5e-3)


@pytest.mark.parametrize("rule", RULES)
def test_tracked_ema_is_the_sum_over_its_profile(rule):
    weights = walk(60).astype(np.float32)
    model = torch.nn.Linear(20, 1, bias=False)
    model.weight.data[:] = torch.from_numpy(weights[0])
    ema = EMA(model, rule)
    for step, current in enumerate(weights[1:], start=1):
        model.weight.data[:] = torch.from_numpy(current)
        ema.update(model.parameters(), step)
    shares = Profile(rule, 60).shares()
    assert shares.sum() == pytest.approx(1, abs=1e-12)
    np.testing.assert_allclose(ema.model.weight[0].numpy(), shares @ weights, rtol=2e-6)


def test_products_are_those_of_the_written_out_profiles():
    profiles = [Profile(rule, step) for step in (7, 40, 41, 100) for rule in RULES]
    full = np.stack([np.pad(p.shares(), (0, 100 - p.step)) for p in profiles])
    np.testing.assert_allclose(inner_products(profiles), full @ full.T, rtol=1e-10)


def test_products_of_a_long_run_neither_overflow_nor_cancel():
    """A power of 98 at 400,000 steps; the square of a profile ∝ t^γ is known in continuous time."""
    rule = PowerFunction(0.01)
    exponent = power_exponent(0.01)
    value = inner_products([Profile(rule, 4_000), Profile(rule, 400_000)])
    expected = (exponent + 1) ** 2 / (2 * exponent + 1) / np.array([4_000, 400_000])
    np.testing.assert_allclose(value.diagonal(), expected, rtol=1e-2)
    assert np.isfinite(value).all()


@pytest.mark.parametrize(
    ("rule", "largest"), [(PowerFunction(0.07), 5e-4), (PowerFunction(0.15), 1e-3), (ConstantDecay(0.95), 2e-3)]
)
def test_reconstruction_is_the_tracked_ema(rule, largest):
    """Snapshots of two EMAs every 20 of 400 steps; errors relative to what averaging changes."""
    weights, steps = walk(400), list(range(20, 401, 20))
    emas = [Profile(PowerFunction(std), step) for std in (0.05, 0.1) for step in steps]
    snapshots = np.concatenate([tracked(PowerFunction(std), weights, steps)[1] for std in (0.05, 0.1)])
    made = reconstruct(emas, Profile(rule, 400))
    assert made.coefficients.sum() == pytest.approx(1, abs=1e-12)
    truth, _ = tracked(rule, weights)
    error = np.linalg.norm(made.coefficients @ snapshots - truth) / np.linalg.norm(truth - weights[-1])
    assert error < largest
    np.testing.assert_allclose(made.shares() @ weights, made.coefficients @ snapshots, rtol=1e-9)
    target = made.target.shares()
    direct = np.linalg.norm(made.shares() - target) / np.linalg.norm(target)
    assert made.residual == pytest.approx(direct, rel=1e-6)


def test_an_ema_among_the_snapshots_is_reproduced_exactly():
    emas = [Profile(PowerFunction(std), step) for step in range(10, 101, 10) for std in (0.05, 0.1)]
    made = reconstruct(emas, emas[-1])
    np.testing.assert_allclose(made.coefficients, np.eye(20)[-1], atol=1e-9)
    assert made.residual < 1e-6


def test_coefficients_are_the_best_with_their_sum():
    """No exchange between two EMAs comes nearer."""
    emas = [Profile(PowerFunction(std), step) for step in (50, 75, 100) for std in (0.05, 0.1)]
    made = reconstruct(emas, Profile(PowerFunction(0.07), 100))
    full = np.stack([np.pad(p.shares(), (0, 100 - p.step)) for p in emas])
    gradient = full @ (made.shares() - made.target.shares())
    np.testing.assert_allclose(gradient, gradient.mean(), atol=1e-9)


def test_equal_emas_are_allowed():
    """After one step all power-function EMAs are the weights of that step."""
    emas = [Profile(PowerFunction(std), step) for step in range(1, 13) for std in (0.05, 0.1)]
    assert reconstruct(emas, Profile(PowerFunction(0.2), 12)).residual < 1e-6


def test_more_snapshots_smaller_error():
    residuals = []
    for every in (100, 50, 20, 10):
        emas = [Profile(PowerFunction(std), n) for n in range(every, 401, every) for std in (0.05, 0.1)]
        residuals.append(reconstruct(emas, Profile(PowerFunction(0.03), 400)).residual)
    assert residuals == sorted(residuals, reverse=True)
    assert residuals[-1] < residuals[0] / 10


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """40 steps with snapshots every 5; power_0.15 and the decay are there to compare with."""
    folder = tmp_path_factory.mktemp("posthoc")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        succeed(
            "train", "name=tiny", "model.hidden_size=32", "model.depth=3", "model.encoder_depth=2",
            "trainer.num_processes=1", "trainer.max_steps=40", "trainer.global_batch_size=8", "trainer.warmup_steps=5",
            "trainer.log_every=40", "trainer.save_every=0", "trainer.validate_every=0", "trainer.preview_every=0",
            "trainer.ema_powers=[0.05,0.1,0.15]", "trainer.ema_decays=[0.8]", "trainer.snapshot_every=5",
        )  # fmt: skip
    return folder / "runs" / "tiny"


def flat(folder, name="ema"):
    return torch.cat([value.double().flatten() for value in ckpt.read_weights(folder, name).values()])


def test_emas_of_a_run(run, tmp_path):
    """Two lengths and a decay from snapshots of two EMAs, against those that training tracked."""
    out, arguments = tmp_path / "out", (f"run={run}", "powers=[0.05,0.1]")
    succeed("scripts.posthoc_ema", *arguments, "std=[0.05,0.15]", "decay=0.8", f"out={out}")
    assert sorted(path.name for path in out.iterdir()) == ["decay_0.8", "std_0.05", "std_0.15"]
    last = ckpt.newest_checkpoint(run)
    raw = flat(last, "model")
    for name, tracked_name in (("std_0.05", "power_0.05"), ("std_0.15", "power_0.15"), ("decay_0.8", "ema_0.8")):
        truth = flat(last, tracked_name)
        error = torch.linalg.norm(flat(out / name) - truth) / torch.linalg.norm(truth - raw)
        assert error < 0.02, name
        assert (out / name / "profile.png").stat().st_size > 1000
    assert torch.equal(flat(out / "std_0.05"), flat(last, "power_0.05"))
    config = ckpt.read_config(out / "std_0.15")
    made = config["posthoc"]
    assert config["step"] == 40
    assert made["std"] == 0.15
    assert made["residual"] < 0.1
    assert {entry["weights"] for entry in made["emas"]} == {"power_0.05", "power_0.1"}
    assert {entry["step"] for entry in made["emas"]} == set(range(5, 41, 5))
    snapshot = run / "snapshots" / "step_0000040"
    assert made["emas"][-1]["sha256"] == ckpt.weights_sha256(snapshot, made["emas"][-1]["weights"])


def test_an_ema_of_an_earlier_step_can_be_sampled_from(run, tmp_path):
    out = tmp_path / "average"
    succeed("scripts.posthoc_ema", f"run={run}", "std=0.12", "step=30", f"out={out}")
    weights = ckpt.read_weights(out, "ema")
    assert ckpt.read_config(out)["step"] == 30
    assert {value.dtype for value in weights.values()} == {torch.float32}
    assert weights.keys() == ckpt.read_weights(run / "snapshots" / "step_0000030", "power_0.05").keys()
    succeed(
        "sample", f"ckpt={out}", "num_samples=2", "num_steps=2", "cfg_scale=1", "num_processes=1",
        f"out={tmp_path / 'samples'}",
    )  # fmt: skip
    receipt = json.loads((tmp_path / "samples" / "receipt.json").read_text())
    assert receipt["request"]["checkpoint"]["step"] == 30


def test_sums_are_float64(tmp_path):
    """1 + 2⁻²⁴ − 1 is 0 in float32."""
    parts = []
    for number, value in enumerate([1.0, 2.0**-24, 1.0]):
        ckpt.write_checkpoint(tmp_path / str(number), {}, ema={"w": torch.tensor([value])})
        parts.append((tmp_path / str(number), "ema"))
    first, second = combine(parts, np.array([[1.0, 1.0, -1.0], [0.0, 0.0, 2.0]]))
    assert first["w"].item() == 2.0**-24
    assert second["w"].item() == 2.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"run": "nowhere"}, "run=nowhere: no such folder"),
        ({"run": "."}, "has no snapshots; train with trainer.ema_powers=[0.05,0.1]"),
        ({"std": None}, "std: not set; give std="),
        ({"std": 0.29}, "std=0.29: must lie in 0.0001..0.28"),
        ({"std": [0.05, -1.0]}, "std=-1.0: must lie in 0.0001..0.28"),
        ({"decay": 1.0}, "decay=1.0: must lie in 0..1"),
        ({"std": [0.05, 0.05]}, "two of the lengths have one name"),
        ({"step": 41}, "step=41: the run has no snapshot of it; the nearest: 35, 40"),
        ({"step": 12}, "the nearest: 10, 15"),
        ({"step": 5}, "is the only snapshot up to step 5"),
        ({"powers": [0.2]}, "powers=0.2: the run saved no such EMA weights; choose from 0.05, 0.1, 0.15"),
        ({"powers": []}, "powers=[]: name at least one of 0.05, 0.1, 0.15"),
        ({"std": 0.01, "powers": [0.1]}, "std=0.01: the snapshots up to step 40 cannot make this EMA"),
        ({"decay": 0.9999}, "decay=0.9999: the snapshots up to step 40 cannot make this EMA"),
        ({"out": "taken"}, "out=taken: exists already"),
        ({"std": [0.07, 0.1], "out": "partly"}, "out=partly/std_0.1: exists already"),
    ],
)
def test_invalid_settings_are_refused(run, tmp_path, monkeypatch, changes, message):
    monkeypatch.chdir(tmp_path)
    for place in ("taken", "partly/std_0.1"):
        (tmp_path / place / "of_others").mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    values = {"run": str(run), "std": 0.07, "decay": None, "step": None, "powers": None, "out": "out"}
    with pytest.raises(UserError) as refused:
        posthoc_ema(PosthocSettings(**(values | changes)))
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_full_disk_is_reported_before_anything_is_read(run, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(UserError, match="GiB are free; free some space"):
        posthoc_ema(PosthocSettings(str(run), 0.07, None, None, None, str(tmp_path / "out")))


def test_a_poor_ema_is_warned_of(caplog):
    target = Profile(PowerFunction(0.03), 100)
    for residual in (0.04, 0.1):
        check_residual("std_0.03", Reconstruction(target, (), np.empty(0), residual))
    (record,) = caplog.records
    assert record.getMessage() == "warning: std=0.03: the error of its profile is 0.10; see profile.png"


@pytest.mark.slow
def test_a_killed_command_writes_what_is_missing(run, tmp_path, caplog):
    arguments = [f"run={run}", "std=[0.07,0.1]", f"out={tmp_path / 'out'}"]
    succeed("scripts.posthoc_ema", *arguments)
    shutil.rmtree(tmp_path / "out" / "std_0.1")  # as if it had been killed before the second
    first = (tmp_path / "out" / "std_0.07" / "manifest.json").stat().st_mtime_ns
    succeed("scripts.posthoc_ema", *arguments)
    assert (tmp_path / "out" / "std_0.07" / "manifest.json").stat().st_mtime_ns == first
    assert ckpt.read_config(tmp_path / "out" / "std_0.1")["posthoc"]["std"] == 0.1
    succeed("scripts.posthoc_ema", *arguments)  # all complete
    (tmp_path / "out" / "std_0.07").rename(tmp_path / "other")
    (tmp_path / "out" / "std_0.1").rename(tmp_path / "out" / "std_0.07")
    assert refusal("scripts.posthoc_ema", *arguments).endswith(
        "std_0.07: exists already and is not written over; choose another out="
    )


def test_the_command_line_refuses_in_one_line(run, tmp_path):
    out = f"out={tmp_path}/out"
    assert refusal("scripts.posthoc_ema", f"run={run}", "std=wide", out).startswith("std=wide: ")
    assert refusal("scripts.posthoc_ema", "run=runs/depth=2,x", "std=0.07", out).startswith(
        "run=runs/depth=2,x: no such"
    )


def test_a_snapshot_of_another_training_is_named(run, tmp_path):
    copy = tmp_path / "copy"
    for step, seed in ((35, 1), (40, 0)):
        folder = run / "snapshots" / f"step_{step:07d}"
        config = ckpt.read_config(folder)
        config["run"]["seed"] = seed
        ckpt.write_checkpoint(
            copy / "snapshots" / folder.name, config, **{"power_0.05": ckpt.read_weights(folder, "power_0.05")}
        )
    assert find_snapshots(run).step == 40
    with pytest.raises(UserError, match=r"step_0000035: is of another training \(seed differ"):
        find_snapshots(copy)
