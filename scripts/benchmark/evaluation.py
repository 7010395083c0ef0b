"""Time an evaluation's stages: feature extraction against the bare Inception network in turns, and
the metrics of 50,000 rows.

python -m scripts.benchmark.evaluation [inception_weights=FILE] [out=FOLDER]
"""

import dataclasses
import functools
import logging
import os
import resource
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from ddt.cli import command
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
from ddt.receipts import circumstances, command_line
from scripts.benchmark.timing import seconds_of

log = logging.getLogger(__name__)
SIDE = 256  # pixels


@dataclasses.dataclass(frozen=True)
class EvaluationBenchmarkSettings:
    """See conf/benchmark_evaluation.yaml. Raises UserError for values that cannot be."""

    num_images: int
    rounds: int
    num_vectors: int
    num_reference: int
    batch_size: int
    inception_weights: str | None
    out: str | None

    def __post_init__(self) -> None:
        for key in ("num_images", "rounds", "batch_size"):
            require(getattr(self, key) >= 1, f"{key}={getattr(self, key)}: must be at least 1")
        for key in ("num_vectors", "num_reference"):
            value = getattr(self, key)
            require(value >= 5, f"{key}={value}: precision and recall need at least 5")


def random_weights(path: Path) -> Path:
    """Write random weights of the network's architecture and return their file."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Untrained(FeatureExtractorInceptionV3):
        def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
            """Keep the random weights."""

    torch.save({}, path)
    torch.save(Untrained("inception-v3-compat", ["2048"], str(path)).state_dict(), path)
    return path


def time_features(settings: EvaluationBenchmarkSettings, accelerator: Accelerator, folder: Path) -> dict[str, Any]:
    """Return images a second of the bare network on batches in memory, and of extraction from
    files, and the ratio.
    """
    count, batch_size, device = settings.num_images, settings.batch_size, accelerator.device
    weights = settings.inception_weights or random_weights(folder / "weights.pth")
    extractor = InceptionFeatures(Path(weights), batch_size, device)
    pixels = np.random.default_rng(0).integers(0, 256, (count, SIDE, SIDE, 3), dtype=np.uint8)
    np.savez(folder / "samples.npz", arr_0=pixels)
    source = NpzImages(folder / "samples.npz", "samples")
    batches = [to_device(part, device) for part in np.split(pixels, range(batch_size, count, batch_size))]

    @torch.no_grad()
    def bare() -> None:
        with exact_arithmetic():
            for batch in batches:
                extractor.network(batch)

    whole = functools.partial(extract, source, extractor, accelerator, "features")
    seconds_of(bare, device)
    rates: dict[str, list[float]] = {"bare": [], "whole": []}
    for _ in range(settings.rounds):
        for name, function in (("bare", bare), ("whole", whole)):
            rates[name].append(count / seconds_of(function, device))
    shares = [b / a for a, b in zip(rates["bare"], rates["whole"], strict=True)]
    medians = {f"images_per_second_{name}": statistics.median(values) for name, values in rates.items()}
    return {**medians, "share_of_bare": statistics.median(shares), "shares": shares}


def random_features(count: int, seed: int, device: torch.device) -> FeatureSet:
    """Return random features whose pool vectors have Inception's size and spread."""
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


def time_metrics(settings: EvaluationBenchmarkSettings, device: torch.device) -> dict[str, Any]:
    """Return seconds and memory of the statistics and of every metric of random features."""
    sets: dict[str, FeatureSet] = {}

    def fill(name: str, count: int, seed: int) -> None:
        sets[name] = random_features(count, seed, device)

    counts = {"samples": settings.num_vectors, "reference": settings.num_reference}
    memory = {"before": peak_gib()}
    seconds = {
        f"moments_{name}": seconds_of(functools.partial(fill, name, count, seed), device)
        for seed, (name, count) in enumerate(counts.items())
    }
    samples, reference = sets["samples"], sets["reference"]
    memory["with_features"] = peak_gib()
    statistics_of = {name: reference.moments[space] for name, space in Shape.distances.items()}
    prepared = Prepared(Reference("random", {}, None), statistics_of, reference, {})  # type: ignore[arg-type]
    pools = reference.rows["pool"], samples.rows["pool"]
    calls = {
        "all_metrics": functools.partial(score, samples, None, prepared, Shape(), "float16"),  # type: ignore[arg-type]
        **{f"precision_recall_{d}": functools.partial(precision_recall, *pools, d) for d in ("float16", "float32")},
        "nearest": functools.partial(nearest, *reversed(pools)),
    }
    seconds |= {name: seconds_of(call, device) for name, call in calls.items()}
    rows = sum(v.nbytes for s in (samples, reference) for v in s.rows.values()) / 2**30
    return {"seconds": seconds, "memory_gib": {**memory, "peak": peak_gib(), "rows_alone": rows}}


@command("benchmark_evaluation", settings=f"{__name__}.EvaluationBenchmarkSettings")
def main(settings: EvaluationBenchmarkSettings) -> None:
    """Measure, print, write."""
    accelerator = make_accelerator("no")
    device = accelerator.device
    metrics = time_metrics(settings, device)
    log.info("metrics: %s", metrics)
    with tempfile.TemporaryDirectory() as folder:
        features = time_features(settings, accelerator, Path(folder))
    share, rate = 100 * features["share_of_bare"], features["images_per_second_bare"]
    log.info("features at %.1f %% of the bare network (%.1f images/s)", share, rate)
    if settings.out is not None:
        path = Path(settings.out) / f"evaluation_{device.type}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        given = {key: value for key, value in vars(settings).items() if key not in ("out", "inception_weights")}
        about = {"threads": torch.get_num_threads(), "cores": os.cpu_count(), "load_after": os.getloadavg()[0]}
        origin = {"command": command_line(), **circumstances(device)}
        write_json(path, {"features": features, "metrics": metrics, "settings": given, **about, **origin})
        log.info("%s", path)


if __name__ == "__main__":
    main()
