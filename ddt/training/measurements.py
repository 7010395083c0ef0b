"""What is measured of the EMA weights while a run trains: validation loss, preview grid, samples'
metrics.

Shapes: B batch, C H W latent.
"""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from accelerate import Accelerator

from ddt.autoencoder import Autoencoder
from ddt.class_names import readable
from ddt.data.images import Images
from ddt.data.source import spread
from ddt.data.stream import validation_batch
from ddt.draws import Stream, random_generator
from ddt.generation.generator import check_finite
from ddt.model import Denoiser
from ddt.objective import Objective
from ddt.pictures import image_grid, write_png
from ddt.precision import autocast
from ddt.sampling.sample import sample_latents
from ddt.sampling.settings import SamplerSettings
from ddt.training.evaluation import OnlineEvaluation
from ddt.training.latents import to_latents
from ddt.training.settings import TrainerSettings, metric_suffix
from ddt.training.tracking import JsonlTracker, read_rows

if TYPE_CHECKING:
    from ddt.training.run import Run

log = logging.getLogger(__name__)
MAX_VALIDATION_IMAGES = 2048


def preview_path(run_dir: Path, step: int) -> Path:
    """Return where the preview grid of a step lies."""
    return run_dir / "previews" / f"step_{step:07d}.png"


def due_measurements(settings: TrainerSettings, held_out: Images, step: int) -> list[str]:
    """Return what is to be measured after a step."""
    periods = {
        "validation": settings.validate_every if len(held_out.labels) else 0,
        "preview": settings.preview_every,
        "evaluation": settings.eval_every,
    }
    return [name for name, every in periods.items() if settings.due(every, step)]


def missing_measurements(settings: TrainerSettings, held_out: Images, run_dir: Path, step: int) -> list[str]:
    """Return what was to be measured after a step and is not on record: a run may be killed between
    its checkpoint and its measurements.
    """
    if not 0 < step <= settings.max_steps:
        return []
    path = run_dir / "metrics.jsonl"
    known = {key for row in read_rows(path) if row["step"] == step for key in row} if path.is_file() else set()
    there = {
        "validation": "validation_loss" in known,
        "preview": preview_path(run_dir, step).is_file(),
        "evaluation": any(key.endswith(metric_suffix(settings.eval_samples)) for key in known),
    }
    return [name for name in due_measurements(settings, held_out, step) if not there[name]]


@contextlib.contextmanager
def picture_or_warning(path: Path) -> Iterator[None]:
    """Let a full disk and non-finite latents cost an image grid, not the run."""
    try:
        yield
    except (OSError, FloatingPointError) as error:
        log.warning("warning: %s: is not written (%s)", path, error)


class Measurements:
    """Measures what is due. Made and called on all processes; process 0 writes.

    batch_size: images that a process takes at once. evaluation: None where there is none.
    """

    def __init__(
        self, run: "Run", batch_size: int, evaluation: OnlineEvaluation | None, accelerator: Accelerator
    ) -> None:
        self.run, self.batch_size, self.evaluation, self.accelerator = run, batch_size, evaluation, accelerator
        self.run_dir = run.settings.run_dir

    def show_training_images(self, images: Images, tracker: JsonlTracker) -> None:
        """Write a grid of training images, on process 0 alone, before the first step."""
        path = self.run_dir / "previews" / "training_images.png"
        with picture_or_warning(path):
            write_training_images(path, images, self.run.autoencoder, self.accelerator.device, self.run.latent_shape)
            tracker.image(0, "training_images", path)
            log.info("training images: %s", path)

    def __call__(self, names: list[str], network: Denoiser, step: int, tracker: JsonlTracker | None) -> None:
        """Measure what `names` say of the EMA weights, in the run's precision. All processes call
        it together.
        """
        run, device, dtype = self.run, self.accelerator.device, self.run.settings.trainer.mixed_precision
        if "validation" in names:
            with autocast(device, dtype):
                loss = validation_loss(
                    run.objective.for_validation(network), run.held_out, run.autoencoder, self.accelerator,
                    run.latent_shape, self.batch_size,
                )  # fmt: skip
            if tracker is not None:
                tracker.log(step, {"validation_loss": loss})
                log.info("step %d: validation loss %.4f", step, loss)
        if "preview" in names and tracker is not None:
            path = preview_path(self.run_dir, step)
            first = not any(path.parent.glob("step_*.png"))
            with picture_or_warning(path), autocast(device, dtype):
                classes = readable(run.images.class_names)
                write_preview(path, network, run.autoencoder, device, run.latent_shape, run.settings.sampler, classes)
                tracker.image(step, "preview", path)
                if first:
                    log.info("first samples: %s", path)
        if "evaluation" in names and self.evaluation is not None:
            metrics = self.evaluation(network, step)
            if tracker is not None:
                tracker.log(step, metrics)
                log.info("step %d: %s", step, ", ".join(f"{name} {value:.4g}" for name, value in metrics.items()))


@torch.no_grad()
def validation_loss(
    objective: Objective,
    images: Images,
    autoencoder: Autoencoder,
    accelerator: Accelerator,
    shape: tuple[int, int, int],
    batch_size: int,
) -> float:
    """Return the mean error of an objective (`Objective.for_validation`) on held-out images at
    fixed times and noise. Source: method.md 1.

    At most 2,048 images, evenly spread over the split, keep their labels. `shape` is (C, H, W) of a
    latent; `batch_size` does not change the result. All processes call it together, each takes its
    share, all get the mean.
    """
    chosen = spread(len(images.labels), MAX_VALIDATION_IMAGES)
    mine = chosen[accelerator.process_index :: accelerator.num_processes]
    total = torch.zeros((), device=accelerator.device, dtype=torch.float64)
    for start in range(0, len(mine), batch_size):
        indices = mine[start : start + batch_size]
        batch = to_latents(validation_batch(images, shape, indices), autoencoder, accelerator.device)
        errors = objective(**batch)["errors"]
        total += errors.double().sum()
    return accelerator.reduce(total, reduction="sum").item() / len(chosen)


@torch.no_grad()
def write_training_images(
    path: Path,
    images: Images,
    autoencoder: Autoencoder,
    device: torch.device,
    shape: tuple[int, int, int],
) -> None:
    """Draw training images as they come back from the autoencoder to `path`: what the network is to
    learn, four of each of the first ten classes, a class per column.

    `shape` is (C, H, W) of a latent. One process alone calls it.
    """
    of_class = [np.flatnonzero(images.labels == label)[:4] for label in np.unique(images.labels)[:10]]
    chosen = np.stack([np.resize(numbers, 4) for numbers in of_class], axis=1).ravel()  # row by row
    batch = to_latents(validation_batch(images, shape, chosen), autoencoder, device)
    check_finite(batch["latents"], advice="an autoencoder in float32")
    pictures = autoencoder.decode(batch["latents"])
    names = readable(images.class_names)
    write_png(path, image_grid(pictures.cpu(), len(of_class), [names[y] for y in batch["y"].tolist()]))


@torch.no_grad()
def write_preview(
    path: Path,
    model: Denoiser,
    autoencoder: Autoencoder,
    device: torch.device,
    shape: tuple[int, int, int],
    sampler: SamplerSettings,
    names: list[str],
) -> None:
    """Draw a grid of a network's samples to `path`: up to ten classes across, four seeds down,
    always the same noise, each with the name of its class.

    `shape` is (C, H, W) of a latent; `sampler` says how. One process alone calls it. Raises
    FloatingPointError for non-finite samples, which would be a constant picture.
    """
    columns = min(model.num_classes, 10)
    noise = np.stack(
        [random_generator(0, Stream.PREVIEW, k).standard_normal(shape, dtype=np.float32) for k in range(4 * columns)]
    )
    y = torch.arange(columns, device=device).repeat(4)
    latents = sample_latents(model, torch.from_numpy(noise).to(device), y, sampler)
    check_finite(latents, advice="a smaller optimizer.lr if the losses are large, too")
    images = autoencoder.decode(latents)
    write_png(path, image_grid(images.cpu(), columns, [names[k] for k in y.tolist()]))
