"""The networks: one file per family, registered in `NETWORKS`."""

from typing import Any

import torch
from torch import Tensor

from ddt.config import parse
from ddt.errors import brief, require
from ddt.model.base import Denoiser
from ddt.model.ddt import DDT
from ddt.model.dit import DiT
from ddt.model.ditdh import DiTDH
from ddt.model.published_ditdh import ReleasedDiTDH
from ddt.model.published_names import ReleasedDDT, ReleasedDiT

__all__ = ["DDT", "NETWORKS", "Denoiser", "DiT", "DiTDH", "build_network", "load_network", "network_class"]

NETWORKS: dict[str, type[Denoiser]] = {f"ddt.model.{kind.__name__}": kind for kind in (DDT, DiT, DiTDH)}
# here, for a network that is loaded from a shared folder knows no files
DDT.release, DiT.release, DiTDH.release = ReleasedDDT(), ReleasedDiT(), ReleasedDiTDH()


def network_class(settings: dict[str, Any]) -> type[Denoiser]:
    """Return the class named by `_target_` of a network's settings; UserError if unknown."""
    target = settings.get("_target_")
    require(
        isinstance(target, str) and target in NETWORKS,
        f"model._target_={brief(str(target), 60)}: unknown network, choose from {', '.join(NETWORKS)}",
    )
    return NETWORKS[str(target)]


def build_network(settings: dict[str, Any]) -> Denoiser:
    """Build the network of `settings`: `_target_`, one of `NETWORKS`, and its arguments.

    Raises UserError for unknown or missing arguments, wrong types and impossible sizes.
    """
    kind = network_class(settings)
    return parse(kind, {key: value for key, value in settings.items() if key != "_target_"}, "model")


def load_network(settings: dict[str, Any], weights: dict[str, Tensor]) -> Denoiser:
    """Build the network of `settings` in eval mode around `weights`, float32, strictly.

    Raises UserError for impossible settings, and naming a weight that is missing, unknown, or of
    another shape or dtype.
    """
    with torch.device("meta"):
        model = build_network(settings)
    expected = model.state_dict()
    for name, value in expected.items():
        require(name in weights, f"the weights of {name} are missing")
        found = weights[name]
        require(
            found.shape == value.shape and found.dtype == value.dtype,
            f"{name} is {found.dtype} of shape {tuple(found.shape)}, but model asks for {value.dtype} of shape "
            f"{tuple(value.shape)}",
        )
    unknown = sorted(weights.keys() - expected.keys())
    require(not unknown, f"{brief(str(unknown[:1]), 80)}: the model has no such weights")
    model.load_state_dict(weights, strict=True, assign=True)
    return model.eval()
