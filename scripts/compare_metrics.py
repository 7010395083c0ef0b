"""Show evaluations side by side, or beside published numbers, and what in their receipts differs.

python scripts/compare_metrics.py metrics=[A,B,…] [published={fid:1.26,sfid:4.2}] [out=FILE.md]
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ddt.cli import command

if TYPE_CHECKING:
    from ddt.metrics.compare import CompareSettings


@command("compare_metrics", settings="ddt.metrics.compare.CompareSettings")
def main(settings: CompareSettings) -> None:
    """Read, compare and show the evaluations."""
    from ddt.metrics.compare import compare_metrics

    compare_metrics(settings)


if __name__ == "__main__":
    main()
