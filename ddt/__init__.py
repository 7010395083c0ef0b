"""DDT: Decoupled Diffusion Transformer (arXiv 2504.05741)."""

import importlib
from typing import TYPE_CHECKING, Any

from ddt.errors import UserError
from ddt.version import __version__

if TYPE_CHECKING:
    from ddt.checkpoint.format import load_model
    from ddt.checkpoint.models import list_models
    from ddt.checkpoint.published import load_released
    from ddt.model import DDT, DiT, DiTDH
    from ddt.sampling.sample import sample
    from ddt.sampling.schedules import optimal_schedule, uniform_schedule
    from ddt.sampling.settings import SamplerSettings

__all__ = [
    "DDT",
    "DiT",
    "DiTDH",
    "SamplerSettings",
    "UserError",
    "__version__",
    "list_models",
    "load_model",
    "load_released",
    "optimal_schedule",
    "sample",
    "uniform_schedule",
]
HOMES = {
    "DDT": "model", "DiT": "model", "DiTDH": "model", "SamplerSettings": "sampling.settings",
    "list_models": "checkpoint.models", "load_model": "checkpoint.format", "load_released": "checkpoint.published",
    "optimal_schedule": "sampling.schedules", "sample": "sampling.sample", "uniform_schedule": "sampling.schedules",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that `import ddt` loads no torch."""
    if name not in HOMES:
        raise AttributeError(f"module 'ddt' has no attribute '{name}'")
    return getattr(importlib.import_module(f"ddt.{HOMES[name]}"), name)
