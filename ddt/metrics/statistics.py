"""Statistics of features, streamed: float64 sums, so that no set of features sits in memory."""

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
    """Mean and covariance of feature vectors (F,), added batch by batch on their device."""

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
