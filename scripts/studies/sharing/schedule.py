"""A schedule fitted to a checkpoint, written with a figure."""

import logging
from pathlib import Path

import numpy as np

from ddt.checkpoint import format as ckpt
from ddt.distributed.prepare import make_accelerator
from ddt.errors import require
from ddt.figures import pyplot, save_figure
from ddt.precision import autocast, choose_dtype
from ddt.receipts import circumstances
from ddt.sampling.fitting import fit_schedule
from ddt.sampling.schedules import write_schedule
from scripts.studies.sharing.settings import FitSettings
from scripts.studies.study import draw_similarity, unshared_sampler

log = logging.getLogger(__name__)


def fit(settings: FitSettings) -> None:
    """Fit the schedule, and write it with a figure of the similarities."""
    folder, stored, sampler = unshared_sampler(settings, settings.ckpt)
    num_steps, out = sampler.num_steps, Path(settings.out)
    require(settings.budget <= num_steps, f"budget={settings.budget}: must lie in 1..num_steps={num_steps}")
    device = make_accelerator().device
    dtype = choose_dtype(settings.dtype, device)
    model = ckpt.load_model(folder).to(device)
    with autocast(device, dtype):
        content = fit_schedule(
            model, tuple(stored["latent_shape"]), sampler, settings.budget, device, settings.templates,
            settings.batch_size,
        )  # fmt: skip
    similarity, steps = content.pop("similarity"), content["recompute_steps"]
    out.parent.mkdir(parents=True, exist_ok=True)
    figure, axes = pyplot().subplots(figsize=(5.5, 4.6))
    image = draw_similarity(axes, np.array(similarity), steps)
    axes.set_title(f"the encoder runs at {len(steps)} of {num_steps} steps")
    figure.colorbar(image, ax=axes, label="cosine similarity of z")
    save_figure(figure, out.with_suffix(".png"))
    origin = {"ema_sha256": ckpt.weights_sha256(folder, "ema"), "dtype": dtype, **circumstances(device)}
    write_schedule(out, {**content, **origin, "similarity": similarity})
    log.info("the encoder runs at %d of %d steps: %s", len(steps), num_steps, ", ".join(map(str, steps)))
    log.info("%s, %s", out, out.with_suffix(".png"))
