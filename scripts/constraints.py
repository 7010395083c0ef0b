"""Print the installed versions of this project's packages and of all that they need: `python
scripts/constraints.py > constraints.txt`, where `pip install -e '.[dev]'` was run and the tests
passed. Use: `pip install -e '.[dev]' -c constraints.txt`.
"""

import argparse
import importlib.metadata
import platform
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
HEADER = """\
# Versions with which the tests ran, on Python {python}, {system}. Use: pip install -e '.[dev]' -c constraints.txt
# Made by: python scripts/constraints.py > constraints.txt
# Without the CUDA packages of PyTorch, which pins them itself, and without its build's name (+cpu).
"""
CUDA = ("nvidia-", "cuda-", "triton")


def installed(requirements: Iterable[str]) -> dict[str, Version]:
    """Return name: version of the requirements and, recursively, of what they need here.

    Raises importlib.metadata.PackageNotFoundError for one that is not installed.
    """
    versions: dict[str, Version] = {}
    walked, coming = set(), [(Requirement(text), "") for text in requirements]
    while coming:
        requirement, extra = coming.pop()
        name = canonicalize_name(requirement.name)
        wanted = requirement.marker is None or requirement.marker.evaluate({"extra": extra})
        if not wanted or name.startswith(CUDA):
            continue
        versions[name] = Version(importlib.metadata.version(name))
        for extra in {"", *requirement.extras} - {extra for known, extra in walked if known == name}:
            walked.add((name, extra))
            coming += [(Requirement(text), extra) for text in importlib.metadata.requires(name) or []]
    return versions


def main() -> None:
    """Print the constraints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    try:
        versions = installed([*project["dependencies"], *project["optional-dependencies"]["dev"]])
    except importlib.metadata.PackageNotFoundError as error:
        sys.exit(f"{error.name}: not installed; run pip install -e '.[dev]'")
    print(HEADER.format(python=platform.python_version(), system=platform.system()), end="")
    for name, version in sorted(versions.items()):
        print(f"{name}=={version.public}")


if __name__ == "__main__":
    main()
