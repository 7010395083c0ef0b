"""Metrics of statistics and of probabilities: plain functions of arrays."""

import numpy as np

from ddt.metrics.statistics import Moments, Statistics


def frechet_distance(a: Moments | Statistics, b: Moments | Statistics) -> float:
    """Return the Fréchet distance `|μ1 − μ2|² + tr(Σ1 + Σ2 − 2(Σ1Σ2)^½)` of two sets of features,
    by torch-fidelity.
    """
    from torch_fidelity.metric_fid import fid_statistics_to_metric

    statistics = [{"mu": m.mean, "sigma": m.covariance} for m in (a, b)]
    result = fid_statistics_to_metric(*statistics, verbose=False)
    return max(0.0, float(result["frechet_inception_distance"]))  # of equal sets rounding may leave −1e-8


def inception_score(probabilities: np.ndarray, split: int = 5000) -> float:
    """Return the Inception Score of class probabilities (n, K), by the rule of ADM's evaluator.

    Consecutive rows in chunks of `split`, the last one as long as it is; the mean over chunks, each
    with the same weight, of `exp(E[KL(p(y|x) ‖ p(y))])`. The order of the rows matters. NaN where a
    probability is exactly 0.
    """
    scores = []
    for start in range(0, len(probabilities), split):
        rows = probabilities[start : start + split].astype(np.float64)
        with np.errstate(divide="ignore", invalid="ignore"):
            divergences = (rows * (np.log(rows) - np.log(rows.mean(axis=0)))).sum(axis=1)
        scores.append(np.exp(divergences.mean()))
    return float(np.mean(scores))


def accuracy(probabilities: np.ndarray, intended: np.ndarray) -> float:
    """Return the share of rows of class probabilities (n, K) whose highest is that of the intended
    class (n,).
    """
    return float((probabilities.argmax(axis=1) == intended).mean())
