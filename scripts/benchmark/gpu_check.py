"""Check on a GPU, without a network, that everything works there, and how fast it is.

bash scripts/gpu_check.sh OUT [minutes=9] [checks=[…]] [key=value …]
"""

from typing import Any

from ddt.cli import command


@command("gpu_check", settings="scripts.benchmark.settings.GpuCheckSettings")
def main(settings: Any) -> None:
    """Run the checks and print the table; a failed one ends it with status 1."""
    from scripts.benchmark.all_checks import check_gpu

    check_gpu(settings)


if __name__ == "__main__":
    main()
