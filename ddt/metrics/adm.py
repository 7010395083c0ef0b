"""The five metrics of ADM's evaluator, from features to numbers."""

from typing import Any

import numpy as np

from ddt.metrics.inception import FeatureSet
from ddt.metrics.metrics import frechet_distance, inception_score
from ddt.metrics.precision_recall import NUM_NEIGHBOURS, PrDtype, precision_recall
from ddt.metrics.reference import Reference
from ddt.metrics.statistics import Moments, Statistics


def adm_metrics(
    of_samples: FeatureSet, of_reference: FeatureSet | None, reference: Reference, pr_dtype: PrDtype
) -> dict[str, Any]:
    """Return ADM's metrics of features, and in `reasons` why one of them is None. `of_reference` are those of the
    reference's images, None where it has none.
    """
    metrics: dict[str, Any] = {}
    reasons: dict[str, str] = {}
    pool: Moments | Statistics | None = reference.pool
    spatial: Moments | Statistics | None = reference.spatial
    if pool is None:
        assert of_reference is not None, "a reference holds statistics or images"
        pool, spatial = of_reference.pool_moments, of_reference.spatial_moments
    metrics["fid"] = frechet_distance(of_samples.pool_moments, pool)
    metrics["sfid"] = None if spatial is None else frechet_distance(of_samples.spatial_moments, spatial)
    if spatial is None:
        reasons["sfid"] = "the reference has mu and sigma, but no mu_s and sigma_s"
    probabilities = of_samples.probabilities
    order = np.random.default_rng(0).permutation(len(probabilities))
    for name, rows in (("inception_score", probabilities), ("inception_score_shuffled", probabilities[order])):
        score = inception_score(rows)
        metrics[name] = score if np.isfinite(score) else None
        if metrics[name] is None:
            reasons[name] = "a class probability is exactly 0, where ADM's formula has no value"
    metrics["precision"] = metrics["recall"] = None
    fewest = 0 if of_reference is None else min(len(of_reference.pool), len(of_samples.pool))
    if of_reference is not None and fewest > NUM_NEIGHBOURS:
        metrics["precision"], metrics["recall"] = precision_recall(of_reference.pool, of_samples.pool, pr_dtype)
    elif of_reference is None:
        reasons["precision"] = reasons["recall"] = "the reference has no images (arr_0)"
    else:
        reasons["precision"] = reasons["recall"] = f"needs more than {NUM_NEIGHBOURS} images on each side"
    return {**metrics, "reasons": reasons}
