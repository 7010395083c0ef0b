"""Export a checkpoint: a folder for a model hub, a diffusers pipeline, or the published key names
(docs/export.md).

python scripts/export.py ckpt=RUN_OR_CHECKPOINT format=hub out=FOLDER [metrics=METRICS_JSON]
[license=…] [push=NAME] python scripts/export.py ckpt=RUN_OR_CHECKPOINT format=diffusers out=FOLDER
[metrics=…] [license=…] [push=…] python scripts/export.py ckpt=RUN_OR_CHECKPOINT format=released
out=FILE
"""

import logging
import sys
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from omegaconf import DictConfig

from ddt.checkpoint.folder import find_checkpoint
from ddt.checkpoint.hub import check_push, push
from ddt.checkpoint.published import SUFFIXES
from ddt.cli import CONF, arguments_for, checked, entry_point
from ddt.errors import require
from ddt.export.export import Card, export, open_source, picture_of, read_metrics
from ddt.files import check_writable

log = logging.getLogger(__name__)
NEXT = {
    "hub": 'load with: ddt.load_model("{out}"), or sample with: python sample.py ckpt={out}',
    "diffusers": 'load with: ddt.pipeline.DDTPipeline.from_pretrained("{out}")',
    "released": 'load with: ddt.load_released("{out}", encoder_depth={encoder_depth}, patch_size={patch_size})',
}


def settings_of(
    ckpt: str,
    format: Literal["hub", "diffusers", "released"],
    out: str,
    weights: str,
    autoencoder: str,
    metrics: str | None,
    license: str | None,
    push: str | None,
) -> None:
    """Refuse settings that cannot be together."""
    require(not Path(out).exists(), f"out={out}: exists already and is not written over; choose another out=")
    check_writable(Path(out))
    if format != "released":
        return
    require(
        Path(out).suffix in SUFFIXES, f"out={out}: is to be one file; give a name that ends in {' or '.join(SUFFIXES)}"
    )
    chosen = {"autoencoder": autoencoder if autoencoder != "checkpoint" else None, "metrics": metrics}
    for key, value in {**chosen, "license": license, "push": push}.items():
        require(value is None, f"{key}={value}: has no effect with format=released, which holds weights alone")


@entry_point("export", CONF / "export")
def main(cfg: DictConfig) -> None:
    """Compose, check everything, write, and upload where that is asked for."""
    chosen = arguments_for(settings_of, checked(cfg))
    settings_of(**chosen)
    form, out, name = chosen["format"], Path(chosen["out"]), chosen["push"]
    folder = find_checkpoint(chosen["ckpt"])
    source = open_source(folder, form, chosen["weights"], chosen["autoencoder"])
    places, metrics = [folder / "samples", Path(chosen["ckpt"]) / "samples"], None
    if chosen["metrics"] is not None:
        path = Path(chosen["metrics"])
        metrics = read_metrics(path, source.made_from())
        places.insert(0, path if path.is_dir() else path.parent)
    if name is not None:
        check_push(name)
    picture = picture_of(places, source.made_from())
    export(source, form, out, Card(name or out.name, metrics, chosen["license"], picture))
    sizes = {key: source.stored["network"].get(key) for key in ("encoder_depth", "patch_size")}
    log.info("%s: %s", out, NEXT[form].format(out=out, **sizes))
    if name is not None:
        log.info("%s (private; its settings there make it public)", push(out, name))


if __name__ == "__main__":
    main()
