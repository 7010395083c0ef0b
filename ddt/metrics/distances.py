"""Fréchet distances for many small sets of images: features and reference are made ready once.

Shapes: B batch, H W C pixels, F features.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from ddt.evaluation import summarise
from ddt.images import Images
from ddt.metrics.features import ClassifierFeatures
from ddt.metrics.inception import InceptionFeatures, extract
from ddt.metrics.metrics import frechet_distance
from ddt.metrics.reference import Reference
from ddt.metrics.statistics import Moments, Statistics


@dataclasses.dataclass(frozen=True)
class FrechetReference:
    """What sets are compared with. features: uint8 (B, H, W, C) → float32 (B, F); statistics: those of the reference's
    images.
    """

    name: str
    features: Callable[[np.ndarray], np.ndarray]
    statistics: Moments | Statistics

    def distance(self, moments: Moments) -> float:
        """Return the Fréchet distance of a set's moments to the reference."""
        return frechet_distance(moments, self.statistics)


def classifier_reference(data: str, features: ClassifierFeatures, train: Images) -> FrechetReference:
    """Train the classifier of a small data set and return the statistics of its training images in its features."""
    features.fit(train)
    of_train, _ = summarise(features, train.load, len(train.labels))

    def read(images: np.ndarray) -> np.ndarray:
        return features(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))[0]

    return FrechetReference(f"Fréchet distance, {data} classifier", read, of_train)


def inception_reference(
    reference: Reference, weights: Path, batch_size: int, device: torch.device | None = None
) -> FrechetReference:
    """Return a reference file's statistics in Inception's pool features: the distance to them is the FID."""
    features = InceptionFeatures(weights, device)
    statistics: Moments | Statistics | None = reference.pool
    if statistics is None:
        assert reference.images is not None, "a reference holds statistics or images"
        statistics = extract(reference.images, features, batch_size, "reference").pool_moments

    def read(images: np.ndarray) -> np.ndarray:
        starts = range(0, len(images), batch_size)
        return np.concatenate([features(images[start : start + batch_size])[0] for start in starts])

    return FrechetReference("FID", read, statistics)
