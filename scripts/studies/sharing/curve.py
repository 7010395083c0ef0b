"""Quality against speed of shared sampling: every rule at every budget, on the same noise as the
run without sharing.

Shapes: n images of a point, B batch, C H W latent.
"""

import dataclasses
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ddt.generation.generator import Generator
from ddt.generation.image_set import ImageSet, image_set
from ddt.metrics.comparability import title
from ddt.metrics.features import Extractor, to_device
from ddt.metrics.frechet import Moments
from ddt.metrics.scores import Prepared
from ddt.sampling.cost import sampling_macs
from ddt.sampling.settings import SamplerSettings
from ddt.training.tracking import read_rows
from scripts.studies.sharing.rules import Schedules, parse_rule

UNSHARED = "unshared"
KEPT = ".unshared"  # folder of the images that the others are compared with


@dataclasses.dataclass(frozen=True)
class Point:
    """One set to be drawn: a rule at a budget (`UNSHARED` at num_steps), with the noise of one
    repeat.
    """

    rule: str
    budget: int
    repeat: int


class Curve:
    """The points of a curve, drawn one after the other and kept in `out/points.jsonl`.

    Args:
        generator: of images, without sharing. schedules: see `sharing_rules.schedules_of`.
        extractor, prepared: features and reference of the Fréchet distance.
        repeats, num_samples, batch_size: repeat r draws num_samples images of seed r.
        out: holds points.jsonl, and of each repeat the images without sharing.
    """

    def __init__(
        self,
        generator: Generator,
        schedules: Schedules,
        rules: list[str],
        extractor: Extractor,
        prepared: Prepared,
        repeats: int,
        num_samples: int,
        batch_size: int,
        out: Path,
    ) -> None:
        self.generator, self.schedules, self.rules = generator, schedules, rules
        self.extractor, self.prepared = extractor, prepared
        self.repeats, self.num_samples, self.batch_size = repeats, num_samples, batch_size
        self.out = out
        self.budgets = sorted({int(b) for kind in schedules.values() for b in kind}, reverse=True)

    @property
    def distance_name(self) -> str:
        """What people call the distance."""
        return title(next(iter(self.extractor.distances)))

    def points(self) -> Iterator[Point]:
        """Yield all points, repeat by repeat, each repeat's without sharing first."""
        for repeat in range(self.repeats):
            yield Point(UNSHARED, self.generator.settings.num_steps, repeat)
            yield from (Point(rule, budget, repeat) for rule in self.rules for budget in self.budgets)

    def settings(self, rule: str, budget: int) -> SamplerSettings:
        """Return the sampler of a rule at a budget."""
        if rule == UNSHARED:
            return self.generator.settings
        kind, order = parse_rule(rule)
        steps = self.schedules[kind][str(budget)]
        return dataclasses.replace(self.generator.settings, recompute=steps, forecast_order=order)

    def bound(self, rule: str, budget: int) -> float:
        """Return how many times fewer MACs a rule takes at a budget than sampling without sharing."""
        model, (_, height, width) = self.generator.model, self.generator.shape
        unshared, own = (
            sampling_macs(model, height, width, settings)
            for settings in (self.generator.settings, self.settings(rule, budget))
        )
        return unshared / own

    def images(self, repeat: int) -> ImageSet:
        """Return the images of a repeat: classes in turns, the noise of seed `repeat`."""
        return image_set(self.generator.model.num_classes, self.num_samples, seed=repeat)

    def run(self) -> list[dict[str, Any]]:
        """Draw the points that are missing and return the rows of all."""
        path = self.out / "points.jsonl"
        rows = read_rows(path, key="rule") if path.exists() else []
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(f"{json.dumps(row)}\n" for row in rows))  # without a line that a kill cut short
        temporary.replace(path)
        found = {Point(row["rule"], row["budget"], row["repeat"]): row for row in rows}
        points = list(self.points())
        left = [point for point in points if point not in found]
        total, done = (number * self.num_samples for number in (len(points), len(points) - len(left)))
        bar = tqdm(total=total, initial=done, unit="img", desc="curve", mininterval=1.0)
        with path.open("a") as file, bar, self.generator.exact():
            if left:
                self.warm_up()
            for point in left:
                if point.rule != UNSHARED and not self.kept(point.repeat).is_file():
                    self.draw(Point(UNSHARED, self.generator.settings.num_steps, point.repeat), None)
                row = {**dataclasses.asdict(point), **self.draw(point, bar)}
                file.write(json.dumps(row) + "\n")
                file.flush()
                found[point] = row
        return [found[point] for point in points]

    def warm_up(self) -> None:
        """Draw one batch in two steps: the first calls allocate and choose their kernels."""
        images = self.images(0)
        short = SamplerSettings(num_steps=2, last_step=None)
        generator = dataclasses.replace(self.generator, settings=short)
        latents, _ = generator.latents(images.classes[: self.batch_size], images.seeds[: self.batch_size])
        generator.pixels(latents, None, None)

    def kept(self, repeat: int) -> Path:
        """Return the file of the latents without sharing; their images lie beside it."""
        return self.out / KEPT / f"latents_{repeat}.npy"

    def draw(self, point: Point, bar: tqdm | None) -> dict[str, Any]:
        """Draw the images of a point; return its measurements. Those without sharing are kept, as
        `kept` says.
        """
        settings, images = self.settings(point.rule, point.budget), self.images(point.repeat)
        generator = dataclasses.replace(self.generator, settings=settings)
        kept = self.kept(point.repeat)
        comparison = Comparison(kept, self.num_samples, new=point.rule == UNSHARED)
        space = next(iter(self.extractor.distances.values()))
        moments, seconds = Moments(self.extractor.spaces[space], self.generator.device), 0.0
        for start in range(0, self.num_samples, self.batch_size):
            chosen = slice(start, min(start + self.batch_size, self.num_samples))
            began = time.perf_counter()
            latents, _ = generator.latents(images.classes[chosen], images.seeds[chosen])
            pixels = generator.pixels(latents, None, None)  # on the CPU, so all work is done
            seconds += time.perf_counter() - began
            comparison.add(chosen, latents.cpu().numpy(), pixels)
            for part in np.split(pixels, range(self.extractor.batch_size, len(pixels), self.extractor.batch_size)):
                moments.add(self.extractor(to_device(part, self.generator.device))[space])
            if bar is not None:
                bar.update(len(pixels))
        return {
            "frechet_distance": self.prepared.main_distance(moments),
            **comparison.finish(),
            "images_per_second": self.num_samples / seconds,
        }


class Comparison:
    """Root mean square differences to the images without sharing, which the `new` one writes:
    latents to `path`, pixels beside it.
    """

    def __init__(self, path: Path, count: int, new: bool) -> None:
        self.path, self.count, self.new = path, count, new
        self.files = {"latents": path, "pixels": path.with_name(path.name.replace("latents", "pixels"))}
        self.arrays: dict[str, np.ndarray] = {}
        self.squares = dict.fromkeys(self.files, 0.0)
        self.values = dict.fromkeys(self.files, 0)

    def add(self, chosen: slice, latents: np.ndarray, pixels: np.ndarray) -> None:
        """Keep, or compare, the float32 latents (B, C, H, W) and uint8 pixels (B, H, W, C) of some
        images.
        """
        for name, values in (("latents", latents), ("pixels", pixels)):
            if name not in self.arrays:
                file, shape = self.files[name], (self.count, *values.shape[1:])
                self.arrays[name] = (
                    np.lib.format.open_memmap(file.with_suffix(".tmp"), "w+", values.dtype, shape)
                    if self.new
                    else np.load(file, mmap_mode="r")
                )
            if self.new:
                self.arrays[name][chosen] = values
            difference = values.astype(np.float64) - self.arrays[name][chosen]
            self.squares[name] += float((difference**2).sum())
            self.values[name] += difference.size

    def finish(self) -> dict[str, float]:
        """Return the differences over all values: of pixels in [0, 1], and of latents."""
        self.arrays.clear()  # what is new goes to disk
        for name in ("pixels", "latents") if self.new else ():
            self.files[name].with_suffix(".tmp").replace(self.files[name])
        rms = {name: (self.squares[name] / self.values[name]) ** 0.5 for name in self.files}
        return {"pixels_rms": rms["pixels"] / 255, "latents_rms": rms["latents"]}
