"""The networks: one file a family, registered here."""

from typing import Any

from ddt.errors import require
from ddt.model.ddt import DDT
from ddt.model.dit import DiT

Denoiser = DDT | DiT  # what can be trained and sampled
NETWORKS: dict[str, type[DDT] | type[DiT]] = {f"ddt.model.{kind.__name__}": kind for kind in (DDT, DiT)}


def build_network(settings: dict[str, Any]) -> Denoiser:
    """Build the network that `settings` describe: `_target_`, one of `NETWORKS`, and its
    constructor's arguments.
    """
    arguments = dict(settings)
    target = arguments.pop("_target_", None)
    require(target in NETWORKS, f"model._target_={target}: unknown network, choose from {', '.join(NETWORKS)}")
    return NETWORKS[target](**arguments)
