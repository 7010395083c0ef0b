"""Mean and covariance of features, and the Fréchet distance between two sets: FID, sFID, FD-DINOv2.

Shapes: B batch, F features.
"""

import dataclasses

import numpy as np
import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Statistics:
    """A mean (F,) and a covariance (F, F), float64, as a reference file holds them."""

    mean: np.ndarray
    covariance: np.ndarray


class Moments:
    """Mean and covariance of feature vectors (F,), streamed: float64 sums on their device."""

    def __init__(self, num_features: int, device: torch.device | str = "cpu") -> None:
        self.count = 0
        self.sum = torch.zeros(num_features, dtype=torch.float64, device=device)
        self.outer = torch.zeros(num_features, num_features, dtype=torch.float64, device=device)

    def add(self, features: Tensor) -> None:
        """Add features (B, F)."""
        features = features.to(torch.float64)
        self.count += len(features)
        self.sum += features.sum(dim=0)
        self.outer.addmm_(features.T, features)

    @property
    def mean(self) -> np.ndarray:
        """The mean (F,), float64."""
        return (self.sum / self.count).cpu().numpy()

    @property
    def covariance(self) -> np.ndarray:
        """The covariance (F, F), float64, divided by count − 1 as in ADM's evaluator."""
        mean = self.sum / self.count
        return ((self.outer - self.count * torch.outer(mean, mean)) / (self.count - 1)).cpu().numpy()


def frechet_distance(a: Moments | Statistics, b: Moments | Statistics) -> float:
    """Return `|μ1 − μ2|² + tr(Σ1 + Σ2 − 2(Σ1Σ2)^½)` of two sets of features, by torch-fidelity."""
    from torch_fidelity.metric_fid import fid_statistics_to_metric

    statistics = [{"mu": m.mean, "sigma": m.covariance} for m in (a, b)]
    result = fid_statistics_to_metric(*statistics, verbose=False)
    return max(0.0, float(result["frechet_inception_distance"]))  # of equal sets rounding may leave −1e-8
