"""Grids and PNG files."""

import os
import platform
import subprocess
import sys

import numpy as np
import torch
from PIL import Image, ImageFont

from ddt.class_names import imagenet_synsets, readable
from ddt.files import TEMPORARY
from ddt.pictures import caption_lines, image_grid, write_png, write_pngs


def test_grid_enlarges_small_images():
    picture = image_grid(torch.full((6, 1, 8, 8), 7, dtype=torch.uint8), columns=3)
    assert picture.shape == (2 * 50 + 2, 3 * 50 + 2, 3)
    assert picture[25, 25].tolist() == [7, 7, 7]


def test_captions_stand_under_their_images_and_never_on_them():
    images = torch.full((5, 3, 64, 64), 7, dtype=torch.uint8)
    names = ["cat", "", "a very long name that cannot fit into sixty-four pixels", "dog", "cat"]
    picture = image_grid(images, 3, names)
    cell, height = 66, 64 + 2 * 10 + 4 + 2  # two lines, for the long name
    assert picture.shape == (2 * height + 2, 3 * cell + 2, 3)
    for k, name in enumerate(names):
        top, left = 2 + k // 3 * height, 2 + k % 3 * cell
        assert (picture[top : top + 64, left : left + 64] == 7).all()
        caption = picture[top + 64 : top + height - 2, left : left + 64]
        assert (caption.min() < 128) == bool(name)
    assert (picture[:, 66:68] == 255).all()  # between two cells nothing is written
    one, other = image_grid(images[:1], 1, ["cat"]), image_grid(images[:1], 1, ["dog"])
    assert not np.array_equal(one, other)


def test_long_captions_break_between_words_and_end_where_they_do_not_fit():
    font = ImageFont.load_default(10)
    assert caption_lines("cat", font, 64) == "cat"
    assert caption_lines("hubble_deep_field", font, 64) == "hubble_\ndeep_field"
    assert caption_lines("golden retriever", font, 64) == "golden\nretriever"
    for name in ("a very long name that cannot fit into it", "supercalifragilistic"):
        lines = caption_lines(name, font, 64).split("\n")
        assert len(lines) <= 2
        assert lines[-1].endswith("…")
        assert max(map(font.getlength, lines)) <= 64


def test_rows_are_named_beside_their_images():
    images = torch.full((4, 3, 64, 64), 7, dtype=torch.uint8)
    plain = image_grid(images, 2, ["cat", "dog"] * 2)
    picture = image_grid(images, 2, ["cat", "dog"] * 2, rows=["original", "reconstruction"])
    margin = picture.shape[1] - plain.shape[1]
    assert margin > 0
    assert np.array_equal(picture[:, margin:], plain)  # names are never on the images
    rows = [picture[top : top + 64, :margin] for top in (2, 2 + 64 + 14 + 2)]
    assert all(row.min() < 128 and (row[:, :2] == 255).all() for row in rows)  # none is cut off
    width = [(row.min(axis=(0, 2)) < 128).sum() for row in rows]
    assert width[0] < width[1]


def test_imagenet_has_names():
    synsets = imagenet_synsets()
    assert len(set(synsets)) == 1000
    assert synsets[:2] == ["n01440764", "n01443537"]
    assert readable(["n01440764", "n02099601", "Trouser"]) == ["tench", "golden retriever", "Trouser"]


def test_png_files_are_the_images_and_stay(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (300, 4, 5, 3), dtype=np.uint8)
    write_pngs(tmp_path / "png", iter(images), 290)
    assert len(list((tmp_path / "png").iterdir())) == 290
    for k in (0, 255, 256, 289):
        assert np.array_equal(np.asarray(Image.open(tmp_path / "png" / f"{k:06d}.png")), images[k])
    (tmp_path / "png" / "000003.png").write_text("mine")
    write_pngs(tmp_path / "png", iter(images), 300)
    assert (tmp_path / "png" / "000003.png").read_text() == "mine"
    assert len(list((tmp_path / "png").iterdir())) == 300


def test_grey_images_are_grey_png_files(tmp_path):
    write_png(tmp_path / "a.png", np.full((4, 5, 1), 9, dtype=np.uint8))
    assert Image.open(tmp_path / "a.png").mode == "L"


def test_no_png_no_folder(tmp_path):
    write_pngs(tmp_path / "png", iter([]), 0)
    assert not (tmp_path / "png").exists()


def test_what_a_killed_process_left_among_the_pngs_is_removed(tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    begin = f"{TEMPORARY}{platform.node()}-"
    names = [f"{begin}{ended.pid}-x.png", f"{begin}{os.getpid()}-x.png", f"{begin}word-x.png", ".tmp-y-1"]
    for name in names:
        (tmp_path / name).touch()
    write_pngs(tmp_path, [np.zeros((4, 4, 3), dtype=np.uint8)], 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*names[1:], "000000.png"])
