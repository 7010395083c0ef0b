"""Data sets: their splits and fingerprints, mirror images, what stands in for broken ones."""

import gzip
import shutil

import numpy as np
import pytest
import torch
from conftest import picture, picture_folder
from PIL import Image

from ddt.data.images import Digits, FashionMNIST, ImageFolder
from ddt.data.stream import TrainingStream, validation_batch
from ddt.errors import UserError


def test_digits_have_a_fixed_split():
    train, test = Digits("train"), Digits("test")
    assert (len(train.labels), len(test.labels)) == (1497, 300)
    assert train.load(np.array([0, 5])).shape == (2, 1, 8, 8)
    assert train.images.dtype == np.uint8
    assert train.images.max() == 255
    assert set(train.labels) == set(test.labels) == set(range(10))
    together = {image.tobytes() for image in train.images}
    assert sum(image.tobytes() in together for image in test.images) == 0


def write_fashion(folder, compress):
    for prefix, count in (("train", 6), ("t10k", 4)):
        labels = (2049).to_bytes(4) + bytes(4) + bytes(range(count))
        images = (2051).to_bytes(4) + bytes(12) + bytes([200]) * (784 * count)
        for name, content in ((f"{prefix}-labels-idx1-ubyte", labels), (f"{prefix}-images-idx3-ubyte", images)):
            (folder / (f"{name}.gz" if compress else name)).write_bytes(gzip.compress(content) if compress else content)


@pytest.mark.parametrize("compress", [True, False])
def test_fashion_mnist_reads_both_kinds_of_files(tmp_path, compress):
    write_fashion(tmp_path, compress)
    train, test = (FashionMNIST(split, root=str(tmp_path)) for split in ("train", "test"))
    assert train.images.shape == (6, 1, 32, 32)
    assert len(test.labels) == 4
    assert train.labels.tolist() == list(range(6))
    assert (train.images[:, :, 2:30, 2:30] == 200).all()
    assert train.images.astype(int).sum() == 6 * 784 * 200


def test_fashion_mnist_says_how_to_get_it(tmp_path):
    with pytest.raises(UserError, match=r"apt-get install dataset-fashion-mnist.*data\.root=FOLDER"):
        FashionMNIST(root=str(tmp_path))
    write_fashion(tmp_path, compress=False)
    (tmp_path / "train-images-idx3-ubyte").write_bytes(bytes(100))
    with pytest.raises(UserError, match="train-images-idx3-ubyte: not the IDX file"):
        FashionMNIST(root=str(tmp_path))
    (tmp_path / "train-images-idx3-ubyte").write_bytes((2051).to_bytes(4) + bytes(100))
    with pytest.raises(UserError, match="train-images-idx3-ubyte: truncated"):
        FashionMNIST(root=str(tmp_path))
    (tmp_path / "train-images-idx3-ubyte").unlink()
    whole = gzip.compress(np.random.default_rng(0).bytes(6 * 784))
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(whole[:2000] + bytes(50) + whole[2050:])
    with pytest.raises(UserError, match=r"train-images-idx3-ubyte\.gz: cannot be read"):
        FashionMNIST(root=str(tmp_path))


def write_folder(root, sizes=((20, 30), (9, 8), (64, 40))):
    for label, name in enumerate(("cat", "dog")):
        (root / name).mkdir(parents=True)
        for k, (width, height) in enumerate(sizes):
            Image.new("RGB", (width, height), (100 * label, 10 * k, 7)).save(root / name / f"{k}.png")
    (root / "cat" / "notes.txt").write_text("not an image")
    (root / ".ipynb_checkpoints").mkdir()


def test_image_folder(tmp_path):
    write_folder(tmp_path)
    images = ImageFolder(str(tmp_path), image_size=8, holdout_every=0)
    assert images.class_names == ["cat", "dog"]
    assert images.labels.tolist() == [0, 0, 0, 1, 1, 1]
    batch = images.load(np.array([4, 0]))
    assert batch.shape == (2, 3, 8, 8)
    assert batch[0, :, 0, 0].tolist() == [100, 10, 7]
    train, test = (ImageFolder(str(tmp_path), 8, split, holdout_every=3) for split in ("train", "test"))
    assert (len(train.names), len(test.names)) == (4, 2)
    assert not set(train.names) & set(test.names)


def test_a_fingerprint_knows_names_labels_sizes_and_contents(tmp_path):
    """What would train another network is another data set, wherever the folder lies."""
    write_folder(tmp_path / "here")

    def parts():
        return ImageFolder(str(tmp_path / "here"), 8).fingerprint.split("-")

    shutil.copytree(tmp_path / "here", tmp_path / "copy")
    first = parts()
    assert ImageFolder(str(tmp_path / "copy"), 8).fingerprint.split("-") == first
    image, content = tmp_path / "here" / "cat" / "2.png", (tmp_path / "here" / "cat" / "2.png").read_bytes()
    image.write_bytes(content + b"x")  # another size
    listed, contents = parts()
    assert listed == first[0]
    assert contents != first[1]
    image.write_bytes(content[:-1] + b"x")  # the same
    assert parts()[1] not in (first[1], contents)
    image.write_bytes(content)
    for old, new in (("cat", "x"), ("dog", "cat"), ("x", "dog")):  # swapped classes
        (tmp_path / "here" / old).rename(tmp_path / "here" / new)
    (tmp_path / "here" / "dog" / "notes.txt").rename(tmp_path / "here" / "cat" / "notes.txt")
    assert parts() == [first[0], parts()[1]]
    assert parts()[1] != first[1]
    image.with_name("3.png").write_bytes(content)
    assert parts()[0] != first[0]


def test_classes_in_another_order_are_another_data_set(tmp_path, monkeypatch):
    for name in ("2", "10"):
        (tmp_path / name).mkdir()
        picture(0, 8, 8).save(tmp_path / name / "0.png")
    natural = ImageFolder(str(tmp_path), 8, holdout_every=0)
    assert natural.class_names == ["2", "10"]
    monkeypatch.setattr("ddt.data.listing.natural_order", str)
    by_text = ImageFolder(str(tmp_path), 8, holdout_every=0)
    assert by_text.class_names == ["10", "2"]
    assert natural.fingerprint.partition("-")[0] != by_text.fingerprint.partition("-")[0]


def broken_folder(root):
    """Two classes of four images, of which the second, third and last of class 0 are broken."""
    picture_folder(root, count=4)
    for k in (1, 2, 3):
        (root / "class0" / f"{k:02d}.png").write_bytes(b"broken")
    return root


def test_the_next_of_its_class_stands_in_for_a_broken_image(tmp_path, caplog):
    root = broken_folder(tmp_path)
    strict, images = (ImageFolder(str(root), 8, holdout_every=0, skip_broken=skip) for skip in (False, True))
    assert np.array_equal(images.load(np.array([3, 1, 2, 0])), strict.load(np.array([0, 0, 0, 0])))
    assert np.array_equal(images.load(np.arange(4, 8)), strict.load(np.arange(4, 8)))
    images.load(np.array([1, 1]))
    assert len(caplog.messages) == 3  # once a file
    assert "03.png: not a readable image" in caplog.messages[0]
    assert "; class0/00.png stands in for it" in caplog.messages[0]
    assert images.fingerprint == strict.fingerprint
    with pytest.raises(UserError, match=r"01\.png: not a readable image"):
        strict.load(np.array([1]))
    (root / "class0" / "00.png").write_bytes(b"broken")
    with pytest.raises(UserError, match=r"00\.png: .*; no image of its class can be read"):
        images.load(np.array([0]))


def test_mirror_images_are_chosen_by_position(tmp_path):
    picture_folder(tmp_path, count=5)
    plain, flipping = (ImageFolder(str(tmp_path), 8, holdout_every=0, horizontal_flip=flip) for flip in (False, True))
    positions = list(range(3, 203))
    straight, mirrored = (TrainingStream(images, 1, (3, 8, 8))[positions] for images in (plain, flipping))
    for key in ("y", "noise", "time_normal", "dropout_uniform"):
        assert torch.equal(straight[key], mirrored[key])
    same = (mirrored["images"] == straight["images"]).flatten(1).all(1)
    turned = (mirrored["images"] == straight["images"].flip(-1)).flatten(1).all(1)
    assert (same ^ turned).all()
    assert 60 < turned.sum() < 140
    assert torch.equal(TrainingStream(flipping, 1, (3, 8, 8))[[150]]["images"][0], mirrored["images"][147])
    held_out = validation_batch(flipping, (3, 8, 8), np.arange(10))
    assert np.array_equal(held_out["images"].numpy(), plain.load(np.arange(10)))
