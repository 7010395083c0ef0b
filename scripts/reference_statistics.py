"""Write the reference statistics of a data set in ADM's format: mu, sigma, mu_s, sigma_s, images.

python scripts/reference_statistics.py data=NAME [data.root=FOLDER] features=inception [out=NPZ]
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ddt.cli import command

if TYPE_CHECKING:
    from ddt.metrics.settings import ReferenceStatisticsSettings


@command("reference_statistics", settings="ddt.metrics.settings.ReferenceStatisticsSettings")
def main(settings: ReferenceStatisticsSettings) -> None:
    """Measure on every process, and write."""
    from ddt.distributed.launch import launch
    from ddt.metrics.reference_statistics import write_reference_statistics
    from ddt.receipts import command_line

    launch(write_reference_statistics, settings.num_processes, settings, command_line())


if __name__ == "__main__":
    main()
