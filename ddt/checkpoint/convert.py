"""Conversion of a published checkpoint into one of this project's, with all that sampling needs."""

import dataclasses
import logging
from pathlib import Path

from ddt.autoencoder import build_autoencoder
from ddt.autoencoder.base import UnknownShape
from ddt.checkpoint.format import write_checkpoint
from ddt.checkpoint.models import PUBLISHED
from ddt.checkpoint.published import Released, find_released, read_released
from ddt.checkpoint.settings import RESOLUTIONS, ConvertSettings
from ddt.class_names import imagenet_synsets
from ddt.config import Choice, group_choice
from ddt.errors import UserError, reason, require
from ddt.files import check_new, sha256
from ddt.sampling.settings import SamplerSettings

log = logging.getLogger(__name__)


def latent_shape(released: Released, resolution: int | None) -> tuple[int, int, int]:
    """Return (C, H, W) of a published model's latents: UserError where neither the file nor
    `resolution` says it.
    """
    channels, size = released.network["in_channels"], released.latent_size
    if size is None:
        require(
            resolution is not None,
            f"resolution: {released.name} does not hold it; give {' or '.join(map(str, RESOLUTIONS))}",
        )
        assert resolution is not None
        size = resolution // released.release.downsampling
    return channels, size, size


def check_autoencoder(
    released: Released, autoencoder: Choice, shape: tuple[int, int, int], resolution: int | None
) -> None:
    """Raise UserError where an autoencoder lacks a local file, does not fit the latents of a file,
    or makes images of another `resolution`. Nothing is downloaded: of an autoencoder whose shape
    only the hub knows, and a file that does not say its latents, sampling checks it.
    """
    usual = released.release.usual_autoencoder(shape[-1])
    advice = f"give autoencoder={usual}, or another of {'×'.join(map(str, shape))} for {released.name}"
    try:
        outline = build_autoencoder(autoencoder.plain(), outline=True)
    except UnknownShape:
        if released.latent_size is None:
            return
        raise
    try:
        size = outline.image_size(shape)
        found = outline.latent_shape(3, size)
    except UserError as error:
        raise UserError(f"{reason(error)}; {advice}") from error
    require(found == shape, f"autoencoder: has latents of {'×'.join(map(str, found))} at {size} px; {advice}")
    fix = advice if released.latent_size is None else "leave it out"
    require(
        resolution in (None, size),
        f"resolution={resolution}: {released.name} makes images of {size} px with this autoencoder; {fix}",
    )


def convert(settings: ConvertSettings) -> None:
    """Write a checkpoint with a published file's EMA (or raw) weights, its autoencoder and sampler.

    Strict: every key of the file is used, or refused by name. Raises UserError, also where `out`
    exists. Source: method.md 6.
    """
    out = Path(settings.out)
    check_new(out)
    path = find_released(settings.released)
    known = PUBLISHED[settings.released].settings if settings.released in PUBLISHED else {}
    encoder_depth, resolution = (getattr(settings, key) or known.get(key) for key in ("encoder_depth", "resolution"))
    released = read_released(path, encoder_depth, settings.patch_size)
    shape = latent_shape(released, resolution)
    usual = released.release.usual_autoencoder(shape[-1])
    autoencoder = settings.autoencoder or group_choice("autoencoder", usual)
    check_autoencoder(released, autoencoder, shape, resolution)
    weights = released.weights(settings.weights)
    log.info(
        "%s: read strictly, %d parameters; writing %s", path, sum(value.numel() for value in weights.values()), out
    )
    num_classes = released.network["num_classes"]
    synsets = imagenet_synsets()
    config = {
        "step": None,  # not in the file
        "network": released.network,
        "latent_shape": list(shape),
        "autoencoder": autoencoder.plain(),
        "sampler": dataclasses.asdict(SamplerSettings(**released.release.sampler(shape))),
        "class_names": synsets if num_classes == len(synsets) else [str(k) for k in range(num_classes)],
        "source": {"file": path.name, "sha256": sha256(path)},
    }
    write_checkpoint(out, config, **{settings.weights: weights})
    chosen = "" if settings.weights == "ema" else f" weights={settings.weights}"
    log.info("sample with: python sample.py ckpt=%s%s", out, chosen)
