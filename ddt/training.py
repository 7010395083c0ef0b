"""The training loop, to be read from top to bottom, and the settings it follows.

Shapes: B micro-batch, C H W latent. Batches come from `data.TrainingStream`, so that a step is a function of
(seed, step) and the weights: nothing random happens in here.
"""

import contextlib
import dataclasses
import logging
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from ddt import checkpoint as ckpt
from ddt.autoencoder import Autoencoder
from ddt.data import (
    PREVIEW,
    Images,
    PositionSampler,
    TrainingStream,
    draws,
    training_batches,
    validation_batch,
)
from ddt.ema import EMA
from ddt.errors import UserError, require
from ddt.flow import TimeDistribution, training_times
from ddt.generation import image_grid, write_png
from ddt.model import Denoiser
from ddt.objective import FlowMatching, flow_matching_loss
from ddt.sampling import SamplerSettings, sample
from ddt.tracking import JsonlTracker

log = logging.getLogger(__name__)
MAX_VALIDATION_IMAGES = 2048


@dataclasses.dataclass(frozen=True)
class TrainerSettings:
    """How long, how large and how often; see conf/trainer.

    max_steps: optimizer steps. global_batch_size: images a step over all processes. micro_batch_size: images a
    process takes at
    once (None: its whole share); gradients are accumulated over the rest. mixed_precision: "bf16" autocast over float32
    weights, or "fp32" ("no", Accelerate's word, means the same). num_processes: None uses every visible GPU, or one CPU
    process. ema_decay: of the averaged weights. warmup_steps: linear warm-up of the learning rate; lr_schedule:
    "constant", or
    "linear" decay to 0 at max_steps. The `_every` periods count steps, 0 is never; the last step is always
    saved, validated and previewed. num_workers: loading processes.

    Raises UserError for values that cannot be.
    """

    max_steps: int
    global_batch_size: int
    micro_batch_size: int | None
    mixed_precision: Literal["bf16", "fp32", "no"]
    num_processes: int | None
    ema_decay: float
    warmup_steps: int
    lr_schedule: Literal["constant", "linear"]
    save_every: int
    log_every: int
    validate_every: int
    preview_every: int
    num_workers: int

    def __post_init__(self) -> None:
        for key in ("max_steps", "global_batch_size", "log_every"):
            require(getattr(self, key) >= 1, f"trainer.{key}={getattr(self, key)}: must be at least 1")
        for key in ("warmup_steps", "save_every", "validate_every", "preview_every", "num_workers"):
            require(getattr(self, key) >= 0, f"trainer.{key}={getattr(self, key)}: must be at least 0")
        for key in ("micro_batch_size", "num_processes"):
            value = getattr(self, key)
            require(value is None or value >= 1, f"trainer.{key}={value}: must be at least 1, or null")
        require(
            0 <= self.ema_decay < 1,
            f"trainer.ema_decay={self.ema_decay}: must lie in 0..1 (published: 0.9999)",
        )
        if self.lr_schedule == "linear":
            require(
                self.warmup_steps < self.max_steps,
                f"trainer.warmup_steps={self.warmup_steps}: must be below trainer.max_steps={self.max_steps}",
            )
        self.micro_batches(self.num_processes or 1)

    def micro_batches(self, num_processes: int) -> tuple[int, int]:
        """Return (images a micro-batch, micro-batches a step) of each of `num_processes` processes, or raise
        UserError.
        """
        share, rest = divmod(self.global_batch_size, num_processes)
        require(
            rest == 0 and share > 0,
            f"trainer.global_batch_size={self.global_batch_size} cannot be divided among {num_processes} processes: "
            f"choose a multiple of {num_processes}",
        )
        micro = self.micro_batch_size or share
        require(
            share % micro == 0,
            f"trainer.micro_batch_size={micro} does not divide the {share} images of each process "
            f"(trainer.global_batch_size={self.global_batch_size} over {num_processes}): choose a divisor of {share}",
        )
        return micro, share // micro

    def lr_factor(self, step: int) -> float:
        """Return what the base learning rate is multiplied by in step `step`, counted from 0."""
        warmup = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        if self.lr_schedule == "constant" or step < self.warmup_steps:
            return warmup
        return (self.max_steps - step) / (self.max_steps - self.warmup_steps)

    def due(self, every: int, step: int) -> bool:
        """Tell whether something done `every` so many steps is due after `step` steps; at the end it always is."""
        return step == self.max_steps or (every > 0 and step % every == 0)


def make_accelerator(mixed_precision: str) -> Accelerator:
    """Return the Accelerator of this process: its GPU where there is one, else the CPU (gloo between processes)."""
    precision = "bf16" if mixed_precision == "bf16" else "no"
    return Accelerator(mixed_precision=precision, cpu=not torch.cuda.is_available())


def to_latents(batch: dict[str, Tensor], autoencoder: Autoencoder, device: torch.device) -> dict[str, Tensor]:
    """Move a batch to the device and encode its images: the arguments of `FlowMatching.forward`."""
    moved = {key: value.to(device, non_blocking=True) for key, value in batch.items()}
    posterior_noise = moved.pop("posterior_noise", None)
    moved["latents"] = autoencoder.encode(moved.pop("images"), posterior_noise)
    return moved


class Meter:
    """Sums of losses on the device between two log rows: reading them is the loop's only wait for the device."""

    def __init__(self, device: torch.device, state: dict[str, Any] | None = None) -> None:
        state = state or {"sums": {}, "count": 0}
        self.sums: dict[str, Tensor] = {key: value.to(device) for key, value in state["sums"].items()}
        self.count: int = state["count"]

    def add(self, losses: dict[str, Tensor], weight: float) -> None:
        """Add a micro-batch's losses, scalars on the device."""
        for key, value in losses.items():
            value = weight * value.detach().float()
            self.sums[key] = self.sums[key] + value if key in self.sums else value

    def state(self, accelerator: Accelerator) -> dict[str, Any]:
        """Return what a checkpoint keeps, averaged over processes, so that a resumed run logs the same means."""
        sums = {key: accelerator.reduce(value.clone(), reduction="mean").cpu() for key, value in self.sums.items()}
        return {"sums": sums, "count": self.count}

    def flush(self, accelerator: Accelerator) -> dict[str, float]:
        """Return the means over steps and processes, and start again."""
        means = accelerator.reduce(torch.stack(list(self.sums.values())), reduction="mean") / self.count
        values = dict(zip(self.sums, means.tolist(), strict=True))
        self.sums, self.count = {}, 0
        return values


@torch.no_grad()
def validation_loss(
    model: Denoiser,
    time_distribution: TimeDistribution,
    images: Images,
    autoencoder: Autoencoder,
    accelerator: Accelerator,
    shape: tuple[int, int, int],
    batch_size: int,
) -> float:
    """Return the flow-matching loss of a network on held-out images at fixed times and noise.

    The first 2,048 images of the held-out split (`shape`: that of their latents), labels kept, shared among the
    processes.
    """
    count = min(len(images.labels), MAX_VALIDATION_IMAGES)
    mine = np.arange(accelerator.process_index, count, accelerator.num_processes)
    total = torch.zeros((), device=accelerator.device, dtype=torch.float64)
    for start in range(0, len(mine), batch_size):
        indices = mine[start : start + batch_size]
        batch = to_latents(validation_batch(images, shape, indices), autoencoder, accelerator.device)
        t = training_times(batch["time_normal"], time_distribution)
        with accelerator.autocast():
            loss = flow_matching_loss(model, batch["latents"], batch["y"], batch["noise"], t)
        total += loss.double() * len(indices)
    return accelerator.reduce(total, reduction="sum").item() / count


@torch.no_grad()
def write_preview(
    path: Path,
    model: Denoiser,
    autoencoder: Autoencoder,
    accelerator: Accelerator,
    shape: tuple[int, int, int],
    sampler: SamplerSettings,
) -> None:
    """Draw a grid of a network's samples to `path`: up to ten classes across, four seeds down, always the same
    noise.
    """
    columns = min(model.num_classes, 10)
    noise = np.stack([draws(0, PREVIEW, k).standard_normal(shape, dtype=np.float32) for k in range(4 * columns)])
    y = torch.arange(columns, device=accelerator.device).repeat(4)
    with accelerator.autocast():
        latents = sample(model, torch.from_numpy(noise).to(accelerator.device), y, **sampler.arguments())
        images = autoencoder.decode(latents)
    write_png(path, image_grid(images.cpu(), columns))


def check_same_training(saved: dict[str, Any], now: dict[str, Any], folder: Path) -> None:
    """Raise UserError where a checkpoint's configuration and the present one describe different trainings; log other
    changes.
    """
    frozen = ckpt.frozen_differences(saved, now)
    if frozen:
        changes = ", ".join(f"{key} {old} -> {new}" for key, (old, new) in frozen.items())
        raise UserError(f"{folder}: belongs to another training ({changes}); give this one another name=")
    for key, (old, new) in ckpt.differences(saved, now).items():
        log.info("changed since the checkpoint: %s %s -> %s", key, old, new)


def train(
    settings: TrainerSettings,
    run_dir: Path,
    config: dict[str, Any],
    objective: FlowMatching,
    autoencoder: Autoencoder,
    images: Images,
    held_out: Images,
    make_optimizer: Callable[..., torch.optim.Optimizer],
    make_tracker: Callable[..., JsonlTracker],
    sampler: SamplerSettings,
) -> None:
    """Train until `settings.max_steps`, going on from the newest checkpoint of `run_dir` where there is one.

    Args:
        settings: how long, how large, how often.
        run_dir: gets `config.json`, `metrics.jsonl`, `checkpoints/`, `previews/`.
        config: what checkpoints carry inside: `network`, `latent_shape`, `autoencoder`, `sampler`, `class_names`, and
            under `run` the whole configuration, which a resumed run is compared with.
        objective: the denoiser with its loss, initialised alike on all processes.
        autoencoder, images, held_out: the border to pixels, the training images, the validation images (may be none).
        make_optimizer: parameters → optimizer. make_tracker: (run_dir, step, config) → tracker, on process 0 alone.
        sampler: for the preview grids.

    Raises UserError where a setting is impossible or the checkpoint belongs to another training, FloatingPointError
    when the loss is not finite any more.
    """
    # --- processes and devices
    accelerator = make_accelerator(settings.mixed_precision)
    rank, num_processes, device = accelerator.process_index, accelerator.num_processes, accelerator.device
    require(
        settings.num_processes in (None, num_processes),
        f"trainer.num_processes={settings.num_processes}, but {num_processes} processes run: launch as many",
    )
    micro_batch_size, num_micro = settings.micro_batches(num_processes)
    shape: tuple[int, int, int] = tuple(config["latent_shape"])

    # --- weights, their average, optimizer
    autoencoder = autoencoder.to(device)
    model = accelerator.prepare(objective)  # all processes leave this with the weights of process 0
    denoiser = objective.denoiser
    optimizer = make_optimizer(objective.parameters())
    base_lrs = [group["lr"] for group in optimizer.param_groups]
    ema = EMA(denoiser, settings.ema_decay)
    meter, step = Meter(device), 0

    # --- resume
    newest = ckpt.newest_checkpoint(run_dir)
    if newest is not None:
        saved, state = ckpt.read_config(newest), ckpt.read_train_state(newest)
        check_same_training(saved["run"], config["run"], newest)
        denoiser.load_state_dict(ckpt.read_weights(newest, "model"), strict=True)
        ema.model.load_state_dict(ckpt.read_weights(newest, "ema"), strict=True)
        optimizer.load_state_dict(state["optimizer"])
        meter, step = Meter(device, state["meter"]), saved["step"]
    if step >= settings.max_steps:
        log.info("%s: complete at step %d; raise trainer.max_steps to train longer", run_dir, step)
        return
    accelerator.wait_for_everyone()  # nobody writes before all have read

    # --- the record and the data, both from this step on
    tracker = None
    if rank == 0:
        log.info(
            "%s: %s to step %d",
            run_dir,
            f"resuming at step {step}" if step else "training",
            settings.max_steps,
        )
        run_dir.mkdir(parents=True, exist_ok=True)
        ckpt.write_json(run_dir / "config.json", {**config["run"], "num_processes": num_processes})
        tracker = make_tracker(run_dir=run_dir, step=step, config=config["run"])
    stream = TrainingStream(images, config["run"]["seed"], shape, autoencoder.stochastic)
    positions = PositionSampler(
        step, settings.max_steps, settings.global_batch_size, micro_batch_size, rank, num_processes
    )
    batches = training_batches(stream, positions, settings.num_workers, pin_memory=device.type == "cuda")
    progress = tqdm(
        total=settings.max_steps * settings.global_batch_size,
        initial=step * settings.global_batch_size,
        unit="img",
        unit_scale=True,
        desc=run_dir.name,
        disable=rank != 0,
        mininterval=1.0,
    )
    clock, clock_step = time.perf_counter(), step
    try:
        while step < settings.max_steps:
            # --- one optimizer step: gradients summed over micro-batches, averaged over processes
            for group, base_lr in zip(optimizer.param_groups, base_lrs, strict=True):
                group["lr"] = base_lr * settings.lr_factor(step)
            for micro in range(num_micro):
                batch = to_latents(next(batches), autoencoder, device)
                with contextlib.nullcontext() if micro == num_micro - 1 else accelerator.no_sync(model):
                    losses = model(**batch)
                    accelerator.backward(losses["loss"] / num_micro)
                meter.add(losses, 1 / num_micro)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            ema.update(denoiser)
            step += 1
            meter.count += 1
            progress.update(settings.global_batch_size)

            # --- log
            row: dict[str, float] = {}
            if settings.due(settings.log_every, step):
                row = meter.flush(accelerator)
                if not math.isfinite(row["loss"]):
                    good = ckpt.newest_checkpoint(run_dir)
                    raise FloatingPointError(
                        f"loss is {row['loss']} at step {step}; the last good checkpoint is {good}"
                    )
                row["lr"] = optimizer.param_groups[0]["lr"]
                seconds = time.perf_counter() - clock
                row["images_per_second"] = (step - clock_step) * settings.global_batch_size / seconds
                progress.set_postfix(step=step, loss=f"{row['loss']:.4f}")
            # --- validate and preview the averaged weights
            if len(held_out.labels) and settings.due(settings.validate_every, step):
                row["validation_loss"] = validation_loss(
                    ema.model,
                    objective.time_distribution,
                    held_out,
                    autoencoder,
                    accelerator,
                    shape,
                    micro_batch_size,
                )
            if tracker is not None and row:
                tracker.log(step, row)
            if tracker is not None and settings.due(settings.preview_every, step):
                picture = run_dir / "previews" / f"step_{step:07d}.png"
                write_preview(picture, ema.model, autoencoder, accelerator, shape, sampler)
                tracker.image(step, "preview", picture)
            if row:
                clock, clock_step = time.perf_counter(), step  # the rate is that of training alone
            # --- save
            if settings.due(settings.save_every, step):
                train_state = {"optimizer": optimizer.state_dict(), "meter": meter.state(accelerator)}
                if rank == 0:
                    ckpt.write_checkpoint(
                        ckpt.checkpoint_folder(run_dir, step),
                        {"format_version": ckpt.FORMAT_VERSION, "step": step, **config},
                        ema=ema.model.state_dict(),
                        model=denoiser.state_dict(),
                        train_state=train_state,
                    )
                accelerator.wait_for_everyone()
    finally:
        progress.close()
        if tracker is not None:
            tracker.finish()
    if rank == 0:
        log.info("trained to step %d: %s", step, ckpt.checkpoint_folder(run_dir, step))
