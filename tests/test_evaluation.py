"""Metrics of small data sets."""

import json

import numpy as np
import pytest
from conftest import refusal, succeed

from ddt.errors import UserError
from ddt.evaluation import evaluate_with_classifier, read_samples
from ddt.images import Digits
from ddt.metrics.features import ClassifierFeatures
from ddt.metrics.metrics import accuracy, frechet_distance, nearest_distances
from ddt.metrics.statistics import Moments
from ddt.photos import Photos


def moments(features, batch=7):
    result = Moments(features.shape[1])
    for start in range(0, len(features), batch):
        result.add(features[start : start + batch])
    return result


def test_streamed_moments_are_numpys():
    features = np.random.default_rng(0).standard_normal((50, 6)).astype(np.float32)
    streamed = moments(features)
    np.testing.assert_allclose(streamed.mean, features.astype(np.float64).mean(axis=0), rtol=1e-10)
    np.testing.assert_allclose(streamed.covariance, np.cov(features.astype(np.float64), rowvar=False), rtol=1e-8)


def test_frechet_distance_in_closed_form():
    rng = np.random.default_rng(0)
    features = rng.standard_normal((200, 5))
    assert frechet_distance(moments(features), moments(features)) == pytest.approx(0, abs=1e-6)
    shifted = features + np.array([1.0, 2, 0, 0, 0])
    assert frechet_distance(moments(shifted), moments(features)) == pytest.approx(5, rel=1e-6)
    one = rng.standard_normal((500, 1))
    scaled = frechet_distance(moments(3 * one), moments(one))
    assert scaled == pytest.approx((2 * one.std(ddof=1)) ** 2 + (2 * one.mean()) ** 2, rel=1e-6)


def test_nearest_distances_see_copies():
    train = Digits("train").images
    assert nearest_distances(train[:5], train) == pytest.approx(np.zeros(5), abs=1e-3)
    far = np.zeros((1, 1, 2, 2), dtype=np.uint8)
    assert nearest_distances(far, np.full((3, 1, 2, 2), 255, dtype=np.uint8)) == pytest.approx([1.0])


def test_accuracy():
    assert accuracy(np.array([1, 2, 3, 4]), np.array([1, 2, 0, 0])) == 0.5


def write(path, **arrays):
    np.savez(path, **arrays)
    return path


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """Held-out real digits passed off as samples: what a perfect model of the data would draw."""
    out = tmp_path_factory.mktemp("evaluation")
    test = Digits("test")
    write(out / "samples.npz", arr_0=test.images.transpose(0, 2, 3, 1), arr_1=test.labels)
    return out, evaluate_with_classifier(out, "digits", Digits("train"), test, ClassifierFeatures(epochs=10), out)


def test_real_images_reach_the_real_values(evaluated):
    out, metrics = evaluated
    assert metrics["class_accuracy"] == metrics["class_accuracy_real"] > 0.95
    assert metrics["fd_digits"] == pytest.approx(metrics["fd_digits_real"], rel=1e-6)
    assert metrics["nearest_train_distance"] == pytest.approx(metrics["nearest_train_distance_real"])
    assert metrics["nearest_train_distance"] > 0.05
    assert json.loads((out / "metrics.json").read_text()) == metrics
    assert metrics["receipt"]["samples"]["count"] == 300


def test_worse_samples_get_worse_values(evaluated, tmp_path):
    _, real = evaluated
    train = Digits("train")
    noisy = train.images[:300].astype(int) + np.random.default_rng(0).integers(-120, 120, (300, 1, 8, 8))
    samples = np.clip(noisy, 0, 255).astype(np.uint8).transpose(0, 2, 3, 1)
    write(tmp_path / "noisy.npz", arr_0=samples, arr_1=(train.labels[:300] + 1) % 10)
    metrics = evaluate_with_classifier(
        tmp_path / "noisy.npz", "digits", train, Digits("test"), ClassifierFeatures(epochs=10), tmp_path
    )
    assert metrics["fd_digits"] > 2 * real["fd_digits"]
    assert metrics["class_accuracy"] < 0.2
    assert metrics["class_accuracy_real"] == real["class_accuracy_real"]  # the same classifier each time


def test_memorised_samples_are_seen(tmp_path):
    train = Digits("train")
    write(tmp_path / "copies.npz", arr_0=train.images[:50].transpose(0, 2, 3, 1))
    metrics = evaluate_with_classifier(
        tmp_path / "copies.npz", "digits", train, Digits("test"), ClassifierFeatures(epochs=1), tmp_path
    )
    assert metrics["nearest_train_distance"] < 0.01 < metrics["nearest_train_distance_real"]
    assert metrics["class_accuracy"] is None
    assert metrics["reasons"] == {"class_accuracy": "the samples carry no classes (arr_1)"}


def test_unusable_samples_are_named(tmp_path):
    images = np.zeros((3, 8, 8, 1), dtype=np.uint8)
    (tmp_path / "text.npz").write_text("no archive")
    cases = {
        "absent.npz": "no such file",
        "text.npz": "damaged or no npz file",
        write(tmp_path / "float.npz", arr_0=images.astype(float)).name: "must be uint8 images",
        write(tmp_path / "flat.npz", arr_0=images[0]).name: "must be uint8 images",
        write(tmp_path / "none.npz", other=images).name: "found nothing",
        write(tmp_path / "empty.npz", arr_0=images[:0]).name: "must be uint8 images",
        write(tmp_path / "bool.npz", arr_0=images, arr_1=np.ones(3, dtype=bool)).name: "expected integers",
        write(tmp_path / "labels.npz", arr_0=images, arr_1=np.zeros(2)).name: "arr_1 has shape",
    }
    whole = write(tmp_path / "cut.npz", arr_0=np.random.default_rng(0).integers(0, 255, (9, 8, 8, 1), dtype=np.uint8))
    whole.write_bytes(whole.read_bytes()[:300])
    cases["cut.npz"] = "damaged or no npz file"
    for name, message in cases.items():
        with pytest.raises(UserError, match=rf"samples=.*{name}: .*{message}"):
            read_samples(tmp_path / name)


def test_samples_of_another_size_and_another_evaluation_are_refused(evaluated, tmp_path):
    out, _ = evaluated
    arguments = ("digits", Digits("train"), Digits("test"), ClassifierFeatures(epochs=1))
    write(tmp_path / "class.npz", arr_0=np.zeros((3, 8, 8, 1), dtype=np.uint8), arr_1=np.array([0, 5, 10]))
    with pytest.raises(UserError, match=r"arr_1 holds classes outside of 0\.\.9"):
        evaluate_with_classifier(tmp_path / "class.npz", *arguments, tmp_path)
    write(tmp_path / "large.npz", arr_0=np.zeros((3, 16, 16, 1), dtype=np.uint8))
    with pytest.raises(UserError, match=r"images of shape \(1, 16, 16\)"):
        evaluate_with_classifier(tmp_path / "large.npz", *arguments, tmp_path)
    write(tmp_path / "small.npz", arr_0=np.zeros((3, 8, 8, 1), dtype=np.uint8))
    with pytest.raises(UserError, match=r"belongs to another evaluation.*choose another out="):
        evaluate_with_classifier(tmp_path / "small.npz", *arguments, out)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["samples=x", "reference=data:digits"], "features=inception: "),
        (["samples=x", "reference=data:digitz", "features=digits"], "reference=data:digitz: give data:NAME"),
        (
            ["samples=x", "reference=data:fashion_mnist", "features=digits"],
            "features=digits reference=data:fashion_mnist: ",
        ),
        (
            ["samples=no/such.npz", "reference=data:digits", "features=digits"],
            "samples=no/such.npz: no such file",
        ),
        (
            ["samples=x", "reference=data:digits", "features=digits", "features.epochs=0"],
            "features.epochs=0: ",
        ),
        (["samples=x", "features=digits"], "reference: not set; give reference=…"),
    ],
)
def test_wrong_input_is_one_line(arguments, message):
    (line,) = refusal("evaluate", *arguments).splitlines()
    assert line.startswith(message)


@pytest.mark.parametrize("data", ["digits", "photos"])
def test_the_command_evaluates_samples(tmp_path, data):
    """As a user calls it; real images passed off as samples."""
    images = Digits("test") if data == "digits" else Photos("test")
    write(tmp_path / "samples.npz", arr_0=images.load(np.arange(90)).transpose(0, 2, 3, 1), arr_1=images.labels[:90])
    succeed("evaluate", f"samples={tmp_path}", f"features={data}", f"reference=data:{data}", "features.epochs=1")
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["class_accuracy"] > 0.5
    assert metrics[f"fd_{data}"] > 0
