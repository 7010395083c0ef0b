"""Reconstruct images by an autoencoder: PSNR, and a set that evaluate.py scores (rFID).

python scripts/reconstruct.py data=NAME autoencoder=NAME out=DIR [split=test num_images=… key=value]
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ddt.cli import command

if TYPE_CHECKING:
    from ddt.metrics.settings import ReconstructSettings


@command("reconstruct", settings="ddt.metrics.settings.ReconstructSettings")
def main(settings: ReconstructSettings) -> None:
    """Encode, decode and write, on one process."""
    from ddt.metrics.reconstruct import write_reconstructions
    from ddt.receipts import command_line

    write_reconstructions(settings, command_line())


if __name__ == "__main__":
    main()
