"""Look inside a model: settings, measurements, files."""

import dataclasses
import functools
import hashlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ddt.checkpoint import format as ckpt
from ddt.class_names import readable
from ddt.config import stored_choice
from ddt.distributed.prepare import make_accelerator
from ddt.errors import UserError, first_line
from ddt.files import atomic_folder
from ddt.generation.load import checkpoint_receipt, load_generator, stored_autoencoder
from ddt.objective import Objective
from scripts.studies.inside import report
from scripts.studies.inside.measure import (
    EDGES,
    decode_film,
    distances,
    find_images,
    loss_by_t,
    measure_similarity,
    shown_steps,
    standard_error,
    walk,
    z_colours,
)
from scripts.studies.inside.settings import InsideSettings
from scripts.studies.study import write_numbers

log = logging.getLogger(__name__)


def look_inside(settings: InsideSettings) -> None:
    """Measure, and write the figures and inside.json; what the checkpoint lacks is left out."""
    folder = ckpt.find_checkpoint(settings.ckpt)
    stored = ckpt.read_config(folder)
    sampler, images = settings.sampler_and_images(stored)
    accelerator = make_accelerator()
    autoencoder = stored_autoencoder(stored, settings.autoencoder)
    left_out: dict[str, str] = {}
    data = None
    try:
        data = find_images(stored, settings.data_root, autoencoder)
        chosen = stored_choice(stored["run"].get("objective"), Objective, "run.objective", late="denoiser")
    except UserError as error:
        left_out["loss_by_t"] = first_line(error).replace("data.root=", "data_root=")
        if settings.data_root != "checkpoint":
            raise UserError(left_out["loss_by_t"]) from error
    generator = load_generator(folder, sampler, autoencoder, accelerator.device, dtype=settings.dtype)
    model = generator.model
    if not model.shares_encoder:
        left_out |= dict.fromkeys(("similarity", "z_pca"), f"{type(model).__name__} has no encoder, so no z")
    for name, reason in left_out.items():
        log.warning("%s.png is left out: %s", name, reason)

    figures: dict[str, Callable[[Path], None]] = {}  # by name
    results: dict[str, Any] = {}
    if model.shares_encoder:
        z = measure_similarity(generator, ckpt.weights_sha256(folder, "ema"))
        for warning in z.warnings:
            log.warning("%s", warning)
        results["similarity"] = {
            "schedules": z.schedules,
            "chosen": z.chosen,
            "similarity_to_z_in_use": {name: z.to_z_in_use(name) for name in z.schedules},
            "similarity": report.numbers(z.values),
        }
        figures["similarity.png"] = functools.partial(report.draw_similarities, z)
        generator = dataclasses.replace(generator, settings=dataclasses.replace(sampler, recompute=z.chosen))
    path = walk(generator, images)
    steps = shown_steps(len(path.times), settings.columns)
    times = [path.times[step] for step in steps]
    class_names = readable(stored["class_names"])
    names = [class_names[label] for label in images.classes]
    film = decode_film(generator, path, steps)
    results["denoising"] = {
        "steps": steps,
        "times": times,
        "rms_to_sample": report.numbers(distances(path)),
        "samples_sha256": hashlib.sha256(film.samples.tobytes()).hexdigest(),
    }
    figures["denoising.png"] = functools.partial(report.draw_film, film, times, names)
    if settings.frames:
        moving = decode_film(generator, path, shown_steps(len(path.times), settings.frames))
        figures["sampling.gif"] = functools.partial(report.write_animation, moving)
    if model.shares_encoder:
        colours, shares = z_colours(generator, path, images.classes, steps)
        results["z_pca"] = {"steps": steps, "times": times, "variance_shown": report.numbers(shares)}
        figures["z_pca.png"] = functools.partial(report.draw_components, colours, times, names, shares)
    if data is not None:
        objective = chosen.build(denoiser=model).for_validation(model)
        errors = loss_by_t(generator, objective, data, accelerator, settings.loss_images, settings.batch_size)
        results["loss_by_t"] = {
            "images": len(errors),
            "edges": EDGES,
            "mean": report.numbers(errors.mean(0)),
            "standard_error": report.numbers(standard_error(errors)),
        }
        figures["loss_by_t.png"] = functools.partial(report.draw_losses, errors)

    request = {
        "checkpoint": checkpoint_receipt(folder, "ema", autoencoder),
        "sampler": sampler.as_receipt(),
        "time_grid": sampler.grid(),
        "dtype": generator.dtype,
        "classes": images.classes,
        "seeds": images.seeds,
    }
    out = Path(settings.out)
    with atomic_folder(out) as folder:
        for name, draw in figures.items():
            draw(folder / name)
        write_numbers(folder / "inside.json", {"request": request, "left_out": left_out, **results}, accelerator.device)
    for name in figures:
        log.info("%s", out / name)
