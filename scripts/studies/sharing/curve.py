"""Quality against speed of encoder sharing: every rule at every budget, on one noise a repeat.

A rule is a kind of schedule with a forecast order of z, a budget the number of encoder runs.
Shapes: B batch, C H W latent (pixels: H W C).
"""

import contextlib
import dataclasses
import functools
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ddt.checkpoint import format as ckpt
from ddt.config import Choice
from ddt.distributed.prepare import make_accelerator
from ddt.files import write_json, write_text
from ddt.generation.generator import Generator, check_finite
from ddt.generation.image_set import ImageSet, image_set
from ddt.generation.load import load_generator, stored_autoencoder
from ddt.logs import progress_bar
from ddt.metrics.comparability import in_words, short, title
from ddt.metrics.features import Extractor, to_device
from ddt.metrics.frechet import Moments
from ddt.metrics.scores import Prepared, prepare
from ddt.precision import choose_dtype
from ddt.receipts import circumstances
from ddt.sampling.cost import sampling_macs
from ddt.sampling.fitting import fit_schedule
from ddt.sampling.schedules import optimal_schedule
from ddt.sampling.settings import SamplerSettings
from ddt.tensor_files import ArrayWriter, open_array, write_array
from ddt.training.tracking import read_rows
from scripts.studies.sharing.report import UNSHARED, draw, summarise, table
from scripts.studies.sharing.settings import SharingSettings, parse_rule, uniform_for
from scripts.studies.study import (
    is_complete,
    load_comparison,
    resume_study,
    unshared_sampler,
    working_folder,
    write_report,
)  # fmt: skip

RESULT = "sharing_curve"
WORK = ".unshared"  # folder of the images that the others are compared with
Schedules = dict[str, dict[str, list[int]]]  # kind → budget, as text → steps at which the encoder runs


def make_schedules(generator: Generator, settings: SharingSettings) -> Schedules:
    """Return the schedules by kind and budget; dp is fitted to the generator here."""
    steps, schedules = generator.settings.num_steps, Schedules()
    if "dp" in settings.kinds:
        with generator.autocast():
            fitted = fit_schedule(
                generator.model, generator.shape, generator.settings, settings.budgets[0], generator.device,
                settings.templates,
            )  # fmt: skip
        similarity = np.array(fitted["similarity"])
        schedules["dp"] = {str(budget): optimal_schedule(similarity, budget) for budget in settings.budgets}
    if "uniform" in settings.kinds:
        schedules["uniform"] = {str(budget): uniform_for(steps, budget) for budget in settings.budgets}
    return schedules


@dataclasses.dataclass(frozen=True)
class Point:
    """A set to sample: a rule at a budget (`UNSHARED` at num_steps), with a repeat's noise."""

    rule: str
    budget: int
    repeat: int


class Curve:
    """The points of a curve, sampled one after another and written to `out/points.jsonl`.

    generator: without sharing. extractor, prepared: features and reference of the Fréchet distance.
    Repeat r samples num_samples images of seed r.
    """

    def __init__(
        self, settings: SharingSettings, generator: Generator, schedules: Schedules, extractor: Extractor,
        prepared: Prepared,
    ) -> None:  # fmt: skip
        self.settings, self.generator, self.schedules = settings, generator, schedules
        self.extractor, self.prepared = extractor, prepared
        self.out = Path(settings.out)
        self.budgets = sorted(settings.budgets, reverse=True)

    def points(self) -> Iterator[Point]:
        """Yield all points, by repeat, the one without sharing first."""
        for repeat in range(self.settings.repeats):
            yield Point(UNSHARED, self.generator.settings.num_steps, repeat)
            yield from (Point(rule, budget, repeat) for rule in self.settings.rules for budget in self.budgets)

    def sampler(self, rule: str, budget: int) -> SamplerSettings:
        """Return the sampler of a rule at a budget."""
        if rule == UNSHARED:
            return self.generator.settings
        kind, order = parse_rule(rule)
        steps = self.schedules[kind][str(budget)]
        return dataclasses.replace(self.generator.settings, recompute=steps, forecast_order=order)

    def speed_by_macs(self, rule: str, budget: int) -> float:
        """Return the MACs without sharing over those of a rule at a budget."""
        macs = functools.partial(sampling_macs, self.generator.model, *self.generator.shape[1:])
        return macs(self.generator.settings) / macs(self.sampler(rule, budget))

    def images(self, repeat: int) -> ImageSet:
        """Return classes and seeds of a repeat, of seed `repeat`."""
        return image_set(self.generator.model.num_classes, self.settings.num_samples, seed=repeat)

    def run(self) -> list[dict[str, Any]]:
        """Sample the missing points and return the rows of all."""
        path = self.out / "points.jsonl"
        stored = read_rows(path, key="rule", kind=str) if path.exists() else []
        write_text(path, "".join(f"{json.dumps(row)}\n" for row in stored))  # without a line that a kill cut short
        rows = {Point(row["rule"], row["budget"], row["repeat"]): row for row in stored}
        points = list(self.points())
        left = [point for point in points if point not in rows]
        total, done = (count * self.settings.num_samples for count in (len(points), len(points) - len(left)))
        bar = progress_bar(total=total, initial=done, unit="img", desc="curve")
        with path.open("a") as file, bar, self.generator.exact():
            if left:
                self.warm_up()
            for point in left:
                if point.rule != UNSHARED and not self.unshared(point.repeat, "latents").is_file():
                    self.measure(Point(UNSHARED, self.generator.settings.num_steps, point.repeat), None)
                row = {**dataclasses.asdict(point), **self.measure(point, bar)}
                file.write(json.dumps(row) + "\n")
                file.flush()
                rows[point] = row
        return [rows[point] for point in points]

    def warm_up(self) -> None:
        """Sample one batch in two steps: first calls allocate and choose kernels."""
        images, size = self.images(0), self.settings.batch_size
        generator = dataclasses.replace(self.generator, settings=SamplerSettings(num_steps=2, last_step=None))
        latents, _ = generator.latents(images.classes[:size], images.seeds[:size])
        generator.pixels(latents, None, None)

    def unshared(self, repeat: int, name: str) -> Path:
        """Return the file of a repeat's "pixels" or "latents" without sharing."""
        return self.out / WORK / f"{name}_{repeat}.npy"

    def measure(self, point: Point, bar: tqdm | None) -> dict[str, Any]:
        """Sample the images of a point and return its measurements; write those without sharing."""
        images, count, size = self.images(point.repeat), self.settings.num_samples, self.settings.batch_size
        generator = dataclasses.replace(self.generator, settings=self.sampler(point.rule, point.budget))
        new = point.rule == UNSHARED
        files = {name: self.unshared(point.repeat, name) for name in ("latents", "pixels")}
        compared = {} if new else {name: open_array(file) for name, file in files.items()}
        writers: dict[str, ArrayWriter] = {}
        squares, sizes = dict.fromkeys(files, 0.0), dict.fromkeys(files, 0)
        space = next(iter(self.extractor.distances.values()))
        moments, seconds = Moments(self.extractor.spaces[space], self.generator.device), 0.0
        with contextlib.ExitStack() as stack:  # the latents' file appears last, for it marks both as complete
            for start in range(0, count, size):
                chosen = np.arange(start, min(start + size, count))
                start_time = time.perf_counter()
                latents, _ = generator.latents(images.classes[start : start + size], images.seeds[start : start + size])
                pixels = generator.pixels(latents, None, None)  # on the CPU: a device sync
                seconds += time.perf_counter() - start_time
                check_finite(latents, start)
                for name, values in {"latents": latents.cpu().numpy(), "pixels": pixels}.items():
                    if new and start == 0:
                        whole = write_array(files[name], values.dtype, (count, *values.shape[1:]))
                        writers[name] = stack.enter_context(whole)
                    if new:
                        writers[name].append(values)
                    else:
                        squares[name] += float(((values.astype(np.float64) - compared[name][chosen]) ** 2).sum())
                    sizes[name] += values.size
                for part in np.split(pixels, range(self.extractor.batch_size, len(pixels), self.extractor.batch_size)):
                    moments.add(self.extractor(to_device(part, self.generator.device))[space])
                if bar is not None:
                    bar.update(len(pixels))
        rms = {name: (squares[name] / sizes[name]) ** 0.5 for name in files}
        return {
            "frechet_distance": self.prepared.main_distance(moments),
            "pixels_rms": rms["pixels"] / 255,
            "latents_rms": rms["latents"],
            "images_per_second": count / seconds,
        }


def measure(settings: SharingSettings, data: Choice | None) -> None:
    """Fit the schedules, sample the points and write the report. data: the reference's data set."""
    folder, stored, sampler = unshared_sampler(settings, settings.ckpt)
    settings.check_budgets(sampler.num_steps)
    accelerator, out = make_accelerator(), Path(settings.out)
    device = accelerator.device
    dtype = choose_dtype(settings.dtype, device)
    request = {
        **settings.request(),
        "ema_sha256": ckpt.weights_sha256(folder, "ema"),
        "sampler": dataclasses.asdict(sampler),
        "dtype": dtype,
        "device": circumstances(device)["device"],
    }
    plan = resume_study(out, request, "plan.json", "curve", WORK)
    if is_complete(out / f"{RESULT}.json"):
        return
    autoencoder = stored_autoencoder(stored, settings.autoencoder)
    reference, extractor = load_comparison(
        settings.reference, data, settings.features, autoencoder, stored["latent_shape"], device
    )
    generator = load_generator(folder, sampler, autoencoder, device, dtype=dtype, cache_gib=settings.cache_gib)
    with working_folder(out, WORK):
        if plan is None:
            plan = {"request": request, "schedules": make_schedules(generator, settings)}
            write_json(out / "plan.json", plan)
        prepared = prepare(reference, extractor, accelerator)
        curve = Curve(settings, generator, plan["schedules"], extractor, prepared)
        rows = curve.run()
        summary, metric = summarise(rows, curve.speed_by_macs), next(iter(extractor.distances))
        distance = in_words(metric, short(settings.num_samples))
        write_report(
            out / RESULT, {**plan, "metric": metric, "summary": summary, "points": rows}, table(summary, title(metric)),
            functools.partial(draw, summary, distance), device, load_after=os.getloadavg()[0],
        )  # fmt: skip
