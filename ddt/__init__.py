"""DDT: Decoupled Diffusion Transformer (arXiv 2504.05741)."""

import importlib
from typing import TYPE_CHECKING, Any

from ddt.errors import UserError
from ddt.version import __version__

if TYPE_CHECKING:
    from ddt.checkpoint import load_model
    from ddt.model import DDT, DiT
    from ddt.released import load_released
    from ddt.sampling import SamplerSettings, sample
    from ddt.schedules import optimal_schedule, uniform_schedule

__all__ = [
    "DDT",
    "DiT",
    "SamplerSettings",
    "UserError",
    "__version__",
    "load_model",
    "load_released",
    "optimal_schedule",
    "sample",
    "uniform_schedule",
]
HOMES = {
    "DDT": "model", "DiT": "model", "SamplerSettings": "sampling", "load_model": "checkpoint",
    "load_released": "released", "optimal_schedule": "schedules", "sample": "sampling", "uniform_schedule": "schedules",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for: `ddt.doctor` must run where torch is missing or broken."""
    if name not in HOMES:
        raise AttributeError(f"module 'ddt' has no attribute '{name}'")
    return getattr(importlib.import_module(f"ddt.{HOMES[name]}"), name)
