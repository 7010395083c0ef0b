"""The doctor: what is missing is named with what helps, whatever is missing, and nothing is left
behind.
"""

import contextlib
import importlib
import importlib.metadata
import json
import os
import re
import sys
import tempfile
import types

import pytest
import timm
import yaml
from conftest import ROOT, run

import ddt
from scripts import doctor, machine
from scripts.doctor import DIGITS, TRAINING, Package, examine, features, installed, look_at, main, requirements, within

GPU = {"name": "NVIDIA A100", "memory_gib": 79.15, "capability": "8.0", "bf16": True}


@pytest.fixture(autouse=True)
def small_disk_test(monkeypatch):
    monkeypatch.setattr(machine, "BLOCK", 2**16)


@pytest.fixture
def sound(monkeypatch):
    """All packages are installed as they should be, and none is imported."""
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "999")
    monkeypatch.setattr(doctor, "within", lambda version, bounds: True)
    monkeypatch.setattr(doctor, "import_problem", lambda name: None)


def packages(**problems):
    """The packages of pyproject.toml, of which some have problems."""
    return {
        extra: [Package(name, "", "1", problems.get(name)) for name in (re.match(r"[\w.-]+", r)[0] for r in needed)]
        for extra, needed in requirements().items()
    }


@pytest.mark.parametrize(
    ("version", "bounds", "fits"),
    [
        ("2.11", ">=2.11", True),
        ("2.11.0+cu128", ">=2.11", True),
        ("2.9.1", ">=2.11", False),
        ("1.3.2", ">=1.3.2,<1.4", True),
        ("1.4.0", ">=1.3.2,<1.4", False),
        ("1.4", ">=1.3.2,<1.4", False),
        ("0.1", "==0.1.0", True),
        ("10", ">=10", True),
        ("10.0.1", "<=10", False),
        ("3", "", True),
    ],
)
def test_versions_are_compared_with_their_bounds(version, bounds, fits):
    assert within(version, bounds) == fits


def test_all_bounds_of_the_project_are_understood():
    for needed in requirements().values():
        for requirement in needed:
            name = re.match(r"[\w.-]+", requirement)[0]
            bounds = requirement[len(name) :]
            assert re.fullmatch(r"((>=|<=|==|>|<)[\d.]+,?)*", bounds), requirement


def test_an_installation_without_the_repository_knows_its_requirements(tmp_path, monkeypatch):
    lines = ["torch>=2.11", "gradio>=5; extra == 'app'", 'torchode>=1.0 ; extra == "adaptive"']
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: lines)
    assert requirements(tmp_path) == {"": ["torch>=2.11"], "app": ["gradio>=5"], "adaptive": ["torchode>=1.0"]}


def test_what_a_package_lacks_is_said(monkeypatch):
    assert look_at("tqdm>=4", imported=True).problem is None
    assert look_at("tqdm>=4,<4.5", imported=True).problem.endswith(", >=4,<4.5 is needed")
    assert look_at("no-such-package>=1", imported=True) == Package("no-such-package", ">=1", None, "not installed")
    monkeypatch.setitem(sys.modules, "sklearn", None)
    problem = look_at("scikit-learn>=1", imported=True).problem
    assert problem.startswith("cannot be imported (ModuleNotFoundError: ")
    assert look_at("scikit-learn>=1", imported=False).problem is None


def test_a_package_that_breaks_in_any_way_is_named(monkeypatch):
    def broken(name):
        raise RuntimeError("operator torchvision::nms does not exist\nsecond line")

    monkeypatch.setattr(importlib, "import_module", broken)
    problem = look_at("torchvision", imported=True).problem
    assert problem == "cannot be imported (RuntimeError: operator torchvision::nms does not exist)"


def test_a_feature_names_what_is_missing_and_the_command():
    found = features(packages(gradio="not installed", diffusers="not installed", matplotlib="not installed"), [])
    assert found["the demo app"].fix == "pip install -e '.[app]'"
    assert found["the demo app"].note == "gradio not installed"
    assert (found["SD-VAE latents"].state, found["SD-VAE latents"].fix) == ("missing", "pip install -e .")
    assert found[TRAINING].state == "ok"
    assert found["sampler=adaptive"].state == "ok"
    without = features(packages(torch="not installed"), [])
    assert {without[name].state for name in ("bf16", "FSDP", "FID (Inception)", TRAINING)} == {"missing"}
    assert without["sampler=adaptive"].state == "ok"


def test_one_cause_is_told_and_not_what_follows_from_it():
    broken = [
        Package("accelerate", ">=1", "1", "cannot be imported (ModuleNotFoundError: No module named 'torch')"),
        Package("torch", ">=2", None, "not installed"),
    ]
    found = installed(broken, "pip install -e .")
    assert (found.note, found.fix) == ("torch not installed", "pip install -e .")
    found = installed(broken[:1], "pip install -e .")
    assert found.fix == "pip install --force-reinstall 'accelerate>=1'"
    assert installed([*broken, Package("a", "", None, "not installed")], "").note.endswith(", and 1 more: see packages")


def test_a_feature_that_cannot_be_told_keeps_none_from_being_told(monkeypatch):
    monkeypatch.setattr(timm, "get_pretrained_cfg", None)
    found = features(packages(), [])
    assert found["REPA (DINOv2)"].note.startswith("cannot be told (TypeError: ")
    assert found["bf16"].state == "ok"


def test_gpus_are_told():
    old = {**GPU, "name": "Tesla T4", "bf16": False}
    found = features(packages(), [GPU, old])
    assert (found["bf16"].state, found["bf16"].note) == ("missing", "Tesla T4 has none")
    assert features(packages(), [GPU])["bf16"].state == "ok"
    rows = doctor.graphics_rows({"devices": [GPU, old], "driver": "570.1", "cuda": "12.8"})
    assert rows[0] == ("gpu 0", "NVIDIA A100, 79.2 GiB, capability 8.0, bf16")
    assert rows[1][1].endswith("no bf16")
    assert rows[2] == ("versions", "driver 570.1, cuda 12.8")


def test_a_driver_without_a_gpu_is_a_problem(monkeypatch):
    monkeypatch.setattr(machine, "output_of", lambda *command: "570.1\n570.1")
    found = machine.graphics()
    assert found["driver"] == "570.1"
    assert found["problem"].startswith("there is a driver, but ")
    monkeypatch.setitem(sys.modules, "torch", None)
    assert machine.graphics()["problem"].startswith("torch does not tell (ModuleNotFoundError: ")


def test_what_gpus_say_is_read(monkeypatch):
    import torch

    about = types.SimpleNamespace(name="NVIDIA A100", total_memory=80 * 2**30, major=8, minor=0)
    for name, value in {
        "is_available": lambda: True,
        "device_count": lambda: 2,
        "get_device_properties": lambda index: about,
        "is_bf16_supported": lambda including_emulation: True,
        "device": contextlib.nullcontext,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    assert machine.graphics()["devices"] == [{**GPU, "memory_gib": 80.0}] * 2


def test_the_disk_test_leaves_nothing(tmp_path):
    found = machine.disk(tmp_path)
    assert found["mib"] == machine.BLOCK * machine.MOST_BLOCKS / 2**20
    assert found["write_mib_per_second"] > 0
    assert found["read_mib_per_second"] > 0
    assert found["free_gib"] > 0
    assert not list(tmp_path.iterdir())


def test_a_slow_disk_gets_one_block(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "SECONDS", 0)
    assert machine.disk(tmp_path)["mib"] == machine.BLOCK / 2**20


def test_the_disk_says_where_it_was_read_from(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "posix_fadvise", raising=False)
    found = machine.disk(tmp_path)
    assert not found["cache_dropped"]
    assert "FROM THE PAGE CACHE" in doctor.disk_rows(found)[-1][1]


def test_a_folder_that_cannot_be_measured_is_one_line(tmp_path, monkeypatch):
    missing = machine.disk(tmp_path / "a")
    assert missing["problem"] == (
        f"{tmp_path / 'a'}: cannot be written (No such file or directory); give another --folder"
    )

    def denied(**_):
        raise PermissionError(13, "Permission denied", str(tmp_path / "tmpx"))

    monkeypatch.setattr(tempfile, "TemporaryFile", denied)
    (row,) = [text for key, text in doctor.disk_rows(machine.disk(tmp_path)) if key == "problem"]
    assert row == f"{tmp_path}: cannot be written (Permission denied); give another --folder"
    monkeypatch.setattr(machine, "BLOCK", 2**60)
    assert "too full" in machine.disk(tmp_path)["problem"]


def test_the_hub_is_asked_on_request_alone(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert machine.hub(ask=True) == "off: HF_HUB_OFFLINE is set"
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # where nobody listens
    assert machine.hub(ask=False) == "not asked; --hub asks it"
    assert machine.hub(ask=True).startswith("not reachable: http://127.0.0.1:9 (")
    monkeypatch.setenv("HF_ENDPOINT", "nonsense")
    assert machine.hub(ask=True).startswith("not reachable: nonsense (")


def test_a_login_is_seen_without_being_shown(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert not machine.logged_in()
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password made-up\n")
    (tmp_path / "netrc").chmod(0o600)
    assert machine.logged_in()
    monkeypatch.setenv("WANDB_BASE_URL", "https://other.example")
    assert not machine.logged_in()
    monkeypatch.setenv("WANDB_API_KEY", "made-up-too")
    assert machine.logged_in()
    assert "WANDB_API_KEY" not in doctor.VARIABLES


def test_weights_are_looked_for_where_they_are_loaded_from(tmp_path, monkeypatch):
    import huggingface_hub
    import torch

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert doctor.sd_vae().state == "missing"
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    found = doctor.sd_vae()
    assert found.state == "download"
    assert found.fix.startswith("hf download stabilityai/sd-vae-ft-ema config.json diffusion_pytorch_model.safetensors")
    files = tmp_path / "models--stabilityai--sd-vae-ft-ema" / "snapshots" / doctor.SD_VAE_REVISION
    files.mkdir(parents=True)
    (files / "config.json").touch()
    (files / "diffusion_pytorch_model.safetensors").touch()
    assert doctor.sd_vae().state == "ok"
    assert doctor.fid().state == "download"
    assert str(tmp_path / "checkpoints") in doctor.fid().fix
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth").touch()
    assert doctor.fid().state == "ok"


def test_the_weights_are_those_of_the_configuration():
    vae = yaml.safe_load((ROOT / "conf" / "autoencoder" / "sd_ft_ema.yaml").read_text())
    assert (vae["source"], vae["revision"]) == (doctor.SD_VAE, doctor.SD_VAE_REVISION)
    repa = yaml.safe_load((ROOT / "conf" / "alignment" / "repa_dinov2_b.yaml").read_text())
    assert repa["target"] == doctor.REPA_TARGET
    assert doctor.repa().fix.startswith("hf download timm/vit_base_patch14_dinov2.lvd142m model.safetensors")
    assert doctor.fd_dinov2().fix.startswith("hf download timm/vit_large_patch14_dinov2.lvd142m model.safetensors")


def test_packages_of_the_features_are_those_of_the_project():
    wanted = {re.match(r"[\w.-]+", requirement)[0] for requirement in requirements()[""]}
    assert set(DIGITS) <= wanted
    assert set(requirements()) - {""} <= set(doctor.EXTRAS)


def test_the_report_is_for_people_and_for_programs(sound, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    assert main([]) == 0
    text = capsys.readouterr().out
    for line in ("machine", "graphics", "disk", "environment", "packages", "features", "what helps"):
        assert line in text.splitlines()
    assert re.search(r"^  SLURM_JOB_ID +77$", text, re.M)
    assert re.search(r"^  training on digits +ok$", text, re.M)
    assert main(["--json", "--folder", str(tmp_path)]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["disk"]["folder"] == str(tmp_path)
    assert report["features"][TRAINING] == {"state": "ok", "note": "", "fix": ""}
    assert report["packages"][""][0]["version"] == "999"
    assert not list(tmp_path.iterdir())


def test_the_status_tells_whether_digits_can_be_trained_on(sound, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    broken = {"wandb": "cannot be imported", "gradio": "no"}
    monkeypatch.setattr(doctor, "import_problem", broken.get)
    assert main([]) == 0
    broken["numpy"] = "cannot be imported (ImportError: x)"
    assert main([]) == 1
    text = capsys.readouterr().out
    assert re.search(r"^  training on digits +missing +numpy cannot be imported \(ImportError: x\)$", text, re.M)
    assert re.search(r"^  training on digits +pip install --force-reinstall 'numpy>=1.26'$", text, re.M)
    del broken["numpy"]
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert main(["--json"]) == 1
    assert json.loads(capsys.readouterr().out)["features"][TRAINING]["note"] == "runs/ cannot be written here"


def test_a_report_does_not_need_the_disk(sound, tmp_path):
    report = examine(tmp_path / "nowhere", ask_hub=False)
    assert "problem" in report["disk"]
    assert report["features"][TRAINING]["state"] == "ok"
    assert "No such file" in doctor.written(report)


def test_the_doctor_comes_where_torch_is_broken(tmp_path):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise OSError('libcudart.so.13: cannot open shared object file')")
    done = run("-m", "scripts.doctor", "--json", "--folder", tmp_path / "no", PYTHONPATH=str(tmp_path))
    assert done.returncode == 1, done.stderr
    report = json.loads(done.stdout)
    assert report["features"][TRAINING]["state"] == "missing"
    (torch,) = [package for package in report["packages"][""] if package["name"] == "torch"]
    assert torch["problem"] == "cannot be imported (OSError: libcudart.so.13: cannot open shared object file)"
    assert report["graphics"]["problem"].startswith("torch does not tell (OSError: ")


def test_public_names_are_those_of_their_modules():
    for name in ddt.__all__:
        assert getattr(ddt, name) is not None
    assert set(ddt.HOMES) == set(ddt.__all__) - {"UserError", "__version__"}
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = ddt.nothing


@pytest.mark.slow
def test_this_machine_is_sound():
    done = run("-m", "scripts.doctor", "--json")
    assert done.returncode == 0, done.stdout
    report = json.loads(done.stdout)
    assert all(package["problem"] is None for package in report["packages"][""])
    assert {report["features"][name]["state"] for name in ("the tests", "bf16", "FSDP")} == {"ok"}
