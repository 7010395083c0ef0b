"""Mean and standard deviation of each channel of a cache's latents, before the autoencoder's
normalisation: what `autoencoder.latents_mean` and `latents_std` take.

Of the training records alone, mirror images included. Where the cache holds a posterior they are
those of latents sampled from it: the variance is that of the means plus the mean variance. Sums are
float64, of blocks merged by Chan's update, so they depend on no division into shards beyond that.
Source: Chan, Golub, LeVeque, "Updating formulae and a pairwise algorithm for computing sample
variances", 1979.

Shapes: B records, C channels, h w latent.
"""

import itertools
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ddt.autoencoder import autoencoder_class
from ddt.data.latent_cache import NUM_HASHERS, read_index, shard_path
from ddt.files import write_json
from ddt.tensor_files import open_array

STATISTICS = "latent_statistics.json"  # in the cache's folder
BLOCK, BLOCK_BYTES = 256, 2**26  # records at once, and bytes of them in float64, of each thread
# dimensions of records (B, flips, C, h, w) over which statistics are taken
OF_CHANNELS, OF_POSITIONS = (0, 1, 3, 4), (0, 1)


class Moments(NamedTuple):
    """Of each channel, or position: number of values, and float64 their mean and the sum of squared
    differences from it.
    """

    num_values: int
    mean: Tensor
    squares: Tensor

    def merge(self, other: "Moments") -> "Moments":
        """Return the moments of both sets of values."""
        total, apart = self.num_values + other.num_values, other.mean - self.mean
        mean = self.mean + apart * (other.num_values / total)
        between = apart**2 * (self.num_values * other.num_values / total)
        return Moments(total, mean, self.squares + other.squares + between)

    @property
    def variance(self) -> Tensor:
        """The population variance."""
        return self.squares / self.num_values


def block_moments(stored: Tensor, stochastic: bool, axes: tuple[int, ...] = OF_CHANNELS) -> Moments:
    """Return the moments of records (B, flips, C or 2C, h, w) over `axes`; 2C: mean and logvar."""
    values = stored.double()
    mean, logvar = values.chunk(2, dim=2) if stochastic else (values, None)
    centre = mean.mean(axes, keepdim=True)
    squares = (mean - centre).square().sum(axes)
    if logvar is not None:
        squares += logvar.clamp(-30, 20).exp().sum(axes)  # as `sample` clamps it
    return Moments(mean.numel() // centre.numel(), centre.squeeze(axes), squares)


def latent_statistics(root: Path) -> dict[str, Any]:
    """Return `mean` and `std` of each channel, lists of C, `count` of values, and the cache's
    `fingerprint`; every moment of a complete cache is read once.
    """
    index = read_index(root)
    stochastic = autoencoder_class(index["autoencoder"]["settings"]).stochastic
    size, train = index["shard_size"], index["splits"]["train"]
    block = max(1, min(BLOCK, BLOCK_BYTES // (8 * math.prod(index["arrays"]["moments"]["shape"]))))

    def of_shard(shard: int) -> Moments:
        stored = open_array(shard_path(root, "moments", shard))
        rows = np.arange(min(stored.shape[0], train - shard * size))
        parts = np.split(rows, range(block, len(rows), block))
        blocks = (block_moments(torch.from_numpy(stored[part]), stochastic) for part in parts)
        return list(itertools.accumulate(blocks, Moments.merge))[-1]

    with ThreadPoolExecutor(NUM_HASHERS) as pool:
        *_, total = itertools.accumulate(pool.map(of_shard, range(-(-train // size))), Moments.merge)
    return {
        "mean": total.mean.tolist(),
        "std": total.variance.sqrt().tolist(),
        "count": total.num_values,
        "fingerprint": index["fingerprint"],
    }


def write_statistics(root: Path) -> dict[str, Any]:
    """Write `latent_statistics.json` of a complete cache, and return its content."""
    statistics = latent_statistics(root)
    write_json(root / STATISTICS, statistics)
    return statistics
