"""Evaluation during training: metrics of a few thousand samples of the EMA weights.

Measured as by evaluate.py. Shapes: B batch, H W C pixels.
"""

import dataclasses
import itertools
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from ddt.autoencoder import Autoencoder
from ddt.files import read_record, write_json
from ddt.generation.generator import Generator
from ddt.generation.image_set import ImageSet, image_set
from ddt.metrics.comparability import labels
from ddt.metrics.features import Extractor, extract
from ddt.metrics.reference import Reference, check_reference
from ddt.metrics.scores import Prepared, prepare, score
from ddt.model import Denoiser
from ddt.precision import Dtype
from ddt.receipts import without_paths
from ddt.sampling.settings import SamplerSettings
from ddt.training.settings import metric_suffix

log = logging.getLogger(__name__)


class GeneratedImages:
    """Images that are sampled when they are read; see `metrics.images.ImageBatches`.

    images: classes and seeds. batch_size: images sampled at once. `finite`: whether all latents
    that this process sampled are finite, a boolean on the device.
    """

    on_disk = False  # reading them is work for the device
    name = "the model's samples"

    def __init__(self, generator: Generator, images: ImageSet, batch_size: int) -> None:
        self.generator, self.images, self.batch_size = generator, images, batch_size
        self.finite = torch.ones((), dtype=torch.bool, device=generator.device)

    def __len__(self) -> int:
        return len(self.images.seeds)

    def sample(self, start: int, stop: int) -> np.ndarray:
        """Return images `start` … `stop` − 1, uint8 (B, H, W, C)."""
        latents, _ = self.generator.latents(self.images.classes[start:stop], self.images.seeds[start:stop])
        self.finite &= latents.isfinite().all()
        return self.generator.pixels(latents, None, None)

    def batches(self, batch_size: int, rank: int = 0, num_processes: int = 1) -> Iterator[np.ndarray]:
        """Yield the batches of a process, uint8 (B, H, W, C)."""
        for start in range(rank * batch_size, len(self), batch_size * num_processes):
            stop = min(start + batch_size, len(self))
            cuts = [*range(start, stop, self.batch_size), stop]
            yield np.concatenate([self.sample(a, b) for a, b in itertools.pairwise(cuts)])


@dataclasses.dataclass(frozen=True)
class OnlineSamples:
    """The samples of each evaluation: classes and noise of sample.py with `num_samples=`.

    shape: (C, H, W) of a latent. batch_size: images sampled at once. dtype: the run's mixed
    precision.
    """

    autoencoder: Autoencoder
    shape: tuple[int, int, int]
    sampler: SamplerSettings
    num_samples: int
    batch_size: int
    dtype: Dtype


@dataclasses.dataclass(frozen=True)
class OnlineEvaluation:
    """Evaluates a network during training; all processes call it together."""

    extractor: Extractor
    prepared: Prepared
    samples: OnlineSamples
    accelerator: Accelerator

    def __call__(self, model: Denoiser, step: int) -> dict[str, float]:
        """Return metrics such as `fid_5k`; {} on processes other than the main one.

        No random state is touched.
        """
        generator = Generator(
            model, self.samples.autoencoder, self.samples.shape, self.samples.sampler,
            self.samples.dtype, self.accelerator.device,
        )  # fmt: skip
        images = image_set(model.num_classes, self.samples.num_samples)
        source = GeneratedImages(generator, images, self.samples.batch_size)
        share = -(-self.samples.num_samples // self.accelerator.num_processes)  # all processes share small sets too
        with generator.exact():
            features = extract(
                source, self.extractor, self.accelerator, f"step {step}: samples", min(self.extractor.batch_size, share)
            )
        if self.accelerator.reduce((~source.finite).float(), reduction="sum").item() > 0:
            if self.accelerator.is_main_process:
                log.warning("warning: step %d: samples are NaN or infinite and are not measured", step)
            return {f"not_finite{metric_suffix(self.samples.num_samples)}": 1.0}
        if features is None:
            return {}
        scores = score(features, np.array(images.classes), self.prepared, self.extractor, "float16")
        metrics = {
            name: value
            for name, value in scores.metrics.items()
            if value is not None and not name.endswith(("_real", "_shuffled"))
        }
        names = labels(metrics, self.samples.num_samples, self.prepared.reference, self.extractor, "float16")
        log.info("step %d: %s", step, ", ".join(f"{names[name]} {value:.4g}" for name, value in metrics.items()))
        return {f"{name}{metric_suffix(self.samples.num_samples)}": value for name, value in metrics.items()}

    def receipt(self) -> dict[str, Any]:
        """Return reference, features, sampler and samples of a run's metrics."""
        return {
            "reference": self.prepared.reference.identity(),
            "features": self.extractor.identity(),
            "sampler": dataclasses.asdict(self.samples.sampler),
            "num_samples": self.samples.num_samples,
            "dtype": self.samples.dtype,
        }

    def write_receipt(self, path: Path) -> None:
        """Write the receipt; warn where that of an earlier start differs."""
        now = json.loads(json.dumps(without_paths(self.receipt())))
        before = read_record(path) if path.is_file() else now
        if before != now:
            changed = [key for key in now if before.get(key) != now[key]]
            log.warning(
                "warning: %s: the evaluation changed in %s: its metrics do not compare with those logged before",
                path.parent, ", ".join(changed),
            )  # fmt: skip
        write_json(path, now)


def online_evaluation(
    reference: Reference, extractor: Extractor, samples: OnlineSamples, accelerator: Accelerator
) -> OnlineEvaluation:
    """Prepare the reference on all processes; UserError where the extractor does not suit it."""
    check_reference(reference, extractor)
    return OnlineEvaluation(extractor, prepare(reference, extractor, accelerator), samples, accelerator)
