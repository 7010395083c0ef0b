"""Tell what a recipe costs before anyone starts it: parameters, FLOPs, memory, time, disk.

python scripts/estimate.py model=xl_22en6de data=in256 [gpus=8] [device=H100 share=0.4]
[measured=FILE] [key=value …]
"""

import logging
import math
import shlex
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from ddt.autoencoder import Identity
from ddt.autoencoder.diffusers import DiffusersAutoencoder
from ddt.cli import arguments_for, checked, entry_point
from ddt.config import build, locate
from ddt.data.photos import PHOTOS
from ddt.errors import UserError, require
from ddt.files import write_json
from ddt.model import Denoiser
from ddt.model.cost import num_tokens
from ddt.objective.alignment import REPA, AlignmentLoss, Dispersive, DispersiveLoss, Target, check_depth
from ddt.training.estimate import Rate, Recipe, assumed_rate, estimate, measured_rate, report, require_known
from train import num_aligned_blocks

log = logging.getLogger(__name__)
IMAGENET = ("in256", "in256_latents", "in512", "in512_latents")
Facts = tuple[int, int, int, int | None]


def facts(node: dict[str, Any], choice: str, num_classes: int | None) -> Facts:
    """Return channels, pixels a side, classes and training images of data that are not opened;
    None: nobody knows.

    Raises UserError where sizes or classes must be told, and for a number of classes that is known
    already.
    """
    kind = node["_target_"].rpartition(".")[2]
    channels, size, classes, images = {
        "Digits": (1, 8, 10, 1497),
        "FashionMNIST": (1, 32, 10, 60_000),
        "Photos": (3, node.get("image_size"), len(PHOTOS), len(PHOTOS) * node.get("crops", 0)),
    }.get(kind, (node.get("channels", 3), node.get("image_size"), None, None))
    if choice in IMAGENET:
        classes, images = 1000, None if node.get("holdout_every") else 1_281_167
    require_known(size, "data.image_size", choice)
    require(
        classes is None or num_classes is None,
        f"num_classes={num_classes}: data={choice} has {classes}; leave it out",
    )
    require_known(classes or num_classes, "num_classes", choice)
    require(num_classes is None or num_classes >= 1, f"num_classes={num_classes}: must be at least 1")
    return channels, size, classes or num_classes, images


def rate(
    device: str | None, share: float | None, measured: str | None, memory_gb: float | None, dtype: str, model: str,
    aligned: bool,
) -> Rate:  # fmt: skip
    """Return the rate that is used: a measured one, or else an assumed one; never a mixture
    (UserError).
    """
    require(memory_gb is None or memory_gb > 0, f"memory_gb={memory_gb}: must be above 0")
    if measured is None:
        return assumed_rate(device or "H100", 0.4 if share is None else share, memory_gb, dtype)
    for key, value in {"device": device, "share": share}.items():
        require(value is None, f"{key}={value}: has no effect with measured=, which brings its own; leave one out")
    return measured_rate(measured, memory_gb, dtype, model, aligned)


def outline_autoencoder(node: dict[str, Any]) -> DiffusersAutoencoder | Identity:
    """Return the autoencoder without weights."""
    kind = locate(node["_target_"])
    return kind() if kind is Identity else kind.outline(node["source"], node["encode_dtype"])


def outline_alignment(
    alignment: REPA | Dispersive | None, network: Denoiser, image_size: int, grid: tuple[int, int]
) -> tuple[AlignmentLoss | DispersiveLoss | None, Target | None]:
    """Return the alignment's trained half and its frozen target, without weights. grid: of the
    latent's tokens.
    """
    if alignment is None:
        return None, None
    check_depth(alignment.align_depth, num_aligned_blocks(network))
    if isinstance(alignment, Dispersive):
        return alignment.build_loss(), None
    target = alignment.outline_target(image_size)
    with torch.device("meta"):
        return alignment.build_loss(network.hidden_size, target.num_features, target.grid, grid), target


def sampler_of(config: dict[str, Any]) -> Any:
    """Return the sampler, once it is known that its cost can be counted."""
    try:
        sampler = build(config["sampler"])
        sampler.schedule()
    except UserError as error:
        raise UserError(f"sampler.{error}") from error
    require(
        sampler.solver != "adaptive",
        "sampler.solver=adaptive: chooses its own steps, so their cost cannot be told beforehand; choose another",
    )
    return sampler


def recipe_of(config: dict[str, Any], choice: str, gpus: int, num_samples: int, num_classes: int | None) -> Recipe:
    """Return the recipe that train.py would run with a checked configuration; nothing of it is
    opened.

    choice: the name of the data. Raises UserError as train.py does, as far as that needs no data.
    """
    trainer, sampler = build(config["trainer"]), sampler_of(config)
    require(
        trainer.num_processes is None,
        f"trainer.num_processes={trainer.num_processes}: has no effect here; give gpus={trainer.num_processes}",
    )
    channels, image_size, classes, num_images = facts(config["data"], choice, num_classes)
    autoencoder = outline_autoencoder(config["autoencoder"])
    shape = autoencoder.latent_shape(channels, image_size)
    patch_size = config["model"]["patch_size"]
    with torch.device("meta"):
        network = build(config["model"])(in_channels=shape[0], num_classes=classes)
    num_tokens(network, *shape[1:])  # raises where the patch size does not divide the latent
    require(
        sampler.recompute is None or hasattr(network, "encoder"),
        f"sampler.recompute={sampler.recompute}: this model has no encoder to share; give null",
    )
    alignment = build({**config["alignment"], "weights": None} if "weights" in config["alignment"] else
                      config["alignment"])  # fmt: skip
    grid = (shape[1] // patch_size, shape[2] // patch_size)
    loss, target = outline_alignment(alignment, network, image_size, grid)
    until = 0 if alignment is None else math.inf if alignment.until_step is None else alignment.until_step
    return Recipe(
        objective=build(config["objective"])(denoiser=network, alignment=loss),
        target=target,
        autoencoder=autoencoder,
        shape=shape,
        image_size=image_size,
        num_images=num_images,
        cached=config["data"]["_target_"].endswith(".LatentCache"),
        align_until=until,
        trainer=trainer,
        sampler=sampler,
        gpus=gpus,
        num_samples=num_samples,
    )


def tell(
    config: dict[str, Any], choice: str, gpus: int, device: str | None, share: float | None, measured: str | None,
    memory_gb: float | None, num_samples: int, num_classes: int | None, out: str | None,
) -> None:  # fmt: skip
    """Check, count, print, and write the numbers to `out` where that is given."""
    require(out is None or Path(out).suffix == ".json", f"out={out}: give a .json file")
    require(out is None or not Path(out).exists(), f"out={out}: exists already and is not written over; choose another")
    recipe = recipe_of(config, choice, gpus, num_samples, num_classes)
    model, dtype = HydraConfig.get().runtime.choices.model, "bf16" if recipe.bf16 else "fp32"
    speed = rate(device, share, measured, memory_gb, dtype, model, aligned=recipe.target is not None)
    found = estimate(recipe, speed)
    log.info("%s", report(found))
    if out is not None:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        write_json(Path(out), {**found, "command": shlex.join(["python", *sys.argv])})


@entry_point(
    "estimate",
    uses=("model", "data", "autoencoder", "alignment", "objective", "sampler", "trainer", "experiment"),
)
def main(cfg: DictConfig) -> None:
    """Compose, check, count."""
    if OmegaConf.is_missing(cfg.data, "root"):
        cfg.data.root = ""  # nothing is read from it
    config = checked(cfg)
    choice = HydraConfig.get().runtime.choices.data
    tell(config, choice, **arguments_for(tell, config, besides=("config", "choice")))


if __name__ == "__main__":
    main()
