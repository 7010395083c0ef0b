"""Which guidance suits a trained model: many settings on few images each, then the best of them on
many.

The points of the proxy stage draw the same noise, so that they differ by their settings alone. The
best of them is partly the one that this noise happened to suit (selection bias), so the final stage
never draws it again: its seeds are 1, 2, …, the proxy's is 0.
"""

import dataclasses
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from ddt.checkpoint import folder as ckpt
from ddt.errors import require
from ddt.generation.generator import Generator
from ddt.generation.image_set import image_set
from ddt.generation.sample_set import sample_set
from ddt.metrics.evaluate import evaluate
from ddt.metrics.features import Extractor
from ddt.metrics.images import SAMPLES, open_images
from ddt.metrics.precision_recall import PrDtype
from ddt.metrics.reference import Reference
from ddt.metrics.scores import Prepared
from ddt.model import Denoiser
from scripts.studies.guidance.points import Point, guidance_text

log = logging.getLogger(__name__)
PROXY_SEED = 0
METRICS = "metrics.json"  # its presence makes a set complete


@dataclasses.dataclass(frozen=True)
class Job:
    """A set of images to be drawn and measured."""

    point: Point
    num_samples: int
    seed: int
    folder: Path


class Search:
    """Draws and measures sets of images on all processes.

    Args:
        make: builds a Generator of `model` and `settings`. autoencoder_sha256: of its autoencoder,
        for receipts. reference, extractor, prepared, pr_dtype: what images are compared with, and
        how.
        metric: the Fréchet distance that points are told apart by.
        keep_samples: whether samples.npz stays once it is measured.
    """

    def __init__(
        self, make: Callable[..., Generator], autoencoder_sha256: str | None, reference: Reference,
        extractor: Extractor, prepared: Prepared, pr_dtype: PrDtype, metric: str, batch_size: int, keep_samples: bool,
        accelerator: Accelerator,
    ) -> None:  # fmt: skip
        self.make, self.autoencoder_sha256 = make, autoencoder_sha256
        self.reference, self.extractor, self.prepared, self.pr_dtype = reference, extractor, prepared, pr_dtype
        self.metric, self.batch_size, self.keep_samples = metric, batch_size, keep_samples
        self.accelerator = accelerator
        self.loaded: tuple[Path, str] | None = None  # where the network in memory is from
        self.model: Denoiser | None = None

    def run(self, jobs: list[Job]) -> list[dict[str, Any]]:
        """Draw and measure what is missing; return the metrics of all jobs, on every process."""
        main = self.accelerator.is_main_process
        missing = [n for n, job in enumerate(jobs) if not (job.folder / METRICS).is_file()] if main else None
        (missing,) = broadcast_object_list([missing])  # one process decides
        for number in set(range(len(jobs))) - set(missing) if main and not self.keep_samples else ():
            (jobs[number].folder / SAMPLES).unlink(missing_ok=True)  # measured, then killed before it was removed
        for done, number in enumerate(missing):
            job = jobs[number]
            metrics = self.measure(job)
            if metrics is not None:
                label, value = metrics["labels"][self.metric], metrics[self.metric]
                log.info(
                    "point %d of %d: %s (%s): %s %.4f; %d left", number + 1, len(jobs),
                    guidance_text(job.point.settings), job.folder, label, value, len(missing) - done - 1,
                )  # fmt: skip
        found = [json.loads((job.folder / METRICS).read_text()) for job in jobs] if main else []
        return broadcast_object_list([found])[0]

    def measure(self, job: Job) -> dict[str, Any] | None:
        """Draw a set and measure it; return the metrics on the main process."""
        model = self.load(job.point)
        try:
            sample_set(
                self.make(model=model, settings=job.point.settings),
                image_set(model.num_classes, job.num_samples, seed=job.seed),
                self.batch_size, job.folder, self.receipt(job.point), self.accelerator,
            )  # fmt: skip
        except FloatingPointError as error:
            raise FloatingPointError(
                f"{job.point.label}: {error}; or leave this point out, with another out="
            ) from error
        self.accelerator.wait_for_everyone()  # until the main process has written what all read
        metrics = evaluate(
            open_images(job.folder, "out"), self.reference, self.extractor, job.folder, self.accelerator,
            self.pr_dtype, self.prepared,
        )  # fmt: skip
        if metrics is not None and not self.keep_samples:
            (job.folder / SAMPLES).unlink()
        return metrics

    def load(self, point: Point) -> Denoiser:
        """Return a point's network, of which one is kept in memory."""
        wanted = point.checkpoint.folder, point.weights
        if self.model is None or self.loaded != wanted:
            self.model = None  # before the next one is read
            self.model = ckpt.load_model(point.checkpoint.folder, point.weights).to(self.accelerator.device)
            self.loaded = wanted
        return self.model

    def receipt(self, point: Point) -> dict[str, Any]:
        """Return what a receipt says of a point's weights."""
        stored, weights = point.checkpoint.stored, point.weights
        return {
            **ckpt.weights_receipt(point.checkpoint.folder, weights),
            "step": stored["step"],
            "class_names": stored["class_names"],
            "autoencoder_sha256": self.autoencoder_sha256,
        }


def chosen_metric(metric: str | None, reference: Reference, extractor: Extractor) -> str:
    """Return the distance that points are told apart by; raise UserError for one that cannot be
    measured.
    """
    known = list(extractor.distances)
    require(
        metric is None or metric in known,
        f"metric={metric}: features={extractor.name} measures {', '.join(known)}; choose from these",
    )
    name = metric or known[0]
    require(
        not reference.statistics or name in reference.statistics,
        f"metric={name}: reference={reference.name} has no statistics for it; choose from "
        f"{', '.join(reference.statistics)}",
    )
    return name


def best_of(metrics: list[dict[str, Any]], metric: str, top: int) -> list[int]:
    """Return the places of the `top` best sets, the best first: a distance is the better the
    smaller.
    """
    return sorted(range(len(metrics)), key=lambda n: metrics[n][metric])[:top]


def proxy_jobs(points: list[Point], num_samples: int, out: Path) -> list[Job]:
    """Return the sets of the first stage: one a point, all of the same noise."""
    return [Job(point, num_samples, PROXY_SEED, out / "proxy" / point.label) for point in points]


def final_jobs(winners: list[Point], num_samples: int, repeats: int, out: Path) -> list[Job]:
    """Return the sets of the second stage, winner by winner: never of the noise that they were
    chosen on.
    """
    seeds = range(PROXY_SEED + 1, PROXY_SEED + 1 + repeats)
    return [Job(p, num_samples, seed, out / "final" / p.label / f"seed_{seed}") for p in winners for seed in seeds]
