"""The golden numbers of the release (tests/golden), for the tests and the GPU check."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

import ddt

GOLDEN = Path(__file__).resolve().parents[2] / "tests" / "golden"
NETWORKS = {"tiny": ("tiny.weights.safetensors", 3, 2), "patch1": ("patch1.lightning.ckpt", 1, 1)}
CASES = (("tiny", 0), ("tiny", 1), ("patch1", 0))  # of inputs and outputs, by network
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}
GRADIENT_TOLERANCE = {"rtol": 1e-4, "atol": 1e-6}
BF16_ERROR = 0.025  # of the velocity under autocast, relative
# absolute tolerance of the latents, else 1e-5: the release rounds these coefficients
CLOSE = {"adam3": 1e-4, "adam4": 1e-4}


def network(name: str) -> ddt.DDT:
    """Return one of `NETWORKS`."""
    file, encoder_depth, patch_size = NETWORKS[name]
    model = ddt.load_released(GOLDEN / file, encoder_depth, patch_size)
    assert isinstance(model, ddt.DDT)
    return model


def case(name: str, number: int) -> dict[str, Tensor]:
    """Return x, t, y, z, v, x_shared, v_shared, target, loss and gradnorm.WEIGHT of a case."""
    stored = load_file(GOLDEN / f"{name}.io.safetensors")
    return {key[2:]: value for key, value in stored.items() if key.startswith(f"{number}.")}


def trajectories() -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the sampling runs' settings by name, and noise, cond and the latents by name."""
    settings = json.loads((GOLDEN / "golden.json").read_text())["samplers"]
    return settings, load_file(GOLDEN / "samplers.safetensors")


def sampler_settings(name: str, case: dict[str, Any], samplers: dict[str, Tensor]) -> dict[str, Any]:
    """Return a run's settings in our names; the release's default interval is (0, 1)."""
    every = case.get("state_refresh_rate")
    settings: dict[str, Any] = {
        "num_steps": case["num_steps"],
        "cfg_scale": case["guidance"],
        "cfg_interval": (case.get("guidance_interval_min", 0.0), case.get("guidance_interval_max", 1.0)),
        "last_step": case.get("last_step"),
        "timeshift": case.get("timeshift", 1.0),
        "recompute": ddt.uniform_schedule(case["num_steps"], every) if every else None,
    }
    if case.get("order", 1) > 1:
        settings["solver"] = f"adams{case['order']}"
    if name.startswith("sde"):  # sde_mean takes the mean at every step but the last: noise of zero
        settings["solver"] = "sde_preserve" if name == "sde_preserve" else "sde"
        settings["step_noise"] = samplers.get(f"{name}.draws", torch.zeros(11, *samplers["noise"].shape))
        settings["sde_last"] = "mean" if "last_step_fn" in case else "euler"
    if "recompute_timesteps" in case:  # fitted by the release to the template batch
        similarity = samplers["dp_similarity"]
        settings["recompute"] = ddt.optimal_schedule(similarity, len(case["recompute_timesteps"]))
        assert settings["recompute"] == case["recompute_timesteps"]
    return settings
