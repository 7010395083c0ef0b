"""Measure inside sampling and loss: z over time, predictions over time, the loss by t.

Shapes: T steps, K of them shown, B images, C H W latent, N = h·w tokens, D width.
"""

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from ddt.autoencoder import Autoencoder
from ddt.config import stored_choice
from ddt.data.images import Images
from ddt.data.source import spread
from ddt.data.stream import validation_batch
from ddt.draws import golden_sequence
from ddt.errors import UserError, require
from ddt.flow import clean
from ddt.generation.generator import Generator, check_finite
from ddt.generation.image_set import ImageSet
from ddt.logs import progress_bar
from ddt.objective import Objective
from ddt.sampling.fitting import fit_schedule, resolve_recompute
from ddt.sampling.schedules import uniform_schedule
from ddt.training.latents import to_latents
from ddt.training.meter import T_BINS

EDGES = [k / T_BINS for k in range(T_BINS + 1)]  # of the bins of t
COLOURS = 3  # principal components in a picture
USUAL_SHARE = 5  # steps per run of the encoder where none is set: the paper's ratio 0.80


# --- sampling


@dataclasses.dataclass(frozen=True)
class Trajectory:
    """A sampling trajectory, float32 on the CPU.

    times: T floats. x_t, v: (T, B, C, H, W), at the start of each step, v guided. latents: (B, C,
    H, W), the samples.
    """

    times: list[float]
    x_t: Tensor
    v: Tensor
    latents: Tensor


def walk(generator: Generator, images: ImageSet) -> Trajectory:
    """Sample images as `sample.py` does, in one batch; FloatingPointError for non-finite ones."""
    times: list[float] = []
    x: list[Tensor] = []
    velocities: list[Tensor] = []

    def record(step: int, t: float | Tensor, x_t: Tensor, v: Tensor) -> None:
        if len(x) == step:  # the first call of this step
            assert not isinstance(t, Tensor), "the solver has a grid"
            times.append(t)
            x.append(x_t.cpu())
            velocities.append(v.cpu())
            progress.update()

    with (
        progress_bar(total=generator.settings.num_steps, unit="step", desc="sampling") as progress,
        generator.exact(),
    ):
        latents, _ = dataclasses.replace(generator, observe=record).latents(images.classes, images.seeds)
    check_finite(latents)
    return Trajectory(times, torch.stack(x), torch.stack(velocities), latents.cpu())


def shown_steps(num_steps: int, columns: int) -> list[int]:
    """Return up to `columns` steps, evenly spread from the first to the last."""
    return sorted({round(step) for step in np.linspace(0, num_steps - 1, columns)})


@dataclasses.dataclass(frozen=True)
class Film:
    """uint8 images: predicted clean ones and x_t (K, B, H, W, C), and samples (B, H, W, C)."""

    predicted: np.ndarray
    noisy: np.ndarray
    samples: np.ndarray


def decode_film(generator: Generator, path: Trajectory, steps: list[int]) -> Film:
    """Decode prediction and x_t at K steps, and the samples."""

    def pixels(latents: Tensor) -> np.ndarray:
        with generator.exact():
            return generator.pixels(latents.to(generator.device), None, None)

    return Film(
        np.stack([pixels(clean(path.v[step], path.x_t[step], path.times[step])) for step in steps]),
        np.stack([pixels(path.x_t[step]) for step in steps]),
        pixels(path.latents),
    )


def distances(path: Trajectory) -> list[float]:
    """Return for each of the T steps the rms between predicted clean latents and samples."""
    steps = zip(path.v, path.x_t, path.times, strict=True)
    return [(clean(v, x_t, t) - path.latents).square().mean().sqrt().item() for v, x_t, t in steps]


# --- z


def principal_components(batches: Iterable[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean (D,), three principal components (3, D) and all variances (D,), float64.

    batches: of vectors (n, D). Variances fall; the largest entry of each component is positive.
    """
    count, total, outer = 0, torch.zeros(()), torch.zeros(())
    for batch in batches:
        vectors = batch.double()
        count, total, outer = count + len(vectors), total + vectors.sum(0), outer + vectors.T @ vectors
    mean = total / count
    variances, vectors = torch.linalg.eigh(outer / count - mean[:, None] * mean)  # the smallest first
    components = vectors.T.flip(0)[:COLOURS]
    largest = components.gather(1, components.abs().argmax(1, keepdim=True))
    return mean, components * largest.sign(), variances.flip(0).clamp(min=0)


@torch.no_grad()
def z_colours(generator: Generator, path: Trajectory, y: list[int], steps: list[int]) -> tuple[np.ndarray, list[float]]:
    """Return z at K steps as RGB (K, B, h, w, 3) in [0, 1], and each colour's variance share.

    z is the encoder's at (x_t, t, y), whether sampling shared z or not. Colours are its principal
    components over all T steps, images and tokens, each from −2 to 2 standard deviations.
    """
    model, device = generator.model, generator.device
    labels = torch.tensor(y, device=device)

    def encode(step: int) -> Tensor:
        t = torch.full((len(y),), path.times[step], device=device)
        with generator.autocast():
            return model.encode(path.x_t[step].to(device), t, labels).float()  # (B, N, D)

    count = len(path.times)
    with progress_bar(iterable=range(count), unit="step", desc="components of z") as progress:
        mean, components, variances = principal_components(encode(step).flatten(0, 1) for step in progress)
    projected = torch.stack([(encode(step).double() - mean) @ components.T for step in steps])  # (K, B, N, 3)
    at = model.encoder.positions(path.x_t[0])
    height, width = at.height, at.width
    spread = variances[:COLOURS].sqrt().clamp(min=torch.finfo(torch.float64).tiny)
    colours = (0.5 + projected / (4 * spread)).clamp(0, 1)
    colours = colours[:, :, -height * width :].unflatten(2, (height, width))  # without a class token
    return colours.cpu().numpy(), (variances[:COLOURS] / variances.sum()).tolist()


@dataclasses.dataclass(frozen=True)
class Similarity:
    """The similarity of z between steps, (T, T) of `fitting.z_similarity`, and schedules.

    schedules: steps at which the encoder runs, by name. chosen: the sampler's, None without
    sharing. warnings: of the sampler's schedule file.
    """

    values: np.ndarray
    schedules: dict[str, list[int]]
    chosen: list[int] | None
    warnings: list[str]

    def to_z_in_use(self, name: str) -> float:
        """Return the mean similarity over all steps of z and the z that a schedule uses instead."""
        steps = self.schedules[name]
        ends = [*steps[1:], len(self.values)]
        return float(np.mean([self.values[a, s] for a, b in zip(steps, ends, strict=True) for s in range(a, b)]))


def measure_similarity(generator: Generator, ema_sha256: str) -> Similarity:
    """Return the similarity of z in the templates' unshared sampling, and schedules over it.

    These are the sampler's, and a uniform and a fitted one of as many encoder runs; of a fifth of
    the steps where the sampler shares nothing.
    """
    model, shape, settings, device = generator.model, generator.shape, generator.settings, generator.device
    steps, recompute = settings.num_steps, settings.parsed_recompute
    chosen: Any = None
    warnings: list[str] = []
    if recompute.kind == "dp":
        budget = recompute.number
    else:
        resolved, warnings = resolve_recompute(model, shape, settings, device, ema_sha256)
        chosen = resolved.recompute
        budget = math.ceil(steps / USUAL_SHARE) if chosen is None else len(chosen)
    with generator.autocast():
        content = fit_schedule(model, shape, settings, budget, device)  # of unshared sampling
    if recompute.kind == "dp":
        chosen = content["recompute_steps"]
    every = math.ceil(steps / budget)
    schedules = {f"uniform:{every}": uniform_schedule(steps, every), f"dp:{budget}": content["recompute_steps"]}
    if chosen is not None and chosen not in schedules.values():
        schedules["as given"] = chosen
    return Similarity(np.array(content["similarity"]), schedules, chosen, warnings)


# --- the loss


def find_images(stored: dict[str, Any], root: str, autoencoder: Autoencoder) -> Images:
    """Return the held-out images of a checkpoint's run. root: "checkpoint", or their folder now.

    Raises UserError without data in the checkpoint or on disk, for data of another fingerprint or
    autoencoder, and where no image was held out.
    """
    run = stored.get("run")
    if run is None:
        raise UserError("the checkpoint was not trained here and names no data")
    data = dict(run["data"])
    fingerprint = data.pop("fingerprint")
    if root != "checkpoint":
        require("root" in data, f"data.root={root}: this run's data have no folder; leave it out")
        data["root"] = root
    chosen = stored_choice(data, Images, "data", late="split")
    train, test = (chosen.build(split=split) for split in ("train", "test"))
    require(
        train.fingerprint == fingerprint,
        f"data.root={data.get('root')}: holds other images than the run was trained on; give data.root=FOLDER",
    )
    test.check_autoencoder(autoencoder)
    test.check_contents(aligned=False, pixels=False)
    require(len(test.labels) > 0, "the run held no images out (data.holdout_every=0)")
    return test


def standard_error(errors: np.ndarray) -> np.ndarray:
    """Return the standard error of the mean over images, (10,) of (n, 10); 0 of a single image."""
    count = len(errors)
    return errors.std(axis=0, ddof=1) / math.sqrt(count) if count > 1 else np.zeros(errors.shape[1])


@torch.no_grad()
def loss_by_t(
    generator: Generator, objective: Objective, images: Images, accelerator: Accelerator, count: int, batch_size: int
) -> np.ndarray:
    """Return the losses (n, 10) in ten bins of t of n ≤ `count` images, evenly spread over all.

    objective: the run's, for validation. An image's noise is that of the validation loss and the
    same in all bins; its time within a bin follows a golden-ratio sequence.
    """
    chosen = spread(len(images.labels), count)
    count = len(chosen)
    within = golden_sequence(np.arange(count))
    errors = np.empty((count, T_BINS))
    with progress_bar(total=count, unit="img", desc="loss by t") as progress:
        for start in range(0, count, batch_size):
            rows = slice(start, start + batch_size)
            batch = to_latents(
                validation_batch(images, generator.shape, chosen[rows]), generator.autoencoder, accelerator.device
            )
            for k in range(T_BINS):
                t = torch.from_numpy((k + within[rows]) / T_BINS)
                batch["time_normal"] = objective.time_normal(t).float().to(accelerator.device)
                with generator.autocast():
                    errors[rows, k] = objective(**batch)["errors"].cpu().numpy()
            progress.update(len(chosen[rows]))
    return errors
