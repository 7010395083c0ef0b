"""Conversion of a published checkpoint into one of this project's, with all that sampling needs."""

import dataclasses
import logging
from pathlib import Path

from ddt.checkpoint.format import write_checkpoint
from ddt.checkpoint.published import Part, find_released, read_released
from ddt.config import Choice
from ddt.errors import require
from ddt.files import check_new, sha256
from ddt.pictures import imagenet_synsets
from ddt.sampling.settings import SamplerSettings

log = logging.getLogger(__name__)
DOWNSAMPLING = 8  # of the autoencoder that all published models were trained with
SAMPLERS = {256: SamplerSettings(), 512: SamplerSettings(cfg_scale=3.0)}  # by resolution: FID 1.26 and 1.28


@dataclasses.dataclass(frozen=True)
class ConvertSettings:
    """See conf/convert_checkpoint.yaml. released: file, folder with one file, or hub id.

    encoder_depth (None: the undivided baseline) and patch_size are not in the file. resolution:
    pixels per side. weights: those of the file to write.
    """

    released: str
    encoder_depth: int | None
    resolution: int
    patch_size: int
    autoencoder: Choice
    out: str
    weights: Part = "ema"

    def __post_init__(self) -> None:
        require(
            self.resolution in SAMPLERS,
            f"resolution={self.resolution}: published models exist at {' and '.join(map(str, SAMPLERS))} px",
        )


def convert(settings: ConvertSettings) -> None:
    """Write a checkpoint with a published file's EMA (or raw) weights, its autoencoder and sampler.

    Strict: every key of the file is used, or refused by name. Raises UserError, also where `out`
    exists. Source: method.md 6.
    """
    out = Path(settings.out)
    check_new(out)
    path = find_released(settings.released)
    released = read_released(path, settings.encoder_depth, settings.patch_size)
    weights = released.weights(settings.weights)
    log.info(
        "%s: read strictly, %d parameters; writing %s", path, sum(value.numel() for value in weights.values()), out
    )
    side, num_classes = settings.resolution // DOWNSAMPLING, released.network["num_classes"]
    synsets = imagenet_synsets()
    config = {
        "step": None,  # not in the file
        "network": released.network,
        "latent_shape": [released.network["in_channels"], side, side],
        "autoencoder": settings.autoencoder.plain(),
        "sampler": dataclasses.asdict(SAMPLERS[settings.resolution]),
        "class_names": synsets if num_classes == len(synsets) else [str(k) for k in range(num_classes)],
        "source": {"file": path.name, "sha256": sha256(path)},
    }
    write_checkpoint(out, config, **{settings.weights: weights})
    chosen = "" if settings.weights == "ema" else f" weights={settings.weights}"
    log.info("sample with: python sample.py ckpt=%s%s", out, chosen)
