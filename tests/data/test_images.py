"""Data sets: their splits, how files are read, and how broken ones are refused."""

import gzip

import numpy as np
import pytest
from conftest import picture
from PIL import Image

from ddt.data.images import Digits, FashionMNIST, ImageFolder, center_crop, read_image
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


def test_every_kind_of_file_is_read_as_rgb_of_eight_bits(tmp_path):
    """Grey, palette, CMYK, transparent, 16-bit, rotated: the pixels that ADM's reader gives."""
    colour = picture(0, 8, 8)
    grey = colour.convert("L")
    deep = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1024
    exif = Image.Exif()
    exif[0x0112] = 6
    palette = colour.convert("P")
    kinds = {
        "grey.png": (grey, {}, grey.convert("RGB")),
        "palette.png": (palette, {}, palette.convert("RGB")),
        "alpha.png": (colour.convert("RGBA"), {}, colour),
        "see_through.png": (palette, {"transparency": bytes(range(200))}, palette.convert("RGB")),
        "deep.png": (Image.fromarray(deep), {}, Image.fromarray((deep >> 8).astype(np.uint8)).convert("RGB")),
        "rotated.png": (colour, {"exif": exif}, colour),
    }
    for name, (image, options, expected) in kinds.items():
        image.save(tmp_path / name, **options)
        actual = read_image(tmp_path / name)
        assert actual.mode == "RGB"
        assert np.array_equal(np.asarray(actual), np.asarray(expected)), name
    colour.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=100)
    with Image.open(tmp_path / "cmyk.jpg") as stored:
        assert np.array_equal(np.asarray(read_image(tmp_path / "cmyk.jpg")), np.asarray(stored.convert("RGB")))


@pytest.mark.parametrize("content", ["cut", "text", "nothing"])
def test_a_broken_file_is_named_and_never_half_read(tmp_path, content):
    picture(0, 300, 200).save(tmp_path / "x.jpg")
    data = (tmp_path / "x.jpg").read_bytes()
    (tmp_path / "x.jpg").write_bytes({"cut": data[: len(data) // 2], "text": b"no picture", "nothing": b""}[content])
    with pytest.raises(UserError, match=r"x\.jpg: not a readable image .*; replace or remove it"):
        read_image(tmp_path / "x.jpg")


def test_a_picture_too_elongated_to_crop_is_named(tmp_path):
    picture(0, 1, 101).save(tmp_path / "x.png")
    with pytest.raises(UserError, match=r"x\.png: is 1×101, too elongated to crop"):
        read_image(tmp_path / "x.png")


def test_image_folder_names_what_is_wrong(tmp_path):
    with pytest.raises(UserError, match=r"data\.root=.*nowhere: no such folder"):
        ImageFolder(str(tmp_path / "nowhere"), 8)
    with pytest.raises(UserError, match="holds no images and no sub-folders"):
        ImageFolder(str(tmp_path), 8)
    write_folder(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty: holds no images"):
        ImageFolder(str(tmp_path), 8)


@pytest.mark.parametrize("size", [(8, 8), (9, 31), (37, 16), (100, 75), (17, 16)])
def test_center_crop_follows_adm(size):
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    actual = np.asarray(center_crop(image, 8))
    expected = image
    while min(*expected.size) >= 2 * 8:
        expected = expected.resize(tuple(x // 2 for x in expected.size), resample=Image.Resampling.BOX)
    scale = 8 / min(*expected.size)
    expected = np.asarray(
        expected.resize(tuple(round(x * scale) for x in expected.size), resample=Image.Resampling.BICUBIC)
    )
    top, left = (expected.shape[0] - 8) // 2, (expected.shape[1] - 8) // 2
    assert np.array_equal(actual, expected[top : top + 8, left : left + 8])
