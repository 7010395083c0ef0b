"""Memorisation: how near samples come to training images. Shapes: n samples, m training images, F
features.
"""

import torch
from torch import Tensor

from ddt.metrics.inception import exact_arithmetic

CHUNK = 1024  # vectors a side of a block of distances


@torch.no_grad()
def nearest(vectors: Tensor, training: Tensor, own: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return each vector's distance to its nearest training vector, root mean square over features
    (n,), and which one that is, int64 (n,).

    vectors (n, F); training (m, F). own, int64 (n,): where the vectors are training vectors
    themselves, their places, which do not count.
    """
    squares = training.square().sum(dim=1)
    which = torch.empty(len(vectors), dtype=torch.int64, device=vectors.device)
    with exact_arithmetic():
        for start in range(0, len(vectors), CHUNK):
            part = vectors[start : start + CHUNK]
            best = torch.full((len(part),), torch.inf, device=vectors.device)
            for first in range(0, len(training), 8 * CHUNK):
                block = slice(first, first + 8 * CHUNK)
                distances = squares[block] - 2 * (part @ training[block].T)  # but for |vector|², alike for all
                if own is not None:
                    at = own[start : start + CHUNK] - first
                    inside = (at >= 0) & (at < distances.shape[1])
                    distances[inside.nonzero().squeeze(1), at[inside]] = torch.inf
                low, place = distances.min(dim=1)
                nearer = low < best
                best[nearer] = low[nearer]
                which[start : start + CHUNK][nearer] = first + place[nearer]
    # the distance itself from the difference, which is exactly 0 for a copy
    parts = zip(vectors.split(CHUNK), which.split(CHUNK), strict=True)
    return torch.cat([(part - training[at]).square().mean(dim=1).sqrt() for part, at in parts]), which


def authenticity(distances: Tensor, which: Tensor, training: Tensor) -> float:
    """Return the share of samples that are farther from their nearest training image than that
    image is from the nearest other one: low for memorised sets.

    distances, which (n,): of `nearest`; training (m, F), m ≥ 2. Source: Alaa et al., arXiv
    2102.08921.
    """
    hit, place = which.unique(return_inverse=True)
    apart, _ = nearest(training[hit], training, own=hit)
    return (distances > apart[place]).double().mean().item()
