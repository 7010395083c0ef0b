"""Time every part of the project beside a plain eager implementation, in one run.

python -m scripts.benchmark [model=b_8en4de] [parts=[training,sampling]] [dtype=bf16] [out=FOLDER]
"""

from typing import Any

from ddt.cli import command


@command("benchmark", settings="scripts.benchmark.settings.BenchmarkSettings")
def main(settings: Any) -> None:
    """Measure; a failed part ends it with status 1."""
    from scripts.benchmark.run import benchmark

    benchmark(settings)


if __name__ == "__main__":
    main()
