"""What is measured of the averaged weights while a run trains: validation loss, preview grid,
samples' metrics.
"""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

from accelerate import Accelerator

from ddt.autoencoder import Autoencoder
from ddt.data.images import Images
from ddt.model import Denoiser
from ddt.objective import FlowMatching
from ddt.sampling.settings import SamplerSettings
from ddt.training.evaluation import OnlineEvaluation
from ddt.training.monitoring import validation_loss, write_preview, write_training_images
from ddt.training.settings import TrainerSettings, metric_suffix
from ddt.training.tracking import JsonlTracker, read_rows

log = logging.getLogger(__name__)


def preview_path(run_dir: Path, step: int) -> Path:
    """Return where the preview grid of a step lies."""
    return run_dir / "previews" / f"step_{step:07d}.png"


def due(settings: TrainerSettings, held_out: Images, step: int) -> list[str]:
    """Return what is to be measured after a step."""
    periods = {
        "validation": settings.validate_every if len(held_out.labels) else 0,
        "preview": settings.preview_every,
        "evaluation": settings.eval_every,
    }
    return [name for name, every in periods.items() if settings.due(every, step)]


def missing(settings: TrainerSettings, held_out: Images, run_dir: Path, step: int) -> list[str]:
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
    return [name for name in due(settings, held_out, step) if not there[name]]


@contextlib.contextmanager
def picture_or_warning(path: Path) -> Iterator[None]:
    """Let a full disk cost a picture, not the run."""
    try:
        yield
    except OSError as error:
        log.warning("warning: %s: could not be written (%s)", path, error)


class Measurements:
    """Measures what is due. Made and called on all processes; process 0 writes.

    shape: (C, H, W) of a latent. batch_size: images a process takes at once. evaluation: None where
    there is none.
    """

    def __init__(
        self,
        run_dir: Path,
        objective: FlowMatching,
        autoencoder: Autoencoder,
        held_out: Images,
        sampler: SamplerSettings,
        shape: tuple[int, int, int],
        batch_size: int,
        evaluation: OnlineEvaluation | None,
        accelerator: Accelerator,
    ) -> None:
        self.run_dir, self.objective, self.autoencoder, self.held_out = run_dir, objective, autoencoder, held_out
        self.sampler, self.shape, self.batch_size = sampler, shape, batch_size
        self.evaluation, self.accelerator = evaluation, accelerator

    def show(self, images: Images, tracker: JsonlTracker) -> None:
        """Write a picture of what is trained on. Process 0 alone calls it, before the first step."""
        path = self.run_dir / "previews" / "training_images.png"
        with picture_or_warning(path):
            write_training_images(path, images, self.autoencoder, self.accelerator, self.shape)
            tracker.image(0, "training_images", path)
            log.info("what is trained on: %s", path)

    def __call__(self, names: list[str], network: Denoiser, step: int, tracker: JsonlTracker | None) -> None:
        """Measure what `names` say of the averaged weights. All processes call it together."""
        if "validation" in names:
            loss = validation_loss(
                network, self.objective.time_distribution, self.held_out, self.autoencoder, self.accelerator,
                self.shape, self.batch_size,
            )  # fmt: skip
            if tracker is not None:
                tracker.log(step, {"validation_loss": loss})
        if "preview" in names and tracker is not None:
            path = preview_path(self.run_dir, step)
            first = not any(path.parent.glob("step_*.png"))
            with picture_or_warning(path):
                write_preview(path, network, self.autoencoder, self.accelerator, self.shape, self.sampler)
                tracker.image(step, "preview", path)
                if first:
                    log.info("first samples: %s", path)
        if "evaluation" in names and self.evaluation is not None:
            found = self.evaluation(network, step)
            if tracker is not None:
                tracker.log(step, found)
