"""Write mean and variance of an RAE's latents over a training split: the file
`autoencoder.statistics`.

python scripts/latent_statistics.py data=NAME autoencoder=NAME out=FILE [key=value …]
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ddt.cli import command

if TYPE_CHECKING:
    from ddt.data.settings import StatisticsSettings


@command("latent_statistics", settings="ddt.data.settings.StatisticsSettings")
def main(settings: StatisticsSettings) -> None:
    """Encode on every process, and write."""
    from ddt.data.statistics_file import write_latent_statistics
    from ddt.distributed.launch import launch
    from ddt.receipts import command_line

    launch(write_latent_statistics, settings.num_processes, settings, command_line())


if __name__ == "__main__":
    main()
