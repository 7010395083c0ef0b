"""Time every part of the project beside a plain eager implementation of the same, in one run.

python -m scripts.benchmark [model=b_8en4de] [parts=[training,sampling]] [dtype=bf16] [compile=true]
[out=FOLDER]
"""

from typing import TYPE_CHECKING

from ddt.cli import command

if TYPE_CHECKING:
    from scripts.benchmark.run import BenchmarkSettings


@command("benchmark", settings="scripts.benchmark.run.BenchmarkSettings")
def main(settings: "BenchmarkSettings") -> None:
    """Measure; a part that failed ends it with status 1."""
    from scripts.benchmark.run import benchmark

    benchmark(settings)


if __name__ == "__main__":
    main()
