"""sample.py: checks its settings, then each process loads the networks and samples its share."""

import datetime
from pathlib import Path

from ddt.checkpoint import format as ckpt
from ddt.checkpoint.models import is_remote
from ddt.distributed.compile import compiles
from ddt.distributed.launch import launch
from ddt.distributed.prepare import make_accelerator
from ddt.errors import collect_errors
from ddt.generation.image_set import ImageSet
from ddt.generation.load import (
    check_guide_config,
    checkpoint_receipt,
    guide_receipt,
    load_generator,
    stored_autoencoder,
)
from ddt.generation.sample_set import sample_set
from ddt.generation.settings import SampleSettings
from ddt.model import network_class
from ddt.sampling.guidance import check_guided
from ddt.sampling.settings import SamplerSettings

COMPILE_FROM = 1_000  # images; for fewer, compiling takes longer than it saves


def sample_checkpoint(settings: SampleSettings) -> None:
    """Sample the set of the settings and write it (`sample_set`); UserError has a line for each
    impossible setting.
    """
    guide = None if settings.guide is None else ckpt.find_checkpoint(settings.guide)
    folder = ckpt.find_checkpoint(settings.ckpt)
    stored = ckpt.read_config(folder)
    network = stored["network"]
    ckpt.check_weights(folder, settings.weights)
    sampler, images = collect_errors(
        lambda: settings.resolve(stored["sampler"], network_class(network).shares_encoder, network.get("base_depth")),
        lambda: settings.image_set(network["num_classes"], stored["class_names"]),
    )
    if guide is not None:
        check_guided(sampler.cfg_scale)
        check_guide_config(stored, ckpt.read_config(guide))
    launch(sample_share, settings.num_processes, settings, folder, guide, sampler, images)


def images_folder(settings: SampleSettings, checkpoint: Path) -> Path:
    """Return the folder for the images: `out`, or "samples" in the checkpoint's, which a model of
    the hub has in a cache only: then `outputs/CKPT`.
    """
    default = Path("outputs") / settings.ckpt if is_remote(settings.ckpt) else checkpoint / "samples"
    return default if settings.out is None else Path(settings.out)


def sample_share(
    settings: SampleSettings, folder: Path, guide: Path | None, sampler: SamplerSettings, images: ImageSet
) -> None:
    """Load the networks and sample this process's share of the images."""
    accelerator = make_accelerator(timeout=datetime.timedelta(days=1))  # one GPU may be hours behind another
    device = accelerator.device
    compile_default = device.type == "cuda" and len(images.seeds) >= COMPILE_FROM
    generator = load_generator(
        folder,
        sampler,
        stored_autoencoder(ckpt.read_config(folder), settings.autoencoder),
        device,
        weights=settings.weights,
        guide=guide,
        dtype=settings.dtype,
        cache_gib=settings.cache_gib,
        compiled=compiles("compile", settings.compile, compile_default, device),
    )
    sample_set(
        generator,
        images,
        settings.batch_size,
        images_folder(settings, folder),
        checkpoint_receipt(folder, settings.weights, generator.autoencoder),
        accelerator,
        guide=None if guide is None else guide_receipt(guide),
        png=settings.png,
    )
