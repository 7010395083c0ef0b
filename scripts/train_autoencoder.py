"""Train a small KL autoencoder on a data set, for latents without a published one.

python scripts/train_autoencoder.py data=photos out=runs/photos_autoencoder
"""

import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from ddt.cli import checked, entry_point
from ddt.config import build, check_arguments
from ddt.errors import UserError
from ddt.training.autoencoder import AutoencoderSettings, train_autoencoder

log = logging.getLogger(__name__)
OWN = tuple(AutoencoderSettings.__dataclass_fields__)


def destination(out: str) -> None:
    """Hold the type of the setting that is not the autoencoder's."""


@entry_point("train_autoencoder", uses=("data", "seed"))
def main(cfg: DictConfig) -> None:
    """Compose, check, train, write."""
    config = checked(cfg)
    values, problems = check_arguments(AutoencoderSettings, {key: config[key] for key in OWN}, "")
    paths, more = check_arguments(destination, {"out": config["out"]}, "")
    if problems + more:
        raise UserError("\n".join(problems + more))
    settings = AutoencoderSettings(**values)
    images, held_out = (build(config["data"])(split=split) for split in ("train", "test"))
    data = {"name": HydraConfig.get().runtime.choices.data}
    data |= {key: value for key, value in config["data"].items() if not key.startswith("_")}
    report = train_autoencoder(images, held_out, settings, Path(paths["out"]), data)
    log.info("%s: PSNR %.2f dB on held-out images, %.0f s", paths["out"], report["psnr"], report["seconds"])
    log.info("train in its latents with: python train.py data=%s autoencoder=kl autoencoder.source=%s …",
             data["name"], paths["out"])  # fmt: skip


if __name__ == "__main__":
    main()
