"""Part files and the npz they become."""

import hashlib
import platform
import tracemalloc
import zipfile

import numpy as np
import pytest

from ddt.generation.part_files import merge_parts, remove_damaged, rows, sampled_numbers, write_part


def fill(folder, total, size, shape=(4, 4, 3), counts=None):
    folder.mkdir(exist_ok=True)
    images = np.random.default_rng(0).integers(0, 256, (total, *shape), dtype=np.uint8)
    for start in range(0, total, size):
        write_part(folder, start, images[start : start + size], counts or {"encoder": 3, "cached_bytes": 7})
    return images


def test_parts_of_any_size_become_the_same_npz_in_order(tmp_path):
    """ADM's evaluator reads rows of arr_0.npy as a stream: stored, not compressed, C order."""
    hashes = set()
    for size in (1, 4, 11):
        images, npz = fill(tmp_path / str(size), 11, size), tmp_path / f"{size}.npz"
        assert merge_parts(tmp_path / str(size), npz, list(range(11))) == {"encoder": 3, "cached_bytes": 7}
        hashes.add(hashlib.sha256(npz.read_bytes()).hexdigest())
    assert len(hashes) == 1
    with np.load(npz, allow_pickle=False) as file:
        assert file["arr_0"].dtype == np.uint8
        assert np.array_equal(file["arr_0"], images)
        assert (file["arr_1"].dtype, file["arr_1"].tolist()) == (np.int64, list(range(11)))
    assert np.array_equal(np.stack(list(rows(npz))), images)
    with zipfile.ZipFile(npz) as archive:
        assert archive.namelist() == ["arr_0.npy", "arr_1.npy"]
        assert {info.compress_type for info in archive.infolist()} == {zipfile.ZIP_STORED}


def test_counts_are_means_over_the_images(tmp_path):
    images = fill(tmp_path / "parts", 4, 4)
    write_part(tmp_path / "parts", 4, images[:1], {"encoder": 8, "cached_bytes": 3})
    counts = merge_parts(tmp_path / "parts", tmp_path / "samples.npz", [0] * 5)
    assert counts == {"encoder": 4.0, "cached_bytes": 7}


def test_merging_holds_one_part_in_memory(tmp_path):
    fill(tmp_path / "parts", 400, 8, shape=(64, 64, 3))  # 4.9 MB in parts of 98 kB
    tracemalloc.start()
    merge_parts(tmp_path / "parts", tmp_path / "samples.npz", [0] * 400)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1e6


def test_damaged_parts_are_sampled_again(tmp_path):
    fill(tmp_path, 12, 3)
    paths = sorted(tmp_path.glob("*.npz"))
    paths[0].write_bytes(paths[0].read_bytes()[:-40])  # cut short
    flipped = bytearray(paths[1].read_bytes())
    flipped[300] ^= 1
    paths[1].write_bytes(flipped)
    paths[2].rename(tmp_path / "00000006-00000010.npz")  # holds fewer images than its name says
    (tmp_path / f".tmp-ddt-{platform.node()}-{2**22 + 1}-00000000-00000003.npz").touch()
    remove_damaged(tmp_path)
    assert sampled_numbers(tmp_path).tolist() == [9, 10, 11]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["00000009-00000012.npz"]


def test_no_flipped_bit_ends_in_a_traceback(tmp_path):
    fill(tmp_path, 2, 2)
    path = next(tmp_path.glob("*.npz"))
    whole = path.read_bytes()
    for place in range(0, len(whole), 3):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        remove_damaged(tmp_path)


def test_an_image_is_in_one_part_alone(tmp_path):
    images = fill(tmp_path, 8, 4)
    write_part(tmp_path, 2, images[2:5], {})  # by a process that lost its launcher
    remove_damaged(tmp_path)
    assert sampled_numbers(tmp_path).tolist() == list(range(8))


def test_a_part_is_written_atomically(tmp_path, monkeypatch):
    def half(path, **arrays):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "savez", half)
    with pytest.raises(KeyboardInterrupt):
        write_part(tmp_path, 0, np.zeros((2, 4, 4, 3), dtype=np.uint8), {})
    assert sampled_numbers(tmp_path).tolist() == []


def test_a_gap_is_never_merged(tmp_path):
    fill(tmp_path / "parts", 6, 2)
    (tmp_path / "parts" / "00000002-00000004.npz").unlink()
    with pytest.raises(AssertionError, match="every image"):
        merge_parts(tmp_path / "parts", tmp_path / "samples.npz", [0] * 6)
    assert not (tmp_path / "samples.npz").exists()
