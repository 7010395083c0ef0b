"""Sample the app's requests by the code of sample.py, each into a folder of its own."""

import collections
import dataclasses
import itertools
import shutil
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import Tensor

from ddt.checkpoint import format as ckpt
from ddt.files import read_json
from ddt.generation.load import (
    check_guide_config,
    checkpoint_receipt,
    guide_receipt,
    load_generator,
    stored_autoencoder,
)
from ddt.generation.sample_set import sample_set
from ddt.sampling.cost import sampling_macs
from ddt.sampling.fitting import fit_schedule
from ddt.sampling.sample import Observer
from ddt.sampling.settings import SamplerSettings
from scripts.app.controls import Request, initial_controls, make_requests
from scripts.app.settings import DEMO, AppSettings

MAX_KEPT = 20  # requests whose files stay
Report = Callable[[float, str], None]  # progress, 0..1, and its description


class Interrupted(Exception):
    """The request was cancelled, its client has gone, or the app closes."""


@dataclasses.dataclass(frozen=True)
class SampledSet:
    """A set on disk, with its receipt."""

    request: Request
    folder: Path
    receipt: dict[str, Any]

    @property
    def seconds(self) -> float:
        """The time from the first network call to the last file, without warm-up and fitting."""
        return self.receipt["samples"] / self.receipt["images_per_second"]


@dataclasses.dataclass(frozen=True)
class Result:
    """The set of a request, and the same without sharing for a comparison."""

    sets: list[SampledSet]
    macs: tuple[int, int] | None  # counted of an image, and without sharing; None: with a guide
    speedups: list[float]  # measured by this and earlier comparisons of the sampler and number of images


class Studio:
    """A loaded checkpoint that samples one request at a time into folders under `root`.

    Raises UserError for a checkpoint that cannot be sampled.
    """

    def __init__(self, settings: AppSettings, root: Path, accelerator: Accelerator) -> None:
        folder = ckpt.find_checkpoint(settings.ckpt or DEMO)
        ckpt.check_weights(folder, settings.weights)
        guide = None if settings.guide is None else ckpt.find_checkpoint(settings.guide)
        self.settings = dataclasses.replace(settings, ckpt=str(folder), guide=None if guide is None else str(guide))
        self.root, self.accelerator = root, accelerator
        self.stored = ckpt.read_config(folder)
        if guide is not None:
            check_guide_config(self.stored, ckpt.read_config(guide))
        self.controls = initial_controls(self.stored, settings)
        self.generator = load_generator(
            folder,
            SamplerSettings(),  # of each request
            stored_autoencoder(self.stored, settings.autoencoder),
            accelerator.device,
            weights=settings.weights,
            guide=guide,
            dtype=settings.dtype,
        )
        self.receipt = checkpoint_receipt(folder, settings.weights, self.generator.autoencoder)
        self.guide_receipt = None if guide is None else guide_receipt(guide)
        self.fitted: dict[str, list[int]] = {}  # steps by sampler, for the next request
        self.speedups = collections.defaultdict[tuple[str, int], list[float]](list)
        self.warm: set[int] = set()  # batch sizes
        self.folders: collections.deque[Path] = collections.deque()
        self.opened: Result | None = None
        self.closed, self.lock = False, threading.Lock()
        self.image_shape = self.warm_up(1)

    def warm_up(self, batch_size: int, observe: Observer | None = None) -> tuple[int, ...]:
        """Sample a batch in four steps, so that no reported time is that of first calls.

        Returns the shape (H, W, C) of an image.
        """
        plain = SamplerSettings(num_steps=4, last_step=None, cfg_scale=2.0, cfg_interval=(0.3, 1.0))
        shared = dataclasses.replace(plain, recompute=[0, 1], forecast_order=1)
        for sampler in [shared, plain] if self.generator.model.shares_encoder else [plain]:
            generator = dataclasses.replace(self.generator, settings=sampler, observe=observe)
            with generator.exact():
                latents, _ = generator.latents([0] * batch_size, list(range(batch_size)))
                shape = generator.pixels(latents, None, None).shape[1:]
        self.warm.add(batch_size)
        return shape

    def close(self) -> None:
        """Interrupt requests, now and from now on; wait until no file is written."""
        self.closed = True
        with self.lock:
            pass

    def opening(self, report: Report, wanted: Callable[[], bool]) -> Result:
        """As `sample`, of the initial controls; sampled once."""
        if self.opened is None or not self.opened.sets[0].folder.exists():
            self.opened = self.sample(dataclasses.asdict(self.controls), report, wanted, keep=True)
        return self.opened

    def sample(self, values: dict[str, Any], report: Report, wanted: Callable[[], bool], keep: bool = False) -> Result:
        """Return the set of the controls' values, and the same without sharing for a comparison.

        keep: its files stay as long as the app. Raises UserError for wrong values, and Interrupted
        at the next step when `wanted` returns False; then no file is left.
        """
        requests = make_requests(values, self.stored, self.settings)
        with self.lock:  # a request that is interrupted may still be in its last step
            self.root.mkdir(parents=True, exist_ok=True)  # temporary folders are cleaned now and then
            folder = Path(tempfile.mkdtemp(prefix="set-", dir=self.root))
            try:
                sets = self._sample_sets(requests, folder, report, wanted)
            except BaseException:
                shutil.rmtree(folder, ignore_errors=True)
                raise
            if not keep:
                self.folders.append(folder)
            while len(self.folders) > MAX_KEPT:
                shutil.rmtree(self.folders.popleft(), ignore_errors=True)
            return self._compared(sets)

    def _sample_sets(
        self, requests: list[Request], folder: Path, report: Report, wanted: Callable[[], bool]
    ) -> list[SampledSet]:
        """Warm up for these batches, fit the schedule, sample, write the archives for download."""
        sampler, total, batch_size = requests[0].sampler, len(requests[0].images.seeds), self.settings.batch_size

        def check(step: int, t: float | Tensor, x_t: Tensor, v: Tensor) -> None:
            if self.closed or not wanted():
                raise Interrupted

        def observe(step: int, t: float | Tensor, x_t: Tensor, v: Tensor) -> None:
            check(step, t, x_t, v)
            report(next(done) / num_calls, text)

        for size in {min(total, batch_size), total % batch_size} - self.warm - {0}:
            self.warm_up(size, check)
        if sampler.parsed_recompute.kind == "dp" and str(sampler) not in self.fitted:
            report(0.0, "fitting the schedule to the model")
            self.fitted[str(sampler)] = self._fit(sampler, check)
        done = itertools.count(1)
        num_calls = len(requests) * -(-total // batch_size) * sum(map(len, sampler.call_times()))
        text = f"sampling {total} images" + (", with and without sharing" if len(requests) > 1 else "")
        sets = []
        for request, out in zip(requests, (folder, folder / "unshared"), strict=False):
            guided = request.sampler.cfg_scale != 1
            guide = self.generator.guide if guided else None
            generator = dataclasses.replace(self.generator, settings=request.sampler, observe=observe, guide=guide)
            sample_set(
                generator, request.images, batch_size, out, self.receipt, self.accelerator, png="all",
                guide=self.guide_receipt if guided else None, command=request.command,
                recompute_steps=self.fitted.get(str(request.sampler)),
            )  # fmt: skip
            sets.append(SampledSet(request, out, read_json(out / "receipt.json")))
        shutil.make_archive(str(folder / "images"), "zip", folder, "png")
        if len(sets) > 1:
            shutil.make_archive(str(folder / "unshared"), "zip", folder / "unshared")
        return sets

    def _fit(self, sampler: SamplerSettings, observe: Observer) -> list[int]:
        """Return the steps of a schedule fitted to a sampler."""
        own, budget = self.generator, sampler.parsed_recompute.number
        with own.autocast():
            fitted = fit_schedule(own.model, own.shape, sampler, budget, own.device, observe=observe)
        return fitted["recompute_steps"]

    def _compared(self, sets: list[SampledSet]) -> Result:
        """Return sets with their counted cost and, of two, the measured speedups."""
        sampler, (_, height, width) = sets[0].request.sampler, self.generator.shape
        resolved = dataclasses.replace(sampler, recompute=sets[0].receipt["recompute_steps"])
        macs = None
        if sets[0].receipt["request"]["guide"] is None:  # a guide is not counted
            shared, unshared = (
                sampling_macs(self.generator.model, height, width, each) for each in (resolved, sampler.unshared())
            )
            macs = shared, unshared
        speedups = self.speedups[str(sampler), sets[0].receipt["samples"]]
        if len(sets) > 1:
            speedups.append(sets[1].seconds / sets[0].seconds)
        return Result(sets, macs, list(speedups))
