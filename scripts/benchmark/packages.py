"""Say which packages of pyproject.toml this Python lacks, before anything is imported: `python
scripts/benchmark/packages.py`.

It needs the standard library alone.
"""

import importlib.metadata
import re
import shlex
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OPTIONAL = ("diffusers", "wandb")  # without them the check leaves a part out and says so, or does not need them


def missing() -> list[str]:
    """Return the requirements, such as "tqdm>=4.66", of which nothing is installed."""
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    names = {requirement: re.split(r"[<>=\[]", requirement)[0] for requirement in wanted}
    installed = {re.sub(r"[-_.]+", "-", found.name).lower() for found in importlib.metadata.distributions()}
    return [requirement for requirement, name in names.items() if name not in installed and name not in OPTIONAL]


def main() -> None:
    """End with status 1 and one line where packages are missing."""
    lacking = missing()
    if lacking:
        wanted = shlex.join(lacking)
        sys.exit(
            f"missing packages: {', '.join(lacking)}; on a machine with a network, the same Python and system: "
            f"python -m pip wheel --wheel-dir wheels {wanted}; carry wheels/ here, then: "
            f"{shlex.quote(sys.executable)} -m pip install --no-index --find-links wheels {wanted}"
        )


if __name__ == "__main__":
    main()
