"""Sample from a run or checkpoint: `python sample.py ckpt=RUN_OR_CHECKPOINT [key=value …]`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ddt.cli import CONF, command

if TYPE_CHECKING:
    from ddt.generation.settings import SampleSettings


@command("sample", settings="ddt.generation.settings.SampleSettings", folder=CONF / "sample")
def main(settings: SampleSettings) -> None:
    """Sample the images and write them."""
    from ddt.generation.run import sample_checkpoint

    sample_checkpoint(settings)


if __name__ == "__main__":
    main()
