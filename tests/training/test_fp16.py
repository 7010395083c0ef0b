"""fp16: the loss is scaled, a step that overflows changes nothing but halves the scale, and a
resumed run has the scale of the straight one.
"""

import math
from pathlib import Path

import pytest
import torch
from conftest import inputs, rows, small_ddt, succeed
from safetensors.torch import load_file

from ddt.checkpoint import format as ckpt
from ddt.distributed.prepare import make_accelerator
from ddt.objective import FlowMatching
from ddt.precision import autocast
from ddt.training.ema import EMA, ConstantDecay
from ddt.training.loop import optimizer_step
from ddt.training.optimizer import adamw
from ddt.training.state import TrainingState
from ddt.training.stopping import MAX_SKIPPED, max_skipped

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = [
    "model.hidden_size=32", "model.depth=3", "model.encoder_depth=2", "sampler.num_steps=2", "trainer.warmup_steps=0",
    "trainer.lr_schedule=constant", "trainer.global_batch_size=12", "trainer.micro_batch_size=6",
    "trainer.log_every=2", "trainer.save_every=2", "trainer.validate_every=0", "trainer.preview_every=0",
]  # fmt: skip


def make_state(mixed_precision="fp16"):
    objective = FlowMatching(small_ddt())
    optimizer = adamw(objective.named_parameters(), lr=0.01, betas=(0.9, 0.95), weight_decay=0.0)
    emas = {"ema": EMA(objective.denoiser, ConstantDecay(0.5))}
    return TrainingState(objective, optimizer, emas, make_accelerator(), mixed_precision)


def backward(state, factor=1.0, dtype="fp16"):
    """Accumulate the gradients of a batch whose loss is multiplied by `factor`."""
    latents, _, y = inputs()
    generator = torch.Generator().manual_seed(3)
    noise, time_normal = (torch.randn(shape, generator=generator) for shape in (latents.shape, (3,)))
    with autocast(torch.device("cpu"), dtype):
        losses = state.objective(latents, y, noise, time_normal, torch.ones(3))
    state.scaler.scale(losses["loss"] * factor).backward()
    state.meter.add(losses, 1.0)


def copies(state):
    return [tensor.clone() for tensor in state.tensors()]


def test_an_overflow_changes_nothing_and_halves_the_scale():
    state = make_state()
    backward(state)
    optimizer_step(state, clip_norm=None)
    before, scale = copies(state), state.scaler.get_scale()
    backward(state, math.inf)
    optimizer_step(state, clip_norm=1.0)
    assert all(torch.equal(a, b) for a, b in zip(before, copies(state), strict=True))  # EMA weights among them
    assert state.scaler.get_scale() == scale / 2
    assert (state.step, state.skips.state()) == (2, [1.0, 1.0])
    backward(state)
    optimizer_step(state, clip_norm=None)
    assert not any(torch.equal(a, b) for a, b in zip(before, copies(state), strict=True))
    assert (state.scaler.get_scale(), state.skips.state()) == (scale / 2, [1.0, 0.0])


def test_norms_and_clipping_are_of_unscaled_gradients():
    norms, weights = {}, {}
    for dtype in ("fp32", "fp16"):
        state = make_state(dtype)
        assert state.scaler.is_enabled() == (dtype == "fp16")
        backward(state, dtype=dtype)
        optimizer_step(state, clip_norm=1e-3)
        norms[dtype] = state.meter.means(state.accelerator)
        weights[dtype] = torch.cat([tensor.flatten() for tensor in state.tensors()])
    assert norms["fp16"]["grad_norm"] == pytest.approx(norms["fp32"]["grad_norm"], rel=0.01)
    assert norms["fp16"]["clipped"] == 1.0
    assert torch.allclose(weights["fp16"], weights["fp32"], atol=0.011)  # Adam's first step is ± lr


def test_a_scale_that_is_too_large_is_no_divergence():
    """torch begins with 2^16 and halves it at each skipped step."""
    assert (max_skipped("bf16"), max_skipped("fp32")) == (MAX_SKIPPED, MAX_SKIPPED)
    assert max_skipped("fp16") == MAX_SKIPPED + math.log2(torch.amp.GradScaler("cpu", enabled=True).get_scale())


@pytest.mark.slow
def test_a_resumed_run_is_the_straight_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # a scale that doubles after three steps, so that the count of steps since matters too
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda *a, **k: scaler(*a, **k, init_scale=8.0, growth_interval=3))
    fp16 = [*SMALL, "trainer.mixed_precision=fp16"]
    succeed("train", *fp16, "name=straight", "trainer.max_steps=4")
    for steps in (2, 4):
        succeed("train", *fp16, "name=resumed", f"trainer.max_steps={steps}")
    folders = [ckpt.checkpoint_folder(Path("runs") / name, 4) for name in ("straight", "resumed")]
    states = [ckpt.read_train_state(folder) for folder in folders]
    assert states[0]["scaler"] == states[1]["scaler"]
    assert (states[0]["scaler"]["scale"], states[0]["scaler"]["_growth_tracker"]) == (16.0, 1)
    for name in ("model", "ema"):
        straight, resumed = (load_file(folder / f"{name}.safetensors") for folder in folders)
        assert all(torch.equal(straight[key], resumed[key]) for key in straight)
    assert rows(Path("runs/straight")) == rows(Path("runs/resumed"))
    assert [row["loss_scale"] for row in rows(Path("runs/straight"))] == [8.0, 16.0]
    # other precisions resume it too, and a run in fp16 begins with torch's scale where it had none
    succeed("train", *SMALL, "name=resumed", "trainer.max_steps=6", "trainer.mixed_precision=bf16")
    succeed("train", *fp16, "name=resumed", "trainer.max_steps=8")
    assert "loss_scale" not in rows(Path("runs/resumed"))[2]
    assert rows(Path("runs/resumed"))[-1]["loss_scale"] == 8.0
