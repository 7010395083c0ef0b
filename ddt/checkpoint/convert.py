"""A published checkpoint in this project's format, with everything that sampling needs inside."""

import logging
from pathlib import Path
from typing import Any

from ddt.checkpoint.folder import FORMAT_VERSION, write_checkpoint
from ddt.checkpoint.published import architecture, build_from_state, find_released, read_state_dict
from ddt.errors import require
from ddt.files import sha256
from ddt.pictures import imagenet_synsets

log = logging.getLogger(__name__)
DOWNSAMPLING = 8  # of the autoencoder that all published models were trained with


def convert(
    released: str,
    encoder_depth: int | None,
    patch_size: int,
    resolution: int,
    autoencoder: dict[str, Any],
    sampler: dict[str, Any],
    out: Path,
) -> None:
    """Write the averaged weights of a published checkpoint as a checkpoint folder `out`, which must
    not exist.

    Args:
        released: file, folder that holds one, or hub id. encoder_depth, patch_size: not in the file
        (method.md 6); encoder_depth None is the undivided baseline.
        resolution: pixels a side of the images.
        autoencoder, sampler: settings that are stored with the weights.

    Strict: every key of the file must be used or refused by name. Raises UserError. Source:
    method.md 6.
    """
    require(not out.exists(), f"out={out}: exists already and is not written over; choose another folder")
    path = find_released(released)
    state = read_state_dict(path)
    sizes = architecture(state, encoder_depth, patch_size, path.name)
    model = build_from_state(state, sizes, path.name)
    log.info("%s: read strictly, %d parameters; writing %s", path, sum(p.numel() for p in model.parameters()), out)
    side, num_classes = resolution // DOWNSAMPLING, sizes["num_classes"]
    synsets = imagenet_synsets()
    write_checkpoint(
        out,
        {
            "format_version": FORMAT_VERSION,
            "step": None,  # the release does not say
            "network": {"_target_": f"ddt.model.{type(model).__name__}", **sizes},
            "latent_shape": [sizes["in_channels"], side, side],
            "autoencoder": autoencoder,
            "sampler": sampler,
            "class_names": synsets if num_classes == len(synsets) else [str(k) for k in range(num_classes)],
            "source": {"file": path.name, "sha256": sha256(path)},
        },
        ema=model.state_dict(),
    )
