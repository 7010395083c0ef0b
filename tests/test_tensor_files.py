"""Files of tensors that others wrote: what is read, and how anything else is named."""

import argparse
import collections
import errno
import mmap
import os
import pathlib
import zipfile

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import picture, small_disk
from omegaconf import OmegaConf

from ddt.errors import UserError, brief
from ddt.files import sha256
from ddt.tensor_files import UnmappedArray, open_array, read_state_dict, read_tensors, unwrapped, write_array

STATE = {"w": torch.arange(6.0).view(2, 3), "b": torch.zeros(0)}


def refused(path, *words):
    with pytest.raises(UserError) as error:
        read_state_dict(path, f"key={path.name}")
    message = str(error.value)
    assert message.startswith(f"key={path.name}: ")
    assert len(message) < 300
    assert message.isprintable()
    assert "weights_only" not in message
    for word in words:
        assert word in message, message


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("around", [None, "state_dict", "model", "model_ema"])
def test_a_state_dict_of_any_layout_is_read(tmp_path, around, legacy):
    content = STATE if around is None else {around: STATE, "epoch": 3}
    torch.save(content, tmp_path / "x.bin", _use_new_zipfile_serialization=not legacy)
    found = read_state_dict(tmp_path / "x.bin")
    assert found.keys() == STATE.keys()
    assert all(torch.equal(found[key], STATE[key]) for key in STATE)


def test_the_content_decides_and_not_the_name(tmp_path):
    safetensors.torch.save_file(STATE, tmp_path / "x.pth")
    torch.save(STATE, tmp_path / "x.safetensors")
    for name in ("x.pth", "x.safetensors"):
        assert torch.equal(read_state_dict(tmp_path / name)["w"], STATE["w"])


def test_settings_and_counters_beside_the_weights_are_passed_over(tmp_path):

    before = set(torch.serialization.get_safe_globals())
    beside = {
        "hyper_parameters": OmegaConf.create({"lr": 1e-4, "betas": [0.9, 0.99], "path": "${lr}"}),
        "args": argparse.Namespace(out=pathlib.PurePosixPath("/x")),
        "loss": np.float64(0.5),
        "history": collections.defaultdict(list, {"a": [np.int64(3)]}),
        "array": np.arange(3),
    }
    torch.save({"state_dict": STATE, **beside}, tmp_path / "x.ckpt")
    assert read_state_dict(tmp_path / "x.ckpt").keys() == STATE.keys()
    content = read_tensors(tmp_path / "x.ckpt")
    assert {type(content[key]).__name__ for key in beside} == {"Skipped", "dict"}  # nothing of theirs was built
    assert set(torch.serialization.get_safe_globals()) == before  # nor is any of it allowed after that


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("thing", [print, pathlib.os.system, torch.nn.Linear(2, 2)])
def test_anything_else_is_refused_by_its_name(tmp_path, thing, legacy):
    torch.save({"state_dict": STATE, "x": thing}, tmp_path / "x.ckpt", _use_new_zipfile_serialization=not legacy)
    name = "torch.nn.modules.linear.Linear" if isinstance(thing, torch.nn.Module) else thing.__name__
    refused(tmp_path / "x.ckpt", "an object", name, "of the weights alone")


def write(path, kind):
    if kind == "pictures":
        picture(0).save(path.with_suffix(".png"))
        with zipfile.ZipFile(path, "w") as archive:
            for number in range(2000):
                archive.writestr(f"images/{number:04d}.png", b"")
    elif kind in ("npy", "npz"):
        {"npy": np.save, "npz": np.savez}[kind](path.with_suffix(f".{kind}"), np.zeros(3))
        path.with_suffix(f".{kind}").rename(path)
    elif kind == "picture":
        picture(0).save(path, format="png")
    else:
        path.write_bytes(kind)


@pytest.mark.parametrize(
    ("kind", "word"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n", "is a Git LFS pointer"),
        (b"<!DOCTYPE html>\n<html><body>Sign in</body></html>", "is a web page"),
        (b'{"weight_map": {}}\r\n', "is JSON"),
        (b"404: Not \x1b[1mFound\x1b[0m", "is text (404: Not Found)"),
        (b"", "is empty"),
        (b"\n \n", "is empty"),
        (bytes(range(7, 200)) * 9, "cannot be read"),
        ("npy", "is a NumPy array"),
        ("npz", "is an npz of NumPy arrays (arr_0.npy)"),
        ("picture", "is a picture (PNG)"),
        ("pictures", "is a zip of 2,000 other files (images/0000.png"),
    ],
)
def test_a_file_of_another_kind_is_named_as_what_it_is(tmp_path, kind, word):
    write(tmp_path / "x.pth", kind)
    refused(tmp_path / "x.pth", word, "download it again")


@pytest.mark.parametrize("save", [torch.save, safetensors.torch.save_file])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_a_cut_file_is_named(tmp_path, save, share):
    save({"w": torch.zeros(5000)}, tmp_path / "x.bin")
    content = (tmp_path / "x.bin").read_bytes()
    (tmp_path / "x.bin").write_bytes(content[: int(share * len(content))])
    refused(tmp_path / "x.bin", "cannot be read")


@pytest.mark.parametrize(
    "value", [torch.zeros(1).expand(10**6, 10**6), torch.zeros(3, device="meta"), torch.eye(2).to_sparse(), 3, {}, None]
)
def test_a_value_that_is_no_plain_tensor_is_refused(tmp_path, value):
    torch.save({"w": value}, tmp_path / "x.bin")
    refused(tmp_path / "x.bin", "w is no")


def test_names_of_wrappers_are_removed_wherever_they_stand(tmp_path):
    for key in ("w", "module.w", "_orig_mod.w", "module._orig_mod.w", "w._orig_mod", "_fsdp_wrapped_module.module.w"):
        torch.save({key: STATE["w"]}, tmp_path / "x.bin")
        assert read_state_dict(tmp_path / "x.bin").keys() == {"w"}
    assert unwrapped("ema_denoiser._orig_mod.blocks.3.module.norm") == "ema_denoiser.blocks.3.norm"
    assert unwrapped("my_module.w") == "my_module.w"
    torch.save({"module.w": STATE["w"], "w": STATE["w"]}, tmp_path / "x.bin")
    refused(tmp_path / "x.bin", "has w twice")


def test_a_file_system_without_mmap_is_read_all_the_same(tmp_path, monkeypatch):
    torch.save(STATE, tmp_path / "x.pt")
    safetensors.torch.save_file(STATE, tmp_path / "x.safetensors")
    load = torch.load

    def without_mmap(*args, **kwargs):  # as torch and safetensors fail there
        if kwargs.get("mmap"):
            raise RuntimeError(f"unable to mmap 100 bytes from file <x.pt>: No such device ({errno.ENODEV})")
        return load(*args, **kwargs)

    def no_device(*args, **kwargs):
        raise OSError("No such device (os error 19)")

    monkeypatch.setattr(torch, "load", without_mmap)
    monkeypatch.setattr(safetensors.torch, "load_file", no_device)
    for name in ("x.pt", "x.safetensors"):
        assert torch.equal(read_state_dict(tmp_path / name)["w"], STATE["w"])
    with pytest.raises(UserError, match=r"none\.pt: no such file"):
        read_state_dict(tmp_path / "none.pt")


def test_a_text_of_others_is_one_short_printable_line():
    assert brief("\x1b[1mdo\x1b[0m\n\tthis\x07  now") == "do this now"
    assert brief("x" * 500) == "x" * 159 + "…"


@pytest.mark.usefixtures("no_mmap")
def test_rows_of_an_array_are_read_without_mmap(tmp_path):
    values = np.arange(2 * 5 * 3 * 4, dtype=np.float16).reshape(5, 2, 3, 4)
    np.save(tmp_path / "x.npy", values)
    stored = open_array(tmp_path / "x.npy")
    assert isinstance(stored, UnmappedArray)
    rows, flips = np.array([4, 0, 0, 2]), np.array([0, 1, 0, 1])
    assert (stored.shape, stored.dtype) == (values.shape, values.dtype)
    assert np.array_equal(stored[rows], values[rows])
    assert np.array_equal(stored[rows, flips], values[rows, flips])
    with pytest.raises(ValueError, match="invalid entry"):
        stored[np.array([5])]
    content = (tmp_path / "x.npy").read_bytes()
    (tmp_path / "x.npy").write_bytes(content[:-1])
    with pytest.raises(OSError, match="ends early") as failed:
        stored[rows]
    assert failed.value.filename == str(tmp_path / "x.npy")
    with pytest.raises(ValueError, match="cut short"):
        open_array(tmp_path / "x.npy")
    np.save(tmp_path / "x.npy", np.asfortranarray(values))
    with pytest.raises(ValueError, match=r"x\.npy: no array of rows"):
        open_array(tmp_path / "x.npy")


def test_an_array_that_cannot_be_mapped_for_another_reason_is_named(tmp_path, monkeypatch):
    def refusing(*args, **kwargs):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    np.save(tmp_path / "x.npy", np.zeros(3))
    monkeypatch.setattr(mmap, "mmap", refusing)
    with pytest.raises(OSError, match="Input/output error") as failed:
        open_array(tmp_path / "x.npy")
    assert failed.value.filename == str(tmp_path / "x.npy")


def test_an_array_written_by_the_row_is_numpys_and_absent_until_it_is_whole(tmp_path):
    values, path = np.arange(24, dtype=np.float32).reshape(6, 4), tmp_path / "new" / "x.npy"
    with write_array(path, values.dtype, values.shape) as writer:
        writer.append(values[:4])
        assert not path.exists()
        writer.append(values[4:])
    np.save(tmp_path / "y.npy", values)
    assert path.read_bytes() == (tmp_path / "y.npy").read_bytes()
    assert writer.record() == {"size": path.stat().st_size, "sha256": sha256(path)}
    other = tmp_path / "other.npy"
    with small_disk(), pytest.raises(OSError, match="too large") as failed:  # noqa: SIM117
        with write_array(other, "f4", (9000,)) as first, write_array(path, "f4", (1,)):
            first.append(np.zeros(9000, dtype=np.float32))
    assert failed.value.filename == str(other)
    assert not other.exists()
