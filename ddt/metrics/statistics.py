"""Statistics of features, streamed: float64 sums, so that no set of features sits in memory."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Statistics:
    """A mean (F,) and a covariance (F, F), float64, as a reference file holds them."""

    mean: np.ndarray
    covariance: np.ndarray


class Moments:
    """Mean and covariance of feature vectors (F,), added batch by batch."""

    def __init__(self, num_features: int) -> None:
        self.count = 0
        self.sum = np.zeros(num_features)
        self.outer = np.zeros((num_features, num_features))

    def add(self, features: np.ndarray) -> None:
        """Add features (B, F)."""
        features = features.astype(np.float64)
        self.count += len(features)
        self.sum += features.sum(axis=0)
        self.outer += features.T @ features

    @property
    def mean(self) -> np.ndarray:
        """The mean (F,), float64."""
        return self.sum / self.count

    @property
    def covariance(self) -> np.ndarray:
        """The covariance (F, F), float64, divided by count − 1 as in ADM's evaluator."""
        return (self.outer - self.count * np.outer(self.mean, self.mean)) / (self.count - 1)
