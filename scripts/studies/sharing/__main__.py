"""Measure the quality of shared sampling against its speed, for every rule and budget, on a trained
model.

python -m scripts.studies.sharing ckpt=RUN features=digits reference=data:digits out=DIR
[budgets=[25,10,5]] [repeats=3]
"""

from typing import TYPE_CHECKING

from ddt.cli import CONF, command, reference_data

if TYPE_CHECKING:
    from scripts.studies.sharing.curve import SharingSettings


@command("sharing", settings="scripts.studies.sharing.curve.SharingSettings", folder=CONF / "study")
def main(settings: "SharingSettings") -> None:
    """Check, fit the schedules, sample and measure every rule at every budget."""
    from scripts.studies.sharing.curve import measure

    measure(settings, reference_data(settings.reference))


if __name__ == "__main__":
    main()
