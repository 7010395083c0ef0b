"""Whole evaluations: of samples against references of every kind, by every kind of features."""

import dataclasses
import json
import os
import re
import shutil
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from typing import ClassVar

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import GOLDEN, picture, refusal, succeed, thinned
from PIL import Image

from ddt.autoencoder.base import weights_hash
from ddt.data.images import ArrayImages, Digits
from ddt.data.photos import Photos
from ddt.distributed.prepare import make_accelerator
from ddt.errors import UserError
from ddt.files import sha256
from ddt.metrics import classifier
from ddt.metrics.classifier import train_classifier
from ddt.metrics.compare import numbers_of
from ddt.metrics.evaluate import evaluate
from ddt.metrics.features import extract
from ddt.metrics.frechet import Moments
from ddt.metrics.images import DataImages, NpzImages, open_images
from ddt.metrics.reference import Reference, data_reference, read_reference
from ddt.metrics.scores import prepare
from ddt.metrics.settings import ClassifierSettings

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")


def moments(features, batch=7):
    result = Moments(features.shape[1])
    for part in torch.as_tensor(features).split(batch):
        result.add(part)
    return result


def test_streamed_moments_are_numpys():
    features = np.random.default_rng(0).standard_normal((50, 6)).astype(np.float32)
    streamed = moments(features)
    np.testing.assert_allclose(streamed.mean, features.astype(np.float64).mean(axis=0), rtol=1e-10)
    np.testing.assert_allclose(streamed.covariance, np.cov(features.astype(np.float64), rowvar=False), rtol=1e-8)


def write(path, **arrays):
    np.savez(path, **arrays)
    return path


def of_digits(path, out, epochs=10, prepared=None):
    """Evaluate samples in the features of a classifier of the digits."""
    train, test = Digits("train"), Digits("test")
    extractor = ClassifierSettings("digits", epochs).extractor(CPU, train)
    reference = data_reference("data:digits", train, test)
    return evaluate(open_images(path, "samples"), reference, extractor, out, make_accelerator(), prepared=prepared)


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """Held-out real digits passed off as samples: what a perfect model would sample."""
    out = tmp_path_factory.mktemp("evaluation")
    test = Digits("test")
    write(out / "samples.npz", arr_0=test.images.transpose(0, 2, 3, 1), arr_1=test.labels)
    return out, of_digits(out, out)


def test_real_images_reach_the_real_values(evaluated):
    out, metrics = evaluated
    assert metrics["class_accuracy"] == metrics["class_accuracy_real"] > 0.95
    assert metrics["fd_digits"] == pytest.approx(metrics["fd_digits_real"], rel=1e-6)
    assert metrics["nearest_train_distance"] == pytest.approx(metrics["nearest_train_distance_real"])
    assert metrics["nearest_train_distance"] > 0.05
    assert min(metrics["precision"], metrics["recall"], metrics["authenticity"]) > 0.4
    assert json.loads((out / "metrics.json").read_text()) == metrics
    assert metrics["receipt"]["samples"]["count"] == 300
    assert metrics["labels"]["fd_digits"] == "FD-digits-300"
    assert "FID" not in json.dumps(metrics)
    assert metrics["comparable"] is False
    assert metrics["not_comparable_because"] == ["features=digits are those of a small classifier of this project"]
    assert (out / "nearest.png").stat().st_size > 1000


@pytest.mark.slow
def test_worse_samples_get_worse_values(evaluated, tmp_path):
    _, real = evaluated
    train = Digits("train")
    noisy = train.images[:300].astype(int) + np.random.default_rng(0).integers(-120, 120, (300, 1, 8, 8))
    samples = np.clip(noisy, 0, 255).astype(np.uint8).transpose(0, 2, 3, 1)
    write(tmp_path / "noisy.npz", arr_0=samples, arr_1=(train.labels[:300] + 1) % 10)
    metrics = of_digits(tmp_path / "noisy.npz", tmp_path)
    assert metrics["fd_digits"] > 2 * real["fd_digits"]
    assert metrics["class_accuracy"] < 0.2
    assert metrics["precision"] < 0.5 * real["precision"]
    assert metrics["class_accuracy_real"] == real["class_accuracy_real"]  # the same classifier each time


def test_memorised_samples(tmp_path):
    train = Digits("train")
    write(tmp_path / "copies.npz", arr_0=train.images[:50].transpose(0, 2, 3, 1))
    metrics = of_digits(tmp_path / "copies.npz", tmp_path, epochs=1)
    assert metrics["nearest_train_distance"] == 0 < metrics["nearest_train_distance_real"]
    assert metrics["authenticity"] == 0
    assert metrics["class_accuracy"] is None
    assert metrics["reasons"] == {"class_accuracy": "the samples carry no classes (arr_1)"}


def test_samples_that_do_not_fit_are_refused_before_training(evaluated, tmp_path, monkeypatch):
    monkeypatch.setattr("ddt.metrics.classifier.kept_classifier", None)
    images = np.zeros((3, 8, 8, 1), dtype=np.uint8)
    cases = {
        "class": (images, r"arr_1 holds classes outside of 0\.\.9"),
        "large": (np.zeros((3, 16, 16, 1), dtype=np.uint8), "images of 16×16 pixels, but features=digits reads 8×8"),
        "colour": (np.zeros((3, 8, 8, 3), dtype=np.uint8), "images of 3 channels, but features=digits reads 1"),
        "one": (images[:1], "holds one image"),
    }
    for name, (content, message) in cases.items():
        path = write(tmp_path / f"{name}.npz", arr_0=content, arr_1=np.array([0, 5, 10]))
        with pytest.raises(UserError, match=message):
            of_digits(path, tmp_path)
    monkeypatch.undo()
    write(tmp_path / "small.npz", arr_0=images)
    with pytest.raises(UserError, match=r"belongs to another evaluation.*choose another out="):
        of_digits(tmp_path / "small.npz", evaluated[0])


def test_threads_do_not_change_the_classifier():
    train = Digits("train")
    hashes = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        hashes.append(weights_hash(train_classifier(ClassifierSettings("digits", 1), train)))
        assert torch.get_num_threads() == threads
    torch.set_num_threads(1)
    assert hashes[0] == hashes[1]


def test_a_classifier_is_trained_once_and_kept(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("DDT_CACHE", str(tmp_path))
    trained = []
    monkeypatch.setattr(
        classifier, "train_classifier", lambda *given: [trained.append(given), train_classifier(*given)][1]
    )

    def weights(settings, train):
        return settings.extractor(CPU, train).identity()["weights"]["tensors_sha256"]

    train, settings = Digits("train"), ClassifierSettings("digits", 1)
    expected = weights_hash(train_classifier(settings, train))
    assert weights(settings, train) == weights(settings, train) == expected
    assert len(trained) == 1
    (kept,) = (tmp_path / "classifiers").glob("digits_*.safetensors")
    inverted = Digits("train")
    inverted.images = 255 - inverted.images
    others = [(dataclasses.replace(settings, learning_rate=1e-3), train), (settings, inverted)]
    assert len({expected, *(weights(*other) for other in others)}) == 3
    assert len(trained) == 3
    for content in (kept.read_bytes()[:-100], safetensors.torch.save({"head.bias": torch.zeros(10)})):
        kept.write_bytes(content)
        with pytest.raises(UserError, match=rf"^{kept}: .*remove it, and it is trained anew$"):
            weights(settings, train)
    (tmp_path / "file").touch()
    monkeypatch.setenv("DDT_CACHE", str(tmp_path / "file"))
    assert weights(settings, train) == expected
    assert len(trained) == 4
    monkeypatch.setenv("DDT_CACHE", str(tmp_path / "full"))
    monkeypatch.setattr(classifier, "reset_permissions", lambda path: os.truncate(path.parent / "none", 0))
    assert weights(settings, train) == expected
    assert len(trained) == 5
    assert caplog.text.count("name a folder by DDT_CACHE") == 2
    assert f"the classifier is not kept ([Errno 20] Not a directory: '{tmp_path}/file/classifiers')" in caplog.text


def test_of_several_processes_the_first_trains_the_classifier(tmp_path, monkeypatch):
    """Threads stand for processes: a lock of files holds between both."""
    monkeypatch.setenv("DDT_CACHE", str(tmp_path))
    trained = []

    def train_slowly(settings, train):
        trained.append(settings)
        time.sleep(0.5)
        return classifier.new_classifier(train)

    monkeypatch.setattr(classifier, "train_classifier", train_slowly)
    with ThreadPoolExecutor(3) as pool:
        made = [
            pool.submit(classifier.kept_classifier, ClassifierSettings("digits", 1), Digits("train")) for _ in "123"
        ]
    assert len({weights_hash(each.result()) for each in made}) == 1
    assert len(trained) == 1


def test_a_folder_of_images_is_not_written_to(tmp_path):
    """Results are written beside it, so that it can be evaluated again."""
    (tmp_path / "pictures").mkdir()
    for k, image in enumerate(Digits("test").images[:12, 0]):
        Image.fromarray(image).save(tmp_path / "pictures" / f"{k:02d}.png")
    arguments = [f"samples={tmp_path / 'pictures'}", "reference=data:digits", "features=digits", "features.epochs=1"]
    succeed("evaluate", *arguments)
    succeed("evaluate", *arguments)
    assert len(list((tmp_path / "pictures").iterdir())) == 12
    result = {path.name for path in (tmp_path / "pictures_evaluation").iterdir()}
    assert result == {"metrics.json", "nearest.png"}


def test_unusable_samples_are_named(tmp_path):
    images = np.zeros((3, 8, 8, 1), dtype=np.uint8)
    (tmp_path / "text.npz").write_text("no archive")
    (tmp_path / "empty").mkdir()
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    cases = {
        "absent.npz": "no such file",
        "empty": "holds no images and no sub-folders of images",
        "text.npz": "damaged or no npz file",
        write(tmp_path / "float.npz", arr_0=images.astype(float)).name: "must be uint8 images",
        write(tmp_path / "object.npz", arr_0=np.array([None, 1])).name: r"found object \(2,\)",
        write(tmp_path / "fortran.npz", arr_0=np.asfortranarray(images)).name: "is in Fortran's order",
        write(tmp_path / "flat.npz", arr_0=images[0]).name: "must be uint8 images",
        write(tmp_path / "none.npz", other=images).name: "found only other",
        write(tmp_path / "empty.npz", arr_0=images[:0]).name: "must be uint8 images",
        write(tmp_path / "bool.npz", arr_0=images, arr_1=np.ones(3, dtype=bool)).name: "expected integers",
        write(tmp_path / "labels.npz", arr_0=images, arr_1=np.zeros(2)).name: "arr_1 has shape",
    }
    whole = write(tmp_path / "cut.npz", arr_0=np.random.default_rng(0).integers(0, 255, (9, 8, 8, 1), dtype=np.uint8))
    whole.write_bytes(whole.read_bytes()[:300])
    cases["cut.npz"] = "damaged or no npz file"
    for name, message in cases.items():
        with pytest.raises(UserError, match=rf"samples=.*{name}: .*{message}"):
            open_images(tmp_path / name, "samples").labels()
    with pytest.raises(UserError, match=r"run: holds no complete checkpoint"):
        open_images(tmp_path / "run", "samples")
    picture(0).save(tmp_path / "one.png")
    with pytest.raises(UserError, match=r"one.png: is a single image; give the folder"):
        open_images(tmp_path / "one.png", "samples")
    with zipfile.ZipFile(tmp_path / "member.npz", "w") as archive:
        archive.writestr("arr_0", b"x")
    with pytest.raises(UserError, match=r"member.npz: damaged or no npz file"):
        open_images(tmp_path / "member.npz", "samples")
    with zipfile.ZipFile(tmp_path / "long.npz", "w") as archive, archive.open("arr_0.npy", "w") as file:
        np.lib.format.write_array_header_1_0(file, {"shape": (2, 8, 8, 1), "fortran_order": False, "descr": "|u1"})
        file.write(bytes(3 * 64))
    with pytest.raises(UserError, match=r"long.npz: damaged.*arr_0 holds 192 bytes"):
        list(open_images(tmp_path / "long.npz", "samples").batches(2))


def npz(path, **members):
    """An npz of raw .npy files, compressed: header and content need not agree."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, (descr, shape, content) in members.items():
            with archive.open(f"{name}.npy", "w") as file:
                header = {"descr": descr, "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(file, header)
                file.write(content)
    return path


@pytest.mark.parametrize(
    ("descr", "shape", "content", "message"),
    [
        ("<i8", (3,), bytes(16), "arr_1 holds 16 bytes"),
        ("<i8", (10**9,), bytes(24), "arr_1 holds 24 bytes"),
        ("<i8", (-3,), bytes(24), "arr_1 holds 24 bytes"),
        ("<i8", (10**30,), bytes(24), "arr_1 holds 24 bytes"),
        ("<i8", (10**6,), bytes(8 * 10**6), "arr_1 has shape (1000000,)"),
        ("|O", (3,), b"cos\nsystem\n", "arr_1 has dtype object"),
        ("<U1000000", (3,), bytes(3 * 4 * 10**6), "arr_1 has dtype <U1000000"),
    ],
)
def test_labels_are_not_read_before_they_fit(tmp_path, monkeypatch, descr, shape, content, message):
    path = npz(tmp_path / "x.npz", arr_0=("|u1", (3, 2, 2, 1), bytes(12)), arr_1=(descr, shape, content))
    images = open_images(path, "samples")
    monkeypatch.setattr("numpy.load", lambda *_, **__: pytest.fail("loaded before it was checked"))
    with pytest.raises(UserError, match=rf"samples={path}: .*{re.escape(message)}"):
        images.labels()


@pytest.mark.parametrize("header", ["(" * 4000, "{'descr':" + "[" * 3000, "{'shape': " + "9" * 5000 + "}", "", "\0"])
def test_a_damaged_header_is_one_line(tmp_path, header):
    content = header.encode().ljust(118) + b"\n"
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("arr_0.npy", b"\x93NUMPY\x01\x00" + len(content).to_bytes(2, "little") + content)
    with pytest.raises(UserError, match=r"x\.npz: damaged or no npz file \("):
        open_images(tmp_path / "x.npz", "samples")


@pytest.mark.parametrize("shape", [(-3, 2, 2, 1), (10**12, 2, 2, 1), (3, 2, 2, 10**30), (3, -2, -2, 1), (4, 2, 2, 1)])
def test_images_must_be_as_many_as_their_header_says(tmp_path, shape):
    path = npz(tmp_path / "x.npz", arr_0=("|u1", shape, bytes(12)))
    with pytest.raises(UserError, match=r"damaged or no npz file \(arr_0 holds 12 bytes"):
        open_images(path, "samples")


@pytest.mark.parametrize(
    ("arguments", "message"),
    thinned(
        [
            (
                ["samples=SET", "reference=data:photos", "features=digits"],
                "features=digits reference=data:photos: ",
            ),
            (["samples=SET", "reference=SET", "features=digits"], "features=digits reference=/"),
            (
                ["samples=SET", "reference=data:digits", "features=digits", "inception_weights=z"],
                "inception_weights=z: has no effect with features=digits",
            ),
            (["samples=SET", "reference=SET", "num_processes=0"], "num_processes=0: must be at least 1"),
            (
                ["samples=SET", "reference=SET", "num_processes=1000000000"],
                "num_processes=1000000000: choose at most ",
            ),
            (
                ["samples=SET", "reference=SET", "features.batch_size=99999999999999999999"],
                "features.batch_size=9",
            ),
            (
                ["samples=SET", "reference=SET", "pr_dtype=float64"],
                "pr_dtype=float64: give 'float16' or 'float32'",
            ),
            (["samples=SET", "reference=SET", "features.batch_size=0"], "features.batch_size=0: "),
            (["samples=SET", "reference=SET", "features=none"], "features=none: measures nothing"),
            (["samples=SET", "reference=data:digitz"], "reference=data:digitz: give data:NAME"),
            (["samples=SET", "reference=data:in256"], "reference=data:in256: data.root would have to be known"),
            (
                ["samples=SET", "reference=data:digits", "features=digits", "features.epochs=0"],
                "features.epochs=0: ",
            ),
            (["samples=SET", "features=digits"], "reference: not set; give reference=…"),
        ],
        3,
    ),
)
def test_wrong_input_is_one_line(arguments, message, tmp_path):
    samples = write(tmp_path / "x.npz", arr_0=np.zeros((3, 8, 8, 3), dtype=np.uint8))
    arguments = [argument.replace("SET", str(samples)) for argument in arguments]
    (line,) = refusal("evaluate", *arguments).splitlines()
    assert line.startswith(message)


@pytest.mark.slow
def test_the_command_evaluates_photos(tmp_path):
    """Real images passed off as samples."""
    images = Photos("test")
    write(tmp_path / "samples.npz", arr_0=images.load(np.arange(90)).transpose(0, 2, 3, 1), arr_1=images.labels[:90])
    succeed("evaluate", f"samples={tmp_path}", "features=photos", "reference=data:photos", "features.epochs=1")
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["class_accuracy"] > 0.5
    assert metrics["fd_photos"] > 0


GOLDEN_IMAGES = GOLDEN / "eval" / "e2e_random_inception.npz"
GOLDEN_METRICS = json.loads((GOLDEN / "eval" / "expected.json").read_text())["e2e_random_inception"]["adm"]


@pytest.fixture(scope="module")
def inception_run(tmp_path_factory, inception_weights, one_thread):
    """ADM's metrics of 24 images against 24, by the command; the folders' names need quotes."""
    folder = tmp_path_factory.mktemp("a set, of (24)")
    with np.load(GOLDEN_IMAGES) as file:
        write(folder / "samples.npz", arr_0=file["gen"], arr_1=np.zeros(24, dtype=np.int64))
        write(folder / "reference.npz", arr_0=file["ref"])
    request, digest = {"seeds": list(range(2000)), "dtype": "fp32"}, sha256(folder / "samples.npz")
    (folder / "receipt.json").write_text(json.dumps({"request": request, "samples_sha256": digest}))
    arguments = [f"samples={folder}", f"reference={folder / 'reference.npz'}", f"inception_weights={inception_weights}"]
    succeed("evaluate", *arguments, "features=inception", "features.batch_size=7")
    return folder, arguments, json.loads((folder / "metrics.json").read_text())


def test_the_command_computes_adms_metrics(inception_run):
    """The numbers are those of ADM's own evaluator, run with the same random Inception."""
    folder, _, metrics = inception_run
    for name, tolerance in (("fid", 1e-4), ("sfid", 1e-4), ("inception_score", 1e-5)):
        assert metrics[name] == pytest.approx(GOLDEN_METRICS[name], rel=tolerance), name
    for name in ("precision", "recall"):
        assert metrics[name] == pytest.approx(GOLDEN_METRICS[name], abs=1 / 24), name
    assert metrics["inception_score_shuffled"] == pytest.approx(metrics["inception_score"], rel=1e-6)  # one chunk
    assert "reasons" not in metrics
    assert metrics["comparable"] is False
    assert len(metrics["not_comparable_because"]) == 6
    assert metrics["labels"]["fid"] == "FID-24 (of 24 reference images, singular covariance)"
    assert metrics["nearest_train_distance"] > 0
    assert metrics["nearest_train_distance_real"] > 0  # of each image of the reference to the next
    assert not (folder / "nearest.png").exists()  # samples and reference are of two sizes
    receipt = metrics["receipt"]
    assert receipt["samples"]["path"] == str(folder / "samples.npz")
    assert (receipt["samples"]["count"], receipt["reference"]["count"]) == (24, 24)
    assert receipt["reference"]["statistics"] == "computed from its images"
    assert receipt["features"]["pr_dtype"] == "float16"
    assert receipt["features"]["resize"].startswith("TensorFlow 1 bilinear")
    hashes = [receipt["samples"], receipt["reference"], receipt["features"]["weights"]]
    assert all(len(entry["sha256"]) == 64 for entry in hashes)
    assert receipt["sampling"] == {
        "request": {"seeds": "2000 values", "dtype": "fp32"},
        "samples_sha256": receipt["samples"]["sha256"],
    }
    assert set(receipt["versions"]) == {"ddt", "python", "torch", "numpy", "torch-fidelity", "timm"}


@pytest.mark.slow
def test_processes_do_not_change_a_number(evaluated, tmp_path):
    """1,497 reference images in three batches, dealt to two processes; both with one thread."""
    arguments = [f"samples={evaluated[0]}", "reference=data:digits", "features=digits", "features.epochs=1"]
    results = []
    for number in (1, 2):
        succeed("evaluate", *arguments, f"num_processes={number}", f"out={tmp_path / str(number)}")
        results.append(json.loads((tmp_path / str(number) / "metrics.json").read_text()))
        del results[-1]["receipt"]["date"]
    assert results[0] == results[1]


@pytest.mark.slow
def test_processes_do_not_change_a_number_of_inception(inception_run, tmp_path):
    """24 images in batches of 7, dealt to two processes; both read with one thread."""
    folder, arguments, _ = inception_run
    metrics = json.loads((folder / "metrics.json").read_text())
    succeed("evaluate", *arguments, "features.batch_size=7", "num_processes=2", f"out={tmp_path}")
    result = json.loads((tmp_path / "metrics.json").read_text())
    metrics["receipt"]["date"] = result["receipt"]["date"]
    assert result == metrics


def test_another_evaluation_is_not_written_over(inception_run):
    folder, arguments, metrics = inception_run
    (line,) = refusal("evaluate", *arguments, "pr_dtype=float32").splitlines()
    assert line.endswith("belongs to another evaluation and is not written over; choose another out=")
    (line,) = refusal("evaluate", *arguments[:1], f"reference={folder}", *arguments[2:]).splitlines()
    assert "belongs to another evaluation" in line
    (line,) = refusal("evaluate", *arguments, f"out={folder / 'samples.npz'}").splitlines()
    assert line.endswith("is a file; give a folder")
    (line,) = refusal("evaluate", *arguments, f"out={folder / 'samples.npz' / 'below'}").splitlines()
    assert line.startswith(f"out={folder / 'samples.npz' / 'below'}: cannot be written")
    assert json.loads((folder / "metrics.json").read_text()) == metrics


@pytest.mark.slow
def test_inputs_that_inception_cannot_use_are_one_line(tmp_path, inception_weights):
    images = np.zeros((3, 8, 8, 3), dtype=np.uint8)
    good = write(tmp_path / "good.npz", arr_0=images)
    (tmp_path / "text.npz").write_text("no archive")
    other = tmp_path / "weights.pth"
    torch.save({"fc.weight": torch.zeros(2)}, other)
    (tmp_path / "graph.pb").write_text("no graph")
    (tmp_path / "cut.pth").write_bytes(inception_weights.read_bytes()[:-1000])
    defaults = {"samples": good, "reference": good, "inception_weights": inception_weights, "out": tmp_path / "out"}
    cases = [
        ("samples", tmp_path / "text.npz", "damaged or no npz file"),
        ("samples", write(tmp_path / "grey.npz", arr_0=images[..., :1]), "images of 1 channels"),
        ("reference", tmp_path / "absent.npz", "no such file"),
        ("reference", write(tmp_path / "labels.npz", labels=np.zeros(3)), "holds neither mu and sigma nor images"),
        ("reference", tmp_path / "grey.npz", "images of 1 channels, but features=inception reads 3"),
        ("inception_weights", tmp_path / "absent.pth", "no such file; give inception_weights=FILE"),
        ("inception_weights", good, "is an npz of NumPy arrays"),
        ("inception_weights", tmp_path / "graph.pb", "damaged or no TensorFlow graph"),
        ("inception_weights", tmp_path / "cut.pth", "cannot be read"),
        ("inception_weights", other, "is not this network"),
    ]

    def refused(key, path):
        (line,) = refusal("evaluate", *(f"{k}={v}" for k, v in (defaults | {key: path}).items())).splitlines()
        return line

    for key, path, message in cases:
        line = refused(key, path)
        assert line.startswith(f"{key}={path}"), line
        assert message in line
    (tmp_path / "samples.npz").write_bytes(good.read_bytes())
    receipt = tmp_path / "receipt.json"
    # damaged; of an earlier version; of another set
    for content in ("{", json.dumps({"samples": 3}), json.dumps({"samples_sha256": "0" * 64})):
        receipt.write_text(content)
        assert refused("samples", tmp_path).startswith(f"{receipt}: is not the receipt of {tmp_path / 'samples.npz'}")
    assert not (tmp_path / "out").exists()


class Cheap:
    """Features that need no network; the classes lie in the first pixel."""

    name, channels, image_size, batch_size, own_classes = "inception", 3, None, 4000, False
    rows, pr_space, nearest_space = ("pool", "probabilities"), "pool", "pool"
    spaces: ClassVar = {"pool": 8, "spatial": 12, "probabilities": 256}
    distances: ClassVar = {"fid": "pool", "sfid": "spatial"}

    def identity(self):
        return {"name": self.name, "weights": {"sha256": "0", "tensors_sha256": "1"}}

    def deviations(self):
        return []

    def __call__(self, images):
        flat = images.permute(0, 2, 3, 1).reshape(len(images), -1).float()
        classes = torch.eye(256)[images[:, 0, 0, 0].long()] * 0.9 + 1e-4
        return {"pool": flat[:, 3:11], "spatial": flat, "probabilities": classes}


def random_set(path, count, save=np.savez):
    """Samples of 2×2 px in 12 classes that are grouped."""
    images = np.random.default_rng(0).integers(0, 256, (count, 2, 2, 3), dtype=np.uint8)
    images[:, 0, 0, 0] = np.arange(count) * 12 // count
    save(path, arr_0=images)
    return images


def test_samples_grouped_by_class_are_warned_of(tmp_path, caplog):
    random_set(tmp_path / "samples.npz", 12_000)
    statistics = {"mu": np.zeros(8), "sigma": np.eye(8, dtype=np.float32)}
    np.savez_compressed(tmp_path / "reference.npz", **statistics)
    reference = read_reference(tmp_path / "reference.npz", {"fid": 8, "sfid": 12}, "inception")
    samples = NpzImages(tmp_path / "samples.npz", "samples")
    metrics = evaluate(samples, reference, Cheap(), tmp_path / "out", make_accelerator())
    assert metrics["inception_score"] < 0.7 * metrics["inception_score_shuffled"]
    assert any("depends on the order" in record.message for record in caplog.records)
    assert (metrics["sfid"], metrics["precision"], metrics["recall"]) == (None, None, None)
    assert json.loads((tmp_path / "out" / "metrics.json").read_text()) == metrics
    assert not (tmp_path / "out" / "nearest.png").exists()


def test_the_reference_itself_is_no_result(tmp_path):
    random_set(tmp_path / "samples.npz", 60)
    reference = read_reference(tmp_path / "samples.npz", {"fid": 8, "sfid": 12}, "inception")
    samples = NpzImages(tmp_path / "samples.npz", "samples")
    metrics = evaluate(samples, reference, Cheap(), tmp_path, make_accelerator())
    assert (metrics["precision"], metrics["recall"]) == (1, 1)
    assert (metrics["nearest_train_distance"], metrics["authenticity"]) == (0, 0)  # every sample is a copy
    assert (metrics["fid"], metrics["sfid"]) == (pytest.approx(0, abs=1e-6), pytest.approx(0, abs=1e-6))
    assert "the samples are the reference itself" in metrics["not_comparable_because"]


def test_copies_are_counted_and_reported(tmp_path):
    """They lower the recall of a set: balls around copies have no radius."""
    images = random_set(tmp_path / "samples.npz", 200)
    write(tmp_path / "reference.npz", arr_0=np.random.default_rng(1).integers(0, 256, images.shape, dtype=np.uint8))
    reference = read_reference(tmp_path / "reference.npz", {"fid": 8, "sfid": 12}, "inception")
    found = {}
    for name, chosen in {"distinct": np.arange(200), "copies": np.arange(200) // 5 * 5}.items():
        write(tmp_path / f"{name}.npz", arr_0=images[chosen])
        samples = NpzImages(tmp_path / f"{name}.npz", "samples")
        found[name] = evaluate(samples, reference, Cheap(), tmp_path / name, make_accelerator())
    distinct, copies = found["distinct"], found["copies"]
    assert (distinct["identical_samples"], copies["identical_samples"]) == (0, 160)
    assert copies["recall"] < 0.5 * distinct["recall"]
    (line,) = [line for line in copies["not_comparable_because"] if "byte-identical" in line]
    assert line.startswith("160 of the 200 samples are byte-identical")
    assert not any("byte-identical" in line for line in distinct["not_comparable_because"])
    assert {"identical_samples"} & numbers_of(copies).keys() == set()


def test_precision_of_a_large_data_set_is_of_some_of_its_images():
    def of(images):
        return Reference("data:x", {}, images)

    class Many:
        image_size, channels, labels, fingerprint = 8, 1, np.zeros(25_000), "0"

    chosen = of(DataImages("data:x", Many())).pr_indices(25_000)
    assert (len(chosen), chosen[0], chosen[-1]) == (10_000, 0, 24_997)
    assert len(set(chosen)) == 10_000
    assert of(DataImages("data:x", Many())).identity()["precision_recall_count"] == 10_000
    assert len(of(None).pr_indices(25_000)) == 25_000  # of a file, as ADM's evaluator


@pytest.mark.parametrize("value", [torch.nan, -torch.inf, 1e20], ids=str)
def test_features_that_cannot_be_measured_are_refused(tmp_path, value):
    """Squared distances between features of 1e20 are infinite, and their differences NaN."""

    class Broken(Cheap):
        def __call__(self, images):
            result = super().__call__(images)
            result["spatial"] = torch.where(images[:, :1, 0, 0] == 7, value, result["spatial"])
            return result

    random_set(tmp_path / "x.npz", 120)
    with pytest.raises(UserError, match=r"features=inception: the features of .*x.npz are NaN, infinite or too large"):
        extract(NpzImages(tmp_path / "x.npz", "samples"), Broken(), make_accelerator(), "samples")


def test_features_stand_in_the_order_of_the_set(tmp_path):
    images = random_set(tmp_path / "x.npz", 130, np.savez_compressed)
    extractor = Cheap()
    extractor.batch_size = 9
    result = extract(NpzImages(tmp_path / "x.npz", "samples"), extractor, make_accelerator(), "samples")
    flat = images.reshape(130, 12).astype(np.float32)
    assert np.array_equal(result.rows["pool"], flat[:, 3:11])
    np.testing.assert_allclose(result.moments["spatial"].mean, flat.mean(axis=0), rtol=1e-6)
    write(tmp_path / "reversed.npz", arr_0=images[::-1])
    other = extract(NpzImages(tmp_path / "reversed.npz", "samples"), extractor, make_accelerator(), "samples")
    for name in ("pool", "spatial"):
        ours, theirs = result.moments[name], other.moments[name]
        np.testing.assert_allclose(theirs.mean, ours.mean, rtol=1e-10)
        np.testing.assert_allclose(theirs.covariance, ours.covariance, rtol=1e-10, atol=1e-8)


def test_the_nearest_images_are_shown(tmp_path):
    """Two of the samples are training images: they come first, each above its own."""
    rng = np.random.default_rng(0)
    training = rng.integers(0, 256, (40, 3, 8, 8), dtype=np.uint8)
    samples = rng.integers(0, 256, (30, 8, 8, 3), dtype=np.uint8)
    samples[[4, 20]] = training[[33, 2]].transpose(0, 2, 3, 1)
    write(tmp_path / "samples.npz", arr_0=samples)
    images = ArrayImages(training, np.zeros(40), ["one"])
    settings = ClassifierSettings("digits", 1)
    reference = Reference("data:digits", {}, DataImages("data:digits", images))
    result = {}

    def grid(pixels, columns, captions, rows):
        result.update(pixels=pixels, captions=captions, rows=rows)
        return np.zeros((2, 2, 3), dtype=np.uint8)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ddt.metrics.evaluate.image_grid", grid)
        evaluate(
            open_images(tmp_path, "samples"), reference, settings.extractor(CPU, images), tmp_path / "out",
            make_accelerator(),
        )  # fmt: skip
    assert np.array_equal(result["pixels"][[0, 1]], training[[33, 2]])
    assert np.array_equal(result["pixels"][[10, 11]], training[[33, 2]])
    assert result["captions"][:2] == ["0", "0"]
    assert result["rows"] == ["sample", "reference"]


def test_a_run_that_was_sampled_from(tmp_path):
    """The samples of a run are those of its newest checkpoint; its own pictures are none."""
    step = tmp_path / "run" / "checkpoints" / "step_0000003"
    (step / "samples").mkdir(parents=True)
    (step / "manifest.json").write_text("{}")
    picture(0).save(tmp_path / "run" / "curves.png")
    for run_or_checkpoint in (tmp_path / "run", step):
        with pytest.raises(UserError, match=r"samples=.*samples.npz is missing; sample first"):
            open_images(run_or_checkpoint, "samples")
    random_set(step / "samples" / "samples.npz", 5)
    assert open_images(tmp_path / "run", "samples").path == step / "samples" / "samples.npz"


@pytest.mark.slow
def test_reference_is_measured_once(evaluated, tmp_path, monkeypatch):
    """A prepared reference serves many sets, and gives the same numbers."""
    out, metrics = evaluated
    train, test = Digits("train"), Digits("test")
    extractor = ClassifierSettings("digits", 10).extractor(CPU, train)
    reference = data_reference("data:digits", train, test)
    accelerator = make_accelerator()
    prepared = prepare(reference, extractor, accelerator)
    monkeypatch.setattr("ddt.metrics.evaluate.prepare", None)
    samples = shutil.copy(out / "samples.npz", tmp_path / "samples.npz")
    again = evaluate(NpzImages(samples, "samples"), reference, extractor, tmp_path, accelerator, prepared=prepared)
    numbers = [key for key, value in metrics.items() if isinstance(value, float)]
    assert len(numbers) == 9
    assert {key: again[key] for key in numbers} == {key: metrics[key] for key in numbers}
