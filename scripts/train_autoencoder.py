"""Train a small KL autoencoder on a data set, for latents without a published one.

python scripts/train_autoencoder.py data=photos out=runs/photos_autoencoder
"""

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from ddt.cli import command

if TYPE_CHECKING:
    from ddt.training.autoencoder import CommandSettings

log = logging.getLogger(__name__)


@command("train_autoencoder", settings="ddt.training.autoencoder.CommandSettings")
def main(settings: "CommandSettings") -> None:
    """Compose, check, train, write."""
    from ddt.training.autoencoder import train_autoencoder

    out, name = settings.out, settings.choices["data"]
    images, held_out = (settings.data.build(split=split) for split in ("train", "test"))
    data = {"name": name, **settings.data.settings, **images.inferred}
    report = train_autoencoder(images, held_out, settings.own, Path(out), data)
    log.info("%s: PSNR %.2f dB on held-out images, %.0f s", out, report["psnr"], report["seconds"])
    log.info("train in its latents with: python train.py data=%s autoencoder=kl autoencoder.source=%s …", name, out)


if __name__ == "__main__":
    main()
