"""A diffusers folder loads and samples where this project is not installed."""

import ast
import importlib.metadata
import json
import os
import subprocess
import sys
import venv
from pathlib import Path

import numpy as np
import pytest
from conftest import SMALL, WIDE, small_network, small_vae
from packaging.requirements import Requirement
from pipelines import CALL, exported, exported_rae, sampled

from ddt.pipeline import COMPONENTS, DDTPipeline
from ddt.pipeline.one_file import merge

pytestmark = pytest.mark.usefixtures("one_thread")


def with_dependencies(*names):
    """The installed distributions of these names and of all that they ask for."""
    found, asked = {}, list(names)
    while asked:
        name = asked.pop()
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # of another platform
        if distribution.name not in found:
            found[distribution.name] = distribution
            needs = map(Requirement, distribution.requires or ())
            asked += [need.name for need in needs if need.marker is None or need.marker.evaluate({"extra": ""})]
    return list(found.values())


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The interpreter of an environment with torch, diffusers, safetensors and what they need."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False, symlinks=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    for distribution in with_dependencies("torch", "diffusers", "safetensors"):
        for top in {path.parts[0] for path in distribution.files} - {"..", "__pycache__"}:
            place = packages / top
            if not place.exists():
                place.symlink_to(distribution.locate_file(top))
    return folder / "bin" / "python"


def run_alone(python, folder, jobs):
    """The images of jobs, see alone.py, by an environment's interpreter."""
    (folder / "jobs.json").write_text(json.dumps(jobs))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        [python, Path(__file__).with_name("alone.py"), folder / "jobs.json", folder],
        env={**environment, "HF_MODULES_CACHE": str(folder / "modules"), "OMP_NUM_THREADS": "1"},
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "might require" not in done.stderr, done.stderr  # diffusers' advice on what a file imports
    images = [np.load(folder / f"{number:03d}.npy") for number in range(len(jobs))]
    return [each[..., None] if each.ndim == 3 else each for each in images]


@pytest.mark.slow
def test_it_samples_the_images_of_sample_py(alone, tmp_path):
    """Bit for bit, by arguments of a call: of latents, with a base head, of a DiT^DH, of an RAE."""
    vae = small_vae(tmp_path / "vae", levels=2, scaling_factor=0.5, shift_factor=0.1)
    latents = exported(tmp_path / "latents", vae=vae)
    network = {"_target_": "ddt.model.DDT", **SMALL, "in_channels": 1, "base_depth": 1}
    head = exported(tmp_path / "head", model=small_network("ddt", in_channels=1, base_depth=1), network=network)
    network = {"_target_": "ddt.model.DiTDH", **SMALL, **WIDE, "in_channels": 1}
    sampler = {"num_steps": 4, "cfg_interval": None, "last_step": None, "t_end": 0.9, "timeshift": 2.0}
    wide = exported(tmp_path / "wide", model=small_network("ditdh", in_channels=1), network=network, sampler=sampler)
    rae = exported_rae(tmp_path / "rae")
    token = exported_rae(tmp_path / "token", class_token=64, decode_dtype="bf16")

    interval = {"guidance_scale": 1.5, "guidance_interval": [0.1, 0.6]}
    internal = {"internal_scale": 1.7, "internal_interval": [0.0, 0.6]}
    shared = {"recompute": "uniform:2", "forecast_order": 1}
    cases = [  # checkpoint and folder, how it is loaded, arguments of the call, settings of sample.py
        (latents, {}, {}, []),
        (latents, {"custom": True}, shared, ["recompute=uniform:2", "forecast_order=1"]),
        (latents, {"hub": True, "custom": True}, {}, []),
        (latents, {"hub": True}, interval, ["cfg_scale=1.5", "cfg_interval=[0.1,0.6]"]),
        (head, {"again": str(tmp_path / "again")}, internal, ["internal_scale=1.7", "internal_interval=[0.0,0.6]"]),
        (wide, {"dtype": "bfloat16"}, {}, ["dtype=bf16"]),
        (wide, {}, {"recompute": "dp:2", "solver": "heun"}, ["recompute=dp:2", "sampler=heun"]),
        (rae, {}, shared, ["recompute=uniform:2", "forecast_order=1"]),
        (rae, {"hub": True, "custom": True}, {}, []),
        (rae, {"again": str(tmp_path / "rae_again")}, {}, []),
        (token, {"custom": True, "dtype": "bfloat16"}, {}, ["dtype=bf16"]),
    ]
    jobs = [{"folder": str(folder), **how, "call": CALL | call} for (_, folder), how, call, _ in cases]
    found = run_alone(alone, tmp_path, jobs)
    for number, (((checkpoint, _), _, _, settings), images) in enumerate(zip(cases, found, strict=True)):
        assert np.array_equal(images, sampled(checkpoint, tmp_path / f"set{number}", *settings)), number
    assert not np.array_equal(found[0], found[1])
    for saved, (_, folder) in ((tmp_path / "again", head), (tmp_path / "rae_again", rae)):
        again = {path.relative_to(saved) for path in saved.rglob("*.py")}
        assert again == {path.relative_to(folder) for path in folder.rglob("*.py")}
        for path in again:  # saved where this project is not, the code is the same
            assert (saved / path).read_text() == (folder / path).read_text()


@pytest.mark.parametrize("kind", [DDTPipeline, *COMPONENTS.values()], ids=lambda kind: kind.__name__)
def test_its_code_imports_nothing_of_this_project(kind):
    """Nor anything but what diffusers, torch and safetensors bring."""
    text = kind.code()
    usual = {"torch", "diffusers", "safetensors", "numpy", "PIL", "tqdm", *sys.stdlib_module_names}
    for node in ast.walk(ast.parse(text)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) else []
        assert {name.partition(".")[0] for name in names} <= usual
    compile(text, kind.__name__, "exec")


def test_what_cannot_be_merged_is_said(tmp_path, monkeypatch):
    """Two definitions of one name, and a module that is used whole."""
    package = tmp_path / "ddt_other"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "a.py").write_text("def f():\n    return 1\n")
    (package / "b.py").write_text("from ddt_other.a import f as g\n\n\ndef f():\n    return g()\n")
    (package / "c.py").write_text("from ddt_other import a\n\n\ndef h():\n    return a.f()\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("ddt.pipeline.one_file.PACKAGE", "ddt_other")
    with pytest.raises(AssertionError, match="two modules define it"):
        merge("ddt_other.b", "f")
    with pytest.raises(AssertionError, match="is no definition"):
        merge("ddt_other.c", "h")
