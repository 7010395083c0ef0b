"""Tests of the tests: each must fail on a copy of the repository that is broken in the way it is there to catch."""

import shlex
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

# what is broken, file, the line as it is, the line as it must not be, the test that must fail
MUTANTS = [
    ("z without time", "ddt/model.py", "silu(t_emb + s)", "silu(s)", "test_model.py::test_network_matches_the_release"),
    (
        "decoder conditioned on the mean of z",
        "ddt/model.py",
        "self.run(x_t, z_t, at)",
        "self.run(x_t, z_t.mean(1, True), at)",
        "test_model.py::test_network_matches_the_release",
    ),
    ("time scaled", "ddt/layers.py", "t.float()[:, None]", "1000 * t.float()[:, None]", "test_layers.py"),
    ("x and y angles exchanged", "ddt/layers.py", "torch.outer(x, freq", "torch.outer(y, freq", "test_layers.py"),
    (
        "positions count tokens",
        "ddt/layers.py",
        "torch.linspace(0, 16, width)",
        "torch.arange(width).float()",
        "test_layers.py",
    ),
    (
        "norm in bf16",
        "ddt/layers.py",
        "F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps)",
        "x * (x.square().mean(-1, True) + self.eps).rsqrt() * self.weight.type_as(x)",
        "test_layers.py",
    ),
    (
        "table kept under inference mode",
        "ddt/layers.py",
        "inference_mode(False)",
        "inference_mode(True)",
        "test_layers.py",
    ),
    (
        "no qk-norm",
        "ddt/layers.py",
        "rotate(self.q_norm(q)",
        "rotate(q",
        "test_model.py::test_network_matches_the_release",
    ),
    (
        "patches channel last",
        "ddt/layers.py",
        "(0, 2, 4, 1, 3, 5)",
        "(0, 2, 4, 3, 5, 1)",
        "test_model.py::test_network_matches_the_release",
    ),
    ("SiLU inside adaLN", "ddt/layers.py", "self.adaln(c).chunk(6", "self.adaln(F.silu(c)).chunk(6", "test_model.py"),
    (
        "graph break",
        "ddt/layers.py",
        "if torch.compiler.is_compiling():",
        "torch._dynamo.graph_break()\n    if torch.compiler.is_compiling():",
        "test_model.py -k compile",
    ),
    (
        "checkpointing loses a block",
        "ddt/model.py",
        "h = checkpoint(block, h",
        "h = checkpoint(block, h.detach()",
        "test_model.py -k checkpointing",
    ),
    (
        "mlp mixer mixes",
        "ddt/layers.py",
        "return super().forward(x)",
        "return super().forward(x) + x.mean(1, True)",
        "test_model.py -k mix",
    ),
    (
        "path reversed",
        "ddt/flow.py",
        "return t * x + (1 - t) * noise",
        "return t * noise + (1 - t) * x",
        "test_flow.py",
    ),
    ("score sign", "ddt/flow.py", "(t * v - x_t)", "(x_t - t * v)", "test_flow.py"),
    ("grid in float64", "ddt/flow.py", "dtype=torch.float32, device", "dtype=torch.float64, device", "test_flow.py"),
    ("shift inverted", "ddt/flow.py", "(1 - t) * timeshift)", "(1 - t) / timeshift)", "test_flow.py"),
    ("uniform is lognormal", "ddt/flow.py", "torch.special.ndtr(normal)", "torch.sigmoid(normal)", "test_flow.py"),
    ("Euler steps to the start", "ddt/solvers.py", "* (t_next - t)", "* t", "test_sampling.py -k euler"),
    ("interval not strict", "ddt/guidance.py", "as_float32(lo) < t", "as_float32(lo) <= t", "test_sampling.py"),
    (
        "bounds in float64",
        "ddt/guidance.py",
        "return as_float32(lo) < t < as_float32(hi)",
        "return lo - 1e-9 < t < hi",
        "test_sampling.py",
    ),
    (
        "guidance around cond",
        "ddt/guidance.py",
        "return v_uncond + self",
        "return v_cond + self",
        "test_sampling.py -k combines",
    ),
    ("cfg 1 costs two", "ddt/guidance.py", "if self.scale == 1:", "if self.scale == -1:", "test_sampling.py -k cost"),
    (
        "edge of the interval forgotten",
        "ddt/sharing.py",
        "2 if any(guided[start:end])",
        "2 if guided[start]",
        "test_sampling.py",
    ),
    ("encoder at every step", "ddt/sharing.py", "if step in self.encodes:", "if self.encodes:", "test_sampling.py"),
    (
        "sampling leaves eval mode",
        "ddt/sampling.py",
        "    grid = time_grid(num_steps, l",
        "    model.eval()\n    grid = time_grid(num_steps, l",
        "test_sampling.py -k trace",
    ),
    (
        "labels dropped in the network too",
        "ddt/model.py",
        "c = nn.functional.silu(t_emb + self.y_embedder(y)[:, None])",
        "y = torch.where(torch.rand(len(y)) < 0.1 * self.training, 5, y)\n        c = nn.functional.silu(t_emb + self.y_embedder(y)[:, None])",
        "test_objective.py test_model.py -k 'drops or mode or function'",
    ),
    (
        "no label dropout",
        "ddt/objective.py",
        "dropout_uniform < self.label_dropout",
        "dropout_uniform < 0",
        "test_objective.py",
    ),
    (
        "dropout draw reversed",
        "ddt/objective.py",
        "dropout_uniform < self",
        "1 - dropout_uniform <= self",
        "test_objective.py",
    ),
    (
        "loss against noise",
        "ddt/objective.py",
        "velocity(latents, noise)",
        "velocity(noise, latents)",
        "test_objective.py",
    ),
    ("EMA the wrong way", "ddt/ema.py", "1 - self.decay", "self.decay", "test_ema.py"),
    ("EMA shares weights", "ddt/ema.py", "copy.deepcopy(model)", "model", "test_ema.py"),
    ("same order each epoch", "ddt/data.py", "PERMUTATION, epoch)", "PERMUTATION, 0)", "test_data.py"),
    (
        "noise without the seed",
        "ddt/data.py",
        "draws(self.seed, TRAINING, position)",
        "draws(0, TRAINING, position)",
        "test_data.py",
    ),
    (
        "noise by row",
        "ddt/data.py",
        "draws(self.seed, TRAINING, position)",
        "draws(self.seed, TRAINING, row)",
        "test_data.py",
    ),
    ("processes overlap", "ddt/data.py", "first + rank * micro_batch_size,", "first,", "test_data.py"),
    ("test images in training", "ddt/images.py", "else ~held_out", "else held_out", "test_images.py"),
    (
        "crop rounds down",
        "ddt/images.py",
        "round(image.width * scale)",
        "int(image.width * scale) + 1",
        "test_images.py -k crop",
    ),
    ("pixels truncated", "ddt/autoencoder.py", "* 127.5 + 0.5)", "* 127.5)", "test_autoencoder.py"),
    (
        "posterior scale",
        "ddt/autoencoder.py",
        "(sample - self.shift) * self.scale",
        "sample * self.scale - self.shift",
        "test_autoencoder.py",
    ),
    (
        "checksum not compared",
        "ddt/checkpoint.py",
        'and sha256(path) == expected["sha256"]',
        "",
        "test_checkpoint.py -k damage",
    ),
    (
        "not atomic",
        "ddt/checkpoint.py",
        'temporary = folder.parent / f".tmp-{folder.name}"',
        "temporary = folder",
        "test_checkpoint.py",
    ),
    (
        "steps compared as text",
        "ddt/checkpoint.py",
        "steps[max(steps)]",
        "steps[max(steps, key=str)]",
        "test_checkpoint.py -k newest",
    ),
    (
        "raw weights released",
        "ddt/released.py",
        'EMA_PREFIX = "ema_denoiser."',
        'EMA_PREFIX = "denoiser."',
        "test_released.py",
    ),
    (
        "unknown keys ignored",
        "ddt/released.py",
        "        require(name is not None and name in wanted",
        "        if name not in wanted: continue\n        require(name is not None",
        "test_released.py",
    ),
    (
        "EMA not resumed",
        "ddt/training.py",
        'ema.model.load_state_dict(ckpt.read_weights(newest, "ema"), strict=True)',
        "pass",
        "test_training.py -k bit_for_bit",
    ),
    (
        "optimizer not resumed",
        "ddt/training.py",
        'optimizer.load_state_dict(state["optimizer"])',
        "pass",
        "test_training.py -k bit_for_bit",
    ),
    (
        "data begin again on resume",
        "ddt/training.py",
        "PositionSampler(\n        step,",
        "PositionSampler(\n        0,",
        "test_training.py -k bit_for_bit",
    ),
    (
        "meters not resumed",
        "ddt/training.py",
        'Meter(device, state["meter"]), saved',
        "Meter(device), saved",
        "test_training.py -k means",
    ),
    (
        "gradients not averaged over micro-batches",
        "ddt/training.py",
        'losses["loss"] / num_micro',
        'losses["loss"]',
        "test_training.py -k 'bit_for_bit or accumulated'",
    ),
    (
        "every process sees the same images",
        "ddt/training.py",
        "micro_batch_size, rank, num_processes\n",
        "micro_batch_size, 0, num_processes\n",
        "test_training.py -k two_processes_train",
    ),
    (
        "gradients not shared",
        "ddt/training.py",
        "accelerator.prepare(objective)",
        "objective.to(device)",
        "test_training.py -k two_processes_train",
    ),
    (
        "changed settings accepted",
        "ddt/checkpoint.py",
        'FROZEN = ("model", ',
        "FROZEN = (",
        "test_training.py -k refused",
    ),
    (
        "classes grouped",
        "ddt/generation.py",
        "chosen = [classes[k % len(classes)]",
        "chosen = [classes[k * len(classes) // num_samples]",
        "test_generation.py",
    ),
    (
        "one generator for all",
        "ddt/generation.py",
        "generator=torch.Generator().manual_seed(s)",
        "generator=torch.Generator().manual_seed(0)",
        "test_generation.py",
    ),
    (
        "noise by batch",
        "ddt/generation.py",
        "images.seeds[k] for k in chosen",
        "images.seeds[k - chosen[0]] for k in chosen",
        "test_generation.py",
    ),
    ("biased covariance", "ddt/metrics/statistics.py", "/ (self.count - 1)", "/ self.count", "test_evaluation.py"),
    ("farthest neighbour", "ddt/metrics/metrics.py", ".min(dim=1)", ".max(dim=1)", "test_evaluation.py"),
    (
        "published recipe changed",
        "conf/optimizer/adamw.yaml",
        "lr: 1.0e-4",
        "lr: 2.0e-4",
        "test_config.py -k published",
    ),
    ("packages apart", "environment.yml", "      - tqdm>=4.66\n", "", "test_packaging.py -k conda"),
    (
        "validation of the raw weights",
        "ddt/training.py",
        "ema.model, objective.time",
        "denoiser, objective.time",
        "test_training.py -k validation_is",
    ),
    (
        "EMA on the first process alone",
        "ddt/training.py",
        "ema.update(denoiser)",
        "rank or ema.update(denoiser)",
        "test_training.py -k validation_is",
    ),
    (
        "no warm-up of the buckets",
        "ddt/training.py",
        "if num_processes > 1:",
        "if num_processes > 9:",
        "test_training.py -k three_processes",
    ),
    (
        "bf16 ignored",
        "ddt/training.py",
        '"bf16" if mixed_precision == "bf16" else "no"',
        '"no"',
        "test_training.py -k bf16_is",
    ),
    (
        "weights not looked at",
        "ddt/training.py",
        "if not all_finite(ema.model):",
        "if False:",
        "test_training.py -k diverged",
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize(("what", "file", "line", "broken", "tests"), MUTANTS, ids=[m[0] for m in MUTANTS])
def test_a_broken_copy_fails(tmp_path, what, file, line, broken, tests):
    ignored = shutil.ignore_patterns(".venv", ".git", "runs", "cache", "checkpoints", ".*_cache", "__pycache__")
    copy = tmp_path / "copy"
    shutil.copytree(ROOT, copy, ignore=ignored)
    text = (copy / file).read_text()
    assert line in text, f"{file} has changed: bring the mutant up to date"
    (copy / file).write_text(text.replace(line, broken, 1))
    names = [f"tests/{part}" if part.startswith("test_") and ".py" in part else part for part in shlex.split(tests)]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-q", "-m", "not slow", *names],
        cwd=copy,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 1, f"no test noticed: {what}\n{done.stdout[-2000:]}"
