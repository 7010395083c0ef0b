"""Evaluate samples: `python evaluate.py samples=… reference=… features=… [out=DIR]`.

With `features=inception` the metrics are ADM's, with `features=dinov2` those of DINOv2, with the
features of a small data set's classifier the reference is `data:NAME`.
"""

import datetime
import logging
from pathlib import Path
from typing import Any

from hydra import compose
from omegaconf import DictConfig, OmegaConf

from ddt.cli import CONF, arguments_for, checked, entry_point
from ddt.config import build
from ddt.data.images import Images
from ddt.distributed.launch import launch
from ddt.distributed.prepare import make_accelerator
from ddt.errors import UserError, require
from ddt.metrics.classifier import ClassifierSettings
from ddt.metrics.evaluate import evaluate
from ddt.metrics.features import Extractor, FeatureSettings
from ddt.metrics.folder import FolderImages
from ddt.metrics.npz import NpzImages
from ddt.metrics.precision_recall import PrDtype
from ddt.metrics.reference import Reference, data_reference, read_reference
from ddt.metrics.sources import open_images

log = logging.getLogger(__name__)
DATA = "data:"  # before the name of a data set


def evaluation(
    samples: str, reference: str, inception_weights: str | None, pr_dtype: PrDtype, num_processes: int | None,
    out: str | None,
) -> None:  # fmt: skip
    """Hold the types of the settings that belong to no group."""


def reference_node(reference: str) -> dict[str, Any] | None:
    """Return the settings of the data set that `reference` names, None where it is a path;
    UserError for one that does not exist.
    """
    if not reference.startswith(DATA):
        return None
    name = reference.removeprefix(DATA)
    known = sorted(path.stem for path in (CONF / "data").glob("*.yaml"))
    if name not in known:
        raise UserError(f"reference={reference}: give data:NAME, one of data:{', data:'.join(known)}")
    composed = OmegaConf.masked_copy(compose("train", overrides=[f"data={name}"]), ["data"])
    missing = OmegaConf.missing_keys(composed)
    require(
        not missing,
        f"reference={reference}: {', '.join(missing)} would have to be known; write a file of its statistics by "
        f"scripts/reference_statistics.py data={name}, and give that",
    )
    return checked(composed)["data"]


def check_weights(settings: FeatureSettings | None, inception_weights: str | None) -> None:
    """Raise UserError for weights of Inception without Inception."""
    name = "none" if settings is None else settings.name
    require(
        inception_weights is None or name == "inception",
        f"inception_weights={inception_weights}: has no effect with features={name}; leave it out",
    )


def features_of(config: dict[str, Any]) -> FeatureSettings:
    """Return the settings of the features; raise UserError where they measure nothing, or do not
    suit the reference.
    """
    settings: FeatureSettings | None = build(config["features"])
    reference = config["reference"]
    if settings is None:
        raise UserError("features=none: measures nothing; choose another file of conf/features")
    if isinstance(settings, ClassifierSettings):
        require(
            reference == f"{DATA}{settings.data}",
            f"features={settings.name} reference={reference}: the classifier is trained on this data set; give "
            f"reference={DATA}{settings.data}",
        )
    check_weights(settings, config["inception_weights"])
    return settings


def load_reference(
    reference: str, node: dict[str, Any] | None, settings: FeatureSettings, device: Any
) -> tuple[Reference, Extractor]:
    """Return the reference and the extractor; `node` is that of `reference_node`.

    Raises UserError where either cannot be used.
    """
    if node is None:
        require(
            Path(reference).exists(),
            f"reference={reference}: no such file; give ADM's reference npz of the data set, a file of "
            "scripts/reference_statistics.py, or a folder of images",
        )
        extractor = settings.extractor(device)
        distances = {name: extractor.spaces[space] for name, space in extractor.distances.items()}
        return read_reference(Path(reference), distances, extractor.name), extractor
    train: Images = build(node)(split="train")
    found = data_reference(reference, train, build(node)(split="test"))
    return found, settings.extractor(device, train)


def beside(samples: NpzImages | FolderImages) -> Path:
    """Return the folder for the results of a set: that of its npz; a folder of pictures stays as it
    is.
    """
    if isinstance(samples, FolderImages):
        return samples.path.with_name(f"{samples.path.resolve().name}_evaluation")
    return samples.path.parent


def run(config: dict[str, Any], node: dict[str, Any] | None, samples: NpzImages | FolderImages) -> None:
    """Load everything and measure, on each process."""
    accelerator = make_accelerator("no", patience=datetime.timedelta(days=1))  # the metrics of one may take hours
    reference, extractor = load_reference(config["reference"], node, features_of(config), accelerator.device)
    out = Path(config["out"] or beside(samples))
    metrics = evaluate(samples, reference, extractor, out, accelerator, config["pr_dtype"])
    if metrics is not None:
        show(metrics)


def show(metrics: dict[str, Any]) -> None:
    """Tell the numbers, each by its label, and what they may not be compared with."""
    width = max(map(len, metrics["labels"].values()))
    for name, label in metrics["labels"].items():
        value = metrics[name]
        text = f"– ({metrics['reasons'][name]})" if value is None else f"{value:.4f}"
        log.info("%s  %s", label.ljust(width), text)
    for reason in metrics["not_comparable_because"]:
        log.info("not comparable with published numbers: %s", reason)


@entry_point("evaluate")
def main(cfg: DictConfig) -> None:
    """Compose, check, evaluate."""
    config = checked(cfg)
    config.update(arguments_for(evaluation, config))
    features_of(config)
    node = reference_node(config["reference"])
    launch(run, config["num_processes"], config, node, open_images(Path(config["samples"]), "samples"))


if __name__ == "__main__":
    main()
