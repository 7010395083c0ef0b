"""Evaluate samples: `python evaluate.py samples=NPZ_OR_FOLDER reference=data:digits features=digits [out=DIR]`."""

import logging
from pathlib import Path

from hydra import compose
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from ddt.config import build, check_arguments
from ddt.errors import UserError, require
from ddt.evaluation import evaluate_with_classifier
from scripts.entry import CONF, checked, entry_point

log = logging.getLogger(__name__)


def evaluation(samples: str, reference: str, out: str | None) -> None:
    """Hold the types of the settings that belong to no group."""


@entry_point("evaluate")
def main(cfg: DictConfig) -> None:
    """Compose, check, evaluate."""
    config = checked(cfg)
    features = HydraConfig.get().runtime.choices.features
    extractor = build(config["features"])
    paths, problems = check_arguments(evaluation, {key: config[key] for key in ("samples", "reference", "out")}, "")
    if problems:
        raise UserError("\n".join(problems))
    config.update(paths)
    kind, _, data = str(config["reference"]).partition(":")
    known = sorted(path.stem for path in (CONF / "data").glob("*.yaml"))
    if kind != "data" or data not in known:
        raise UserError(f"reference={config['reference']}: give data:NAME, one of data:{', data:'.join(known)}")
    require(
        features == data,
        f"features={features} reference=data:{data}: the classifier and the reference must be of one data set",
    )
    node = checked(OmegaConf.masked_copy(compose("train", overrides=[f"data={data}"]), ["data"]))["data"]
    samples = Path(config["samples"])
    metrics = evaluate_with_classifier(
        samples,
        data,
        train=build(node)(split="train"),
        test=build(node)(split="test"),
        features=extractor,
        out=Path(config["out"] or (samples if samples.is_dir() else samples.parent)),
    )
    for name, value in metrics.items():
        if isinstance(value, float):
            log.info("%-28s %.4f", name, value)


if __name__ == "__main__":
    main()
