"""Random numbers as functions of (seed, stream, position), so that nothing depends on state."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor


@enum.unique  # streams never overlap
class Stream(enum.IntEnum):
    """What random numbers are for."""

    PERMUTATION = 0
    TRAINING = 1
    VALIDATION = 2
    PREVIEW = 3
    CLASSES = 4  # classes=random of sample.py
    RECONSTRUCTION = 5
    CLASSIFIER = 16
    PHOTOS_TRAIN = 17
    PHOTOS_TEST = 18


def random_generator(seed: int, stream: Stream, position: int) -> np.random.Generator:
    """Return the random generator at a position of a stream."""
    return np.random.Generator(np.random.Philox(key=[seed, position], counter=[0, 0, 0, stream]))


def golden_sequence(numbers: np.ndarray) -> np.ndarray:
    """Return frac((i + ½)·0.618…) of numbers i (n,); consecutive ones cover [0, 1) evenly."""
    return (numbers + 0.5) * 0.6180339887498949 % 1


def noise_of(seeds: list[int], shape: tuple[int, int, int]) -> Tensor:
    """Return starting noise (B, *shape), float32, CPU, one generator per image (method.md 4)."""
    import torch

    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(s)) for s in seeds])
