"""Metrics of small data sets."""

import json

import numpy as np
import pytest
import torch
from conftest import GOLDEN, refusal, succeed

from ddt.errors import UserError
from ddt.evaluation import compare, evaluate_with_classifier, evaluate_with_inception, read_samples
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
        (["samples=x", "reference=data:digits"], "features=inception: reference=data:digits is no file; "),
        (["samples=x", "reference=y", "pr_dtype=float64"], "pr_dtype=float64: input should be 'float16' or 'float32'"),
        (["samples=x", "reference=y", "features.batch_size=0"], "features.batch_size=0: "),
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


GOLDEN_IMAGES = GOLDEN / "eval" / "e2e_random_inception.npz"
GOLDEN_METRICS = json.loads((GOLDEN / "eval" / "expected.json").read_text())["e2e_random_inception"]["adm"]


@pytest.fixture(scope="module")
def inception_run(tmp_path_factory, inception_weights, one_thread):
    """ADM's five metrics of 24 images against 24, by the command; the folders' names need quotes."""
    folder = tmp_path_factory.mktemp("a set, of (24)")
    with np.load(GOLDEN_IMAGES) as file:
        write(folder / "samples.npz", arr_0=file["gen"], arr_1=np.zeros(24, dtype=np.int64))
        write(folder / "reference.npz", arr_0=file["ref"])
    (folder / "receipt.json").write_text(json.dumps({"request": {"seeds": list(range(2000)), "dtype": "fp32"}}))
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
    assert len(metrics["not_comparable_because"]) == 5
    receipt = metrics["receipt"]
    assert receipt["samples"]["path"] == str(folder / "samples.npz")
    assert (receipt["samples"]["count"], receipt["reference"]["count"]) == (24, 24)
    assert receipt["reference"]["statistics"] == "computed from its images"
    assert receipt["features"]["pr_dtype"] == "float16"
    hashes = [receipt["samples"], receipt["reference"], receipt["features"]["weights"]]
    assert all(len(entry["sha256"]) == 64 for entry in hashes)
    assert receipt["sampling"] == {"request": {"seeds": "2000 values", "dtype": "fp32"}}
    assert set(receipt["versions"]) == {"ddt", "torch", "python", "torch_fidelity"}


def test_another_evaluation_is_not_written_over(inception_run):
    folder, arguments, metrics = inception_run
    (line,) = refusal("evaluate", *arguments, "pr_dtype=float32").splitlines()
    assert line.endswith("belongs to another evaluation and is not written over; choose another out=")
    (line,) = refusal("evaluate", *arguments[:1], f"reference={folder}", *arguments[2:]).splitlines()
    assert "belongs to another evaluation" in line
    (line,) = refusal("evaluate", *arguments, f"out={folder / 'samples.npz'}").splitlines()
    assert line.endswith("is a file; give a folder")
    assert json.loads((folder / "metrics.json").read_text()) == metrics


def test_inputs_that_inception_cannot_use_are_one_line(tmp_path, monkeypatch):
    images = np.zeros((3, 8, 8, 3), dtype=np.uint8)
    good = write(tmp_path / "good.npz", arr_0=images)
    (tmp_path / "text.npz").write_text("no archive")
    (tmp_path / "empty").mkdir()
    weights = tmp_path / "weights.pth"
    torch.save({"fc.weight": torch.zeros(2)}, weights)
    (tmp_path / "graph.pb").write_bytes(b"x")
    defaults = {"samples": good, "reference": good, "inception_weights": weights, "out": tmp_path / "out"}
    cases = [
        ("samples", tmp_path / "absent.npz", "no such file"),
        ("samples", tmp_path / "empty", "no such file"),
        ("samples", tmp_path / "text.npz", "damaged or no npz file"),
        ("samples", write(tmp_path / "other.npz", pictures=images), "found only pictures"),
        ("samples", write(tmp_path / "float.npz", arr_0=images.astype(np.float32)), "found float32 (3, 8, 8, 3)"),
        ("samples", write(tmp_path / "gray.npz", arr_0=images[..., :1]), "found uint8 (3, 8, 8, 1)"),
        ("samples", write(tmp_path / "object.npz", arr_0=np.array([None, 1])), "found object (2,)"),
        ("samples", write(tmp_path / "fortran.npz", arr_0=np.asfortranarray(images)), "is in Fortran's order"),
        ("samples", write(tmp_path / "one.npz", arr_0=images[:1]), "holds one image"),
        ("reference", tmp_path / "absent.npz", "no such file"),
        ("reference", write(tmp_path / "labels.npz", labels=np.zeros(3)), "holds neither mu and sigma nor images"),
        ("inception_weights", tmp_path / "absent.pth", "no such file; give inception_weights=FILE"),
        ("inception_weights", tmp_path / "graph.pb", "TensorFlow graphs are not read"),
        ("inception_weights", good, "cannot be read"),
        ("inception_weights", weights, "is not this network"),
    ]
    for key, path, message in cases:
        values = defaults | {key: path}
        (line,) = refusal("evaluate", *(f"{name}={value}" for name, value in values.items())).splitlines()
        assert line.startswith(f"{key}={path}"), line
        assert message in line
    (tmp_path / "samples.npz").write_bytes(good.read_bytes())
    (tmp_path / "receipt.json").write_text("{")
    line = refusal("evaluate", *(f"{k}={v}" for k, v in (defaults | {"samples": tmp_path}).items()))
    assert line.startswith(f"{tmp_path / 'receipt.json'}: damaged")
    assert not (tmp_path / "out").exists()


class CheapFeatures:
    """Features that need no network; the classes lie in the first pixel."""

    def __init__(self, weights):
        self.weights = weights

    def __call__(self, images):
        flat = images.reshape(len(images), -1).astype(np.float32)
        classes = np.eye(1008, dtype=np.float32)[images[:, 0, 0, 0]] * 0.9 + 1e-4
        return np.resize(flat[:, :8], (len(images), 2048)), np.resize(flat, (len(images), 2023)), classes


def test_samples_grouped_by_class_are_warned_of(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("ddt.evaluation.InceptionFeatures", CheapFeatures)
    monkeypatch.setattr("ddt.metrics.adm.frechet_distance", lambda a, b: 1.0)
    images = np.random.default_rng(0).integers(0, 256, (12_000, 2, 2, 3), dtype=np.uint8)
    images[:, 0, 0, 0] = np.arange(12_000) // 1000
    samples = write(tmp_path / "samples.npz", arr_0=images)
    statistics = {"mu": np.zeros(2048), "sigma": np.zeros((2048, 2048), dtype=np.float32)}
    np.savez_compressed(tmp_path / "reference.npz", **statistics)
    (tmp_path / "weights.pth").write_bytes(b"")
    paths = (samples, tmp_path / "reference.npz", tmp_path / "weights.pth", tmp_path / "out")
    metrics = evaluate_with_inception(*paths, batch_size=4000)
    assert metrics["inception_score"] < 0.7 * metrics["inception_score_shuffled"]
    assert any("depends on the order" in record.message for record in caplog.records)
    assert (metrics["sfid"], metrics["precision"], metrics["recall"]) == (None, None, None)
    assert json.loads((tmp_path / "out" / "metrics.json").read_text()) == metrics
    assert compare(metrics, {"fid": 1.26}).count("not comparable: ") == len(metrics["not_comparable_because"])
