"""Crops of colour photos: the same in every run, of every photo, other ones held out."""

import importlib.util

import numpy as np
import pytest
from conftest import refusal, succeed
from PIL import Image

from ddt.data.images import ImageFolder
from ddt.data.photos import PHOTOS, Photos, photo
from ddt.errors import UserError


@pytest.fixture(scope="module")
def train():
    return Photos("train", image_size=16, crops=10)


def test_the_crops_can_be_written_as_a_folder_of_images(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    succeed("scripts.studies.photos.write_photos", "out=mine", "crops=5", "image_size=16")
    images = ImageFolder("mine", 16, holdout_every=0)
    expected = Photos(image_size=16, crops=5)
    assert images.class_names == sorted(expected.class_names)
    assert len(images.names) == 45
    chelsea = np.flatnonzero(images.labels == images.class_names.index("chelsea"))
    crops = expected.load(np.flatnonzero(expected.labels == expected.class_names.index("chelsea")))
    assert np.abs(images.load(chelsea).astype(int) - crops).mean() < 6  # JPEG
    assert refusal("scripts.studies.photos.write_photos", "out=mine").startswith(
        "out=mine: exists already and is not written over"
    )
    assert refusal("scripts.studies.photos.write_photos", "out=other", "crops=2").startswith(
        "crops=2: must be at least 5"
    )


def test_every_photo_gives_as_many_crops(train):
    test = Photos("test", image_size=16, crops=10)
    assert train.images.shape == (90, 3, 16, 16)
    assert train.images.dtype == np.uint8
    assert (train.channels, train.image_size) == (3, 16)
    assert train.class_names == list(PHOTOS)
    assert len(PHOTOS) == 9
    assert np.bincount(train.labels).tolist() == [10] * 9
    assert np.bincount(test.labels).tolist() == [2] * 9
    assert sorted(set(train.labels[:9])) == list(range(9))  # interleaved
    many = Photos("test", image_size=16, crops=45)
    assert len(set(train.names) | set(many.names)) == 90 + 81  # other crops than those of training


def test_crops_are_the_same_in_every_run_and_for_every_number_of_them(train):
    fewer = Photos("train", image_size=16, crops=5)
    assert train.fingerprint != fewer.fingerprint
    assert np.array_equal(fewer.images, train.images[:45])
    assert fewer.names == train.names[:45]
    assert train.names[1] == "chelsea/260+159+8"
    assert int(train.images[:9].astype(int).sum()) == pytest.approx(739_254, rel=1e-3)  # a Pillow may round otherwise


def test_a_crop_is_the_part_of_the_photo_that_its_name_says(train):
    shares = []
    for image, label, name in zip(train.images, train.labels, train.names, strict=True):
        source, _, box = name.partition("/")
        assert source == train.class_names[label]
        side, left, top = map(int, box.split("+"))
        picture = photo(source)
        assert left + side <= picture.width
        assert top + side <= picture.height
        shares.append(side / min(picture.size))
        part = picture.crop((left, top, left + side, top + side)).resize((16, 16), Image.Resampling.BICUBIC)
        difference = np.abs(image.astype(int) - np.asarray(part).transpose(2, 0, 1))
        assert difference.mean() < 4, name  # reduced by a box filter first
    assert 0.39 < min(shares) < 0.5
    assert 0.9 < max(shares) <= 1


def test_sizes_that_cannot_be_are_named():
    with pytest.raises(UserError, match=r"data\.image_size=0: must be at least 1"):
        Photos(image_size=0)
    with pytest.raises(UserError, match=r"data\.crops=4: must be at least 5"):
        Photos(crops=4)


@pytest.mark.parametrize("installed", ["nothing", "an older release"])
def test_a_missing_package_is_named_in_one_line(monkeypatch, tmp_path, installed):
    original = importlib.util.find_spec

    def find(name, package=None):
        if name != "skimage":
            return original(name, package)
        if installed == "nothing":
            return None
        spec = original("skimage")
        spec.submodule_search_locations[:] = [str(tmp_path)]
        return spec

    monkeypatch.setattr(importlib.util, "find_spec", find)
    message = refusal("scripts.train_autoencoder", "data=photos", f"out={tmp_path / 'out'}")
    what = "needs the package skimage" if installed == "nothing" else "scikit-image is missing, or lacks astronaut.png"
    assert message.partition(": ")[2] == f"{what}; run pip install -e '.[photos]'"
