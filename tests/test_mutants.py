"""Tests of the tests: each must fail on a copy of the repository that is broken in the way it is
there to catch.
"""

import shlex
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, copy_repository, run

MUTANTS = yaml.safe_load(Path(__file__).with_name("mutants.yaml").read_text())


def text_of(root, mutant):
    """The text of the file that is broken, "" where the break is a new file."""
    file = root / mutant["file"]
    return file.read_text() if file.is_file() else ""


def test_lines_to_break_are_there():
    stale = [mutant["what"] for mutant in MUTANTS if mutant["line"] not in text_of(ROOT, mutant)]
    assert stale == [], "bring them up to date in mutants.yaml"


@pytest.mark.slow
@pytest.mark.parametrize("mutant", MUTANTS, ids=[mutant["what"] for mutant in MUTANTS])
def test_a_broken_copy_fails(tmp_path, mutant):
    copy = copy_repository(tmp_path / "copy")
    broken = text_of(copy, mutant).replace(mutant["line"], mutant["broken"], 1)
    (copy / mutant["file"]).write_text(broken)
    # the slow ones too, where they are named
    done = run("-m", "pytest", "-x", *shlex.split(mutant["tests"]), cwd=copy, timeout=600)
    assert done.returncode == 1, f"no test noticed: {mutant['what']}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
