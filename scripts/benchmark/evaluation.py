"""Measure an evaluation's stages: features against the bare Inception network in turns, and the
metrics of 50,000 rows.

python scripts/benchmark/evaluation.py [inception_weights=FILE] [out=FOLDER]
"""

import logging
import os
import resource
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from omegaconf import DictConfig
from torch import nn

from ddt.cli import arguments_for, checked, entry_point
from ddt.distributed.prepare import make_accelerator
from ddt.errors import require
from ddt.files import write_json
from ddt.metrics.features import FeatureSet, exact_arithmetic, extract, to_device
from ddt.metrics.frechet import Moments
from ddt.metrics.images import NpzImages
from ddt.metrics.inception import NUM_CLASSES, NUM_POOL, NUM_SPATIAL, InceptionFeatures
from ddt.metrics.precision_recall import precision_recall
from ddt.metrics.reference import Reference
from ddt.metrics.scores import Prepared, nearest, score
from ddt.receipts import circumstances

log = logging.getLogger(__name__)
SIDE = 256


def check(
    num_images: int, rounds: int, num_vectors: int, num_reference: int, batch_size: int, inception_weights: str | None,
    out: str | None,
) -> None:  # fmt: skip
    """Refuse settings that cannot be."""
    counts = {"num_images": num_images, "rounds": rounds, "batch_size": batch_size}
    for key, value in counts.items():
        require(value >= 1, f"{key}={value}: must be at least 1")
    for key, value in {"num_vectors": num_vectors, "num_reference": num_reference}.items():
        require(value >= 5, f"{key}={value}: precision and recall need at least 5")


def random_weights(path: Path) -> Path:
    """Write random weights of the network's architecture and return their file."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Untrained(FeatureExtractorInceptionV3):
        def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
            """Keep the weights that were drawn."""

    torch.save({}, path)
    torch.save(Untrained("inception-v3-compat", ["2048"], str(path)).state_dict(), path)
    return path


def timed(device: torch.device, function: Callable[[], Any]) -> float:
    """Return the seconds that a call takes, the device's work included."""
    began = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def features_stage(values: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return images a second of the bare network on batches in memory, and of extraction from
    files, and the ratio.
    """
    accelerator, count, batch_size = make_accelerator("no"), values["num_images"], values["batch_size"]
    device = accelerator.device
    weights = values["inception_weights"] or random_weights(folder / "weights.pth")
    extractor = InceptionFeatures(Path(weights), batch_size, device)
    pixels = np.random.default_rng(0).integers(0, 256, (count, SIDE, SIDE, 3), dtype=np.uint8)
    np.savez(folder / "samples.npz", arr_0=pixels)
    source = NpzImages(folder / "samples.npz", "samples")
    batches = [to_device(part, device) for part in np.split(pixels, range(batch_size, count, batch_size))]
    network: nn.Module = extractor.network

    @torch.no_grad()
    def bare() -> None:
        with exact_arithmetic():
            for batch in batches:
                network(batch)

    def whole() -> None:
        extract(source, extractor, accelerator, "features")

    timed(device, bare)
    rates: dict[str, list[float]] = {"bare": [], "whole": []}
    for _ in range(values["rounds"]):
        for name, function in (("bare", bare), ("whole", whole)):
            rates[name].append(count / timed(device, function))
    shares = [b / a for a, b in zip(rates["bare"], rates["whole"], strict=True)]
    return {
        "images_per_second_bare": statistics.median(rates["bare"]),
        "images_per_second_whole": statistics.median(rates["whole"]),
        "share_of_bare": statistics.median(shares),
        "shares": shares,
    }


def made_up(count: int, seed: int, device: torch.device) -> FeatureSet:
    """Return made-up features whose pool vectors have Inception's size and spread."""
    rng = torch.Generator(device).manual_seed(seed)
    scale = torch.linspace(0.1, 1, NUM_POOL, device=device)
    pool = (torch.randn(count, NUM_POOL, generator=rng, device=device) * scale).add_(0.4)
    rows = {"pool": pool, "probabilities": torch.rand(count, NUM_CLASSES, generator=rng, device=device).softmax(dim=1)}
    moments = {"pool": Moments(NUM_POOL, device), "spatial": Moments(NUM_SPATIAL, device)}
    for part in pool.split(64):
        moments["pool"].add(part)
        moments["spatial"].add(part[:, :NUM_SPATIAL])
    return FeatureSet(count, rows, moments)


class Shape:
    """What the metrics need to know of the extractor."""

    name, own_classes = "inception", False
    distances = InceptionFeatures.distances
    pr_space, nearest_space = InceptionFeatures.pr_space, InceptionFeatures.nearest_space


def peak_gib() -> float:
    """Return the largest memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def metrics_stage(count: int, num_reference: int) -> dict[str, Any]:
    """Return seconds and memory of the statistics and of every metric of made-up features."""
    device = make_accelerator("no").device
    seconds: dict[str, float] = {}
    before, sets = peak_gib(), {}
    for name, number, seed in (("samples", count, 0), ("reference", num_reference, 1)):
        seconds[f"moments_{name}"] = timed(
            device, lambda n=number, s=seed, k=name: sets.update({k: made_up(n, s, device)})
        )
    samples, reference = sets["samples"], sets["reference"]
    made = peak_gib()
    prepared = Prepared(Reference("made up", {}, None), {
        name: reference.moments[space] for name, space in Shape.distances.items()}, reference, {})  # fmt: skip
    seconds["all_metrics"] = timed(device, lambda: score(samples, None, prepared, Shape(), "float16"))  # type: ignore[arg-type]
    for dtype in ("float16", "float32"):
        seconds[f"precision_recall_{dtype}"] = timed(
            device, lambda d=dtype: precision_recall(reference.rows["pool"], samples.rows["pool"], d)
        )
    seconds["nearest"] = timed(device, lambda: nearest(samples.rows["pool"], reference.rows["pool"]))
    vectors = sum(v.nbytes for s in (samples, reference) for v in s.rows.values()) / 2**30
    return {
        "seconds": seconds,
        "memory_gib": {"before": before, "with_features": made, "peak": peak_gib(), "rows_alone": vectors},
    }


@entry_point("benchmark_evaluation")
def main(cfg: DictConfig) -> None:
    """Check, measure, write."""
    values = arguments_for(check, checked(cfg))
    check(**values)
    metrics = metrics_stage(values["num_vectors"], values["num_reference"])
    log.info("metrics: %s", metrics)
    with tempfile.TemporaryDirectory() as folder:
        features = features_stage(values, Path(folder))
    device = make_accelerator("no").device
    result = {
        "features": features,
        "metrics": metrics,
        "settings": {
            key: values[key] for key in ("num_images", "rounds", "num_vectors", "num_reference", "batch_size")
        },
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "load_after": os.getloadavg()[0],
        "command": shlex.join(["python", *sys.argv]),
        **circumstances(device),
    }
    log.info("features at %.1f %% of the bare network (%.1f images/s)", 100 * features["share_of_bare"],
             features["images_per_second_bare"])  # fmt: skip
    if values["out"] is not None:
        path = Path(values["out"]) / f"evaluation_{device.type}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, result)
        log.info("%s", path)


if __name__ == "__main__":
    main()
