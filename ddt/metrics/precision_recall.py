"""Precision and recall of two sets of features, in the arithmetic of ADM's evaluator.

A ball around each vector reaches to its k-th nearest neighbour in the same set. Precision is the
share of samples inside a ball of the reference, recall that of the reference inside the samples'.
Shapes: n and m vectors of F features. Source: Kynkäänniemi et al., arXiv 1904.06991.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from ddt.metrics.features import exact_arithmetic
from ddt.metrics.settings import PrDtype

BLOCK = 10_000  # vectors a side of a block of distances, the evaluator's
NUM_NEIGHBOURS = 3


def half_distances(a: Tensor, b: Tensor) -> Tensor:
    """Return squared distances (n, m) of a (n, F) and b (m, F), each operation rounded to float16.

    Sums and products are float32, where products are exact: no reduced-precision sums on GPUs.
    """
    a, b = a.half(), b.half()
    norm_a, norm_b = ((v * v).float().sum(dim=1).half() for v in (a, b))
    products = (a.float() @ b.float().T).half()  # (n, m)
    return products.mul_(-2).add_(norm_a[:, None]).add_(norm_b).clamp_(min=0).float()


def single_distances(a: Tensor, b: Tensor) -> Tensor:
    """Return squared distances (n, m) of a (n, F) and b (m, F) in float32."""
    return (a @ b.T).mul_(-2).add_(a.square().sum(dim=1)[:, None]).add_(b.square().sum(dim=1)).clamp_(min=0)


def squared_distances(a: Tensor, b: Tensor, dtype: PrDtype) -> Tensor:
    """Return squared distances (n, m) as float32; a float16 block that overflows is redone."""
    if dtype == "float16":
        distances = half_distances(a, b)
        if bool(distances.isfinite().all()):
            return distances
    return single_distances(a, b)


def blocks(features: Tensor, size: int) -> Iterator[tuple[slice, Tensor]]:
    """Yield blocks of vectors (≤ size, F), each after its slice."""
    for start in range(0, len(features), size):
        rows = slice(start, start + size)
        yield rows, features[rows]


def squared_radii(features: Tensor, k: int, dtype: PrDtype, block: int) -> Tensor:
    """Return each vector's squared distance to its k-th nearest neighbour in the set (n,)."""
    radii = torch.empty(len(features), device=features.device)
    for rows, a in blocks(features, block):
        smallest = torch.empty(len(a), 0, device=features.device)
        for _, b in blocks(features, block):
            distances = squared_distances(a, b, dtype)
            near = distances.topk(min(k + 1, len(b)), dim=1, largest=False).values
            smallest = torch.cat([smallest, near], dim=1).sort(dim=1).values[:, : k + 1]
        radii[rows] = smallest[:, k]  # the (k + 1)-th smallest: the vector itself is among them
    return radii


@torch.no_grad()
def precision_recall(
    reference: Tensor, samples: Tensor, dtype: PrDtype = "float16", k: int = NUM_NEIGHBOURS, block: int = BLOCK
) -> tuple[float, float]:
    """Return precision and recall of samples (m, F) against a reference (n, F), float32; n, m > k.

    At most one block of distances, block × block, is in memory.
    """
    assert min(len(reference), len(samples)) > k, "a k-th neighbour needs more than k vectors"
    sample_inside = torch.zeros(len(samples), dtype=torch.bool, device=samples.device)
    reference_inside = torch.zeros(len(reference), dtype=torch.bool, device=samples.device)
    with exact_arithmetic():
        of_reference = squared_radii(reference, k, dtype, block)
        of_samples = squared_radii(samples, k, dtype, block)
        for rows, a in blocks(reference, block):
            for columns, b in blocks(samples, block):
                distances = squared_distances(a, b, dtype)
                sample_inside[columns] |= (distances <= of_reference[rows, None]).any(dim=0)
                reference_inside[rows] |= (distances <= of_samples[columns]).any(dim=1)
    return sample_inside.double().mean().item(), reference_inside.double().mean().item()
