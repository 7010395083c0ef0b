"""Evaluate a set of samples against a data set; needs no model.

Shapes: n samples, C H W pixels.
"""

import datetime
import json
import logging
import platform
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ddt.errors import UserError, require
from ddt.files import sha256, write_json
from ddt.images import Images
from ddt.metrics.features import ClassifierFeatures, batches
from ddt.metrics.metrics import accuracy, frechet_distance, nearest_distances
from ddt.metrics.statistics import Moments
from ddt.version import __version__

log = logging.getLogger(__name__)


def read_samples(path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    """Return the images, uint8 (n, C, H, W), and the classes, int64 (n,) or None, of a samples.npz or the folder
    that holds one.

    Raises UserError naming a missing, damaged or foreign file.
    """
    path = path / "samples.npz" if path.is_dir() else path
    require(
        path.is_file(),
        f"samples={path}: no such file; give the samples.npz, or the folder, that sample.py wrote",
    )
    try:
        with np.load(path, allow_pickle=False) as file:
            images = file.get("arr_0")
            classes = file.get("arr_1")
    except (zipfile.BadZipFile, ValueError, OSError, EOFError, TypeError, AttributeError) as error:
        raise UserError(f"samples={path}: damaged or no npz file ({error}); sample again") from error
    if images is None or images.dtype != np.uint8 or images.ndim != 4 or len(images) == 0:
        found = "nothing" if images is None else f"{images.dtype} {images.shape}"
        raise UserError(f"samples={path}: arr_0 must be uint8 images (n, H, W, C), found {found}")
    if classes is not None and classes.shape != (len(images),):
        raise UserError(
            f"samples={path}: arr_1 has shape {classes.shape}, expected one class for each of {len(images)} images"
        )
    if classes is not None and not np.issubdtype(classes.dtype, np.integer):
        raise UserError(f"samples={path}: arr_1 has dtype {classes.dtype}, expected integers")
    return images.transpose(0, 3, 1, 2), classes


def summarise(
    features: ClassifierFeatures, load: Callable[[np.ndarray], np.ndarray], count: int
) -> tuple[Moments, np.ndarray]:
    """Return the moments of the features and the predicted classes (n,) of `count` images, read by `load(indices)`."""
    moments, guesses = None, []
    for indices in batches(count):
        values, predicted = features(load(indices))
        moments = moments or Moments(values.shape[1])
        moments.add(values)
        guesses.append(predicted)
    assert moments is not None, "there is at least one image"
    return moments, np.concatenate(guesses)


def refuse_other_evaluation(out: Path, inputs: dict[str, Any]) -> None:
    """Raise UserError where `out` holds the metrics of other samples, or of another reference."""
    path = out / "metrics.json"
    if not path.exists():
        return
    try:
        receipt = json.loads(path.read_text())["receipt"]
        same = receipt["samples"]["sha256"] == inputs["samples"]["sha256"]
        same = same and all(receipt[key] == inputs[key] for key in ("reference", "features"))
    except (OSError, ValueError, KeyError, TypeError):
        same = False
    require(same, f"{path}: belongs to another evaluation and is not written over; choose another out=")


def evaluate_with_classifier(
    samples: Path, data: str, train: Images, test: Images, features: ClassifierFeatures, out: Path
) -> dict[str, Any]:
    """Compare samples with a small data set and write `metrics.json` into `out`; return its content.

    With d the data set's name:

        fd_d                        Fréchet distance to the real training images in the classifier's features (not FID)
        fd_d_real                   the same of the real test images: what a perfect model of the data would reach
        class_accuracy              share of samples that the classifier assigns to their intended class
        class_accuracy_real         the same of the real test images
        nearest_train_distance      median distance of a sample to its nearest training image (rms, pixels in [0, 1])
        nearest_train_distance_real the same of the real test images: samples far below it are memorised

    A metric that the input does not allow is null and `reasons` says why. Raises UserError for samples of another
    shape and an `out` that holds another evaluation.
    """
    images, classes = read_samples(samples)
    expected = (train.channels, train.image_size, train.image_size)
    require(
        images.shape[1:] == expected,
        f"samples={samples}: images of shape {images.shape[1:]} (C, H, W), but data:{data} has {expected}",
    )
    require(not out.exists() or out.is_dir(), f"out={out}: is a file; give a folder")
    require(len(images) >= 2, f"samples={samples}: holds one image; statistics need at least 2")
    if classes is not None and not (classes.min() >= 0 and classes.max() < len(train.class_names)):
        raise UserError(f"samples={samples}: arr_1 holds classes outside of 0..{len(train.class_names) - 1}")
    path = samples / "samples.npz" if samples.is_dir() else samples
    inputs = {
        "samples": {"path": str(path), "sha256": sha256(path), "count": len(images)},
        "reference": {"data": data, "train": len(train.labels), "test": len(test.labels)},
        "features": {"name": f"{data} classifier", **features.settings},
    }
    refuse_other_evaluation(out, inputs)
    features.fit(train)
    of_train, _ = summarise(features, train.load, len(train.labels))
    of_test, guesses_test = summarise(features, test.load, len(test.labels))
    of_samples, guesses = summarise(features, lambda indices: np.ascontiguousarray(images[indices]), len(images))
    everything = train.load(np.arange(len(train.labels)))
    held_out = test.load(np.arange(min(len(test.labels), 2000)))
    metrics: dict[str, Any] = {
        f"fd_{data}": frechet_distance(of_samples, of_train),
        f"fd_{data}_real": frechet_distance(of_test, of_train),
        "class_accuracy": None if classes is None else accuracy(guesses, classes),
        "class_accuracy_real": accuracy(guesses_test, test.labels),
        "nearest_train_distance": float(np.median(nearest_distances(images[:2000], everything))),
        "nearest_train_distance_real": float(np.median(nearest_distances(held_out, everything))),
    }
    if classes is None:
        metrics["reasons"] = {"class_accuracy": "the samples carry no classes (arr_1)"}
    metrics["receipt"] = {
        **inputs,
        "versions": {"ddt": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "metrics.json", metrics)
    log.info("%s", out / "metrics.json")
    return metrics
