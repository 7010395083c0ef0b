"""Train a DDT: `python train.py [model=… data=… key=value …]`. The same command again resumes."""

import functools
import logging
import re
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from ddt.autoencoder import Autoencoder
from ddt.checkpoint.folder import newest_checkpoint
from ddt.cli import checked, entry_point
from ddt.config import build, check_arguments
from ddt.data.images import Images
from ddt.data.latent_cache import LatentCache
from ddt.data.survey import found, hints, survey
from ddt.distributed.launch import default_processes, launch
from ddt.errors import UserError, require
from ddt.files import sha256
from ddt.metrics.classifier import ClassifierSettings
from ddt.metrics.features import FeatureSettings
from ddt.metrics.reference import data_reference
from ddt.model import DDT, Denoiser
from ddt.objective.alignment import REPA, AlignmentLoss, Dispersive, DispersiveLoss, Target, check_depth
from ddt.training.evaluation import OnlineEvaluation, online_evaluation
from ddt.training.init_from import find_source
from ddt.training.loop import train
from evaluate import check_weights, load_reference

log = logging.getLogger(__name__)
RUN_SETTINGS = ("name", "seed", "init_from", "reference", "inception_weights")


def run_settings(
    name: str, seed: int, init_from: str | None, reference: str | None, inception_weights: str | None
) -> None:
    """Hold the types of the settings that stand outside of any group."""
    require(
        re.fullmatch(r"[\w.=,+\[\]-][\w.=,+\[\]/-]*", name) is not None and ".." not in name and name != ".",
        f"name={name}: give a folder name made of letters, digits and _.=,+-",
    )
    require(init_from != "", "init_from: not set; give init_from=RUN_OR_CHECKPOINT_OR_PUBLISHED_FILE")
    require(0 <= seed < 2**63, f"seed={seed}: must be at least 0")


def check(config: dict[str, Any], run_dir: Path) -> None:
    """Build what costs nothing and raise one UserError with a line for each setting that cannot be.

    `run_dir` is the folder of the run.
    """
    values, problems = check_arguments(run_settings, {key: config[key] for key in RUN_SETTINGS}, "")
    config.update(values)

    def attempt(function: Any, *args: Any, prefix: str = "", **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except (UserError, TypeError) as error:  # TypeError: a file that lacks what its target needs
            problems.append(f"{prefix}{error}")

    if not problems:
        attempt(run_settings, **values)
    settings = attempt(build, config["trainer"])
    if settings is not None and settings.num_processes is None:
        attempt(settings.micro_batches, default_processes())
    sampler = attempt(build, config["sampler"], prefix="sampler.")
    if sampler is not None:
        attempt(sampler.schedule, prefix="sampler.")
    with torch.device("meta"):
        network = attempt(build(config["model"]), in_channels=1, num_classes=1)
    attempt(build(config["objective"]), denoiser=network)
    attempt(build(config["optimizer"]), named_parameters=[("weight", torch.nn.Parameter(torch.zeros(1)))])
    alignment = attempt(build, config["alignment"])
    if alignment is not None and network is not None:
        attempt(check_depth, alignment.align_depth, num_aligned_blocks(network))
    features = attempt(build, config["features"])
    data = HydraConfig.get().runtime.choices.data
    if settings is not None and (features is not None or config["features"]["_target_"] is None):
        attempt(check_evaluation, features, data, config["reference"], settings.eval_every)
        attempt(check_weights, features, config["inception_weights"])
    if config["init_from"] and newest_checkpoint(run_dir) is None:  # a run that has begun does not need it any more
        attempt(find_source, str(config["init_from"]))
    recompute = config["sampler"].get("recompute")
    if recompute is not None and network is not None and not hasattr(network, "encoder"):
        problems.append(f"sampler.recompute={recompute}: this model has no encoder to share; give null")
    if problems:
        raise UserError("\n".join(problems))


def num_aligned_blocks(network: Denoiser) -> int:
    """Return how many blocks an alignment can choose from: the encoder's, or all of the undivided
    baseline's.
    """
    return len(network.encoder.blocks if isinstance(network, DDT) else network.blocks)


def build_alignment(
    alignment: REPA | Dispersive | None, network: Denoiser, images: Images, grid: tuple[int, int]
) -> tuple[AlignmentLoss | DispersiveLoss | None, Target | None, str | None]:
    """Return the alignment's trained half, its frozen target (None where features are cached or
    there is none) and the hash of the target's weights. `grid` is that of the latent's tokens.

    Raises UserError where the images are not what the target takes, or the cached features are
    another target's.
    """
    if alignment is None:
        return None, None, None
    if isinstance(alignment, Dispersive):
        return alignment.build_loss(), None, None
    hidden_size = network.hidden_size
    if isinstance(images, LatentCache) and images.features is not None:
        cached = images.features
        require(
            cached["target"] == alignment.target,
            f"data.root={images.root}: holds features of {cached['target']}, but alignment.target={alignment.target}: "
            "choose one, or run the target with data.cached_features=false",
        )
        if alignment.weights is not None:
            require(
                sha256(Path(alignment.weights)) == cached["weights_sha256"],
                f"alignment.weights={alignment.weights}: is not the file that the cached features of data.root="
                f"{images.root} come from; leave it out, or run the target with data.cached_features=false",
            )
        loss = alignment.build_loss(hidden_size, cached["num_features"], tuple(cached["grid"]), grid)
        return loss, None, cached["fingerprint"]
    if isinstance(images, LatentCache):
        images.require_pixels()
    target = alignment.build_target(images.image_size)
    return alignment.build_loss(hidden_size, target.num_features, target.grid, grid), target, target.fingerprint


def check_evaluation(features: FeatureSettings | None, data: str, reference: str | None, eval_every: int) -> None:
    """Raise UserError where an evaluation while training cannot be, or settings of it have no
    effect.
    """
    if features is None:
        require(eval_every == 0, f"trainer.eval_every={eval_every}: needs features=, such as inception or {data}")
        require(reference is None, f"reference={reference}: has no effect without features=; leave it out")
        return
    require(
        eval_every > 0, f"features={features.name}: has no effect with trainer.eval_every=0; give a number of steps"
    )
    if isinstance(features, ClassifierSettings):
        require(
            data in (features.data, f"{features.data}_latents"),
            f"features={features.name}: is the classifier of another data set than data={data}; choose other features",
        )
        require(
            reference is None,
            f"reference={reference}: features={features.name} compares with the training images; leave it out",
        )
    if reference is not None:
        require(Path(reference).exists(), f"reference={reference}: no such file; give ADM's reference npz")


def build_evaluation(
    config: dict[str, Any], images: Images, held_out: Images, autoencoder: Autoencoder, shape: tuple[int, int, int],
    accelerator: Accelerator,
) -> OnlineEvaluation:  # fmt: skip
    """Return the evaluation of a run, against a reference file or its own training images."""
    settings: FeatureSettings = build(config["features"])
    reference, device = config["reference"], accelerator.device
    if reference is None and isinstance(images, LatentCache):
        images.require_pixels()
    if reference is None:
        base, extractor = data_reference("training images", images, held_out), settings.extractor(device, images)
    else:
        base, extractor = load_reference(reference, None, settings, device)
    trainer = build(config["trainer"])
    batch_size, _ = trainer.micro_batches(accelerator.num_processes)
    return online_evaluation(
        base, extractor, autoencoder, shape, build(config["sampler"]), trainer.eval_samples, batch_size,
        trainer.mixed_precision, accelerator,
    )  # fmt: skip


def run(config: dict[str, Any]) -> None:
    """Build everything and train, on each process."""
    torch.manual_seed(config["seed"])  # the initial weights; nothing later draws from the global state
    images, held_out = (build(config["data"])(split=split) for split in ("train", "test"))
    autoencoder = build(config["autoencoder"])
    shape = autoencoder.latent_shape(images.channels, images.image_size)
    patch_size = config["model"]["patch_size"]
    require(
        shape[1] % patch_size == 0 and shape[2] % patch_size == 0,
        f"model.patch_size={patch_size} does not divide the latent size {shape[1]}×{shape[2]}: choose a divisor",
    )
    if isinstance(images, LatentCache):
        images.check_autoencoder(autoencoder)
    sizes = {"in_channels": shape[0], "num_classes": len(images.class_names)}
    network = build(config["model"])(**sizes)
    alignment = build(config["alignment"])
    grid = (shape[1] // patch_size, shape[2] // patch_size)
    alignment_loss, target, target_hash = build_alignment(alignment, network, images, grid)
    # what data and frozen weights are, wherever they lie, stands beside the settings that a resumed
    # run must share
    found = {"data": images.fingerprint, "autoencoder": autoencoder.fingerprint, "alignment": target_hash}
    identified = {group: {**config[group], "fingerprint": value} for group, value in found.items()}
    network_settings = {key: value for key, value in config["model"].items() if key != "_partial_"} | sizes
    train(
        settings=build(config["trainer"]),
        run_dir=Path(config["run_dir"]),
        config={
            "network": network_settings,
            "latent_shape": list(shape),
            "autoencoder": config["autoencoder"],
            "autoencoder_fingerprint": autoencoder.fingerprint,
            "sampler": {key: value for key, value in config["sampler"].items() if key != "_target_"},
            "class_names": images.class_names,
            "run": {key: value for key, value in config.items() if key != "run_dir"} | identified,
        },
        objective=build(config["objective"])(denoiser=network, alignment=alignment_loss),
        autoencoder=autoencoder,
        images=images,
        held_out=held_out,
        make_optimizer=build(config["optimizer"]),
        make_tracker=build(config["tracker"]),
        sampler=build(config["sampler"]),
        alignment=alignment,
        target=target,
        init_from=config["init_from"],
        make_evaluation=(
            None
            if config["trainer"]["eval_every"] == 0
            else functools.partial(build_evaluation, config, images, held_out, autoencoder, shape)
        ),
    )


def tell_of_folder(config: dict[str, Any]) -> None:
    """Say what was found in a folder of images, and what should be known before training on it."""
    data, root = config["data"], str(config["data"]["root"])
    looked_at = survey(root)
    if looked_at.broken:
        raise UserError(
            f"{root}/{looked_at.broken[0]}: cannot be opened, as {len(looked_at.broken)} of the images; replace or "
            "remove them"
        )
    line = found(looked_at, data["image_size"], data["channels"], config["model"]["patch_size"])
    log.info("data.root=%s: %s", root, line)
    for hint in hints(looked_at, data["image_size"], data["channels"], data["holdout_every"]):
        log.info("hint: %s", hint)


@entry_point("train")
def main(cfg: DictConfig) -> None:
    """Compose, check, train."""
    config = checked(cfg)
    hydra_config = HydraConfig.get()
    if hydra_config.runtime.choices.data == "folder":
        tell_of_folder(config)
    sweep = hydra_config.mode == RunMode.MULTIRUN
    run_dir = Path(hydra_config.runtime.output_dir) if sweep else Path("runs") / str(config["name"])
    check(config, run_dir)
    if sweep:
        config["name"] = f"{config['name']}/{run_dir.name}"
    launch(run, config["trainer"]["num_processes"], {**config, "run_dir": str(run_dir)})


if __name__ == "__main__":
    main()
