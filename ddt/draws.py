"""Every random number: a function of (seed, stream, position), so that nothing depends on state."""

import numpy as np
import torch
from torch import Tensor

# One key space for all draws: (seed, stream, position). Streams never overlap.
PERMUTATION, TRAINING, VALIDATION, PREVIEW = range(4)
CLASSES = 17  # of random classes of sample.py


def draws(seed: int, stream: int, position: int) -> np.random.Generator:
    """Return the random generator that belongs to a position of a stream; equal arguments give
    equal draws.
    """
    return np.random.Generator(np.random.Philox(key=[seed, position], counter=[0, 0, 0, stream]))


def golden_sequence(numbers: np.ndarray) -> np.ndarray:
    """Return frac((i + ½)·0.618…) of numbers i (n,): any number of them in a row covers [0, 1)
    evenly.
    """
    return (numbers + 0.5) * 0.6180339887498949 % 1


def noise_of(seeds: list[int], shape: tuple[int, int, int]) -> Tensor:
    """Return the starting noise (B, *shape), float32 on the CPU, one generator an image. Source:
    method.md 4.
    """
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(s)) for s in seeds])
