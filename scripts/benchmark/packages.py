"""Name the packages of pyproject.toml that this Python lacks, with the standard library alone."""

import importlib.metadata
import re
import shlex
import sys
import tomllib
from pathlib import Path

OPTIONAL = ("diffusers", "wandb")  # without diffusers one check is not run; wandb is unused


def missing() -> list[str]:
    """Return the requirements, such as "tqdm>=4.66", of which nothing is installed."""
    pyproject = Path(__file__).resolve().parents[2] / "pyproject.toml"
    requirements = tomllib.loads(pyproject.read_text())["project"]["dependencies"]
    present = {re.sub(r"[-_.]+", "-", package.name).lower() for package in importlib.metadata.distributions()}
    return [each for each in requirements if re.split(r"[<>=\[]", each)[0] not in {*present, *OPTIONAL}]


if __name__ == "__main__" and missing():
    wheels = shlex.join(missing())
    sys.exit(
        f"missing packages: {', '.join(missing())}; on a machine with a network, the same Python and system: "
        f"python -m pip wheel --wheel-dir wheels {wheels}; carry wheels/ here, then: "
        f"{shlex.quote(sys.executable)} -m pip install --no-index --find-links wheels {wheels}"
    )
