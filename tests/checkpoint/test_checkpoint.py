"""Checkpoints: written atomically, checked, free of code."""

import json
import os

import pytest
import torch
from conftest import inputs, small_config, small_ddt

import ddt
from ddt.checkpoint import format as ckpt
from ddt.errors import UserError
from ddt.files import atomic_file, atomic_folder, lock_folder


def write(folder, step=7, model=None, **more):
    model = model or small_ddt()
    ckpt.write_checkpoint(folder, small_config(model, step=step), ema=model.state_dict(), **more)
    return model


def test_a_model_comes_back_from_run_and_checkpoint(tmp_path):
    model = write(ckpt.checkpoint_folder(tmp_path, 7))
    x, t, y = inputs()
    for path in (tmp_path, tmp_path / "checkpoints" / "step_0000007", str(tmp_path)):
        loaded = ddt.load_model(path)
        assert torch.equal(loaded(x, t, y), model(x, t, y))
        assert not loaded.training


def test_the_newest_complete_checkpoint_is_used(tmp_path):
    for step in (9, 10, 200):
        write(ckpt.checkpoint_folder(tmp_path, step), step)
    assert ckpt.newest_checkpoint(tmp_path).name == "step_0000200"
    (tmp_path / "checkpoints" / "step_0000200" / "manifest.json").unlink()
    assert ckpt.newest_checkpoint(tmp_path).name == "step_0000010"


def test_an_interrupted_write_leaves_no_checkpoint(tmp_path, monkeypatch):
    def no_space(*args):
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", no_space)
    with pytest.raises(OSError, match="No space"):
        write(ckpt.checkpoint_folder(tmp_path, 7), train_state={"optimizer": {}})
    assert ckpt.newest_checkpoint(tmp_path) is None
    monkeypatch.undo()
    write(ckpt.checkpoint_folder(tmp_path, 7), train_state={"optimizer": {}})  # leftovers do not matter
    assert ckpt.newest_checkpoint(tmp_path) is not None
    assert not list((tmp_path / "checkpoints").glob(".tmp*"))


def test_checkpoints_are_never_overwritten(tmp_path):
    write(tmp_path / "a")
    before = (tmp_path / "a" / "ema.safetensors").read_bytes()
    with pytest.raises(UserError, match="exists already"):
        write(tmp_path / "a", model=small_ddt().double())
    assert (tmp_path / "a" / "ema.safetensors").read_bytes() == before


@pytest.mark.parametrize("name", ["ema.safetensors", "config.json"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_damage_is_named(tmp_path, name, damage):
    write(tmp_path / "a")
    path = tmp_path / "a" / name
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
    path.write_bytes(content if damage == "flip" else content[:-1])
    if damage == "remove":
        os.remove(path)
    with pytest.raises(UserError, match=name.replace(".", r"\.")):
        ddt.load_model(tmp_path / "a")


def test_another_format_version_is_refused(tmp_path):
    write(tmp_path / "a")
    manifest = json.loads((tmp_path / "a" / "manifest.json").read_text())
    (tmp_path / "a" / "manifest.json").write_text(json.dumps({**manifest, "format_version": 99}))
    with pytest.raises(UserError, match="format version 99, this code reads 2"):
        ddt.load_model(tmp_path / "a")


def test_a_path_without_a_checkpoint_is_named(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        ddt.load_model(tmp_path / "nowhere")
    with pytest.raises(UserError, match="holds no complete checkpoint"):
        ddt.load_model(tmp_path)
    (tmp_path / "x.ckpt").touch()
    with pytest.raises(UserError, match=r"x\.ckpt: is a file; .* scripts/convert_checkpoint\.py"):
        ddt.load_model(tmp_path / "x.ckpt")


def test_a_checkpoint_cannot_name_code_to_run(tmp_path):
    config = small_config(small_ddt(), network={"_target_": "subprocess.Popen", "args": "true"})
    ckpt.write_checkpoint(tmp_path / "a", config, ema={"w": torch.zeros(1)})
    with pytest.raises(UserError, match=r"model\._target_=subprocess\.Popen: unknown network"):
        ddt.load_model(tmp_path / "a")


def test_shards_of_processes_are_joined(tmp_path):
    """Split along the first dimension, as under FSDP; a shard of a short tensor may be empty."""
    full = {"w": torch.arange(6.0).view(3, 2), "b": torch.tensor([7.0])}
    moments = {0: {"step": torch.tensor(4.0), "exp_avg": torch.arange(5.0)}}
    with atomic_folder(tmp_path / "a") as temporary:
        files = {}
        for rank in (1, 0):
            weights = {"w": full["w"][2 * rank : 2 * rank + 2], "b": full["b"][rank:]}
            state = {0: {"step": moments[0]["step"], "exp_avg": moments[0]["exp_avg"][3 * rank : 3 * rank + 3]}}
            train_state = {"optimizer": {"state": state}, "skips": [rank, rank]}
            files |= ckpt.write_files(temporary, {"ema": weights, "ema_0.9": weights}, train_state, (rank, 2))
        ckpt.write_manifest(temporary, {}, files)
    for name in ("ema", "ema_0.9"):
        found = ckpt.read_weights(tmp_path / "a", name)
        assert all(torch.equal(found[key], full[key]) for key in full)
    found = ckpt.read_train_state(tmp_path / "a")
    assert torch.equal(found["optimizer"]["state"][0]["exp_avg"], moments[0]["exp_avg"])
    assert found["optimizer"]["state"][0]["step"] == 4
    assert found["skips"] == [0, 0]
    assert ckpt.weights_names(tmp_path / "a") == ["ema", "ema_0.9"]
    assert ckpt.weights_sha256(tmp_path / "a", "ema") == ckpt.weights_sha256(tmp_path / "a", "ema_0.9")
    shards = [path.stat().st_size for path in (tmp_path / "a").glob("ema-*.safetensors")]
    assert len(shards) == 2
    assert ckpt.weights_bytes(tmp_path / "a", "ema") == sum(shards)
    with pytest.raises(UserError, match=r"weights=model: .* has no model\.safetensors; choose from ema, ema_0\.9"):
        ckpt.read_weights(tmp_path / "a", "model")


def test_wrapped_names_are_never_saved(tmp_path):
    with pytest.raises(AssertionError, match="module"):
        ckpt.write_checkpoint(tmp_path / "a", {}, ema={"module.w": torch.zeros(1)})


def test_a_failed_write_leaves_nothing(tmp_path):
    def fail(write):
        with write(tmp_path / "a") as temporary:
            (temporary / "x" if temporary.is_dir() else temporary).write_text("half")
            raise KeyboardInterrupt

    for write in (atomic_folder, atomic_file):
        with pytest.raises(KeyboardInterrupt):
            fail(write)
        assert list(tmp_path.iterdir()) == []


def test_a_folder_is_locked_once(tmp_path):
    with lock_folder(tmp_path / "a", "a: taken"), pytest.raises(UserError, match="a: taken"):
        lock_folder(tmp_path / "a", "a: taken").__enter__()
    with lock_folder(tmp_path / "a", "a: taken"):
        pass
