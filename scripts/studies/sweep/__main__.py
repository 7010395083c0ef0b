"""Gather the runs of a sweep into tables and a curve, with means over seeds.

python -m scripts.studies.sweep sweep=RUNS out=FOLDER [metric=fd_digits_1k] [x=model.encoder_depth]
"""

from typing import Any

from ddt.cli import CONF, command


@command("sweep", settings="scripts.studies.sweep.settings.SweepSettings", folder=CONF / "study")
def main(settings: Any) -> None:
    """Read the runs and write the report."""
    from scripts.studies.sweep.report import write_report

    write_report(settings)


if __name__ == "__main__":
    main()
