"""A run with a base head: logged, saved, resumed, sampled."""

import numpy as np
import pytest
from conftest import composed, refusal, rows, succeed, thinned
from safetensors.torch import load_file
from test_alignment_training import SMALL

from ddt.checkpoint import format as ckpt
from ddt.training.estimate import build_recipe, count

pytestmark = pytest.mark.usefixtures("one_thread")
BASE = [*SMALL, "objective.base_depth=1", "objective.base_weight=0.5", "optimizer.lr=0.01"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("base")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        succeed("train", *BASE, "name=straight", "trainer.max_steps=4", "trainer.save_every=2")
        succeed("train", *SMALL, "name=plain", "trainer.max_steps=2")
    return root


def test_its_loss_is_logged_and_its_weights_are_saved(place):
    for row in rows(place / "runs" / "straight"):
        if "base_loss" in row:
            assert row["loss"] == pytest.approx(row["fm_loss"] + 0.5 * row["base_loss"], rel=1e-5)
    assert any("base_loss" in row for row in rows(place / "runs" / "straight"))
    folder = ckpt.find_checkpoint(place / "runs" / "straight")
    assert ckpt.read_config(folder)["network"]["base_depth"] == 1
    for name in ("model", "ema"):
        weights = load_file(folder / f"{name}.safetensors")
        assert weights["base_head.linear.weight"].any(), "it was trained"
    assert "base_depth" not in ckpt.read_config(ckpt.find_checkpoint(place / "runs" / "plain"))["network"]


@pytest.mark.slow
def test_a_resumed_run_is_the_straight_one(place, monkeypatch):
    monkeypatch.chdir(place)
    for steps in (2, 4):
        succeed("train", *BASE, "name=resumed", f"trainer.max_steps={steps}", "trainer.save_every=2")
    straight, resumed = (ckpt.find_checkpoint(place / "runs" / name) for name in ("straight", "resumed"))
    for name in ("model", "ema"):
        assert ckpt.weights_sha256(straight, name) == ckpt.weights_sha256(resumed, name)
    assert "objective.base_depth 1 -> 2" in refusal("train", *BASE, "name=resumed", "objective.base_depth=2")


def test_samples_are_guided_by_it(place, monkeypatch):
    monkeypatch.chdir(place)
    images = []
    for scale in ("1", "1.5"):
        out = place / f"samples_{scale}"
        succeed(
            "sample", "ckpt=runs/straight", "weights=model", f"internal_scale={scale}", "num_samples=2", f"out={out}"
        )
        assert f'"internal_scale": {float(scale)}' in (out / "receipt.json").read_text()
        images.append(np.load(out / "samples.npz")["arr_0"])
    assert (images[0] != images[1]).any()


def test_a_checkpoint_without_it_is_refused_before_anything(place, monkeypatch):
    monkeypatch.chdir(place)
    message = refusal("sample", "ckpt=runs/plain", "internal_scale=1.5", "num_samples=1", f"out={place / 'none'}")
    assert message.startswith("internal_scale=1.5: this model has no base head")
    assert not (place / "none").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    thinned(
        [
            (["objective.base_depth=3"], "objective.base_depth=3: the encoder has 2 blocks, choose 1..2"),
            (
                ["objective.base_depth=1", "model=dit_nano"],
                "objective.base_depth=1: DiT has no encoder for a base head",
            ),
            (
                ["objective.base_weight=0.5", "optimizer.lr=0.01"],
                "objective.base_weight=0.5: has no effect without objective.base_depth=",
            ),
            (["objective.base_depth=1", "objective.base_weight=0"], "objective.base_weight=0.0: must be above 0"),
            (["sampler.internal_scale=1.5"], "sampler.internal_scale=1.5: this model has no base head"),
        ],
        2,
    ),
)
def test_wrong_settings_are_one_line(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = [each for each in SMALL if "encoder_depth" not in each or "model=dit_nano" not in arguments]
    (line,) = refusal("train", *small, *arguments).splitlines()
    assert line.startswith(message)


def test_the_estimate_counts_it():
    recipes = [
        build_recipe(composed("estimate", "ddt.training.settings.EstimateSettings", "model=nano", *more))
        for more in ([], ["objective.base_depth=2"])
    ]
    plain, based = (recipe.objective for recipe in recipes)
    assert count(based) == count(plain) + count(based.denoiser.base_head)
