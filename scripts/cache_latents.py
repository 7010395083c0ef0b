"""Encode a data set once: python scripts/cache_latents.py data=NAME [autoencoder=NAME] [out=FOLDER]
[key=value …].

The same command again resumes where it stopped; on a complete cache it compares every checksum.
"""

import contextlib
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

from ddt.cli import command

if TYPE_CHECKING:
    from ddt.data.images import Images
    from ddt.data.settings import CacheSettings


def encode(settings: "CacheSettings", splits: "dict[str, Images]") -> None:
    """Encode on each process."""
    from ddt.data.cache_writer import cache_latents
    from ddt.distributed.prepare import make_accelerator

    while not (Path(settings.out) / "manifest.csv").is_file():  # under torchrun, process 0 is writing it
        time.sleep(0.5)
    accelerator = make_accelerator()
    target = None
    if settings.store_features:
        assert settings.alignment is not None
        target = settings.alignment.build().build_target(splits["train"].image_size)
    cache_latents(settings, splits, settings.autoencoder.build(), target, accelerator)


@command("cache_latents", settings="ddt.data.settings.CacheSettings")
def main(settings: "CacheSettings") -> None:
    """Compose, check, read every image once, encode."""
    from ddt.data.cache_writer import list_images
    from ddt.distributed.launch import launch
    from ddt.errors import require
    from ddt.files import lock_folder

    alignment = settings.alignment and settings.alignment.build()
    require(
        not settings.store_features or (alignment is not None and alignment.needs_target),
        "store_features=true: needs an alignment with a target, such as alignment=repa_dinov2_b",
    )
    splits = {split: settings.data.build(split=split) for split in ("train", "test")}
    images = splits["train"]
    settings.check_images(images)
    settings.autoencoder.build().latent_shape(images.channels, images.image_size)
    out, is_main = Path(settings.out), os.environ.get("RANK", "0") == "0"
    busy = f"out={out}: another process is writing this cache; wait for it"
    with lock_folder(out, busy) if is_main else contextlib.nullcontext():
        if is_main:
            list_images(settings, splits)
        launch(encode, settings.num_processes, settings, splits)


if __name__ == "__main__":
    main()
