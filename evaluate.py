"""Evaluate samples: `python evaluate.py samples=NPZ_OR_FOLDER reference=… features=… [out=DIR]`.

With `features=inception` the reference is ADM's npz of a data set and the metrics are ADM's; with the features of a
small data set's classifier it is `data:NAME`.
"""

import logging
from pathlib import Path
from typing import Any

from hydra import compose
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from ddt.config import build
from ddt.errors import UserError, require
from ddt.evaluation import evaluate_with_classifier, evaluate_with_inception
from ddt.metrics.precision_recall import PrDtype
from scripts.entry import CONF, arguments_for, checked, entry_point

log = logging.getLogger(__name__)


def evaluation(samples: str, reference: str, inception_weights: str | None, pr_dtype: PrDtype, out: str | None) -> None:
    """Hold the types of the settings that belong to no group."""


def with_inception(config: dict[str, Any], out: Path) -> dict[str, Any]:
    """Compare with a reference file by ADM's metrics."""
    require(
        not config["reference"].startswith("data:"),
        f"features=inception: reference={config['reference']} is no file; give ADM's reference npz of the data set, "
        "or for a small one features=digits reference=data:digits",
    )
    weights = config["inception_weights"]
    return evaluate_with_inception(
        Path(config["samples"]),
        Path(config["reference"]),
        None if weights is None else Path(weights),
        out,
        batch_size=build(config["features"]).batch_size,
        pr_dtype=config["pr_dtype"],
    )


def reference_data(reference: str, features: str) -> tuple[str, dict[str, Any]]:
    """Return the name and the settings of the small data set that `reference` means, which must be the classifier's."""
    kind, _, data = reference.partition(":")
    known = sorted(path.stem for path in (CONF / "data").glob("*.yaml"))
    if kind != "data" or data not in known:
        raise UserError(f"reference={reference}: give data:NAME, one of data:{', data:'.join(known)}")
    require(
        features == data,
        f"features={features} reference=data:{data}: the classifier and the reference must be of one data set",
    )
    composed = compose("train", overrides=[f"data={data}"])
    return data, checked(OmegaConf.masked_copy(composed, ["data"]))["data"]


def with_classifier(config: dict[str, Any], features: str, out: Path) -> dict[str, Any]:
    """Compare with a small data set in the features of its classifier."""
    data, node = reference_data(config["reference"], features)
    if config["inception_weights"] is not None:
        log.warning("warning: inception_weights: has no effect with features=%s", features)
    extractor = build(config["features"])
    train, test = build(node)(split="train"), build(node)(split="test")
    return evaluate_with_classifier(Path(config["samples"]), data, train, test, extractor, out)


@entry_point("evaluate")
def main(cfg: DictConfig) -> None:
    """Compose, check, evaluate."""
    config = checked(cfg)
    config.update(arguments_for(evaluation, config))
    samples = Path(config["samples"])
    out = Path(config["out"] or (samples if samples.is_dir() else samples.parent))
    features = HydraConfig.get().runtime.choices.features
    metrics = with_inception(config, out) if features == "inception" else with_classifier(config, features, out)
    for name, value in metrics.items():
        if isinstance(value, float):
            log.info("%-28s %.4f", name, value)
    for name, reason in metrics.get("reasons", {}).items():
        log.info("%-28s – (%s)", name, reason)
    for reason in metrics.get("not_comparable_because", []):
        log.info("not comparable with published numbers: %s", reason)


if __name__ == "__main__":
    main()
