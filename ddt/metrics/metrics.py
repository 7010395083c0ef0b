"""Metrics of statistics and of labels: plain functions of arrays."""

import numpy as np
import torch

from ddt.metrics.statistics import Moments


def frechet_distance(a: Moments, b: Moments) -> float:
    """Return the Fréchet distance `|μ1 − μ2|² + tr(Σ1 + Σ2 − 2(Σ1Σ2)^½)` of two sets of features, by torch-fidelity."""
    from torch_fidelity.metric_fid import fid_statistics_to_metric

    statistics = [{"mu": m.mean, "sigma": m.covariance} for m in (a, b)]
    result = fid_statistics_to_metric(*statistics, verbose=False)
    return float(result["frechet_inception_distance"])


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
