"""Measure quality against speed of sampling with encoder sharing, for every rule and budget.

python -m scripts.studies.sharing ckpt=RUN features=digits reference=data:digits out=DIR
[budgets=[25,10,5]] [repeats=3]
"""

from typing import Any

from ddt.cli import CONF, command, reference_data


@command("sharing", settings="scripts.studies.sharing.settings.SharingSettings", folder=CONF / "study")
def main(settings: Any) -> None:
    """Fit the schedules, then sample and measure every rule at every budget."""
    from scripts.studies.sharing.curve import measure

    measure(settings, reference_data(settings.reference))


if __name__ == "__main__":
    main()
