"""Loading a checkpoint for sampling: network, autoencoder, guide, and their part of the receipt."""

import logging
from pathlib import Path
from typing import Any

import torch

from ddt.autoencoder import Autoencoder, autoencoder_class, build_autoencoder
from ddt.checkpoint import format as ckpt
from ddt.checkpoint.config import other_latents
from ddt.distributed.compile import compile_blocks
from ddt.errors import UserError, require
from ddt.generation.generator import Generator, cast_weights
from ddt.precision import Dtype, choose_dtype
from ddt.sampling.settings import SamplerSettings

log = logging.getLogger(__name__)


def check_guide_config(stored: dict[str, Any], guide: dict[str, Any]) -> None:
    """Raise UserError where a guide has other latents or classes than a model."""
    key = other_latents(stored, guide)
    require(
        key is None,
        f"guide: has another {key} than the model; give a weaker checkpoint of the same data and autoencoder",
    )


def stored_autoencoder(stored: dict[str, Any], chosen: str) -> Autoencoder:
    """Return the autoencoder of a checkpoint, or the one `chosen` in its place.

    Raises UserError where it is missing, or has other weights than in training, or other latents.
    """
    settings, expected = stored["autoencoder"], stored.get("autoencoder_fingerprint")
    if chosen != "checkpoint":
        pixels = autoencoder_class(settings).pixel_space
        require(not pixels, f"autoencoder={chosen}: this model samples pixels; leave it out")
        autoencoder = build_autoencoder(autoencoder_class(settings).moved(settings, chosen))
        if expected not in (None, autoencoder.fingerprint):
            log.warning("warning: autoencoder=%s: has other weights than the model was trained with", chosen)
    else:
        try:
            autoencoder = build_autoencoder(settings)
        except UserError as error:
            raise UserError(f"{error} (or sample with autoencoder=FOLDER)") from error
        require(
            expected in (None, autoencoder.fingerprint),
            f"autoencoder.source={settings.get('source')}: holds other weights than the run was trained with; name the "
            "right ones with autoencoder=, or choose these explicitly by autoencoder=THIS_SOURCE",
        )
    try:
        autoencoder.image_size(tuple(stored["latent_shape"]))
    except UserError as error:
        raise UserError(f"{error}; choose the model's own") from error
    return autoencoder


def load_generator(
    folder: Path,
    settings: SamplerSettings,
    autoencoder: Autoencoder,
    device: torch.device,
    weights: str = "ema",
    guide: Path | None = None,
    dtype: Dtype | None = None,
    cache_gib: float = 4,
    compiled: bool = False,
) -> Generator:
    """Load a checkpoint's network and a guide's; `autoencoder` is of `stored_autoencoder`.

    dtype: None for the autoencoder's, see `choose_dtype`. Raises UserError for files that are
    missing or damaged.
    """
    dtype = choose_dtype(dtype or autoencoder.sampling_dtype, device)
    model = ckpt.load_model(folder, weights)
    guide_model = None if guide is None else ckpt.load_model(guide)
    for network in filter(None, (model, guide_model)):
        network.to(device)
        cast_weights(network, dtype)
        if compiled:
            compile_blocks(network, dynamic=True)  # batches of B and 2B, and a smaller last one
    return Generator(
        model=model,
        autoencoder=autoencoder.to(device),
        shape=tuple(ckpt.read_config(folder)["latent_shape"]),
        settings=settings,
        dtype=dtype,
        device=device,
        guide=guide_model,
        cache_bytes=cache_gib * 2**30,
        compiled=compiled,
    )


def checkpoint_receipt(folder: Path, weights: str, autoencoder: Autoencoder) -> dict[str, Any]:
    """Return the checkpoint's part of a set's receipt; autoencoder: the one that decodes."""
    stored = ckpt.read_config(folder)
    return {
        **ckpt.weights_receipt(folder, weights),
        "step": stored["step"],
        "class_names": stored["class_names"],
        "autoencoder_sha256": autoencoder.fingerprint,
    }


def guide_receipt(folder: Path) -> dict[str, Any]:
    """Return a guide's part of a set's receipt."""
    return {"ema_sha256": ckpt.weights_sha256(folder, "ema"), "step": ckpt.read_config(folder)["step"]}
