"""A model's best guidance: many settings on few samples each, then the best of them on many.

The points of the proxy stage (seed 0) sample the same noise, so that they differ by their settings
alone. This noise favours some of them (selection bias), so the final stage has seeds 1, 2, ….
"""

import contextlib
import dataclasses
import datetime
import functools
import json
import logging
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from ddt.autoencoder import Autoencoder
from ddt.checkpoint import format as ckpt
from ddt.config import Choice
from ddt.distributed.prepare import make_accelerator
from ddt.errors import require
from ddt.files import write_json
from ddt.generation.generator import Generator
from ddt.generation.image_set import ImageSet, image_set
from ddt.generation.load import checkpoint_receipt, stored_autoencoder
from ddt.generation.receipt import is_receipt_of
from ddt.generation.sample_set import sample_set
from ddt.generation.set_folder import set_request
from ddt.metrics.compare import read_evaluation
from ddt.metrics.evaluate import evaluate, shorten
from ddt.metrics.features import Extractor
from ddt.metrics.images import SAMPLES, open_images
from ddt.metrics.ranking import ranked
from ddt.metrics.reference import Reference
from ddt.metrics.scores import Prepared, prepare
from ddt.model import Denoiser
from ddt.precision import Dtype, choose_dtype
from ddt.receipts import circumstances, nested, without_paths
from scripts.studies.guidance.report import draw, make_result, tables
from scripts.studies.guidance.settings import Checkpoint, GuidanceSettings, Point, interval_text
from scripts.studies.study import is_complete, load_comparison, number, resume_study, working_folder, write_report

log = logging.getLogger(__name__)
RESULT, WORK = "search", ".search"
PROXY_SEED = 0
METRICS = "metrics.json"  # its presence makes a set complete


@dataclasses.dataclass(frozen=True)
class Job:
    """A set to sample and evaluate."""

    point: Point
    num_samples: int
    seed: int
    folder: Path


@dataclasses.dataclass
class Search:
    """Samples and evaluates sets on all processes. metric: the distance to compare points by."""

    settings: GuidanceSettings
    autoencoder: Autoencoder
    dtype: Dtype
    reference: Reference
    extractor: Extractor
    prepared: Prepared
    metric: str
    accelerator: Accelerator
    loaded: tuple[Path, str] | None = None  # folder and weights of the network in memory
    model: Denoiser | None = None

    def run(self, jobs: list[Job]) -> list[dict[str, Any]]:
        """Run the missing jobs; return the metrics of all jobs, on every process."""
        main = self.accelerator.is_main_process
        missing = [n for n, job in enumerate(jobs) if self.measured(job) is None] if main else None
        (missing,) = broadcast_object_list([missing])  # one process decides
        for n in set(range(len(jobs))) - set(missing) if main and not self.settings.keep_samples else ():
            (jobs[n].folder / SAMPLES).unlink(missing_ok=True)  # killed before it was removed
        for done, n in enumerate(missing):
            job = jobs[n]
            metrics = self.measure(job)
            if metrics is not None:
                sampler = job.point.settings
                guidance = f"cfg {sampler.cfg_scale:g}, interval {interval_text(sampler.cfg_interval)}"
                log.info(
                    "point %d of %d: %s (%s): %s %s; %d left", n + 1, len(jobs),
                    "no guidance" if sampler.cfg_scale == 1 else guidance, job.folder,
                    metrics["labels"][self.metric], number(metrics[self.metric], 4), len(missing) - done - 1,
                )  # fmt: skip
        results = [self.measured(job) for job in jobs] if main else []
        return broadcast_object_list([results])[0]

    def inputs(self, job: Job) -> tuple[ImageSet, dict[str, Any]]:
        """Return classes and seeds of a job, and its checkpoint's part of their receipt."""
        checkpoint = job.point.checkpoint
        images = image_set(checkpoint.stored["network"]["num_classes"], job.num_samples, seed=job.seed)
        return images, checkpoint_receipt(checkpoint.folder, job.point.weights, self.autoencoder)

    def measured(self, job: Job) -> dict[str, Any] | None:
        """Return the metrics of a job, None where it is missing; UserError for those of another."""
        path = job.folder / METRICS
        if not path.is_file():
            return None
        _, metrics = read_evaluation(str(path))
        sampling = nested(metrics, "receipt", "sampling")
        request = set_request(job.point.settings, *self.inputs(job), self.dtype)
        require(
            is_receipt_of(sampling, nested(metrics, "receipt", "samples", "sha256"))
            and sampling.get("request") == shorten(request),
            f"{path}: is of other samples than this point's; remove {job.folder}, and it is measured again",
        )
        return metrics

    def measure(self, job: Job) -> dict[str, Any] | None:
        """Sample and evaluate a set; return the metrics on the main process."""
        model, stored = self.load(job.point), job.point.checkpoint.stored
        generator = Generator(
            model=model, autoencoder=self.autoencoder, shape=tuple(stored["latent_shape"]),
            settings=job.point.settings, dtype=self.dtype, device=self.accelerator.device,
            cache_bytes=self.settings.cache_gib * 2**30,
        )  # fmt: skip
        images, checkpoint = self.inputs(job)
        try:
            sample_set(generator, images, self.settings.batch_size, job.folder, checkpoint, self.accelerator)
        except FloatingPointError as error:
            raise FloatingPointError(
                f"{job.point.label}: {error}; or leave this point out, with another out="
            ) from error
        self.accelerator.wait_for_everyone()  # until the main process has written what all read
        metrics = evaluate(
            open_images(job.folder, "out"), self.reference, self.extractor, job.folder, self.accelerator,
            self.settings.pr_dtype, self.prepared,
        )  # fmt: skip
        if metrics is not None and not self.settings.keep_samples:
            (job.folder / SAMPLES).unlink()
        return metrics

    def load(self, point: Point) -> Denoiser:
        """Return a point's network; one is kept in memory."""
        own = point.checkpoint.folder, point.weights
        if self.model is None or self.loaded != own:
            self.model = None  # before the next one is read
            self.model = ckpt.load_model(*own).to(self.accelerator.device)
            self.loaded = own
        return self.model


def choose_metric(metric: str | None, reference: Reference, extractor: Extractor) -> str:
    """Return the Fréchet distance to compare points by; raise UserError for an unknown one."""
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


def search(settings: GuidanceSettings, data: Choice | None, checkpoints: list[Checkpoint], points: list[Point]) -> None:
    """Run both stages on each process and write the report. data: the reference's data set."""
    accelerator = make_accelerator(timeout=datetime.timedelta(days=1))  # one GPU may be hours behind another
    device, main, out = accelerator.device, accelerator.is_main_process, Path(settings.out)
    dtype = choose_dtype(settings.dtype, device)
    plan: dict[str, Any] | None = None
    request: dict[str, Any] = {}
    if main:  # it alone reads files for their hashes
        request = settings.request(checkpoints, dtype, circumstances(device)["device"])
        plan = resume_study(out, request, "plan.json", "search", WORK)
    (complete,) = broadcast_object_list([is_complete(out / f"{RESULT}.json")])  # as the main process sees it
    if complete:
        return
    stored = checkpoints[0].stored
    autoencoder = stored_autoencoder(stored, settings.autoencoder).to(device)
    reference, extractor = load_comparison(
        settings.reference, data, settings.features, autoencoder, stored["latent_shape"], device
    )
    metric = choose_metric(settings.metric, reference, extractor)
    with working_folder(out, WORK) if main else contextlib.nullcontext():
        if main:
            inputs = {"reference": reference.identity(), "features": extractor.identity()}
            inputs = json.loads(json.dumps(without_paths(inputs)))
            require(
                plan is None or plan["inputs"] == inputs,
                f"out={out}: its points were measured with another content of reference, features or weights; choose "
                "another out=",
            )
            write_json(out / "plan.json", {"request": request, "inputs": inputs})
        prepared = prepare(reference, extractor, accelerator)
        runner = Search(settings, autoencoder, dtype, reference, extractor, prepared, metric, accelerator)
        proxy = runner.run([Job(p, settings.num_samples, PROXY_SEED, out / "proxy" / p.label) for p in points])
        best = ranked({n: metrics[metric] for n, metrics in enumerate(proxy)}, metric)[: settings.top]
        require(
            len(best) > 0,
            f"metric={metric}: no point has one ({nested(proxy[0], 'reasons', metric)}); choose another metric=, "
            "reference= or features=, with another out=",
        )
        seeds = range(PROXY_SEED + 1, PROXY_SEED + 1 + settings.repeats)
        jobs = [
            Job(points[n], settings.final_samples, seed, out / "final" / points[n].label / f"seed_{seed}")
            for n in best
            for seed in seeds
        ]
        final = dict(zip(((job.point.label, job.seed) for job in jobs), runner.run(jobs), strict=True))
        if main:
            winners = [(points[n], proxy[n], [(seed, final[points[n].label, seed]) for seed in seeds]) for n in best]
            result = {"request": request, **make_result(list(zip(points, proxy, strict=True)), winners, metric)}
            write_report(
                out / RESULT, result, tables(result), functools.partial(draw, result), device,
                num_processes=accelerator.num_processes,
            )  # fmt: skip
