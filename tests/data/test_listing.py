"""Which files of a folder are images, in which order, and what a wrong layout leads to."""

import os

import numpy as np
import pytest
from conftest import picture, picture_folder

from ddt.data.images import ImageFolder
from ddt.data.listing import IMAGE_SUFFIXES, layout_hints, list_folder
from ddt.errors import UserError


def write(path, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(seed, 8, 8).save(path)


def test_files_come_class_by_class_in_the_order_of_their_paths(tmp_path):
    for name in ("b/0.png", "a/z.PNG", "a/more/1.png", "a/more.png", "a/10.png", "a/9.png"):
        write(tmp_path / name)
    listed = list_folder(str(tmp_path))
    assert listed.class_names == ["a", "b"]
    assert listed.names == ["a/10.png", "a/9.png", "a/more/1.png", "a/more.png", "a/z.PNG", "b/0.png"]
    assert listed.labels.tolist() == [0] * 5 + [1]
    assert listed.names == sorted(listed.names, key=lambda name: name.split("/"))


def test_classes_are_numbered_as_they_are_called(tmp_path):
    for k in range(12):
        write(tmp_path / str(k) / "0.png")
    listed = list_folder(str(tmp_path))
    assert listed.class_names == [str(k) for k in range(12)]
    assert [int(name.split("/")[0]) for name in listed.names] == listed.labels.tolist() == list(range(12))
    for name in ("x2y10", "x2y9", "x10", "n01440764", "n01440763"):
        write(tmp_path / "mixed" / name / "0.png")
    assert list_folder(str(tmp_path / "mixed")).class_names == ["n01440763", "n01440764", "x2y9", "x2y10", "x10"]


def test_images_without_sub_folders_are_one_class(tmp_path):
    for k in range(3):
        write(tmp_path / "flowers" / f"{k}.png")
    listed = list_folder(str(tmp_path / "flowers"))
    assert (listed.class_names, listed.names) == (["flowers"], ["0.png", "1.png", "2.png"])
    assert listed.labels.tolist() == [0, 0, 0]


def test_every_suffix_that_pillow_reads_is_an_image(tmp_path):
    kinds = {".jfif": "JPEG", ".jpe": "JPEG", ".tif": "TIFF", ".pgm": "PPM", ".webp": "WEBP", ".avif": "AVIF"}
    (tmp_path / "a").mkdir()
    for suffix, kind in kinds.items():
        picture(1, 16, 16).save(tmp_path / "a" / f"x{suffix}", format=kind)
        assert suffix in IMAGE_SUFFIXES
    images = ImageFolder(str(tmp_path), 8, holdout_every=0)
    assert images.load(np.arange(6)).shape == (6, 3, 8, 8)


def test_what_is_no_image_is_left_out_and_counted(tmp_path):
    """Hidden files and folders at any depth, leftovers, a pipe, a link back up: none is read."""
    picture_folder(tmp_path, count=4)
    sound = list_folder(str(tmp_path)).names
    inside = tmp_path / "class0"
    for name in (".tmp-host-12-x.png", "._00.png", ".ipynb_checkpoints/00-checkpoint.png", "@eaDir/00.png"):
        write(inside / name)
    write(tmp_path / "__MACOSX" / "class0" / "00.png")
    (inside / "notes.txt").touch()
    (inside / "film.GIF").touch()
    (tmp_path / "README").touch()
    (inside / "loop").symlink_to("..")
    (inside / "above").symlink_to(tmp_path.parent)
    os.mkfifo(inside / "pipe.png")
    (inside / "linked.png").symlink_to("pipe.png")
    listed = list_folder(str(tmp_path))
    assert listed.names == sound
    assert listed.left_out == {
        "hidden": 5, ".txt": 1, ".gif": 1, "without suffix": 1, "links to a folder above them": 2,
        "pipes or devices": 2,
    }  # fmt: skip
    (hint,) = layout_hints(listed)
    assert hint == (
        "not read: 1 .gif, 1 .txt, 5 hidden, 2 links to a folder above them, 2 pipes or devices, 1 without suffix"
    )


def test_links_are_followed_and_a_broken_one_is_named_when_it_is_read(tmp_path):
    elsewhere = picture_folder(tmp_path / "elsewhere", count=2, classes=1)
    root = picture_folder(tmp_path / "pictures", count=1)
    (root / "class1" / "more").symlink_to(elsewhere / "class0")
    (root / "class2").symlink_to(elsewhere / "class0")
    assert list_folder(str(root)).labels.tolist() == [0, 1, 1, 1, 2, 2]
    (root / "class0" / "99.png").symlink_to("nowhere.png")
    (root / "class0" / "self.png").symlink_to("self.png")
    images = ImageFolder(str(root), 8, holdout_every=0)
    assert images.names[1:3] == ["class0/99.png", "class0/self.png"]
    for index in (1, 2):
        with pytest.raises(UserError, match=r"(99|self)\.png: not a readable image"):
            images.load(np.array([index]))


def test_file_names_keep_their_bytes_and_class_names_must_be_utf8(tmp_path):
    root = picture_folder(tmp_path / "pictures", count=1)
    (root / "class0" / "00.png").rename(os.fsdecode(os.fsencode(root) + b"/class0/caf\xe9.png"))
    images = ImageFolder(str(root), 8, holdout_every=0)
    assert os.fsencode(images.names[0]) == b"class0/caf\xe9.png"
    assert images.load(np.array([0])).shape == (1, 3, 8, 8)
    assert images.fingerprint
    os.rename(root / "class1", os.fsencode(root) + b"/caf\xe9")
    with pytest.raises(UserError, match=r"sub-folder b'caf\\xe9' is not UTF-8; rename it"):
        list_folder(str(root))


def test_a_folder_that_is_laid_out_otherwise_is_named(tmp_path):
    with pytest.raises(UserError, match="holds no images and no sub-folders"):
        list_folder(str(tmp_path))
    picture_folder(tmp_path / "train", count=1)
    write(tmp_path / "train" / "beside.png")
    with pytest.raises(
        UserError, match=r"samples=.*: holds images \(beside\.png\) beside its sub-folders \(class0, cla"
    ):
        list_folder(str(tmp_path / "train"), "samples")
    (tmp_path / "train" / "beside.png").unlink()
    (tmp_path / "train" / "empty").mkdir()
    with pytest.raises(UserError, match="empty: holds no images"):
        list_folder(str(tmp_path / "train"))


@pytest.mark.parametrize(
    ("folders", "advised"),
    [
        (("train", "val"), "train"),
        (("test", "Training_set"), "Training_set"),
        (("train2017", "val2017", "annotations"), "train2017"),
        (("CLS-LOC/train", "CLS-LOC/val"), "CLS-LOC/train"),
        (("only/train",), "only/train"),
    ],
)
def test_splits_are_no_classes_here_or_one_level_below(tmp_path, folders, advised):
    for folder in folders:
        picture_folder(tmp_path / folder, count=1)
    with pytest.raises(UserError, match=rf"are splits, not classes; give data\.root={tmp_path}/{advised}$"):
        list_folder(str(tmp_path))


def test_what_a_layout_may_mean_is_hinted_at(tmp_path):
    def hints(*names, expected=None):
        root = tmp_path / str(len(list(tmp_path.iterdir())))
        for name in names:
            write(root / name / "0.png")
        return layout_hints(list_folder(str(root)), expected)

    assert hints("a", "b") == hints("a", "b", expected=2) == []
    assert hints("a/x", "a/y", "b") == []
    assert hints("plane", "train") == ["the sub-folder train is taken for a class"]  # as in COCO
    (line,) = hints("pets/cat", "pets/dog")
    assert line.startswith("the only class is pets, whose sub-folders cat, dog hold the images")
    (line,) = hints("bottle/train/good", "bottle/test/good", "wood/train")
    assert line == "bottle: hold the splits test, train, and all of them are read"
    (line,) = hints("a", "b", expected=1000)
    assert line == "2 classes, where data.num_classes=1000 are expected: is it the right folder?"
