"""Encode a data set once: python scripts/cache_latents.py data=NAME [autoencoder=NAME] [out=FOLDER]
[key=value …].

The same command again goes on where it stopped; on a complete cache it compares every checksum.
"""

import contextlib
import fcntl
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from omegaconf import DictConfig

from ddt.cli import checked, entry_point
from ddt.config import build, check_arguments
from ddt.data.cache_writer import CacheSettings, cache_latents
from ddt.data.images import FileImages, Images
from ddt.data.latent_cache import LatentCache
from ddt.data.manifest import make_manifest
from ddt.distributed.launch import launch
from ddt.distributed.prepare import make_accelerator
from ddt.errors import UserError, require

OWN = (*CacheSettings.__dataclass_fields__, "num_processes")
GROUPS = ("data", "autoencoder", "alignment")


def processes(num_processes: int | None) -> None:
    """Hold the type of a setting."""


def check(config: dict[str, Any]) -> tuple[CacheSettings, dict[str, Images]]:
    """Return the settings and the data's splits; one line for each problem."""
    values, problems = check_arguments(CacheSettings, {key: config[key] for key in OWN if key != "num_processes"}, "")
    others, found = check_arguments(processes, {"num_processes": config["num_processes"]}, "")
    if problems + found:
        raise UserError("\n".join(problems + found))
    config.update(others)
    number = others["num_processes"]
    require(number is None or number >= 1, f"num_processes={number}: must be at least 1, or null for every visible GPU")
    settings = CacheSettings(**values)
    alignment = build(config["alignment"])
    require(
        not settings.store_features or (alignment is not None and alignment.needs_target),
        "store_features=true: needs an alignment with a target, such as alignment=repa_dinov2_b",
    )
    splits = {split: build(config["data"])(split=split) for split in ("train", "test")}
    images = splits["train"]
    require(not isinstance(images, LatentCache), "data: is a latent cache already; give the images")
    require(
        not isinstance(images, FileImages) or images.root.resolve() not in Path(settings.out).resolve().parents,
        f"out={settings.out}: lies among the images of data.root; choose another folder",
    )
    return settings, splits


@contextlib.contextmanager
def locked(out: Path) -> Iterator[None]:
    """Hold the folder against a second call of this command; raise UserError where another holds
    it.
    """
    out.mkdir(parents=True, exist_ok=True)
    with (out / ".lock").open("a") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # of this process alone: loading processes do not keep it
        except (BlockingIOError, PermissionError) as error:
            raise UserError(f"out={out}: another process is writing this cache; wait for it") from error
        yield


def run(config: dict[str, Any], settings: CacheSettings, splits: dict[str, Images]) -> None:
    """Encode, on each process."""
    while not (Path(settings.out) / "manifest.csv").is_file():  # under torchrun, process 0 is writing it
        time.sleep(0.5)
    cache_latents(
        settings,
        splits,
        source={key: value for key, value in config["data"].items() if key != "_partial_"},
        autoencoder=build(config["autoencoder"]),
        autoencoder_settings=config["autoencoder"],
        alignment=build(config["alignment"]),
        accelerator=make_accelerator("no"),
    )


@entry_point("cache_latents", uses=("data", "autoencoder", "alignment"))
def main(cfg: DictConfig) -> None:
    """Compose, check, look at every image, encode."""
    config = checked(cfg)
    settings, splits = check(config)
    build(config["autoencoder"]).latent_shape(splits["train"].channels, splits["train"].image_size)
    with locked(Path(settings.out)) if os.environ.get("RANK", "0") == "0" else contextlib.nullcontext():
        if os.environ.get("RANK", "0") == "0":
            make_manifest(Path(settings.out), splits, settings.workers, settings.skip_broken)
        launch(run, config["num_processes"], {key: config[key] for key in GROUPS}, settings, splits)


if __name__ == "__main__":
    main()
