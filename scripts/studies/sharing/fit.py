"""Fit a schedule to a checkpoint and its sampler, for `sample.py recompute=schedule.json`.

python -m scripts.studies.sharing.fit ckpt=RUN_OR_CHECKPOINT budget=10 out=FILE.json [num_steps=…]
"""

from typing import Any

from ddt.cli import CONF, command


@command("sharing_fit", settings="scripts.studies.sharing.settings.FitSettings", folder=CONF / "study")
def main(settings: Any) -> None:
    """Fit the schedule, and write it with a figure of the similarities."""
    from scripts.studies.sharing.schedule import fit

    fit(settings)


if __name__ == "__main__":
    main()
