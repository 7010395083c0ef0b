"""Convert a published checkpoint into this project's format.

python scripts/convert_checkpoint.py released=FILE_OR_HUB_ID encoder_depth=22 resolution=256
[autoencoder=sd_ft_ema] out=DIR
"""

import logging
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from hydra import compose
from omegaconf import DictConfig, OmegaConf

from ddt.checkpoint.convert import convert
from ddt.cli import CONF, arguments_for, checked, composing, entry_point
from ddt.errors import UserError

log = logging.getLogger(__name__)


def conversion(released: str, encoder_depth: int | None, patch_size: int, resolution: int, out: str) -> None:
    """Hold the types of this script's settings."""


def published_sampler(resolution: int | None) -> dict[str, Any]:
    """Return the published sampler's settings at a resolution; raise UserError where no model was
    published.
    """
    known = sorted(int(path.stem.removeprefix("xl_")) for path in (CONF / "sampler").glob("xl_*.yaml"))
    if resolution not in known:
        raise UserError(f"resolution={resolution}: published models exist at {' and '.join(map(str, known))} px")
    with composing(CONF):
        sampler = checked(compose("train", overrides=[f"sampler=xl_{resolution}"]).sampler)
    return {key: value for key, value in sampler.items() if key != "_target_"}


def convert_published(released: str, encoder_depth: int | None, resolution: int | None, out: Path) -> None:
    """Convert a published checkpoint with the autoencoder and the sampler it was published with."""
    sampler = published_sampler(resolution)
    assert resolution is not None, "known by now"
    autoencoder = OmegaConf.to_container(OmegaConf.load(CONF / "autoencoder" / "sd_ft_ema.yaml"))
    convert(released, encoder_depth, 2, resolution, autoencoder, sampler, out)  # type: ignore[arg-type]


@entry_point("convert_checkpoint")
def main(cfg: DictConfig) -> None:
    """Check, read strictly, write."""
    config = checked(cfg)
    values = arguments_for(conversion, config)
    out = Path(values.pop("out"))
    convert(**values, autoencoder=config["autoencoder"], sampler=published_sampler(values["resolution"]), out=out)
    log.info("sample with: python sample.py ckpt=%s", out)


if __name__ == "__main__":
    main()
