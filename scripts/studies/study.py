"""What the scripts of conf/study share: what images are compared with, and folders that a killed
study goes on in.
"""

import json
from pathlib import Path
from typing import Any

import torch

from ddt.autoencoder import Autoencoder
from ddt.cli import reference_data
from ddt.errors import require
from ddt.metrics.features import Extractor
from ddt.metrics.reference import Reference, check_reference, load_reference


def comparison(
    config: dict[str, Any], autoencoder: Autoencoder, shape: list[int], device: torch.device
) -> tuple[Reference, Extractor]:
    """Return reference and extractor, once it is known that they suit the model."""
    settings, reference = config["features"], config["reference"]
    data = reference_data(reference)
    if data is not None:
        train = data.build(split="train")
        found = autoencoder.latent_shape(train.channels, train.image_size)
        require(
            list(found) == list(shape),
            f"reference={reference}: has latents of shape {list(found)}, the model draws {list(shape)}; give its own "
            "data",
        )
    base, extractor = load_reference(reference, data, settings, device)
    require(
        autoencoder.latent_channels is not None or shape[0] == extractor.channels,
        f"features={extractor.name}: reads images of {extractor.channels} channels, this model draws {shape[0]}; "
        "choose other features",
    )
    check_reference(base, extractor)
    return base, extractor


def begin(out: Path, request: dict[str, Any], study: str, working: str) -> dict[str, Any] | None:
    """Return the plan that an earlier call of the same command left in `out`, or None; refuse any
    other content (UserError). study: what people call it. working: the folder in `out` that a study
    holds while it runs.
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
