"""The networks: one file per family, registered in `NETWORKS`."""

from typing import Any

import torch
from torch import Tensor

from ddt.errors import require
from ddt.model.base import Denoiser
from ddt.model.ddt import DDT
from ddt.model.dit import DiT

__all__ = ["DDT", "NETWORKS", "Denoiser", "DiT", "build_network", "load_network", "network_class"]

NETWORKS: dict[str, type[Denoiser]] = {f"ddt.model.{kind.__name__}": kind for kind in (DDT, DiT)}


def network_class(settings: dict[str, Any]) -> type[Denoiser]:
    """Return the class named by `_target_` of a network's settings; UserError if unknown."""
    target = settings.get("_target_")
    require(target in NETWORKS, f"model._target_={target}: unknown network, choose from {', '.join(NETWORKS)}")
    return NETWORKS[str(target)]


def build_network(settings: dict[str, Any]) -> Denoiser:
    """Build the network of `settings`: `_target_`, one of `NETWORKS`, and its arguments."""
    return network_class(settings)(**{key: value for key, value in settings.items() if key != "_target_"})


def load_network(settings: dict[str, Any], weights: dict[str, Tensor]) -> Denoiser:
    """Build the network of `settings` in eval mode around `weights`, which must fit strictly."""
    with torch.device("meta"):
        model = build_network(settings)
    model.load_state_dict(weights, strict=True, assign=True)
    return model.eval().requires_grad_(True)
