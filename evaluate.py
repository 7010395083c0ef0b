"""Evaluate samples: `python evaluate.py samples=… reference=… features=… [out=DIR]`.

`features=inception` gives ADM's metrics, `features=dinov2` FD-DINOv2; with the features of a small
data set's classifier the reference is `data:NAME`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ddt.cli import command, reference_data

if TYPE_CHECKING:
    from ddt.metrics.settings import EvaluateSettings


@command("evaluate", settings="ddt.metrics.settings.EvaluateSettings")
def main(settings: EvaluateSettings) -> None:
    """Check the inputs, then measure on every process."""
    from ddt.distributed.launch import launch
    from ddt.metrics.evaluate import run
    from ddt.metrics.images import open_images

    data = reference_data(settings.reference)
    samples = open_images(Path(settings.samples), "samples")
    launch(run, settings.num_processes, settings, data, samples)


if __name__ == "__main__":
    main()
