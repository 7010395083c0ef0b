"""The settings of a training run, checked before anything is loaded, and what is built of them."""

import abc
import dataclasses
import logging
import os
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from torch import nn

from ddt.autoencoder import Autoencoder
from ddt.checkpoint import format as ckpt
from ddt.config import Choice, locate
from ddt.data.images import Images
from ddt.data.survey import infer_settings
from ddt.distributed.launch import default_processes
from ddt.epochs import are_steps, epoch_steps, in_epochs, in_steps
from ddt.errors import UserError, require
from ddt.metrics.reference import data_reference, load_reference
from ddt.model.layers import token_grid
from ddt.objective import Objective, check_alignment, network_arguments
from ddt.objective.alignment import Alignment
from ddt.precision import Dtype
from ddt.sampling.settings import SamplerSettings, check_base_head
from ddt.training.evaluation import OnlineEvaluation, OnlineSamples, online_evaluation
from ddt.training.init_from import find_source
from ddt.training.settings import RunSettings, TrainSettings

log = logging.getLogger(__name__)
FLOAT_BYTES = 4
Settings = TypeVar("Settings", bound="RunSettings")


def infer(settings: TrainSettings) -> TrainSettings:
    """Return settings whose nulls are inferred from the images, where they can be."""
    model, data = infer_settings(settings.model, settings.data, settings.autoencoder)
    return dataclasses.replace(settings, model=model, data=data)


def count_steps(settings: Settings) -> Settings:
    """Return settings whose lengths in epochs are steps, and log them; without any nothing is
    opened.

    Raises UserError as the data set does, and for a schedule that cannot be.
    """
    groups = [group for group in ("trainer", "reconstruction") if hasattr(settings, group)]
    if not any(in_epochs(getattr(settings, group)) for group in groups):
        return settings
    count, size = len(settings.data.build(split="train").labels), settings.trainer.global_batch_size
    changed = {group: in_steps(getattr(settings, group), count, size, group) for group in groups}
    steps = [
        f"{group}.{name}={getattr(changed[group], name)}"
        for group in groups
        for name in in_epochs(getattr(settings, group))
    ]
    epoch = epoch_steps(count, size)
    log.info("an epoch of %s images is %s step%s: %s", f"{count:,}", f"{epoch:,}", "s" * (epoch > 1), ", ".join(steps))
    return dataclasses.replace(settings, **changed)


def with_timeshift(objective: Choice, sampler: SamplerSettings, timeshift: float) -> tuple[Choice, SamplerSettings]:
    """Return an objective and a sampler whose null time shifts are this one, of their latents."""
    if objective.settings.get("timeshift", timeshift) is None:
        objective = Choice(objective.target, {**objective.settings, "timeshift": timeshift})
    if sampler.timeshift is None:
        sampler = dataclasses.replace(sampler, timeshift=timeshift)
    return objective, sampler


def inspect(settings: TrainSettings) -> None:
    """Look at the files of the data set before they are trained on; see `inspect_data`."""
    inspect_data(
        settings.data,
        aligned=settings.alignment is not None and settings.alignment.build().needs_target,
        pixels=settings.features is not None and settings.reference is None,
    )


def inspect_data(data: Choice, aligned: bool, pixels: bool) -> None:
    """Look at the files of a data set, on one process: log hints, raise UserError for broken ones.

    aligned, pixels: as for `Images.check_contents`.
    """
    if os.environ.get("RANK", "0") != "0" or not locate(data.target).reads_files:
        return
    images = data.build(split="train")
    images.log_hints()
    images.check_contents(aligned=aligned, pixels=pixels)


def check(settings: TrainSettings) -> None:
    """Build what costs nothing; raise one UserError with a line for each impossible setting."""
    problems: list[str] = []

    def attempt(function: Any, *args: Any, prefix: str = "", **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except (UserError, TypeError) as error:  # TypeError: a file that lacks what its target needs
            problems.append(f"{prefix}{error}")

    if settings.trainer.num_processes is None:
        attempt(settings.trainer.micro_batches, default_processes())
    attempt(with_timeshift(settings.objective, settings.sampler, 1.0)[1].grid, prefix="sampler.")
    with torch.device("meta"):
        token = int(bool(settings.autoencoder.settings.get("class_token")))  # its features are not known yet
        asked = attempt(network_arguments, settings.objective, settings.model, token)
        network = attempt(settings.model.build, in_channels=1, num_classes=1, **(asked or {}))
    if network is not None:
        attempt(check_memory, sum(parameter.numel() for parameter in network.parameters()))
        attempt(with_timeshift(settings.objective, settings.sampler, 1.0)[0].build, denoiser=network)
    attempt(settings.optimizer.build, named_parameters=[("weight", nn.Parameter(torch.zeros(1)))])
    alignment = None if settings.alignment is None else attempt(settings.alignment.build)
    attempt(check_alignment, locate(settings.objective.target), alignment)
    if alignment is not None and network is not None:
        attempt(alignment.check_depth, network.num_alignable_blocks)
    attempt(locate(settings.tracker.target).check, **settings.tracker.settings)
    if settings.init_from and ckpt.newest_checkpoint(settings.run_dir) is None:  # a resumed run does not read it
        attempt(find_source, settings.init_from)
    if settings.sampler.recompute is not None and network is not None and not network.shares_encoder:
        problems.append(
            f"sampler.recompute={settings.sampler.recompute}: this model has no encoder to share; give null"
        )
    if network is not None and asked is not None:
        attempt(check_base_head, settings.sampler, network.base_depth, prefix="sampler.")
    require(not problems, "\n".join(problems))
    trainer = settings.trainer
    if are_steps(trainer.warmup_steps, trainer.max_steps) and trainer.warmup_steps >= trainer.max_steps:
        log.info(
            "hint: trainer.warmup_steps=%d is not below trainer.max_steps=%d: the learning rate rises to the end",
            trainer.warmup_steps, trainer.max_steps,
        )  # fmt: skip


def check_memory(num_parameters: int) -> None:
    """Raise UserError where a network's weights alone exceed the memory of the machine, which each
    process builds them in.
    """
    needed, memory = FLOAT_BYTES * num_parameters, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    require(
        needed < memory,
        f"model: {num_parameters:.3g} parameters are {needed / 2**30:,.0f} GiB of weights, and this machine has "
        f"{memory / 2**30:,.0f} GiB of memory; choose a smaller model.hidden_size or model.depth",
    )


# --- what is built of the settings


@dataclasses.dataclass(frozen=True)
class BaseRun(abc.ABC):
    """What every training has, whatever it trains.

    config: what checkpoints carry inside: `latent_shape`, `autoencoder`, what is needed to use the
    weights, and under `run` all settings, which a resumed run is compared with. held_out:
    validation images, possibly none.
    """

    settings: RunSettings
    config: dict[str, Any]
    images: Images
    held_out: Images

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of a latent."""
        return tuple(self.config["latent_shape"])

    @property
    @abc.abstractmethod
    def what_next(self) -> str:
        """What to do with the trained weights, a line."""

    @property
    @abc.abstractmethod
    def trained(self) -> dict[str, nn.Module]:
        """The parts that are trained, by name."""


@dataclasses.dataclass(frozen=True)
class Run(BaseRun):
    """What a process trains, and with what.

    config: `network`, `sampler` and `class_names`, too. objective: the denoiser with its loss,
    initialised alike on all processes. alignment: of a hidden layer, with its frozen target.
    """

    settings: TrainSettings
    objective: Objective
    autoencoder: Autoencoder
    alignment: Alignment

    @property
    def what_next(self) -> str:
        return f"sample images with: python sample.py ckpt={self.settings.run_dir}"

    @property
    def trained(self) -> dict[str, nn.Module]:
        denoiser = self.objective.denoiser
        names = ("encoder", "decoder") if denoiser.shares_encoder else ("network",)
        parts: dict[str, nn.Module] = dict(zip(names, denoiser.stacks, strict=True))
        return parts if self.alignment.loss is None else {**parts, "alignment's projector": self.alignment.loss}


def build_run(settings: TrainSettings) -> Run:
    """Build data, autoencoder, network and loss; raise UserError where they do not fit."""
    torch.manual_seed(settings.seed)  # the initial weights; nothing later uses the global state
    images, held_out = (settings.data.build(split=split) for split in ("train", "test"))
    autoencoder = settings.autoencoder.build()
    objective, sampler = with_timeshift(settings.objective, settings.sampler, autoencoder.timeshift)
    settings = dataclasses.replace(settings, objective=objective, sampler=sampler)
    shape = autoencoder.latent_shape(images.channels, images.image_size)
    model = settings.model
    grid = token_grid(model.settings["patch_size"], *shape[1:])
    images.check_autoencoder(autoencoder)
    sizes = {"in_channels": shape[0], "num_classes": len(images.class_names)}
    sizes |= network_arguments(settings.objective, model, autoencoder.class_token)
    network = model.build(**sizes)
    alignment = Alignment()
    if settings.alignment is not None:
        chosen = settings.alignment.build()
        alignment = chosen.build(network.hidden_size, grid, images.image_size, images.cached_features)
    if alignment.target is not None:
        images.require_pixels()
    loss = settings.objective.build(denoiser=network, alignment=alignment.loss)
    # what data and frozen weights are, wherever they lie: a resumed run must share it
    fingerprints = {
        "data": images.fingerprint,
        "autoencoder": autoencoder.fingerprint,
        "alignment": alignment.fingerprint,
    }
    plain = settings.plain() | {"model": model.plain()}
    for group, fingerprint in fingerprints.items():
        plain[group] = {**(plain[group] or {}), "fingerprint": fingerprint}
    config = {
        "network": {**model.plain(), **sizes, "prediction": network.prediction},
        "latent_shape": list(shape),
        "autoencoder": settings.autoencoder.plain(),
        "autoencoder_fingerprint": autoencoder.fingerprint,
        "sampler": dataclasses.asdict(settings.sampler),
        "class_names": images.class_names,
        "run": plain,
    }
    return Run(settings, config, images, held_out, loss, autoencoder, alignment)


def build_evaluation(run: Run, accelerator: Accelerator) -> OnlineEvaluation | None:
    """Return the evaluation of a run's samples, against a reference file or its own training
    images.
    """
    settings, device = run.settings, accelerator.device
    if settings.trainer.eval_every == 0 or settings.features is None:
        return None
    if settings.reference is None:
        run.images.require_pixels()
        reference = data_reference("training images", run.images, run.held_out)
        extractor = settings.features.extractor(device, run.images)
    else:
        reference, extractor = load_reference(settings.reference, None, settings.features, device)
    batch_size, _ = settings.trainer.micro_batches(accelerator.num_processes)
    precision = settings.trainer.mixed_precision
    dtype: Dtype = "fp32" if precision == "no" or precision == "tf32" else precision
    return online_evaluation(
        reference,
        extractor,
        OnlineSamples(
            run.autoencoder, run.latent_shape, settings.sampler, settings.trainer.eval_samples, batch_size,
            dtype,
        ),
        accelerator,
    )  # fmt: skip
