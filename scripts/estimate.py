"""Estimate what a recipe costs before it starts: parameters, FLOPs, memory, time, disk.

python scripts/estimate.py model=xl_22en6de data=in256 [gpus=8] [device=H100 share=0.4]
[measured=FILE] [plot=growth.png] [key=value …]
"""

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from ddt.cli import command
from ddt.errors import require

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
    encoder = recipe.objective.denoiser.shares_encoder
    require(settings.plot is None or encoder, f"plot={settings.plot}: needs a network with an encoder; choose a DDT")
    cost = estimate(recipe, choose_rate(settings, recipe))
    log.info("%s", report(cost))
    if settings.plot is not None:
        from ddt.training.cost_growth import plot_growth

        plot_growth(settings, recipe, Path(settings.plot))
    if settings.out is not None:
        out = Path(settings.out)
        out.parent.mkdir(parents=True, exist_ok=True)
        write_json(out, {**cost, "command": command_line()})


if __name__ == "__main__":
    main()
