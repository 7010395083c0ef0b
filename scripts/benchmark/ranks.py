"""Simulate a training step on many GPUs: memory, bytes sent, and what of the sending is hidden.

python -m scripts.benchmark.ranks [model=xl_22en6de] [ranks=[8,64,1024]] [images=32] [out=FILE.json]
"""

from typing import Any

from ddt.cli import command


@command("ranks", settings="scripts.benchmark.settings.RanksSettings")
def main(settings: Any) -> None:
    """Simulate, report."""
    from scripts.benchmark.many_ranks import report

    report(settings)


if __name__ == "__main__":
    main()
