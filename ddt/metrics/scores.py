"""From features to numbers: every metric of a set of samples against a reference.

Shapes: n samples, m reference images, F features, K classes.
"""

import dataclasses

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from ddt.metrics.features import Extractor, FeatureSet, extract
from ddt.metrics.metrics import accuracy, frechet_distance, inception_score
from ddt.metrics.nearest import authenticity, nearest
from ddt.metrics.precision_recall import NUM_NEIGHBOURS, PrDtype, precision_recall
from ddt.metrics.reference import Reference
from ddt.metrics.statistics import Moments, Statistics


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A reference made ready for many sets of samples: what the main process holds; on the others
    it is empty.

    statistics: by distance. features: of its images, None where it has none. real: metrics of
    held-out real images.
    """

    reference: Reference
    statistics: dict[str, Moments | Statistics]
    features: FeatureSet | None
    real: dict[str, float]

    def main_distance(self, moments: Moments) -> float:
        """Return the main Fréchet distance, the FID say, of a set's moments."""
        return frechet_distance(moments, next(iter(self.statistics.values())))


def prepare(reference: Reference, extractor: Extractor, accelerator: Accelerator) -> Prepared:
    """Measure a reference's images. All processes call it together."""
    features = None
    if reference.images is not None:
        features = extract(reference.images, extractor, accelerator, "reference")
        if features is not None:  # no metric asks for a reference's classes
            features.rows.pop("probabilities", None)
    held_out = None
    if reference.held_out is not None:
        held_out = extract(reference.held_out, extractor, accelerator, "held-out images")
    if not accelerator.is_main_process:
        return Prepared(reference, {}, None, {})
    statistics: dict[str, Moments | Statistics] = dict(reference.statistics)
    if not statistics:
        assert features is not None, "a reference holds statistics or images"
        statistics |= {name: features.moments[space] for name, space in extractor.distances.items()}
    prepared = Prepared(reference, statistics, features, {})
    if held_out is not None:
        assert reference.held_out is not None
        prepared.real.update(baseline(held_out, reference.held_out.labels(), prepared, extractor))
    elif features is not None and features.count > 2:
        prepared.real["nearest_train_distance"] = apart(features.rows[extractor.near])
    return prepared


def baseline(
    held_out: FeatureSet, labels: np.ndarray | None, prepared: Prepared, extractor: Extractor
) -> dict[str, float]:
    """Return what a perfect model would reach: the metrics of held-out real images."""
    assert prepared.features is not None
    distances, _ = nearest(held_out.rows[extractor.near], prepared.features.rows[extractor.near])
    found = {name: frechet_distance(held_out.moments[space], prepared.statistics[name])
             for name, space in extractor.distances.items()}  # fmt: skip
    found["nearest_train_distance"] = distances.median().item()
    if extractor.own_classes and labels is not None:
        found["class_accuracy"] = accuracy(held_out.rows["probabilities"].cpu().numpy(), labels)
    return found


def apart(training: Tensor, most: int = 2000) -> float:
    """Return the median distance of training vectors (m, F) to the nearest other one, of at most so
    many of them.
    """
    count = min(most, len(training))
    chosen = torch.arange(count, device=training.device) * len(training) // count
    return nearest(training[chosen], training, own=chosen)[0].median().item()


@dataclasses.dataclass(frozen=True)
class Scores:
    """metrics: by name, None where the input does not allow one, and then `reasons` says why.
    distances, nearest (n,): of each sample to its nearest training image, and which one that is;
    None where the reference has no images.
    """

    metrics: dict[str, float | None]
    reasons: dict[str, str]
    distances: Tensor | None = None
    nearest: Tensor | None = None


def score(
    samples: FeatureSet, labels: np.ndarray | None, prepared: Prepared, extractor: Extractor, pr_dtype: PrDtype
) -> Scores:
    """Return all metrics of a set of samples. labels (n,): the class that each was drawn of, None
    if not known.

        fid, sfid, fd_dinov2, fd_D  Fréchet distances; D a data set, in the features of its
        classifier inception_score             by ADM's rule, which reads chunks of 5,000 images in
        the file's order inception_score_shuffled    the same of shuffled images: what the score
        should be class_accuracy              share of samples that the data set's classifier
        assigns to their class precision, recall           of 3 nearest neighbours, in the
        arithmetic pr_dtype nearest_train_distance      median distance to the nearest training
        image authenticity                share of samples that lie apart from the training images
        (`nearest.authenticity`)

    A name with `_real` is the same of held-out real images: what a perfect model would reach.
    """
    metrics: dict[str, float | None] = {}
    reasons: dict[str, str] = {}
    for name, space in extractor.distances.items():
        known = prepared.statistics.get(name)
        metrics[name] = None if known is None else frechet_distance(samples.moments[space], known)
        if known is None:
            reasons[name] = "the reference has mu and sigma, but no mu_s and sigma_s"
    if "probabilities" in samples.rows:
        probabilities = samples.rows["probabilities"].cpu().numpy()
        if extractor.own_classes:
            metrics["class_accuracy"] = None if labels is None else accuracy(probabilities, labels)
            if labels is None:
                reasons["class_accuracy"] = "the samples carry no classes (arr_1)"
        else:
            score_classes(probabilities, metrics, reasons)
    near = None
    if prepared.features is None:
        for name in ("precision", "recall", "nearest_train_distance", "authenticity"):
            metrics[name], reasons[name] = None, "the reference has no images (arr_0)"
    else:
        balls(samples, prepared, extractor.balls, pr_dtype, metrics, reasons)
        training = prepared.features.rows[extractor.near]
        near = nearest(samples.rows[extractor.near], training)
        metrics["nearest_train_distance"] = near[0].median().item()
        metrics["authenticity"] = authenticity(*near, training) if len(training) > 1 else None
        if len(training) == 1:
            reasons["authenticity"] = "needs at least 2 images in the reference"
    metrics |= {f"{name}_real": value for name, value in prepared.real.items()}
    return Scores(metrics, reasons, *(near or (None, None)))


def score_classes(probabilities: np.ndarray, metrics: dict[str, float | None], reasons: dict[str, str]) -> None:
    """Add the Inception Score of class probabilities (n, K), in the file's order and shuffled."""
    order = np.random.default_rng(0).permutation(len(probabilities))
    for name, rows in (("inception_score", probabilities), ("inception_score_shuffled", probabilities[order])):
        found = inception_score(rows)
        metrics[name] = found if np.isfinite(found) else None
        if metrics[name] is None:
            reasons[name] = "a class probability is exactly 0, where ADM's formula has no value"


def balls(
    samples: FeatureSet, prepared: Prepared, space: str, pr_dtype: PrDtype, metrics: dict[str, float | None],
    reasons: dict[str, str],
) -> None:  # fmt: skip
    """Add precision and recall."""
    assert prepared.features is not None
    metrics["precision"] = metrics["recall"] = None
    if min(samples.count, prepared.features.count) <= NUM_NEIGHBOURS:
        reasons["precision"] = reasons["recall"] = f"needs more than {NUM_NEIGHBOURS} images on each side"
        return
    rows = prepared.features.rows[space]
    real = rows[torch.from_numpy(prepared.reference.balls(len(rows))).to(rows.device)]
    metrics["precision"], metrics["recall"] = precision_recall(real, samples.rows[space], pr_dtype)
