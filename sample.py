"""Sample from a run or checkpoint: `python sample.py ckpt=RUN_OR_CHECKPOINT [key=value …]`."""

import datetime
import logging
import os
from pathlib import Path
from typing import Any, Literal

import torch
from omegaconf import DictConfig

from ddt.checkpoint import folder as ckpt
from ddt.checkpoint.convert import DOWNSAMPLING
from ddt.checkpoint.hub import is_hub_id
from ddt.cli import CONF, arguments_for, checked, entry_point
from ddt.distributed.compile import compiles
from ddt.distributed.launch import launch
from ddt.distributed.prepare import make_accelerator
from ddt.errors import collected, require
from ddt.generation.load import (
    check_guide_config,
    checkpoint_receipt,
    guide_receipt,
    images_of,
    load_generator,
    sampler_of,
    stored_autoencoder,
)
from ddt.generation.sample_set import sample_set
from ddt.metrics.evaluate import evaluate
from ddt.metrics.inception import InceptionSettings
from ddt.metrics.reference import check_reference
from ddt.metrics.side_by_side import beside_published
from ddt.metrics.sources import open_images
from evaluate import load_reference
from scripts.convert_checkpoint import convert_published, published_sampler

log = logging.getLogger(__name__)
PUBLISHED = ("fid", "sfid", "inception_score", "precision", "recall")
COMPILE_FROM = 1_000  # images: fewer are drawn before a compilation pays


def settings_of(
    ckpt: str,
    weights: str,
    out: str | None,
    guide: str | None,
    autoencoder: str,
    dtype: Literal["bf16", "fp32"] | None,
    compile: bool | None,
    batch_size: int,
    num_processes: int | None,
    cache_gib: float,
    png: int | Literal["all"],
    released: str | None,
    encoder_depth: int | None,
    resolution: int | None,
    reference: str | None,
    inception_weights: str | None,
    published: dict[str, float] | None,
) -> None:
    """Refuse settings that belong to neither the set nor the sampler and cannot be."""
    require(batch_size >= 1, f"batch_size={batch_size}: must be at least 1")
    require(cache_gib >= 0, f"cache_gib={cache_gib}: must be at least 0 (0 keeps no modulations)")
    require(png == "all" or int(png) >= 0, f"png={png}: give a number of images, or all")
    require(
        released is not None or (encoder_depth is None and resolution is None),
        "encoder_depth, resolution: describe a published checkpoint; give released= too, or leave them out",
    )
    require(
        published is None or reference is not None,
        "reference: not set; give reference= ADM's npz of the data set, beside whose metrics published= is laid",
    )
    unknown = [name for name in published or {} if name not in PUBLISHED]
    require(not unknown, f"published: {', '.join(unknown)}: no such metric; choose from {', '.join(PUBLISHED)}")
    require(
        inception_weights is None or reference is not None,
        "inception_weights: has no effect without reference=; give both",
    )


def check(config: dict[str, Any], stored: dict[str, Any]) -> dict[str, Any]:
    """Return the sampler and the images from the command line and the checkpoint's config; one line
    for each problem.
    """
    sampler, images = collected(lambda: sampler_of(config, stored), lambda: images_of(config, stored))
    return {"sampler": sampler, "images": images}


def run(folder: Path, stored: dict[str, Any], arguments: dict[str, Any]) -> None:
    """Load the checkpoint and draw the set, on each process."""
    accelerator = make_accelerator("no", patience=datetime.timedelta(days=1))  # one GPU may be hours behind another
    many = len(arguments["images"].seeds) >= COMPILE_FROM
    on_gpu = accelerator.device.type == "cuda"
    keys = ("weights", "guide", "dtype", "cache_gib")
    generator = load_generator(
        folder,
        arguments["sampler"],
        stored_autoencoder(stored, arguments["autoencoder"]),
        accelerator.device,
        compiled=compiles("compile", arguments["compile"], on_gpu and many, accelerator.device),
        **{key: arguments[key] for key in keys},
    )
    sample_set(
        generator,
        images=arguments["images"],
        batch_size=arguments["batch_size"],
        out=arguments["out"],
        checkpoint=checkpoint_receipt(folder, arguments["weights"], generator),
        accelerator=accelerator,
        guide=None if arguments["guide"] is None else guide_receipt(arguments["guide"]),
        png=arguments["png"],
    )


def to_come(encoder_depth: int | None, resolution: int | None) -> dict[str, Any]:
    """Return what is known of a published checkpoint before it is read, so that a slip costs no
    conversion.
    """
    network = {"_target_": f"ddt.model.{'DiT' if encoder_depth is None else 'DDT'}", "num_classes": 1000}
    return {"sampler": published_sampler(resolution), "network": network}


def check_released(settings: dict[str, Any], stored: dict[str, Any]) -> None:
    """Raise UserError where `released` is given and the checkpoint is not what it was converted to."""
    if settings["released"] is None:
        return
    folder, depth, resolution = settings["ckpt"], settings["encoder_depth"], settings["resolution"]
    require("source" in stored, f"ckpt={folder}: was not converted from a published checkpoint; give another ckpt=")
    found = stored["network"].get("encoder_depth"), stored["latent_shape"][1] * DOWNSAMPLING
    require(
        found == (depth, resolution),
        f"ckpt={folder}: was converted with encoder_depth={found[0]} resolution={found[1]}; give another ckpt= or "
        "these",
    )


def evaluate_set(arguments: dict[str, Any], out: Path) -> None:
    """Evaluate the set in `out` as evaluate.py does, on each process, and lay the result beside the
    published numbers.
    """
    accelerator = make_accelerator("no", patience=datetime.timedelta(days=1))
    features = InceptionSettings(weights=arguments["inception_weights"])
    reference, extractor = load_reference(arguments["reference"], None, features, accelerator.device)
    metrics = evaluate(open_images(out, "out"), reference, extractor, out, accelerator)
    if metrics is not None:
        log.info("%s", beside_published(metrics, arguments["published"] or {}))


@entry_point("sample", CONF / "sample")
def main(cfg: DictConfig) -> None:
    """Compose, check, sample, and evaluate where a reference is given."""
    config = checked(cfg)
    others = arguments_for(settings_of, config)
    settings_of(**others)
    guide = None if others["guide"] is None else ckpt.find_checkpoint(others["guide"])
    if others["reference"] is not None:  # what would be missing after hours of sampling is said now
        features = InceptionSettings(weights=others["inception_weights"])
        check_reference(*load_reference(others["reference"], None, features, torch.device("cpu")))
    if others["released"] is not None and not Path(others["ckpt"]).exists():
        require("RANK" not in os.environ, f"ckpt={others['ckpt']}: convert it first, by scripts/convert_checkpoint.py")
        check(config, to_come(others["encoder_depth"], others["resolution"]))
        convert_published(others["released"], others["encoder_depth"], others["resolution"], Path(others["ckpt"]))
    require(
        others["out"] is not None or not is_hub_id(others["ckpt"]),
        f"out: not set; ckpt={others['ckpt']} is a model of the hub, so give the folder for its images",
    )
    folder = ckpt.find_checkpoint(others["ckpt"])
    stored = ckpt.read_config(folder)
    out = Path(others["out"] or folder / "samples")
    check_released(others, stored)
    ckpt.check_weights(folder, others["weights"])
    arguments = {**others, **check(config, stored), "out": out, "guide": guide}
    if guide is not None:
        check_guide_config(stored, ckpt.read_config(guide), arguments["sampler"].cfg_scale)
    require(
        arguments["reference"] is None or stored["latent_shape"][0] == 3 or "source" in stored["autoencoder"],
        f"reference: Inception reads RGB images, this model draws {stored['latent_shape'][0]} channel; use evaluate.py",
    )
    require(
        arguments["reference"] is None or len(arguments["images"].seeds) >= 2,
        "num_samples=1: statistics need at least 2 images; draw more, or leave reference= out",
    )
    launch(run, arguments["num_processes"], folder, stored, arguments)
    if arguments["reference"] is not None:
        launch(evaluate_set, arguments["num_processes"], arguments, out)


if __name__ == "__main__":
    main()
