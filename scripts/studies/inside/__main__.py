"""Look inside a trained model: z over time, predictions on the way to an image, the loss by t.

python scripts/studies/inside/__main__.py ckpt=RUN_OR_CHECKPOINT out=FOLDER [classes=[3,7]
seeds=0-3] [recompute=dp:10] [num_steps=…]
"""

import dataclasses
import functools
import hashlib
import logging
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from omegaconf import DictConfig

from ddt.autoencoder import Autoencoder
from ddt.checkpoint import folder as ckpt
from ddt.cli import CONF, arguments_for, checked, entry_point
from ddt.config import parse
from ddt.data.images import Images
from ddt.distributed.prepare import make_accelerator
from ddt.errors import UserError, collected, first_line, require
from ddt.files import check_writable, write_json
from ddt.generation.generator import Dtype, Generator
from ddt.generation.image_set import ImageSet, image_set
from ddt.generation.load import checkpoint_receipt, load_generator, stored_autoencoder
from ddt.generation.settings import SamplerOverrides
from ddt.model import network_class
from ddt.pictures import readable
from ddt.receipts import circumstances
from ddt.sampling.settings import SamplerSettings
from scripts.studies.inside.measure import (
    Similarity,
    distances,
    film,
    held_out,
    loss_by_t,
    shown_steps,
    similarity,
    walk,
    z_colours,
)
from scripts.studies.inside.report import draw_components, draw_film, draw_losses, draw_similarities, numbers

log = logging.getLogger(__name__)
Draw = Callable[[Path], None]
MOST_IMAGES = 16  # in a picture that a person looks at


def check(
    ckpt: str, out: str, columns: int, loss_images: int, batch_size: int, data_root: str, autoencoder: str,
    dtype: Dtype | None,
) -> None:  # fmt: skip
    """Refuse settings that cannot be, and a folder whose content would be written over."""
    for key, value in {"columns": columns, "loss_images": loss_images, "batch_size": batch_size}.items():
        require(value >= 1, f"{key}={value}: must be at least 1")
    folder = Path(out)
    require(not folder.exists() or folder.is_dir(), f"out={out}: is a file; give a folder")
    require(
        not folder.exists() or not any(folder.iterdir()),
        f"out={out}: holds files already and is not written over; choose another out=",
    )
    check_writable(folder)


def what_to_draw(config: dict[str, Any], stored: dict[str, Any]) -> tuple[SamplerSettings, ImageSet]:
    """Return sampler and images, as sample.py understands the same settings."""
    chosen = {key: config[key] for key in SamplerOverrides.__dataclass_fields__ if key in config}
    network = stored["network"]
    settings, images = collected(
        lambda: parse(SamplerOverrides, chosen).resolve(stored["sampler"], network_class(network).shares_encoder),
        lambda: image_set(network["num_classes"], classes=config["classes"], seeds=config["seeds"]),
    )
    require(
        settings.solver != "adaptive",
        "sampler=adaptive: chooses its own steps, at another t for each image; choose another sampler",
    )
    require(
        len(images.seeds) <= MOST_IMAGES,
        f"classes, seeds: make {len(images.seeds)} images; name at most {MOST_IMAGES}, as in classes=[3,7] seeds=0-3",
    )
    return settings, images


def find_images(stored: dict[str, Any], root: str, autoencoder: Autoencoder) -> tuple[Images | None, str]:
    """Return the held-out images of the run, or None and why not; raise UserError where a folder
    was named.
    """
    try:
        return held_out(stored, root, autoencoder), ""
    except UserError as error:
        reason = first_line(error).replace("data.root=", "data_root=")
        if root != "checkpoint":
            raise UserError(reason) from error
        return None, reason


def look_at_z(generator: Generator, ema_sha256: str) -> tuple[Similarity, dict[str, Any]]:
    """Return how alike z is between steps, and the numbers of it that are kept."""
    alike = similarity(generator, ema_sha256)
    for warning in alike.warnings:
        log.warning("%s", warning)
    return alike, {
        "schedules": alike.schedules,
        "chosen": alike.chosen,
        "similarity_to_z_in_use": {name: alike.kept(name) for name in alike.schedules},
        "similarity": numbers(alike.values),
    }


def look_at_sampling(
    generator: Generator, images: ImageSet, names: list[str], columns: int
) -> tuple[dict[str, Draw], dict[str, Any]]:
    """Return what is to be drawn of the way from noise to images, by picture, and the numbers
    behind it.
    """
    way = walk(generator, images)
    steps = shown_steps(len(way.times), columns)
    times = [way.times[step] for step in steps]
    pictures = film(generator, way, steps)
    shown = {"steps": steps, "times": times}
    found: dict[str, Any] = {
        "denoising": {
            **shown,
            "rms_to_sample": numbers(distances(way)),
            "samples_sha256": hashlib.sha256(pictures.samples.tobytes()).hexdigest(),
        }
    }
    draw: dict[str, Draw] = {"denoising": functools.partial(draw_film, pictures, times, names)}
    if generator.model.shares_encoder:
        colours, shares = z_colours(generator, way, images.classes, steps)
        found["z_pca"] = {**shown, "variance_shown": numbers(shares)}
        draw["z_pca"] = functools.partial(draw_components, colours, times, names, shares)
    return draw, found


@entry_point("visualize", CONF / "study")
def main(cfg: DictConfig) -> None:
    """Check, find the data, look, draw."""
    config = checked(cfg)
    values = arguments_for(check, config)
    check(**values)
    folder = ckpt.find_checkpoint(values["ckpt"])
    stored = ckpt.read_config(folder)
    settings, images = what_to_draw(config, stored)
    accelerator = make_accelerator("no")
    autoencoder = stored_autoencoder(stored, values["autoencoder"])
    data, why = find_images(stored, values["data_root"], autoencoder)
    generator = load_generator(folder, settings, autoencoder, accelerator.device, dtype=values["dtype"])
    left_out = {} if data is not None else {"loss_by_t": why}
    if not generator.model.shares_encoder:
        left_out |= dict.fromkeys(("similarity", "z_pca"), f"{type(generator.model).__name__} has no encoder, so no z")
    for name, reason in left_out.items():
        log.warning("%s.png is left out: %s", name, reason)

    draw: dict[str, Draw] = {}
    found: dict[str, Any] = {}
    if generator.model.shares_encoder:
        alike, found["similarity"] = look_at_z(generator, ckpt.weights_sha256(folder, "ema"))
        draw["similarity"] = functools.partial(draw_similarities, alike)
        generator = dataclasses.replace(generator, settings=dataclasses.replace(settings, recompute=alike.chosen))
    class_names = readable(stored["class_names"])
    names = [class_names[label] for label in images.classes]
    drawn, numbers_of = look_at_sampling(generator, images, names, values["columns"])
    draw, found = draw | drawn, found | numbers_of
    if data is not None:
        losses = loss_by_t(generator, data, accelerator, values["loss_images"], values["batch_size"])
        draw["loss_by_t"] = functools.partial(draw_losses, losses)
        spread = {"mean": numbers(losses.mean), "standard_error": numbers(losses.standard_error)}
        found["loss_by_t"] = {"images": len(losses.errors), "edges": losses.edges, **spread}

    out = Path(values["out"])
    out.mkdir(parents=True, exist_ok=True)
    for name, picture in draw.items():
        picture(out / f"{name}.png")
        log.info("%s", out / f"{name}.png")
    request = {
        "checkpoint": checkpoint_receipt(folder, "ema", generator),
        "sampler": settings.as_receipt(),
        "time_grid": settings.grid(),
        "dtype": generator.dtype,
        "classes": images.classes,
        "seeds": images.seeds,
    }
    origin = {"command": shlex.join(["python", *sys.argv]), **circumstances(accelerator.device)}
    write_json(out / "visualize.json", {"request": request, "left_out": left_out, **found, **origin})


if __name__ == "__main__":
    main()
