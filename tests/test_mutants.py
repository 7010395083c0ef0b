"""Tests of the tests: each must fail on a copy of the repository that is broken in the way it is
there to catch.
"""

import shlex
from pathlib import Path

import pytest
import yaml
from conftest import copy_repository, run

MUTANTS = yaml.safe_load(Path(__file__).with_name("mutants.yaml").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("mutant", MUTANTS, ids=[mutant["what"] for mutant in MUTANTS])
def test_a_broken_copy_fails(tmp_path, mutant):
    copy = copy_repository(tmp_path / "copy")
    file = copy / mutant["file"]
    text = file.read_text() if file.is_file() else ""
    assert mutant["line"] in text, (
        f"{mutant['file']} has no `{mutant['line']}` any more: bring `{mutant['what']}` in mutants.yaml up to date"
    )
    file.write_text(text.replace(mutant["line"], mutant["broken"], 1))
    # the slow ones too, where they are named
    done = run("-m", "pytest", "-x", *shlex.split(mutant["tests"]), cwd=copy, timeout=600)
    assert done.returncode == 1, f"no test noticed: {mutant['what']}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
