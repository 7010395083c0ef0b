"""Metrics of statistics and of labels: plain functions of arrays."""

import numpy as np
import torch

from ddt.metrics.statistics import Moments, Statistics


def frechet_distance(a: Moments | Statistics, b: Moments | Statistics) -> float:
    """Return the Fréchet distance `|μ1 − μ2|² + tr(Σ1 + Σ2 − 2(Σ1Σ2)^½)` of two sets of features, by torch-fidelity."""
    from torch_fidelity.metric_fid import fid_statistics_to_metric

    statistics = [{"mu": m.mean, "sigma": m.covariance} for m in (a, b)]
    result = fid_statistics_to_metric(*statistics, verbose=False)
    return float(result["frechet_inception_distance"])


def inception_score(probabilities: np.ndarray, split: int = 5000) -> float:
    """Return the Inception Score of class probabilities (n, K), by the rule of ADM's evaluator.

    Consecutive rows in chunks of `split`, the last one as long as it is; the mean over chunks, each with the same
    weight, of `exp(E[KL(p(y|x) ‖ p(y))])`. The order of the rows matters. NaN where a probability is exactly 0.
    """
    scores = []
    for start in range(0, len(probabilities), split):
        rows = probabilities[start : start + split].astype(np.float64)
        with np.errstate(divide="ignore", invalid="ignore"):
            divergences = (rows * (np.log(rows) - np.log(rows.mean(axis=0)))).sum(axis=1)
        scores.append(np.exp(divergences.mean()))
    return float(np.mean(scores))


def accuracy(predicted: np.ndarray, intended: np.ndarray) -> float:
    """Return the share of equal entries of two arrays of classes (n,)."""
    return float((predicted == intended).mean())


def nearest_distances(images: np.ndarray, training: np.ndarray, chunk: int = 256) -> np.ndarray:
    """Return each image's distance to its nearest training image: root mean square over pixels in [0, 1], (n,).

    images: uint8 (n, C, H, W); training: uint8 (m, C, H, W). Set beside the same distance of held-out real
    images it shows memorisation, which class accuracy cannot see.
    """
    flat = torch.from_numpy(images.reshape(len(images), -1)).float() / 255
    reference = torch.from_numpy(training.reshape(len(training), -1)).float() / 255
    nearest = [torch.cdist(part, reference).min(dim=1).values for part in flat.split(chunk)]
    return (torch.cat(nearest) / flat.shape[1] ** 0.5).numpy()
