"""DDT: Decoupled Diffusion Transformer (arXiv 2504.05741)."""

from ddt.checkpoint import load_model
from ddt.errors import UserError
from ddt.model import DDT, DiT
from ddt.released import load_released
from ddt.sampling import SamplerSettings, sample
from ddt.schedules import optimal_schedule, uniform_schedule
from ddt.version import __version__

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
