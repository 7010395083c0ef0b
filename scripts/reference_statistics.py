"""Write the reference statistics of a data set, in ADM's format: mu, sigma, mu_s, sigma_s, and some
images.

python scripts/reference_statistics.py data=NAME [data.root=FOLDER] features=inception
[out=FILE.npz] [key=value …]
"""

import datetime
import logging
import shlex
import sys
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from ddt.cli import arguments_for, checked, entry_point
from ddt.config import build
from ddt.data.images import FileImages, Images
from ddt.data.latent_cache import LatentCache
from ddt.distributed.launch import launch
from ddt.distributed.prepare import make_accelerator
from ddt.errors import require
from ddt.files import check_writable
from ddt.metrics.classifier import ClassifierSettings
from ddt.metrics.features import check_images, extract
from ddt.metrics.reference import choose, write_reference
from ddt.metrics.sources import DataImages
from ddt.version import __version__
from evaluate import check_weights

log = logging.getLogger(__name__)
CROP = "ADM centre crop: box halving, then bicubic to the size, then the centre square"


def check(
    out: str, split: Literal["train", "test"], num_images: int | None, num_kept: int, num_processes: int | None
) -> None:
    """Refuse settings that cannot be."""
    require(Path(out).suffix == ".npz", f"out={out}: give an .npz file")
    require(not Path(out).exists(), f"out={out}: exists and is not written over; choose another out=, or remove it")
    check_writable(Path(out))
    require(num_images is None or num_images >= 2, f"num_images={num_images}: statistics need at least 2")
    require(num_kept >= 0, f"num_kept={num_kept}: must be at least 0")


def transform_of(images: Images) -> str:
    """Return what was done to the pictures of a data set."""
    if isinstance(images, LatentCache):
        return "as stored in the latent cache"
    return CROP if isinstance(images, FileImages) else "none"


def run(config: dict[str, Any], name: str, command: str) -> None:
    """Measure the images on all processes and write the file."""
    accelerator = make_accelerator("no", patience=datetime.timedelta(days=1))
    images = build(config["data"])(split=config["split"])
    if isinstance(images, LatentCache):
        images.require_pixels()
    total = len(images.labels)
    require(total >= 2, f"split={config['split']}: data={name} holds {total} images of it; choose the other")
    chosen = DataImages(f"data:{name}", images, choose(total, config["num_images"]))
    extractor = build(config["features"]).extractor(accelerator.device)
    extractor.rows = ()  # the statistics alone: a million vectors would not fit
    check_images(chosen, "data", extractor)
    features = extract(chosen, extractor, accelerator, f"data:{name}")
    if features is None:
        return
    kept = DataImages(chosen.name, images, chosen.chosen[choose(len(chosen), config["num_kept"])])
    made = {
        "data": {key: value for key, value in config["data"].items() if key != "_partial_"},
        "split": config["split"],
        "total": total,
        "transform": transform_of(images),
        "command": command,
        "versions": {"ddt": __version__},
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    write_reference(Path(config["out"]), chosen, kept, features, extractor, made)
    log.info("%s: statistics of %d images, %d of them kept", config["out"], len(chosen), len(kept))


@entry_point("reference_statistics", uses=("data", "features", "inception_weights"))
def main(cfg: DictConfig) -> None:
    """Compose, check, measure."""
    config = checked(cfg)
    values = arguments_for(check, config)
    check(**values)
    name, features = HydraConfig.get().runtime.choices.data, build(config["features"])
    require(features is not None, "features=none: measures nothing; choose inception or dinov2")
    require(
        not isinstance(features, ClassifierSettings),
        f"features={features.name}: a classifier is trained on the images themselves; give "
        f"reference=data:{features.name} to evaluate.py, which needs no file",
    )
    check_weights(features, config["inception_weights"])
    launch(run, values["num_processes"], {**config, **values}, name, shlex.join(["python", *sys.argv]))


if __name__ == "__main__":
    main()
