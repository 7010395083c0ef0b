"""Features → metrics: every number of a set of samples against a reference.

Shapes: n samples, m reference images, F features, K classes.
"""

import dataclasses

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from ddt.metrics.features import Extractor, FeatureSet, exact_arithmetic, extract
from ddt.metrics.frechet import NOT_COMPUTED, Moments, Statistics, frechet_distance
from ddt.metrics.precision_recall import NUM_NEIGHBOURS, precision_recall
from ddt.metrics.reference import Reference
from ddt.metrics.settings import PrDtype

CHUNK = 1024  # vectors a side of a block of distances


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A reference measured for many sets of samples; empty but on the main process.

    statistics: by distance. features: of its images, or None. real: metrics of held-out images.
    """

    reference: Reference
    statistics: dict[str, Moments | Statistics]
    features: FeatureSet | None
    real: dict[str, float | None]

    def main_distance(self, moments: Moments) -> float | None:
        """Return the main Fréchet distance, such as the FID, of a set's moments; None where it is
        not computed.
        """
        return frechet_distance(moments, next(iter(self.statistics.values())))


def prepare(reference: Reference, extractor: Extractor, accelerator: Accelerator) -> Prepared:
    """Measure a reference's images. All processes call it together."""
    features = held_out = None
    if reference.images is not None:
        features = extract(reference.images, extractor, accelerator, "reference")
        if features is not None:  # no metric reads a reference's classes
            features.rows.pop("probabilities", None)
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
        prepared.real.update(score_held_out(held_out, reference.held_out.labels(), prepared, extractor))
    elif features is not None and features.count > 2:
        prepared.real["nearest_train_distance"] = distance_to_others(features.rows[extractor.nearest_space])
    return prepared


def score_held_out(
    held_out: FeatureSet, labels: np.ndarray | None, prepared: Prepared, extractor: Extractor
) -> dict[str, float | None]:
    """Return what a perfect model would reach: the metrics of held-out real images."""
    assert prepared.features is not None
    training = prepared.features.rows[extractor.nearest_space]
    distances, _ = nearest(held_out.rows[extractor.nearest_space], training)
    moments = {name: held_out.moments[space] for name, space in extractor.distances.items()}
    metrics: dict[str, float | None] = {
        name: frechet_distance(each, prepared.statistics[name]) for name, each in moments.items()
    }
    metrics["nearest_train_distance"] = distances.median().item()
    if extractor.own_classes and labels is not None:
        metrics["class_accuracy"] = accuracy(held_out.rows["probabilities"].cpu().numpy(), labels)
    return metrics


def distance_to_others(training: Tensor) -> float:
    """Return the median distance of ≤ 2,000 training vectors (m, F) to the nearest other one."""
    count = min(2000, len(training))
    indices = torch.arange(count, device=training.device) * len(training) // count
    return nearest(training[indices], training, own=indices)[0].median().item()


@dataclasses.dataclass(frozen=True)
class Scores:
    """metrics: by name, None for the `reasons`. distances, nearest (n,): of each sample to its
    nearest training image, and that image's index; None where the reference has no images.
    """

    metrics: dict[str, float | None]
    reasons: dict[str, str]
    distances: Tensor | None = None
    nearest: Tensor | None = None


def score(
    samples: FeatureSet, labels: np.ndarray | None, prepared: Prepared, extractor: Extractor, pr_dtype: PrDtype
) -> Scores:
    """Return all metrics of a set of samples. labels (n,): the class of each, None if not known.

    - fid, sfid, fd_dinov2, fd_D: Fréchet distances; fd_D in features of data set D's classifier
    - inception_score, inception_score_shuffled: by ADM's rule, in the file's order, and shuffled
    - class_accuracy: share of samples that the data set's classifier assigns to their class
    - precision, recall: of 3 nearest neighbours, in the arithmetic pr_dtype
    - nearest_train_distance: median distance to the nearest training image
    - authenticity: see `authenticity`

    A name with `_real` is the same of held-out real images: what a perfect model would reach.
    """
    metrics: dict[str, float | None] = {}
    reasons: dict[str, str] = {}
    for name, space in extractor.distances.items():
        if name in prepared.statistics:
            metrics[name] = frechet_distance(samples.moments[space], prepared.statistics[name])
            if metrics[name] is None:
                reasons[name] = NOT_COMPUTED
        else:
            metrics[name], reasons[name] = None, "the reference has mu and sigma, but no mu_s and sigma_s"
    if "probabilities" in samples.rows:
        probabilities = samples.rows["probabilities"].cpu().numpy()
        if not extractor.own_classes:
            shuffled = probabilities[np.random.default_rng(0).permutation(len(probabilities))]
            for name, each in (("inception_score", probabilities), ("inception_score_shuffled", shuffled)):
                value = inception_score(each)
                metrics[name] = value if np.isfinite(value) else None
                if metrics[name] is None:
                    reasons[name] = "a class probability is exactly 0, where ADM's formula has no value"
        elif labels is not None:
            metrics["class_accuracy"] = accuracy(probabilities, labels)
        else:
            metrics["class_accuracy"], reasons["class_accuracy"] = None, "the samples carry no classes (arr_1)"
    distances = which = None
    if prepared.features is None:
        for name in ("precision", "recall", "nearest_train_distance", "authenticity"):
            metrics[name], reasons[name] = None, "the reference has no images (arr_0)"
    else:
        metrics["precision"] = metrics["recall"] = None
        if min(samples.count, prepared.features.count) <= NUM_NEIGHBOURS:
            reasons["precision"] = reasons["recall"] = f"needs more than {NUM_NEIGHBOURS} images on each side"
        else:
            rows = prepared.features.rows[extractor.pr_space]
            real = rows[torch.from_numpy(prepared.reference.pr_indices(len(rows))).to(rows.device)]
            metrics["precision"], metrics["recall"] = precision_recall(real, samples.rows[extractor.pr_space], pr_dtype)
        training = prepared.features.rows[extractor.nearest_space]
        distances, which = nearest(samples.rows[extractor.nearest_space], training)
        metrics["nearest_train_distance"] = distances.median().item()
        metrics["authenticity"] = authenticity(distances, which, training) if len(training) > 1 else None
        if len(training) == 1:
            reasons["authenticity"] = "needs at least 2 images in the reference"
    metrics |= {f"{name}_real": value for name, value in prepared.real.items()}
    reasons |= {f"{name}_real": NOT_COMPUTED for name, value in prepared.real.items() if value is None}
    return Scores(metrics, reasons, distances, which)


def inception_score(probabilities: np.ndarray, split: int = 5000) -> float:
    """Return the Inception Score of class probabilities (n, K), as ADM's evaluator does.

    Mean of `exp(E[KL(p(y|x) ‖ p(y))])` over chunks of `split` rows, whose order matters. NaN where
    a probability is exactly 0.
    """
    scores = []
    for start in range(0, len(probabilities), split):
        rows = probabilities[start : start + split].astype(np.float64)
        with np.errstate(divide="ignore", invalid="ignore"):
            divergences = (rows * (np.log(rows) - np.log(rows.mean(axis=0)))).sum(axis=1)
        scores.append(np.exp(divergences.mean()))
    return float(np.mean(scores))


def accuracy(probabilities: np.ndarray, intended: np.ndarray) -> float:
    """Return the share of rows (n, K) of probabilities that are highest at the intended (n,)."""
    return float((probabilities.argmax(axis=1) == intended).mean())


@torch.no_grad()
def nearest(vectors: Tensor, training: Tensor, own: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the distance (root mean square over features) of each vector to its nearest training
    vector (n,), and the latter's index, int64 (n,).

    vectors (n, F); training (m, F). own, int64 (n,): the indices of vectors that are training
    vectors themselves, which are left out.
    """
    squares = training.square().sum(dim=1)
    which = torch.empty(len(vectors), dtype=torch.int64, device=vectors.device)
    with exact_arithmetic():
        for start in range(0, len(vectors), CHUNK):
            part = vectors[start : start + CHUNK]
            best = torch.full((len(part),), torch.inf, device=vectors.device)
            for first in range(0, len(training), 8 * CHUNK):
                block = slice(first, first + 8 * CHUNK)
                distances = squares[block] - 2 * (part @ training[block].T)  # without |vector|²: constant
                if own is not None:
                    at = own[start : start + CHUNK] - first
                    inside = (at >= 0) & (at < distances.shape[1])
                    distances[inside.nonzero().squeeze(1), at[inside]] = torch.inf
                low, place = distances.min(dim=1)
                nearer = low < best
                best[nearer] = low[nearer]
                which[start : start + CHUNK][nearer] = first + place[nearer]
    # the distance itself from the difference, which is exactly 0 for a copy
    parts = zip(vectors.split(CHUNK), which.split(CHUNK), strict=True)
    return torch.cat([(part - training[at]).square().mean(dim=1).sqrt() for part, at in parts]), which


def authenticity(distances: Tensor, which: Tensor, training: Tensor) -> float:
    """Return the share of samples farther from their nearest training image than that image is from
    the nearest other one: low for memorised sets.

    distances, which (n,): of `nearest`; training (m, F), m ≥ 2. Source: Alaa et al., arXiv
    2102.08921.
    """
    hit, inverse = which.unique(return_inverse=True)
    gaps, _ = nearest(training[hit], training, own=hit)
    return (distances > gaps[inverse]).double().mean().item()
