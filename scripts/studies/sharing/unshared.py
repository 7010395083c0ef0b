"""What the scripts about sharing need of a checkpoint: its sampler without sharing, its place, its
precision.
"""

from pathlib import Path
from typing import Any

import torch

from ddt.checkpoint import folder as ckpt
from ddt.config import parse
from ddt.errors import require
from ddt.generation.generator import Dtype, usual_dtype
from ddt.generation.settings import SamplerOverrides
from ddt.model import network_class
from ddt.sampling.settings import SamplerSettings


def find_shareable(path: str) -> tuple[Path, dict[str, Any]]:
    """Return the folder and the config of a checkpoint whose network has an encoder; no weights are
    read.
    """
    folder = ckpt.find_checkpoint(path)
    stored = ckpt.read_config(folder)
    kind = network_class(stored["network"])
    require(kind.shares_encoder, f"ckpt={path}: {kind.__name__} has no encoder to share; choose a DDT")
    return folder, stored


def unshared_sampler(config: dict[str, Any], stored: dict[str, Any]) -> SamplerSettings:
    """Return the sampler that the command line and the checkpoint describe, as sample.py does,
    without sharing.
    """
    chosen = {key: config[key] for key in SamplerOverrides.__dataclass_fields__ if key in config}
    overrides = parse(SamplerOverrides, {**chosen, "recompute": None, "forecast_order": 0})
    settings = overrides.resolve(stored["sampler"], shares_encoder=True)
    require(
        not settings.adaptive,
        "sampler=adaptive: chooses its own steps, so there is no schedule for it; choose another sampler",
    )
    return settings


def place(dtype: Dtype | None) -> tuple[torch.device, Dtype]:
    """Return the device to run on, the GPU where there is one, and the precision that is used
    there.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return device, dtype or usual_dtype(device)
