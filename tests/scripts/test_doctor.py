"""The doctor names what is missing with the command that adds it."""

import importlib.metadata

import huggingface_hub.constants
import pytest
import torch
from conftest import run

from ddt.distributed import compile as compiling
from ddt.metrics.settings import WEIGHTS_NAME
from scripts.doctor import machine, packages, unmet, weights


def test_versions_are_compared_with_their_bounds(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", {"torch": "2.9.1", "hydra-core": "1.3.2"}.__getitem__)
    assert unmet(["torch>=2.9", "hydra-core>=1.3.2,<1.4"]) == []
    assert unmet(["torch>=2.11", "hydra-core<1.3"]) == [
        "torch 2.9.1, needed: torch>=2.11",
        "hydra-core 1.3.2, needed: hydra-core<1.3",
    ]


def test_a_missing_package_costs_its_extra_alone(monkeypatch):
    version = importlib.metadata.version

    def without_gradio(name):
        if name == "gradio":
            raise importlib.metadata.PackageNotFoundError
        return "2.11.0+cu128" if name == "torch" else version(name)

    monkeypatch.setattr(importlib.metadata, "version", without_gradio)
    found = {check.name: check for check in packages()}
    assert found["packages: required"].state == "ok"
    app = found["packages: app"]
    assert (app.state, app.fix) == ("missing", "pip install -e '.[app]'")
    assert app.note.startswith("gradio")
    assert app.note.endswith(" is not installed")


def test_weights_are_checked_where_they_are_loaded_from(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    found = {check.name: check for check in weights()}
    assert {check.state for check in found.values()} == {"download"}
    vae = found["SD-VAE latents"].fix
    assert vae.startswith("hf download stabilityai/sd-vae-ft-ema config.json diffusion_pytorch_model.safetensors")
    assert "timm/vit_base_patch14_dinov2.lvd142m" in found["REPA (DINOv2-B)"].fix
    assert "timm/vit_large_patch14_dinov2.lvd142m" in found["FD-DINOv2 (DINOv2-L)"].fix
    revision = vae.split("--revision ")[1].split()[0]
    for folder, names in (
        (f"models--stabilityai--sd-vae-ft-ema/snapshots/{revision}", vae.split()[3:5]),
        ("checkpoints", [WEIGHTS_NAME]),
    ):
        (tmp_path / folder).mkdir(parents=True)
        for name in names:
            (tmp_path / folder / name).touch()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    states = {check.name: check.state for check in weights()}
    assert (states["SD-VAE latents"], states["FID (Inception)"]) == ("ok", "ok")
    assert states["REPA (DINOv2-B)"] == "missing"


def test_compiler_and_disk_are_checked(monkeypatch):
    monkeypatch.setattr(compiling, "missing_compiler", lambda device: "a C++ compiler (g++)")
    monkeypatch.setattr("os.access", lambda path, mode: False)
    found = {check.name: check for check in machine()}
    assert found["compiled blocks"].fix == "apt-get install g++ python3-dev"
    assert found["disk: runs/"].note.endswith("GiB free, read-only")


@pytest.mark.slow
def test_this_installation_is_complete():
    done = run("scripts/doctor.py")
    assert done.returncode == 0, done.stdout
    assert "PyTorch version" in done.stdout
    assert not [line for line in done.stdout.splitlines() if line.startswith("packages: ") and "missing" in line]
