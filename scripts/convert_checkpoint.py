"""Convert a published checkpoint into this project's format.

python scripts/convert_checkpoint.py released=FILE_OR_HUB_ID encoder_depth=22 resolution=256
[autoencoder=NAME] out=DIR
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ddt.cli import command

if TYPE_CHECKING:
    from ddt.checkpoint.settings import ConvertSettings


@command("convert_checkpoint", settings="ddt.checkpoint.settings.ConvertSettings")
def main(settings: ConvertSettings) -> None:
    """Check, read strictly, write."""
    from ddt.checkpoint.convert import convert

    convert(settings)


if __name__ == "__main__":
    main()
