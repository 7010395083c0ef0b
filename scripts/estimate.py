"""Estimate what a recipe costs before it starts: parameters, FLOPs, memory, time, disk.

python scripts/estimate.py model=xl_22en6de data=in256 [gpus=8] [device=H100 share=0.4]
[measured=FILE] [key=value …]
"""

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from ddt.cli import command

if TYPE_CHECKING:
    from ddt.training.settings import EstimateSettings

log = logging.getLogger(__name__)


@command("estimate", settings="ddt.training.settings.EstimateSettings")
def main(settings: "EstimateSettings") -> None:
    """Count, print, and write the numbers to out= if it is set."""
    from ddt.files import write_json
    from ddt.receipts import command_line
    from ddt.training.estimate import build_recipe, choose_rate, estimate, report

    recipe = build_recipe(settings)
    cost = estimate(recipe, choose_rate(settings, recipe))
    log.info("%s", report(cost))
    if settings.out is not None:
        out = Path(settings.out)
        out.parent.mkdir(parents=True, exist_ok=True)
        write_json(out, {**cost, "command": command_line()})


if __name__ == "__main__":
    main()
