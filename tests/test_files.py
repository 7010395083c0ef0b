"""Whose a folder is, and what a failed write leaves."""

import contextlib
import json
import os

import numpy as np
import pytest
import torch
from conftest import GOLDEN, refusal, small_checkpoint, small_disk, small_vae, thinned
from safetensors.torch import save_file

from ddt.errors import UserError
from ddt.files import (
    LOCK,
    atomic_file,
    atomic_folder,
    check_new,
    file_errors,
    find_record,
    lock_folder,
    read_record,
    remove_temporary_files,
    write_json,
    write_text,
)
from ddt.metrics.images import write_npz
from ddt.training.tracking import JsonlTracker


@pytest.mark.parametrize(
    "write",
    [
        lambda path: torch.save({"a": torch.zeros(10_000)}, path),
        lambda path: save_file({"a": torch.zeros(10_000)}, path),
        lambda path: np.savez(path, a=np.zeros(10_000)),
        lambda path: path.write_bytes(bytes(10_000)),
    ],
    ids=["torch", "safetensors", "numpy", "python"],
)
def test_every_writers_failure_names_the_file(tmp_path, write):
    path = tmp_path / "file.npz"
    with small_disk(), pytest.raises(OSError, match=str(tmp_path)) as failed, file_errors(path):
        write(path)
    assert failed.value.filename == str(path)
    with small_disk(), pytest.raises(OSError, match=str(tmp_path)) as failed, atomic_file(path) as temporary:
        write(temporary)
    assert failed.value.filename == str(path)
    path.unlink(missing_ok=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("metrics.jsonl", lambda folder: JsonlTracker(folder, 400, {})),
        ("x.npz", lambda folder: write_npz(folder / "x.npz", {"a": np.zeros(9000)}, [], (0, 1, 1, 1))),
        ("x.json", lambda folder: write_json(folder / "x.json", list(range(9000)))),
        ("x.md", lambda folder: write_text(folder / "x.md", "x" * 9000)),
    ],
)
def test_a_full_disk_is_named_by_the_file_and_leaves_no_half_of_it(tmp_path, name, write):
    rows = "".join(f'{{"step": {k}, "loss": 0.123456789}}\n' for k in range(500))
    (tmp_path / "metrics.jsonl").write_text(rows)  # of a run that resumes
    with small_disk(), pytest.raises(OSError, match="File too large") as failed:
        write(tmp_path)
    assert failed.value.filename == str(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
    assert (tmp_path / "metrics.jsonl").read_text() == rows


def test_other_errors_pass_as_they_are(tmp_path):
    with pytest.raises(RuntimeError, match="shape"), file_errors(tmp_path):
        raise RuntimeError("shape")
    with pytest.raises(FileNotFoundError) as failed, file_errors(tmp_path):
        open(tmp_path / "nowhere")  # noqa: SIM115
    assert failed.value.filename == str(tmp_path / "nowhere")


def test_a_folder_is_new_ours_or_refused(tmp_path):
    def record(**options):
        return find_record(tmp_path / "out", ["a.json", "b.json"], "out", **options)

    assert record() is None  # there is none
    out = tmp_path / "out"
    out.mkdir()
    assert record() is None
    for own in (LOCK, ".tmp-ddt-host-1-a.json"):
        (out / own).touch()
    assert record() is None
    (out / "parts").mkdir()
    assert record(own=["parts"]) is None
    with pytest.raises(UserError, match=f"^out={out}: holds parts, not written by this command"):
        record()
    assert record(written=["a.json", "picture.png"]) is None  # it would not be written over
    (out / "picture.png").touch()
    with pytest.raises(UserError, match=r"holds picture\.png"):
        record(written=["a.json", "picture.png"])
    (out / "b.json").touch()
    assert record() == record(written=["picture.png"]) == out / "b.json"
    with pytest.raises(UserError, match="is a file; give a folder"):
        find_record(out / "b.json", ["a.json"], "out")


@pytest.mark.parametrize("text", ["", "{", "[1]", "\x00"])
def test_a_damaged_record_is_that_of_nothing(tmp_path, text):
    path = tmp_path / "a.json"
    path.write_text(text)
    assert read_record(path) == {}
    path.write_text(json.dumps({"request": 1}))
    assert read_record(path) == {"request": 1}


def test_only_what_is_missing_or_an_empty_folder_is_new(tmp_path):
    check_new(tmp_path / "out")
    (tmp_path / "empty").mkdir()
    check_new(tmp_path / "empty")
    (tmp_path / "file.png").touch()
    for path in (tmp_path, tmp_path / "file.png"):
        with pytest.raises(UserError, match=f"^ckpt={path}: exists already and is not written over; choose another"):
            check_new(path, "ckpt")


def test_a_folder_of_others_under_the_temporary_name_stays(tmp_path):
    theirs = tmp_path / ".tmp-out" / "notes.txt"
    theirs.parent.mkdir()
    theirs.write_text("mine")
    with pytest.raises(UserError, match=r"\.tmp-out: is in the way"), atomic_folder(tmp_path / "out"):
        pass
    assert theirs.read_text() == "mine"


def test_what_a_kill_left_is_replaced_but_not_what_another_command_is_writing(tmp_path):
    left = tmp_path / ".tmp-out"
    left.mkdir()
    (left / LOCK).touch()
    (left / "half").touch()
    with atomic_folder(tmp_path / "out") as temporary:
        assert sorted(path.name for path in temporary.iterdir()) == [LOCK]
        with pytest.raises(UserError, match="another command is writing it"), atomic_folder(tmp_path / "out"):
            pass
        (temporary / "a").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "a"]
    with lock_folder(tmp_path / "out", "free"):
        pass


def test_temporary_files_of_others_stay(tmp_path):
    with contextlib.suppress(KeyError), atomic_file(tmp_path / "a.json") as temporary:
        left = tmp_path / temporary.name.replace(f"-{os.getpid()}-", f"-{2**22 + 1}-")  # of a killed process
        left.touch()
        raise KeyError
    with atomic_file(tmp_path / "b.json") as used:  # of a running process
        used.touch()
        (tmp_path / ".tmp-notes").touch()
        remove_temporary_files(tmp_path)
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted([".tmp-notes", used.name])


def full_disk_commands(place):
    """Commands that write something large into place/out, by name."""
    return {
        "convert": ["scripts.convert_checkpoint", f"released={GOLDEN / 'tiny.weights.safetensors'}", "encoder_depth=3",
                    "resolution=256"],
        "export": ["scripts.export", f"ckpt={small_checkpoint(place / 'ckpt')}", "format=hub"],
        "diffusers": ["scripts.export", f"ckpt={small_checkpoint(place / 'latents', small_vae(place / 'vae'))}",
                      "format=diffusers"],
        "released": ["scripts.export", f"ckpt={small_checkpoint(place / 'raw')}", "format=released"],
        "sample": ["sample", f"ckpt={small_checkpoint(place / 'pixels')}", "num_samples=90", "batch_size=90"],
        "autoencoder": ["scripts.train_autoencoder", "data=digits", "steps=2", "block_out_channels=[8,8]"],
        "cache": ["scripts.cache_latents", "data=digits", "autoencoder=identity"],
    }  # fmt: skip


@pytest.mark.parametrize(
    "name", thinned(["convert", "export", "diffusers", "released", "sample", "autoencoder", "cache"], 3)
)
def test_on_a_full_disk_a_command_ends_with_a_line_that_names_the_file(tmp_path, name):
    command = full_disk_commands(tmp_path)[name]
    out = tmp_path / ("out.safetensors" if name == "released" else "out")
    with small_disk():
        said = refusal(*command, f"out={out}")
    assert said.startswith(str(out.with_suffix("")))
    assert said.endswith("; check the path and the disk")
    assert "\n" not in said
    assert not out.exists() or name in ("sample", "cache")
    assert name != "cache" or said.startswith(str(out / "manifest.csv"))
    assert ".tmp-" not in said
    assert not list(tmp_path.glob(".tmp-*"))
