"""Count the kernels of compiled blocks on an H100, and their bytes, without a GPU.

python -m scripts.benchmark.kernels [model=xl_22en6de] [batch_size=64] [dtype=bf16] [out=FILE.json]
"""

from typing import Any

from ddt.cli import command


@command("kernels", settings="scripts.benchmark.settings.KernelSettings")
def main(settings: Any) -> None:
    """Compile, count, report."""
    from scripts.benchmark.traffic import report

    report(settings)


if __name__ == "__main__":
    main()
