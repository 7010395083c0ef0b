"""Settings inferred from a folder of images, and the hints that are logged."""

import json
import shutil

import numpy as np
import pytest
from conftest import picture, picture_folder, refusal, run_inside
from PIL import Image

from ddt.config import Choice
from ddt.data import survey as surveying
from ddt.data.images import ImageFolder
from ddt.data.labels import FolderPlace
from ddt.data.source import Folder
from ddt.data.survey import (
    header_hints,
    infer_settings,
    listing_hints,
    log_folder_summary,
    patch_size,
    report_broken,
    survey,
)
from ddt.errors import UserError

pytestmark = pytest.mark.usefixtures("one_thread")
FOLDER = {"image_size": None, "channels": None, "holdout_every": 20}


def write(path, width, height, mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(len(str(path)), width, height).convert(mode).save(path)


def test_small_squares_of_one_size_are_trained_on_as_they_are(tmp_path):
    for k in range(3):
        write(tmp_path / "a" / f"{k}.png", 28, 28, "L")
    seen = survey(FolderPlace(str(tmp_path)))
    assert (seen.image_size, seen.channels) == (28, 1)
    images = ImageFolder(str(tmp_path), None, holdout_every=0, channels=None)
    assert images.inferred == {"image_size": 28, "channels": 1}
    assert images.load(np.arange(3)).shape == (3, 1, 28, 28)
    pixels = np.asarray(Image.open(tmp_path / "a" / "1.png"))
    assert np.array_equal(images.load(np.array([1]))[0, 0], pixels)
    write(tmp_path / "b" / "0.png", 28, 28)
    survey.cache_clear()
    assert survey(FolderPlace(str(tmp_path))).channels == 3  # one coloured image makes all RGB


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([(47, 47)], 44),
        ([(64, 64)], 64),
        ([(65, 65)], 32),
        ([(28, 28), (28, 29)], 32),
        ([(40, 30)], 32),
        ([(640, 480), (300, 900)], 32),
    ],
)
def test_other_sizes_are_brought_to_a_usual_one(tmp_path, sizes, expected):
    for k, (width, height) in enumerate(sizes):
        write(tmp_path / "a" / f"{k}.png", width, height)
    assert survey(FolderPlace(str(tmp_path))).image_size == expected


@pytest.mark.parametrize(
    ("size", "patch"), [(4, 1), (8, 1), (10, 2), (16, 2), (28, 4), (32, 4), (44, 4), (64, 8), (256, 8)]
)
def test_patches_make_a_grid_of_at_most_eight_where_they_can(size, patch):
    assert patch_size(size) == patch
    with pytest.raises(UserError, match=r"image_size=47: give a multiple of 4, 44 or 48, or a model\.patch_size="):
        patch_size(47)


def test_null_settings_are_inferred_and_others_kept(tmp_path):
    picture_folder(tmp_path, count=2)
    model, data = Choice("ddt.model.DDT", {"patch_size": None}), Choice("ddt.data.images.ImageFolder", FOLDER)
    data = Choice(data.target, {**data.settings, "root": str(tmp_path)})
    for kind, patch in (("Identity", 4), ("KLAutoencoder", 2)):
        autoencoder = Choice(f"ddt.autoencoder.{kind}", {})
        inferred, images = infer_settings(model, data, autoencoder)
        assert inferred.settings == {"patch_size": patch}
        assert images.settings == {**data.settings, "image_size": 32, "channels": 3}
        assert infer_settings(inferred, images, autoencoder) == (inferred, images)


def hints(root, image_size, channels, holdout_every, exif="ignore"):
    seen = survey(FolderPlace(str(root)))
    return [
        *listing_hints(seen.listed, holdout_every, None),
        *header_hints(seen.headers, image_size, channels, exif),
    ]


def test_what_should_be_known_is_said(tmp_path, caplog):
    caplog.set_level("INFO")
    for k in range(25):
        write(tmp_path / "many" / f"{k}.png", 40, 30)
    write(tmp_path / "alone" / "0.png", 20, 50, "RGBA")
    (tmp_path / "many" / "notes.txt").touch()
    text = "\n".join(hints(tmp_path, 32, 3, holdout_every=20))
    assert "26 images are few" in text
    assert "classes of fewer than 20 images: alone (1)\n" in text
    assert "alone: the only image is held out" in text
    assert "26 images are smaller than data.image_size=32" in text
    assert "1 images are transparent" in text
    assert "converted to RGB: 1 RGBA" in text
    assert "not read: 1 .txt" in text
    assert "data.channels=1 drops" not in text
    others = "\n".join(hints(tmp_path, 20, 1, 0))
    assert "26 images have colours, which data.channels=1 drops" in others
    assert "enlarged" not in others
    log_folder_summary(FolderPlace(str(tmp_path)), 32, 3, 4)
    images = ImageFolder(str(tmp_path), 32)
    images.log_hints()
    line, *rest = caplog.messages
    assert line.startswith(f"data.root={tmp_path}: 26 images in 2 classes, 20×50 to 40×30 px; trained at ")
    assert line.endswith("data.image_size=32, data.channels=3 (RGB), model.patch_size=4")
    assert rest == [f"hint: {hint}" for hint in text.splitlines()]


def test_conversions_are_those_of_the_latent_cache(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(1).save(tmp_path / "a.jpg", exif=exif)
    picture(2).convert("CMYK").save(tmp_path / "b.jpg")
    Image.fromarray(np.zeros((20, 24), np.uint16)).save(tmp_path / "c.png")
    ignored, applied = (hints(tmp_path, 16, 3, 0, exif)[1:] for exif in ("ignore", "apply"))
    assert ignored[0] == "converted to RGB: 1 CMYK, 1 I;16"
    assert ignored[1].startswith("1 images have more than 8 bits")
    assert "1 images carry an EXIF rotation, which is not applied" in ignored[2]
    assert "data.exif=apply" in ignored[2]
    assert applied[2] == "1 images carry an EXIF rotation, which is applied"


def test_nothing_is_said_where_nothing_needs_to(tmp_path, monkeypatch):
    picture_folder(tmp_path, count=21)
    monkeypatch.setattr(surveying, "FEW_IMAGES", 40)
    assert hints(tmp_path, 16, 3, 20) == []


def test_broken_and_elongated_images_are_found_before_training(tmp_path, monkeypatch, caplog):
    """Headers of all, pixels of as many as take seconds."""
    root = picture_folder(tmp_path, count=4)
    report_broken(FolderPlace(str(root)), skip_broken=False)
    cut = root / "class0" / "02.png"
    cut.write_bytes(cut.read_bytes()[:-500])
    picture(0, 1, 101).save(root / "class1" / "01.png")
    survey.cache_clear()
    seen = survey(FolderPlace(str(root)))
    assert list(seen.broken) == ["class1/01.png", "class0/02.png"]
    assert (seen.num_opened, seen.num_decoded) == (8, 7)
    with pytest.raises(UserError, match=r"01\.png: is 1×101, too elongated.*2 of the 8 .*data\.skip_broken=true"):
        report_broken(FolderPlace(str(root)), skip_broken=False)
    report_broken(FolderPlace(str(root)), skip_broken=True)
    assert "2 of the 8 images looked at cannot be read" in caplog.text
    survey.cache_clear()
    monkeypatch.setattr(surveying, "MAX_PIXELS", 3 * 24 * 20)
    assert survey(FolderPlace(str(root))).num_decoded == 3  # the cut one may be among the others


def test_large_folders_are_known_by_some_of_their_pictures(tmp_path, monkeypatch):
    picture_folder(tmp_path, count=5)
    monkeypatch.setattr(Folder, "max_surveyed", 4)
    seen = survey(FolderPlace(str(tmp_path)))
    assert sum(seen.headers.sizes.values()) == seen.num_opened == 4
    assert len(seen.listed.names) == 10


def test_a_folder_is_trained_on_with_what_was_found_in_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for k in range(6):
        write(tmp_path / "my cats" / f"class{k % 2}" / f"{k}.png", 12, 12, "L")
    small = ["trainer.max_steps=2", "trainer.global_batch_size=4", "trainer.preview_every=1", "sampler.num_steps=2"]
    done = run_inside("train", "data=folder", f"data.root={tmp_path / 'my cats'}", *small, "model.hidden_size=32")
    assert done.returncode == 0, done.stderr
    assert "6 images in 2 classes, 12×12 px; trained at data.image_size=12" in done.stderr
    assert "hint: 6 images are few" in done.stderr
    run_dir = tmp_path / "runs" / "folder_my_cats_nano"
    assert f"first samples: {run_dir.relative_to(tmp_path) / 'previews' / 'step_0000001.png'}" in done.stderr
    assert done.stderr.count("first samples") == 1
    stored = json.loads((run_dir / "config.json").read_text())
    assert (stored["data"]["image_size"], stored["data"]["channels"], stored["model"]["patch_size"]) == (12, 1, 2)
    shown = Image.open(run_dir / "previews" / "training_images.png")
    assert shown.width > 2 * 48  # a column per class
    again = run_inside("train", "data=folder", f"data.root={tmp_path / 'my cats'}", *small, "model.hidden_size=32")
    assert "complete at step 2" in again.stderr


def test_training_refuses_what_cannot_be_opened_before_it_begins(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    picture_folder(tmp_path / "pictures", count=2)
    (tmp_path / "pictures" / "class1" / "zz.jpg").write_text("no picture")
    message = refusal("train", "data=folder", f"data.root={tmp_path / 'pictures'}")
    assert "class1/zz.jpg: not a readable image" in message.splitlines()[-1]
    assert "; 1 of the 5 images looked at cannot be read. To train without them: data.skip_broken=true" in message
    assert not (tmp_path / "runs").exists()
    shutil.rmtree(tmp_path / "pictures" / "class0")
    for path in (tmp_path / "pictures" / "class1").glob("*.png"):
        path.unlink()
    survey.cache_clear()
    assert "none of its 1 images can be opened" in refusal("train", "data=folder", f"data.root={tmp_path / 'pictures'}")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data=folder"], "data.root: not set; give data.root=…"),
        (["data=folder", "data.root="], "data.root: not set; give data.root=…"),
        (["data=folder", "data.root=NOWHERE"], "data.root=NOWHERE: no such folder"),
        (["data=folder", "data.root=.", "data.image_size=8", "data.channels=2"], "data.channels=2: give 1 or 3"),
    ],
)
def test_a_wrong_folder_is_one_line(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (line,) = refusal("train", *arguments).splitlines()
    assert line.startswith(message)
