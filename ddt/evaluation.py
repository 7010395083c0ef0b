"""Evaluate a set of samples against a data set; needs no model.

Shapes: n samples, C H W pixels.
"""

import logging
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ddt.errors import UserError, require
from ddt.files import sha256
from ddt.images import Images
from ddt.metrics.adm import adm_metrics
from ddt.metrics.comparison import compare, obstacles, order_matters, order_warning
from ddt.metrics.features import ClassifierFeatures, batches
from ddt.metrics.folder import open_images
from ddt.metrics.inception import RESIZE, InceptionFeatures, extract, find_weights
from ddt.metrics.metrics import accuracy, frechet_distance, nearest_distances
from ddt.metrics.precision_recall import PrDtype
from ddt.metrics.reference import read_reference
from ddt.metrics.statistics import Moments
from ddt.receipts import refuse_other_evaluation, sampling_receipt, write_metrics

__all__ = ["compare", "evaluate_with_classifier", "evaluate_with_inception", "read_samples"]
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
    write_metrics(out, metrics, inputs)
    return metrics


def evaluate_with_inception(
    samples: Path,
    reference: Path,
    weights: Path | None,
    out: Path,
    batch_size: int = 64,
    pr_dtype: PrDtype = "float16",
) -> dict[str, Any]:
    """Compute ADM's five metrics, write `metrics.json` into `out`, and return its content.

        fid, sfid                 Fréchet distances in pool and in spatial features
        inception_score           by ADM's rule, which reads chunks of 5,000 images in the file's order
        inception_score_shuffled  the same of shuffled images: what the score should be
        precision, recall         of 3 nearest neighbours in pool features, in the arithmetic pr_dtype

    `samples` and `reference` are npz files, folders that hold a samples.npz, or folders of PNG or JPEG images;
    `weights` is torch-fidelity's .pth file, None its download. A metric that the input does not allow is None and
    `reasons` says why; `comparable` and `not_comparable_because` tell whether the numbers may stand beside published
    ones.

    Raises UserError for wrong files and an `out` that holds another evaluation.
    """
    import torch_fidelity

    images = open_images(samples, "samples")
    require(len(images) >= 2, f"samples={images.path}: holds one image; statistics need at least 2")
    base = read_reference(reference)
    sampling = sampling_receipt(images.path)
    weights = find_weights(weights)
    inputs = {
        "samples": {"path": str(images.path), "sha256": images.sha256, "count": len(images)},
        "reference": {
            "path": str(base.path),
            "sha256": base.sha256,
            "count": None if base.images is None else len(base.images),
            "statistics": base.source,
        },
        "features": {
            "name": "inception-v3-compat",
            "weights": {"path": str(weights), "sha256": sha256(weights)},
            "resize": RESIZE,
            "pr_dtype": pr_dtype,
        },
        **sampling,
    }
    refuse_other_evaluation(out, inputs)
    features = InceptionFeatures(weights)
    of_reference = None if base.images is None else extract(base.images, features, batch_size, "reference")
    of_samples = extract(images, features, batch_size, "samples")
    metrics = adm_metrics(of_samples, of_reference, base, pr_dtype)
    reasons = metrics.pop("reasons")
    if order_matters(metrics):
        log.warning("warning: %s", order_warning(metrics))
    found = obstacles(metrics, len(images), base, inputs["features"]["weights"]["sha256"], pr_dtype)
    metrics |= {"comparable": not found, "not_comparable_because": found}
    if reasons:
        metrics["reasons"] = reasons
    write_metrics(out, metrics, inputs, torch_fidelity=torch_fidelity.__version__)
    return metrics
