"""Mean and covariance of features, and the Fréchet distance between two sets: FID, sFID, FD-DINOv2.

Shapes: B batch, F features.
"""

import dataclasses

import numpy as np
import torch
from torch import Tensor

ROUNDING = 1e-4  # relative error of the root's trace; 24 images against themselves in 2048 features: 2e-7
NOT_COMPUTED = "the root of the covariances' product was not found: the distance is NaN, infinite or out of its bounds"


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


def frechet_distance(a: Moments | Statistics, b: Moments | Statistics) -> float | None:
    """Return `|μ1 − μ2|² + tr(Σ1 + Σ2 − 2(Σ1Σ2)^½)` of two sets of features, by torch-fidelity.

    None where it is not computed (`NOT_COMPUTED`): not finite, or, beyond rounding, out of the
    bounds `|μ1 − μ2|²` and `|μ1 − μ2|² + tr(Σ1 + Σ2)` that any root of the product keeps.
    """
    from torch_fidelity.metric_fid import fid_statistics_to_metric

    statistics = [{"mu": m.mean, "sigma": m.covariance} for m in (a, b)]
    try:
        with np.errstate(over="ignore", invalid="ignore"):
            distance = float(fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"])
            means = float(np.square(statistics[0]["mu"] - statistics[1]["mu"]).sum())
            traces = float(sum(np.trace(each["sigma"]) for each in statistics))
    except np.linalg.LinAlgError:  # infinite values, or eigenvalues that do not converge
        return None
    rounding = ROUNDING * (means + traces)
    if not means - rounding <= distance <= means + traces + rounding < np.inf:  # NaN lies in no bounds
        return None
    return max(distance, 0.0)  # of equal sets rounding may leave −1e-8
