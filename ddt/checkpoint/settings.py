"""Settings of the conversion and the export of a checkpoint, parsed before torch is imported."""

import dataclasses
from pathlib import Path
from typing import Literal

from ddt.checkpoint.models import check_exist, check_released
from ddt.config import Choice
from ddt.errors import require

Part = Literal["ema", "model"]  # weights of a published file
Form = Literal["hub", "diffusers", "released"]
RESOLUTIONS = (256, 512)  # of all published models
SUFFIXES = (".ckpt", ".safetensors")  # of the published files that are written


@dataclasses.dataclass(frozen=True)
class ConvertSettings:
    """See conf/convert_checkpoint.yaml. released: as of `find_released`.

    autoencoder: None for the published one. encoder_depth, resolution (pixels per side),
    patch_size: None where the file says it.
    encoder_depth of the undivided baseline is None. weights: those of the file to write.
    """

    released: str
    out: str
    autoencoder: Choice | None = None
    encoder_depth: int | None = None
    resolution: int | None = None
    patch_size: int | None = None
    weights: Part = "ema"

    def __post_init__(self) -> None:
        require(
            self.resolution in (None, *RESOLUTIONS),
            f"resolution={self.resolution}: published models exist at {' and '.join(map(str, RESOLUTIONS))} px",
        )
        check_released(self.released, "released")


@dataclasses.dataclass(frozen=True)
class ExportSettings:
    """See conf/export/export.yaml. ckpt: run, checkpoint, export or hub id.

    out: folder to write, or file of format=released. autoencoder: "checkpoint", or the hub id or
    new folder of it or another one. metrics: a metrics.json or its folder. push: hub id.
    """

    ckpt: str
    format: Form
    out: str
    weights: str = "ema"
    autoencoder: str = "checkpoint"
    metrics: str | None = None
    license: str | None = None
    push: str | None = None

    def __post_init__(self) -> None:
        check_exist(self.ckpt)
        if self.format != "released":
            return
        require(
            Path(self.out).suffix in SUFFIXES,
            f"out={self.out}: is to be one file; give a name that ends in {' or '.join(SUFFIXES)}",
        )
        chosen = {"autoencoder": self.autoencoder if self.autoencoder != "checkpoint" else None}
        for key, value in {**chosen, "metrics": self.metrics, "license": self.license, "push": self.push}.items():
            require(value is None, f"{key}={value}: has no effect with format=released, which holds weights alone")
