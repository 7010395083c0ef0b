"""Checkpoints and exports of others: whatever their config and manifest say, they load as what they
are or are refused by one line that names the file.
"""

import copy
import json
import shutil

import pytest
import torch
from conftest import RUN, small_checkpoint
from safetensors.torch import load_file, save_file

import ddt
from ddt.checkpoint import format as ckpt
from ddt.config import flat
from ddt.errors import UserError
from ddt.export.export import ExportSettings, export, open_source
from ddt.export.model_card import dataset, training_rows
from ddt.files import MAX_JSON, sha256
from ddt.generation.settings import SamplerOverrides
from ddt.model import network_class

pytestmark = pytest.mark.usefixtures("one_thread")

SAMPLER = {"solver": "euler", "num_steps": 4, "cfg_scale": 2.0, "cfg_interval": [0.0, 0.9], "recompute": [0, 2]}
VALUES = [
    None, True, -1, 0, 3, 10**7, 10**12, 10**400, 0.5, 1e308, float("nan"), float("inf"), "", "x", "\x1b[1mx",
    "9" * 5000, [], ["x"], [1, 2, 3], [0.5, None], [[[[]]]], {}, {"x": 1}, {"_target_": "antigravity.geohash"},
    {"_target_": []},
]  # fmt: skip
DELETE = object()
NETWORK = {
    "_target_": "ddt.model.DDT", "patch_size": 2, "hidden_size": 32, "num_heads": 2, "depth": 3, "encoder_depth": 2,
    "in_channels": 1, "num_classes": 5,
}  # fmt: skip


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = small_checkpoint(tmp_path_factory.mktemp("good") / "checkpoint", sampler=SAMPLER, run=RUN)
    export(ExportSettings(str(folder), "hub", str(folder.parent / "export")))
    return {"checkpoint": folder, "export": folder.parent / "export"}


def paths(node, prefix=()):
    """Every key of nested settings, and the settings themselves."""
    for key, value in node.items():
        yield (*prefix, key)
        if isinstance(value, dict):
            yield from paths(value, (*prefix, key))


def changed(values, path, value):
    values = copy.deepcopy(values)
    node = values
    for key in path[:-1]:
        node = node[key]
    if value is DELETE:
        del node[path[-1]]
    else:
        node[path[-1]] = value
    return values


def write_config(folder, content):
    """Write another config.json, and its hash into the manifest, as an author of it would."""
    (folder / "config.json").write_bytes(content)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["config.json"] = {"size": len(content), "sha256": sha256(folder / "config.json")}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def use(folder):
    """All that a command reads of a checkpoint before it samples or exports."""
    stored = ckpt.read_config(folder)
    if stored["network"] != NETWORK:
        ddt.load_model(folder)  # the slow part
    SamplerOverrides().resolve(stored["sampler"], network_class(stored["network"]).shares_encoder)
    source = open_source(folder, "hub")
    config = source.config(stored["autoencoder"])
    assert training_rows(config, f"{source.image_size()} {dataset(config)}")  # of the model card


def refused(folder, name, use=use):
    """Whether a folder is refused, by a UserError of one short line that names `name`."""
    try:
        use(folder)
    except UserError as error:
        line = str(error)
        assert name in line
        assert line.isprintable()
        assert len(line.replace(str(folder), "")) < 300
        return True
    return False


@pytest.mark.slow
def test_every_value_of_a_config_is_checked(good, tmp_path):
    folder = shutil.copytree(good["export"], tmp_path / "export")
    config = json.loads((folder / "config.json").read_text())
    tried, accepted = 0, []
    for path in paths(config):
        for value in [DELETE, *(VALUES if path[0] not in ("run", "export") else VALUES[len(path) :: 4])]:
            write_config(folder, json.dumps(changed(config, path, value)).encode())
            tried += 1
            if changed(config, path, value) != config and not refused(folder, "config.json"):
                accepted.append((".".join(path), "deleted" if value is DELETE else value))
    assert tried > 500
    # what sampling does not depend on, other valid values, and what may be left out
    free = ("run.", "sampler.", "export.", "autoencoder_fingerprint", "step", "source", "posthoc")
    optional = ("run", "sampler", "export", "network.activation_checkpointing", "network.adaln_init", "autoencoder")
    wrong = [each for each in accepted if not each[0].startswith(free) and each[0] not in optional]
    assert not wrong, wrong
    assert not [each for each in accepted if each[0] in ("network", "latent_shape", "class_names", "network._target_")]


MUST = [
    ("sampler", DELETE), ("step", DELETE), ("step", "x"), ("step", -1), ("network", DELETE), ("network.depth", 10**7),
    ("network.hidden_size", 10**9), ("network.num_classes", 10**12), ("network.patch_size", None),
    ("network.encoder_depth", DELETE), ("network.depth", 4), ("network._target_", "subprocess.Popen"),
    ("latent_shape", [1, 10**9, 10**9]), ("latent_shape", [1, 8]), ("latent_shape", [2, 8, 8]),
    ("class_names", ["a"]), ("class_names", [None] * 5), ("sampler.num_steps", 10**9), ("sampler.nothing", 1),
    ("sampler.cfg_scale", {"_target_": "antigravity.geohash"}), ("autoencoder._target_", "os.system"),
    ("autoencoder.source", "x"), ("extra", 1), ("run.seed", "x"), ("run.trainer", DELETE), ("run.optimizer.lr", "x"),
    ("run.data", []), ("run", 3),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value"), MUST)
def test_what_must_be_refused_is(good, tmp_path, key, value):
    folder = shutil.copytree(good["checkpoint"], tmp_path / "checkpoint")
    config = json.loads((folder / "config.json").read_text())
    write_config(folder, json.dumps(changed(config, key.split("."), value)).encode())
    assert refused(folder, "config.json")


def test_no_module_that_a_config_names_is_imported(good, tmp_path, monkeypatch):
    (tmp_path / "trap.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    folder = shutil.copytree(good["checkpoint"], tmp_path / "checkpoint")
    config = json.loads((folder / "config.json").read_text())
    for path in paths(config):
        for value in ("trap.x", {"_target_": "trap.x"}, [{"_target_": "trap.x"}]):
            write_config(folder, json.dumps(changed(config, path, value)).encode())
            refused(folder, "")


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{", b"null", b"[]", b"3", b"\xff\xfe\x00", b'{"a":' * 10**5, b"[" * 10**5, b'{"a": 1e999}',
        b'{"step": ' + b"[" * 500 + b"]" * 500 + b"}", b'{"x": "' + b"y" * MAX_JSON + b'"}',
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n", b"<html></html>",
    ],
    ids=lambda content: repr(content[:12]),
)  # fmt: skip
@pytest.mark.parametrize("name", ["config.json", "manifest.json"])
def test_what_is_no_settings_is_named(good, tmp_path, name, content):
    folder = shutil.copytree(good["export"], tmp_path / "export")
    write_config(folder, content) if name == "config.json" else (folder / name).write_bytes(content)
    assert refused(folder, name)


def test_every_value_of_a_manifest_is_checked(good, tmp_path):
    folder = shutil.copytree(good["export"], tmp_path / "export")
    manifest = json.loads((folder / "manifest.json").read_text())
    accepted = []
    for path in paths(manifest):
        for value in [DELETE, *VALUES, "../model.safetensors", "/etc/passwd", "model-00000-of-00003.safetensors"]:
            (folder / "manifest.json").write_text(json.dumps(changed(manifest, path, value)))
            if not refused(folder, "", ddt.load_model):
                accepted.append(path)
    assert {path[0] for path in accepted} <= {"ddt_version"}, accepted


@pytest.mark.parametrize(
    "name", ["../x", "/etc/passwd", "a\\b", "", ".", "a\nb", "ema-00001-of-00002.safetensors", "ema-00000-of-99999.x"]
)
def test_a_manifest_names_files_of_its_folder_alone(good, tmp_path, name):
    folder = shutil.copytree(good["checkpoint"], tmp_path / "checkpoint")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][name] = manifest["files"]["ema.safetensors"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert refused(folder, "manifest.json")


def double(state):
    return {name: value.double() for name, value in state.items()}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda state: {name: value.half() for name, value in state.items()}, "torch.float16"),
        (double, "torch.float64"),
        (lambda state: {name: value.long() for name, value in state.items()}, "torch.int64"),
        (lambda state: {name: value for name, value in state.items() if "mlp.w1" not in name}, "are missing"),
        (lambda state: state | {"surplus": torch.zeros(1)}, "surplus"),
        (lambda state: state | {"decoder.output.linear.bias": torch.zeros(7)}, "(7,)"),
    ],
)
def test_weights_that_do_not_fit_are_named(good, tmp_path, change, words):
    folder = shutil.copytree(good["checkpoint"], tmp_path / "checkpoint")
    file = folder / "ema.safetensors"
    save_file(change(load_file(file)), file)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][file.name] = ckpt.manifest_entry(file)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"checkpoint: config\.json and the ema weights do not fit: ") as error:
        ddt.load_model(folder)
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda content: content.replace(b"\n", b"\r\n"), "line ends were converted to CRLF"),
        (lambda content: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n", "is a Git LFS pointer"),
        (lambda content: b"", "is empty"),
        (lambda content: content[:-3], "checksum"),
    ],
)
def test_what_happened_to_a_file_is_said(good, tmp_path, damage, words):
    folder = shutil.copytree(good["export"], tmp_path / "export")
    for name in ("config.json", "model.safetensors")[: 1 if "CRLF" in words else 2]:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(damage(content))
        with pytest.raises(UserError, match=rf"{name}: damaged \(.*{words}"):
            ddt.load_model(folder)
        (folder / name).write_bytes(content)
    assert flat(ckpt.read_config(folder))["step"] == 7
