"""What autoencoders lose: PSNR, and sets of reconstructions that evaluate.py scores."""

import json

import numpy as np
import pytest
import torch
from conftest import picture_folder, refusal, small_rae, small_vae, succeed, thinned
from PIL import Image

from ddt.autoencoder import KLAutoencoder, build_autoencoder
from ddt.data.images import Digits, ImageFolder
from ddt.draws import noise_of
from ddt.metrics.evaluate import sampling_receipt
from ddt.metrics.images import open_images
from ddt.metrics.reconstruct import comparison, psnr

pytestmark = pytest.mark.usefixtures("one_thread")
DATA = ["data=folder", "data.root=pictures", "data.image_size=16", "data.channels=3", "data.holdout_every=5"]


@pytest.fixture(autouse=True)
def inside(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def written(folder):
    with np.load(folder / "samples.npz") as file:
        return torch.from_numpy(file["arr_0"]).permute(0, 3, 1, 2), file["arr_1"]


def test_reconstructions_are_a_set_that_is_measured_with_its_receipt(tmp_path):
    """Held-out images, each with posterior noise of its own number: no batch size changes them."""
    picture_folder(tmp_path / "pictures", 8)
    held_out = ImageFolder("pictures", 16, "test", holdout_every=5)
    images = torch.from_numpy(held_out.load(np.arange(len(held_out.labels))))
    rae, vae = small_rae(tmp_path / "rae"), small_vae(tmp_path / "vae")
    parts = [f"autoencoder.{key}={value}" for key, value in rae.items() if key != "_target_"]
    chosen = ["autoencoder=rae_dinov2_b", "autoencoder.source=null", "autoencoder.statistics=null", *parts]
    succeed("scripts.reconstruct", *DATA, *chosen, "out=by_rae", "batch_size=3")
    succeed("scripts.reconstruct", *DATA, "autoencoder=kl", f"autoencoder.source={vae}", "out=by_kl", "batch_size=1")
    codec = KLAutoencoder(vae)
    noise = noise_of(list(range(len(images))), codec.latent_shape(3, 16))
    own = build_autoencoder(rae)
    for name, expected in (
        ("by_rae", own.decode(own.sample(own.encode(images)))),
        ("by_kl", codec.decode(codec.sample(codec.encode(images), noise))),
    ):
        found, labels = written(tmp_path / name)
        assert (found.int() - expected.int()).abs().max() <= 1
        assert np.array_equal(labels, held_out.labels)
        opened = open_images(tmp_path / name, "samples")
        receipt = sampling_receipt(opened.path, opened.sha256)["sampling"]
        assert (receipt["kind"], receipt["samples"], receipt["split"]) == ("reconstructions", 4, "test")
        assert receipt["psnr"] == pytest.approx(psnr(images, found))
        with Image.open(tmp_path / name / "grid.png") as picture:
            assert picture.width > 4 * 16


def test_a_share_of_the_training_images_without_loss(tmp_path):
    succeed("scripts.reconstruct", "data=digits", "out=digits", "split=train", "num_images=20", "batch_size=7")
    found, labels = written(tmp_path / "digits")
    digits = Digits("train")
    chosen = np.linspace(0, len(digits.labels) - 1, 20).astype(int)
    assert np.array_equal(found, digits.load(chosen))
    assert np.array_equal(labels, digits.labels[chosen])
    assert json.loads((tmp_path / "digits" / "receipt.json").read_text())["psnr"] > 100


@pytest.mark.parametrize(
    ("arguments", "message"),
    thinned(
        [
            ([], "out: not set; give out=…"),
            (["out=here"], "out=here: exists already and is not written over; choose another out="),
            (["out=new", "num_images=0"], "num_images=0: must be at least 1"),
            (["out=new", "split=all"], "split=all: give "),
            (["out=new", "model=nano"], "model: has no effect here; choose from data, autoencoder, out"),
        ],
        2,
    ),
)
def test_mistakes_are_one_line(tmp_path, arguments, message):
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "notes.txt").touch()
    (line,) = refusal("scripts.reconstruct", "data=digits", *arguments).splitlines()
    assert line.startswith(message), line
    assert not (tmp_path / "new").exists()


def test_a_split_without_images_is_named(tmp_path):
    picture_folder(tmp_path / "pictures", 3)
    none = [*DATA[:-1], "data.holdout_every=0", "autoencoder=identity", "out=new"]
    assert refusal("scripts.reconstruct", *none).startswith("split=test: data=folder holds no image of it; give split=")
    assert not (tmp_path / "new").exists()


def test_psnr():
    dark = torch.zeros(2, 1, 4, 4, dtype=torch.uint8)
    other = dark.clone()
    other[0] = 255  # 0 dB
    other[1, 0, 0, 0] = 204  # mean square 0.8²/16: 13.98 dB
    assert psnr(dark, other) == pytest.approx(13.979 / 2, abs=1e-3)
    assert 100 < psnr(dark, dark) < 200


def test_originals_stand_above_their_reconstructions():
    for count, rows in ((1, 2), (3, 2), (8, 2), (11, 2), (16, 4), (40, 4)):
        images = torch.zeros(count, 3, 48, 48, dtype=torch.uint8)
        picture = comparison(images, images + 255)
        margin = picture.shape[1] - (min(count, 8) * 50 + 2)  # the names of the rows
        assert picture.shape[0] == rows * 50 + 2
        assert picture[25::50, margin + 25 :: 50].mean(axis=(1, 2)).tolist() == [0, 255] * (rows // 2)
        names = [picture[2 + 50 * k : 50 + 50 * k, :margin] for k in range(rows)]
        assert all(name.min() < 128 for name in names)
        assert not (names[0] == names[1]).all()
