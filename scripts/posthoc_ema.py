"""Make EMA weights of any length from a run's snapshots (post-hoc EMA), as checkpoints.

python scripts/posthoc_ema.py run=runs/x std=0.07 [decay=0.9999] [step=700] out=DIR
python scripts/posthoc_ema.py run=runs/x std=[0.03,0.05,0.1] out=DIR   # DIR/std_0.03 …
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ddt.cli import command

if TYPE_CHECKING:
    from ddt.training.settings import PosthocSettings


@command("posthoc_ema", settings="ddt.training.settings.PosthocSettings")
def main(settings: PosthocSettings) -> None:
    """Check, combine, write."""
    from ddt.training.posthoc import posthoc_ema

    posthoc_ema(settings)


if __name__ == "__main__":
    main()
