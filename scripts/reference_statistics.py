"""Write the reference statistics of a data set, in ADM's format: mu, sigma, mu_s, sigma_s, and some
images.

python scripts/reference_statistics.py data=NAME [data.root=FOLDER] features=inception
[out=FILE.npz] [key=value …]
"""

from __future__ import annotations

import shlex
import sys
from typing import TYPE_CHECKING

from ddt.cli import command

if TYPE_CHECKING:
    from ddt.metrics.reference_statistics import ReferenceStatisticsSettings


@command("reference_statistics", settings="ddt.metrics.reference_statistics.ReferenceStatisticsSettings")
def main(settings: ReferenceStatisticsSettings) -> None:
    """Measure on every process, and write."""
    from ddt.distributed.launch import launch
    from ddt.metrics.reference_statistics import write_reference_statistics

    command_line = shlex.join(["python", *sys.argv])
    launch(write_reference_statistics, settings.num_processes, settings, command_line)


if __name__ == "__main__":
    main()
