"""Imports run one way: import-linter holds the layers of ddt/, this file the commands above."""

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

COMMANDS = [ROOT / f"{name}.py" for name in ("train", "sample", "evaluate")]
COMMANDS += sorted((ROOT / "scripts").rglob("*.py"))


def imported(path):
    """The modules that a file imports, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            yield node.module or ""
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


@pytest.mark.parametrize("path", COMMANDS, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_import_ddt_and_their_own_folder_alone(path):
    folder = ".".join(path.parent.relative_to(ROOT).parts)
    for module in imported(path):
        assert module.split(".")[0] not in ("train", "sample", "evaluate"), module
        if module.startswith("scripts"):
            assert folder.startswith("scripts."), module
            assert module.startswith((folder, "scripts.studies.study")), module


def test_an_upward_import_is_noticed(tmp_path):
    """The contracts hold for this tree, and fail where ddt.flow imports ddt.training, a layer
    imports ddt.cli, or a new module imports Hydra.
    """
    linter = Path(sys.executable).with_name("lint-imports")
    for name in ("ddt", "pyproject.toml"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copyfile
        copy(ROOT / name, tmp_path / name)

    def lint():
        return subprocess.run([linter, "--no-cache"], cwd=tmp_path, capture_output=True, text=True, check=False)

    assert lint().returncode == 0
    planted = {"flow": "ddt.training.ema", "training.run": "ddt.cli", "model.new": "hydra"}
    for module, imported_module in planted.items():
        with (tmp_path / "ddt" / f"{module.replace('.', '/')}.py").open("a") as file:
            file.write(f"\nimport {imported_module}\n")
    done = lint()
    assert done.returncode == 1
    for module, imported_module in planted.items():
        assert f"ddt.{module} -> {imported_module}" in done.stdout
