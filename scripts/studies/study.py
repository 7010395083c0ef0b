"""What the studies share: the checkpoint, what images are compared with, a folder that a killed
study resumes in, and means with their deviation.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ddt.autoencoder import Autoencoder
from ddt.checkpoint import folder as ckpt
from ddt.config import Choice
from ddt.errors import require
from ddt.generation.settings import SamplerOverrides
from ddt.metrics.features import Extractor, FeatureSettings
from ddt.metrics.reference import Reference, check_reference, load_reference
from ddt.model import network_class
from ddt.sampling.settings import SamplerSettings

Spread = dict[str, float | None]  # mean and standard deviation over repeats; of one repeat there is no deviation
BUSY = "another command is sampling for this study; wait for it, or choose another out="


def unshared_sampler(overrides: SamplerOverrides, path: str) -> tuple[Path, dict[str, Any], SamplerSettings]:
    """Return folder and config of a checkpoint, and its sampler with `overrides` and without
    sharing; no weights are read.

    Raises UserError for a network without an encoder to share, and a solver without steps.
    """
    folder = ckpt.find_checkpoint(path)
    stored = ckpt.read_config(folder)
    kind = network_class(stored["network"])
    require(kind.shares_encoder, f"ckpt={path}: {kind.__name__} has no encoder to share; choose a DDT")
    alone = dataclasses.replace(overrides, recompute=None, forecast_order=0)
    settings = alone.resolve(stored["sampler"], shares_encoder=True)
    require(
        not settings.adaptive,
        "sampler=adaptive: chooses its own steps, so there is no schedule for it; choose another sampler",
    )
    return folder, stored, settings


def load_comparison(
    reference: str, data: Choice | None, features: FeatureSettings, autoencoder: Autoencoder, shape: list[int],
    device: torch.device,
) -> tuple[Reference, Extractor]:  # fmt: skip
    """Return reference and extractor, once it is known that they suit a model of latents of `shape`
    (C, H, W). data: the data set that `reference` names, None where it is a path.
    """
    if data is not None:
        train = data.build(split="train")
        found = list(autoencoder.latent_shape(train.channels, train.image_size))
        require(
            found == list(shape),
            f"reference={reference}: has latents of shape {found}, the model {list(shape)}; give its own data",
        )
    base, extractor = load_reference(reference, data, features, device)
    require(
        autoencoder.latent_channels is not None or shape[0] == extractor.channels,
        f"features={extractor.name}: reads images of {extractor.channels} channels, this model samples {shape[0]}; "
        "choose other features",
    )
    check_reference(base, extractor)
    return base, extractor


def resume_study(out: Path, request: dict[str, Any], study: str, working: str) -> dict[str, Any] | None:
    """Return the plan that an earlier call of the same command left in `out`, or None; refuse any
    other content (UserError). working: the folder in `out` that a study holds while it runs.
    """
    require(not out.exists() or out.is_dir(), f"out={out}: is a file; give a folder")
    if not out.exists() or not any(path.name != working for path in out.iterdir()):
        return None
    try:
        plan = json.loads((out / "plan.json").read_text())
        same = plan["request"] == json.loads(json.dumps(request))
    except (OSError, ValueError, KeyError, TypeError):
        same = False
    require(same, f"out={out}: holds another {study} or other files and is not written over; choose another out=")
    return plan


def spread(values: list[float]) -> Spread:
    """Return mean and standard deviation (divided by count − 1)."""
    return {"mean": float(np.mean(values)), "sd": float(np.std(values, ddof=1)) if len(values) > 1 else None}


def mean_sd(value: Spread, digits: int, sign: str = "") -> str:
    """Return "mean ± sd" as text."""
    text = f"{value['mean']:{sign}.{digits}f}"
    return text if value["sd"] is None else f"{text} ± {value['sd']:.{digits}f}"


def draw_similarity(axes: Any, values: np.ndarray, steps: list[int]) -> Any:
    """Draw the similarity of z between all steps, (T, T), and over it the segments that share one;
    return the image.
    """
    count = len(values)
    image = axes.imshow(values, origin="lower", extent=(0, count, 0, count), cmap="viridis")
    for start, end in zip(steps, [*steps[1:], count], strict=True):
        axes.plot([start, end, end, start, start], [start, start, end, end, start], color="white", linewidth=1.2)
    axes.set(xlabel="step", ylabel="step")
    axes.grid(False)
    return image
