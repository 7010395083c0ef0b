"""Fitting a recompute schedule to a model: similarity of z_t on template images, then optimum.

Shapes: B batch of templates, C H W latent, N tokens, D width, T steps. Source: method.md 4.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddt.draws import noise_of
from ddt.errors import require, require_count
from ddt.logs import progress_bar
from ddt.model import Denoiser
from ddt.sampling.sample import Observer, sample_latents
from ddt.sampling.schedules import MAX_TEMPLATES, optimal_schedule, read_schedule
from ddt.sampling.settings import SamplerSettings, check_fitted, guidance_of
from ddt.sampling.sharing import require_encoder

TEMPLATES = 8  # as the release
TEMPLATE_SEED = 2**32 - 1_000_000  # first seed of the templates, beyond those of sampled sets
GRAM_BYTES = 2**28  # bounds the float64 copy of z_t


def templates(
    model: Denoiser, shape: tuple[int, int, int], count: int, batch_size: int, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield noise (B, C, H, W) and evenly spread classes (B,) of `count` template images."""
    for start in range(0, count, batch_size):
        numbers = range(start, min(start + batch_size, count))
        noise = noise_of([TEMPLATE_SEED + k for k in numbers], shape)
        y = torch.tensor([k * model.num_classes // count for k in numbers])
        yield noise.to(device), y.to(device)


def trajectory(
    model: Denoiser, noise: Tensor, y: Tensor, settings: SamplerSettings, observe: Observer | None = None
) -> list[Tensor]:
    """Sample without sharing; return the latents (B, C, H, W) at the start of each step."""
    x: list[Tensor] = []

    def keep(step: int, t: float | Tensor, x_t: Tensor, v: Tensor) -> None:
        if len(x) == step:  # the first call of this step
            x.append(x_t)
        if observe is not None:
            observe(step, t, x_t, v)

    sample_latents(model, noise, y, settings.unshared(), observe=keep)
    return x


@torch.no_grad()
def z_similarity(
    model: Denoiser, noise: Tensor, y: Tensor, settings: SamplerSettings, observe: Observer | None = None
) -> np.ndarray:
    """Return the cosine similarity of z_t between all pairs of steps, (T, T) float64.

    The mean over tokens and noise (B, C, H, W) of classes y (B,), both halves. T·2B·N·D floats.
    """
    labels = torch.cat([y, torch.full_like(y, model.num_classes)])
    grid = settings.grid()
    tokens = []
    for x_t, t in zip(trajectory(model, noise, y, settings, observe), grid[:-1], strict=True):
        z = model.encode(x_t.repeat(2, 1, 1, 1), torch.full((len(labels),), t, device=x_t.device), labels)
        tokens.append(z.flatten(0, 1))  # (2B·N, D)
    steps, total = len(tokens), len(tokens[0])
    gram = torch.zeros(steps, steps, dtype=torch.float64, device=noise.device)
    at_once = max(1, GRAM_BYTES // (8 * steps * tokens[0].shape[1]))
    for start in range(0, total, at_once):
        z = torch.stack([z[start : start + at_once] for z in tokens]).double()  # (T, some, D)
        unit = torch.nn.functional.normalize(z, dim=-1).flatten(1)
        gram += unit @ unit.T
    return (gram / total).cpu().numpy()


def fit_schedule(
    model: Denoiser,
    shape: tuple[int, int, int],
    settings: SamplerSettings,
    budget: int,
    device: torch.device,
    num_templates: int = TEMPLATES,
    batch_size: int = TEMPLATES,
    observe: Observer | None = None,
) -> dict[str, Any]:
    """Choose the `budget` steps at which the encoder should run, latents of `shape` (C, H, W).

    Runs under the caller's autocast. Returns the content of a schedule file: `recompute_steps`,
    `budget`, `time_grid`, `solver`, `guidance`, `templates`, `similarity` (T, T). observe: of the
    templates' sampling. Raises UserError for a model without an encoder, and impossible numbers.
    """
    require_encoder(model)
    require(not settings.adaptive, f"solver={settings.solver}: chooses its own steps; fit a schedule to another solver")
    require_count("templates", num_templates, 1, MAX_TEMPLATES)
    steps = settings.num_steps
    require(1 <= budget <= steps, f"budget={budget}: must lie in 1..num_steps={steps}")
    similarity = np.zeros((steps, steps))
    with progress_bar(total=num_templates, unit="img", desc="templates") as progress:
        for noise, y in templates(model, shape, num_templates, batch_size, device):
            similarity += z_similarity(model, noise, y, settings, observe) * (len(y) / num_templates)
            progress.update(len(y))
    return {
        "budget": budget,
        "recompute_steps": optimal_schedule(similarity, budget),
        "solver": settings.solver,
        "time_grid": settings.grid(),
        "guidance": guidance_of(settings),
        "templates": {"count": num_templates, "first_seed": TEMPLATE_SEED},
        "similarity": [[float(f"{value:.8g}") for value in row] for row in similarity],
    }


def resolve_recompute(
    model: Denoiser,
    shape: tuple[int, int, int],
    settings: SamplerSettings,
    device: torch.device,
    ema_sha256: str | None = None,
) -> tuple[SamplerSettings, list[str]]:
    """Return the settings with `recompute` as a list of steps or None, and warnings.

    "dp:50" is fitted here, to 8 templates. shape: (C, H, W) of a latent; ema_sha256: of the model's
    weights. Raises UserError as `read_schedule` and `check_fitted`.
    """
    schedule, warnings = settings.parsed_recompute, list[str]()
    if schedule.kind == "file":
        content = read_schedule(Path(str(settings.recompute)))
        steps, warnings = content["recompute_steps"], check_fitted(content, settings, ema_sha256)
    elif schedule.kind == "dp":
        steps = fit_schedule(model, shape, settings, schedule.number, device)["recompute_steps"]
    else:
        steps = schedule.steps
    return dataclasses.replace(settings, recompute=steps), warnings
