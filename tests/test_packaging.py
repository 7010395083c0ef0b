"""What a fresh machine installs and runs."""

import ast
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, copy_repository, run, thinned
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import ddt
from scripts.constraints import installed as installed_versions

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_conda_and_pip_install_the_same_packages():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    *conda, pip = environment["dependencies"]
    assert f"python{PYPROJECT['project']['requires-python']}" in conda
    assert set(pip["pip"]) == {*PYPROJECT["project"]["dependencies"], "--editable ."}


def test_the_tests_have_what_the_photos_the_app_the_pages_and_the_sweeps_on_slurm_need():
    extras = PYPROJECT["project"]["optional-dependencies"]
    assert {*extras["photos"], *extras["app"], *extras["docs"], *extras["slurm"]} <= set(extras["dev"])


def test_constraints_hold_a_version_of_each_package_that_its_bounds_allow():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    # no path, no URL, and no build such as 2.11.0+cpu, which is on another index
    pins = dict(re.fullmatch(r"([a-z0-9-]+)==([a-z0-9.]+)", line).groups() for line in lines if line[0] != "#")
    assert not [name for name in pins if name.startswith(("nvidia-", "cuda-", "triton", "ddt"))]
    extras = PYPROJECT["project"]["optional-dependencies"]
    for text in [*PYPROJECT["project"]["dependencies"], *(text for extra in extras.values() for text in extra)]:
        requirement = Requirement(text)
        assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)], prereleases=True), text


def test_constraints_are_what_is_installed_of_the_packages_and_all_that_they_need(monkeypatch):
    needs = {
        "torch": ["SymPy>=1", "triton==3; sys_platform != 'x'", "nvidia-cublas==13", "colorama; sys_platform == 'x'"],
        "sympy": ["mpmath", "pytest; extra == 'dev'"],
        "docs": ["mpmath", "griffe; extra == 'python'", "other; extra == 'ruby'"],
    }  # fmt: skip
    versions = {"torch": "2.14.1+cpu", "sympy": "1.14", "mpmath": "1.3", "docs": "1.0", "griffe": "2.0"}
    monkeypatch.setattr(importlib.metadata, "requires", needs.get)
    monkeypatch.setattr(importlib.metadata, "version", versions.__getitem__)
    found = installed_versions(["torch>=2", "docs", "docs[python]>=1"])
    assert {name: version.public for name, version in found.items()} == {**versions, "torch": "2.14.1"}


def test_docker_is_not_sent_what_git_ignores():
    ignored = [line.rstrip("/") for line in (ROOT / ".gitignore").read_text().splitlines()]
    patterns = (ROOT / ".dockerignore").read_text().splitlines()
    assert {".git", *ignored} <= {pattern.removeprefix("**/") for pattern in patterns}
    deep = [name for name in ignored if name != ".venv"]  # git ignores them in every folder
    assert {f"**/{name}" for name in deep} <= set(patterns)


def test_the_hooks_of_pre_commit_are_the_checks_of_the_test_command():
    """The same lines in the same order, on all files, by the tools of .venv."""
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert {(hook["language"], hook["pass_filenames"]) for hook in repository["hooks"]} == {("system", False)}
    checks = re.findall(r"^ +(\.venv/bin/.+)$", (ROOT / "scripts" / "test.sh").read_text(), re.M)
    assert len(checks) == 4
    assert [hook["entry"] for hook in repository["hooks"]] == checks


def sources(*folders):
    return [*ROOT.glob("*.py"), *(path for folder in folders for path in (ROOT / folder).rglob("*.py"))]


def test_every_import_is_a_declared_dependency():
    """Packages imported anywhere in the code, by the names they are installed under."""
    aliases = {
        "PIL": "pillow",
        "sklearn": "scikit-learn",
        "hydra": "hydra-core",
        "huggingface_hub": "huggingface-hub",
        "torch_fidelity": "torch-fidelity",
        "yaml": "pyyaml",
    }
    extras = PYPROJECT["project"]["optional-dependencies"]
    named = PYPROJECT["project"]["dependencies"] + extras["adaptive"] + extras["app"] + extras["dev"]
    declared = {re.split(r"[<>=\[]", d)[0] for d in named}
    used = set()
    for path in sources("ddt", "scripts"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                used |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                used.add(node.module.split(".")[0])
    used -= set(sys.stdlib_module_names) | {"ddt", "scripts", "triton"}  # torch brings Triton on Linux
    assert {aliases.get(name, name) for name in used} <= declared


def test_every_package_is_installed():
    """Discovery of packages asks for an `__init__.py` in each folder."""
    assert [
        folder for folder in {path.parent for path in sources("ddt")} - {ROOT} if not (folder / "__init__.py").is_file()
    ] == []


def test_hydra_stops_at_one_module():
    for path in sources("ddt", "scripts"):
        imports = re.search(r"^\s*(import|from) (hydra|omegaconf)", path.read_text(), re.M)
        assert not imports or path == ROOT / "ddt" / "cli.py", path


def test_entry_points_import_nothing_of_each_other():
    for path in sources():
        assert not re.search(r"^\s*(import|from) (train|sample|evaluate|scripts)\b", path.read_text(), re.M), path


def test_scripts_are_executable_and_sound():
    for path in [ROOT / ".ci" / "run", *(ROOT / "scripts").glob("*.sh"), *(ROOT / "scripts").rglob("*.sbatch")]:
        assert os.access(path, os.X_OK), path
        subprocess.run(["bash", "-n", path], check=True)
    assert "scripts/test.sh" in (ROOT / ".ci" / "run").read_text()
    assert "--slow" not in (ROOT / ".ci" / "run").read_text()


def test_top_level_is_what_scripts_rely_on():
    for name in [
        "train.py",
        "sample.py",
        "evaluate.py",
        "environment.yml",
        "README.md",
        "CHANGELOG.md",
        "LICENSE",
        "CITATION.cff",
        "Dockerfile",
        "constraints.txt",
    ]:
        assert (ROOT / name).is_file(), name
    assert set(PYPROJECT["project"]["optional-dependencies"]) >= {"dev", "app"}


def test_citation_parses():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["preferred-citation"]["year"] == 2025


@pytest.mark.parametrize(
    "script", thinned(["train.py", "sample.py", "evaluate.py", "scripts/convert_checkpoint.py"], 2)
)
def test_help_and_config_are_shown(script):
    done = run(ROOT / script, "--cfg", "job")
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) > 4


def test_public_names_are_those_of_their_modules():
    for name in ddt.__all__:
        assert getattr(ddt, name) is not None
    assert set(ddt.HOMES) == set(ddt.__all__) - {"UserError", "__version__"}
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = ddt.nothing


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The commands of a wheel of this repository, installed beside the packages that it needs."""
    folder = tmp_path_factory.mktemp("wheel")
    copy_repository(folder / "repository")
    build = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    offline = ["--quiet", "--no-deps", "--no-index"]
    wheel = ["wheel", *offline, "--no-build-isolation", "-w", folder / "dist", folder / "repository"]
    subprocess.run([*build, *wheel], check=True, cwd=folder)
    shutil.rmtree(folder / "repository")
    venv.create(folder / "environment", with_pip=False, symlinks=True)
    (packages,) = (folder / "environment").glob("lib/python*/site-packages")
    (packages / "needed.pth").write_text(str(Path(pytest.__file__).parent.parent))
    install = ["--python", folder / "environment" / "bin" / "python", "install", *offline, *(folder / "dist").iterdir()]
    subprocess.run([*build, *install], check=True, cwd=folder)
    return folder / "environment" / "bin"


def run_installed(program, *arguments, cwd):
    """Run a program outside the repository; it must end without an error."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        [program, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_wheel_has_commands_and_settings(installed, tmp_path):
    assert {path.name for path in installed.glob("ddt-*")} == {"ddt-app", "ddt-evaluate", "ddt-sample", "ddt-train"}
    assert "ddt.data.images.Digits" in run_installed(installed / "ddt-train", "--cfg", "job", cwd=tmp_path)
    where = (
        "import ddt.cli as c, sys; assert str(c.CONF).startswith(sys.prefix), c.CONF; print(*c.CONF.rglob('*.yaml'))"
    )
    style = "from ddt.figures import STYLE; print(STYLE.is_file())"
    assert run_installed(installed / "python", "-c", style, cwd=tmp_path) == "True\n"
    (packages,) = installed.parent.glob("lib/python*/site-packages")
    assert (packages / "ddt" / "py.typed").is_file()  # its annotations are for type checkers of others too
    needed = "from ddt.config import missing_package as f; print(f('gradio', 'x'))"
    said = run_installed(installed / "python", "-c", needed, cwd=tmp_path)
    assert said == "x: needs the package gradio; run pip install 'ddt-diffusion[app]'\n"
    found = run_installed(installed / "python", "-c", where, cwd=tmp_path).split()
    ours = [path for path in (ROOT / "conf").glob("**/*.yaml") if not path.parent.is_symlink()]
    assert {Path(path).name for path in found} == {path.name for path in ours}


@pytest.mark.slow
def test_a_wheel_runs_the_steps_of_the_demo(installed, tmp_path):
    """As `bash scripts/demo.sh` does, outside the repository, with a shorter training."""
    run_installed(installed / "ddt-train", "name=demo", "trainer.max_steps=20", cwd=tmp_path)
    samples = ["ckpt=runs/demo", "num_samples=20", "batch_size=10", "out=runs/demo/samples"]
    run_installed(installed / "ddt-sample", *samples, cwd=tmp_path)
    evaluation = ["samples=runs/demo/samples", "reference=data:digits", "features=digits"]
    run_installed(installed / "ddt-evaluate", *evaluation, cwd=tmp_path)
    assert (tmp_path / "runs" / "demo" / "samples" / "grid.png").is_file()
    assert (tmp_path / "runs" / "demo" / "samples" / "metrics.json").is_file()
