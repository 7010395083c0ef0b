"""The training loop, to be read from top to bottom.

Shapes: B micro-batch, C H W latent. Batches come from `data.TrainingStream`, so that a step is a function of
(seed, step) and the weights: nothing random happens in here.
"""

import contextlib
import datetime
import logging
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from tqdm import tqdm

from ddt import checkpoint as ckpt
from ddt.alignment import REPA, Dispersive, Target
from ddt.autoencoder import Autoencoder
from ddt.data import PositionSampler, TrainingStream, load_batches
from ddt.ema import EMA
from ddt.errors import UserError, require
from ddt.files import write_json
from ddt.images import Images
from ddt.initial import initialise
from ddt.monitoring import Meter, all_finite, to_latents, validation_loss, write_preview
from ddt.objective import FlowMatching
from ddt.online import OnlineEvaluation
from ddt.sampling import SamplerSettings
from ddt.settings import TrainerSettings
from ddt.tracking import JsonlTracker

log = logging.getLogger(__name__)


def make_accelerator(mixed_precision: str, patience: datetime.timedelta | None = None) -> Accelerator:
    """Return the Accelerator of this process: its GPU where there is one, else the CPU (gloo between processes).

    patience: how long the processes wait for each other before they give up; None is torch's default.
    """
    precision = "bf16" if mixed_precision == "bf16" else "no"
    handlers = [] if patience is None else [InitProcessGroupKwargs(timeout=patience)]
    return Accelerator(mixed_precision=precision, cpu=not torch.cuda.is_available(), kwargs_handlers=handlers)


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


def not_finite(what: str, step: int, run_dir: Path) -> FloatingPointError:
    """Return the error that ends a diverged run, with the last checkpoint whose weights were finite."""
    good = ckpt.newest_checkpoint(run_dir)
    return FloatingPointError(
        f"{what} at step {step}: lower optimizer.lr or try another seed; "
        f"{f'the last good checkpoint is {good}' if good else 'there is no checkpoint yet'}"
    )


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
    alignment: REPA | Dispersive | None = None,
    target: Target | None = None,
    init_from: str | None = None,
    make_evaluation: Callable[[Accelerator], OnlineEvaluation] | None = None,
) -> None:
    """Train until `settings.max_steps`, going on from the newest checkpoint of `run_dir` where there is one.

    Args:
        settings: how long, how large, how often.
        run_dir: gets `config.json`, `metrics.jsonl`, `checkpoints/`, `previews/`.
        config: what checkpoints carry inside: `network`, `latent_shape`, `autoencoder`, `sampler`, `class_names`, and
            under `run` the whole configuration, which a resumed run is compared with.
        objective: the denoiser with its loss, initialised alike on all processes.
        autoencoder, images, held_out: the border to pixels, the training images, the validation images (may be none).
        make_optimizer: (name, parameter) pairs → optimizer. make_tracker: (run_dir, step, config) → tracker, on
            process 0 alone.
        sampler: for the preview grids.
        alignment: how a hidden layer is aligned, where the objective does; target: the network whose features it is
            aligned to, where they do not come from a cache.
        init_from: run, checkpoint or published file whose weights a new run starts from (`ddt.initial`).
        make_evaluation: accelerator → evaluation of samples every `settings.eval_every` steps, on all processes.

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
    target = target.to(device) if target is not None else None
    model = accelerator.prepare(objective)  # all processes leave this with the weights of process 0
    denoiser = objective.denoiser
    optimizer = make_optimizer(objective.named_parameters())
    base_lrs = [group["lr"] for group in optimizer.param_groups]
    ema = EMA(denoiser, settings.ema_decay)
    meter, step = Meter(device), 0

    # --- resume
    ckpt.refuse_incomplete(run_dir)
    newest = ckpt.newest_checkpoint(run_dir)
    if newest is not None:
        saved, state = ckpt.read_config(newest), ckpt.read_train_state(newest)
        check_same_training(saved["run"], config["run"], newest)
        require(
            saved["latent_shape"] == config["latent_shape"],
            f"{newest}: was trained on latents of shape {saved['latent_shape']}, not {config['latent_shape']}; give "
            "this one another name=",
        )
        denoiser.load_state_dict(ckpt.read_weights(newest, "model"), strict=True)
        ema.model.load_state_dict(ckpt.read_weights(newest, "ema"), strict=True)
        if objective.alignment is not None:
            objective.alignment.load_state_dict(state["alignment"], strict=True)
        optimizer.load_state_dict(state["optimizer"])
        meter, step = Meter(device, state["meter"]), saved["step"]
    elif init_from is not None:
        initialise(
            init_from,
            config["network"],
            config["autoencoder_fingerprint"],
            config["class_names"],
            objective,
            ema,
        )
    if step >= settings.max_steps:
        longer = (
            "raise trainer.max_steps" if settings.lr_schedule == "constant" else "start another run with init_from="
        )
        log.info("%s: complete at step %d; %s to train longer", run_dir, step, longer)
        return
    evaluation = None if make_evaluation is None else make_evaluation(accelerator)
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
        write_json(run_dir / "config.json", {**config["run"], "num_processes": num_processes})
        if evaluation is not None:
            evaluation.keep_receipt(run_dir / "evaluation.json")
        tracker = make_tracker(run_dir=run_dir, step=step, config=config["run"])
    align_until: float = 0  # step from which on the alignment is left out
    if alignment is not None:
        align_until = math.inf if alignment.until_step is None else alignment.until_step
    read_until = align_until * settings.global_batch_size if alignment is not None and alignment.needs_target else 0
    stream = TrainingStream(images, config["run"]["seed"], shape, autoencoder.stochastic, read_until)
    positions = PositionSampler(
        step, settings.max_steps, settings.global_batch_size, micro_batch_size, rank, num_processes
    )
    batches = load_batches(stream, positions, settings.num_workers, pin_memory=device.type == "cuda")
    progress = tqdm(
        total=settings.max_steps * settings.global_batch_size,
        initial=step * settings.global_batch_size,
        unit="img",
        unit_scale=True,
        desc=run_dir.name,
        disable=rank != 0,
        mininterval=1.0,
    )
    if num_processes > 1:
        # DDP sorts its buckets anew after its first backward pass. One discarded pass over the run's first positions
        # makes the first step after a resume add gradients in the same order as it did in the uninterrupted run.
        first = PositionSampler(0, 1, settings.global_batch_size, micro_batch_size, rank, num_processes)
        align = align_until > 0
        batch = to_latents(stream[next(iter(first))], autoencoder, accelerator, target if align else None)
        accelerator.backward(model(**batch, align=align)["loss"])
        optimizer.zero_grad(set_to_none=True)
    clock, clock_step, pauses = time.perf_counter(), step, 0.0
    try:
        while step < settings.max_steps:
            # --- one optimizer step: gradients summed over micro-batches, averaged over processes
            for group, base_lr in zip(optimizer.param_groups, base_lrs, strict=True):
                group["lr"] = base_lr * settings.lr_factor(step)
            align = step < align_until
            for micro in range(num_micro):
                batch = to_latents(next(batches), autoencoder, accelerator, target if align else None)
                with contextlib.nullcontext() if micro == num_micro - 1 else accelerator.no_sync(model):
                    losses = model(**batch, align=align)
                    accelerator.backward(losses["loss"] / num_micro)
                meter.add(losses, 1 / num_micro)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            ema.update(denoiser)
            step += 1
            progress.update(settings.global_batch_size)

            # --- log
            if step == settings.max_steps or step % settings.log_every == 0:
                row: dict[str, Any] = meter.means(accelerator)
                if not math.isfinite(row["loss"]):
                    raise not_finite(f"the loss is {row['loss']}", step, run_dir)
                if step % settings.log_every == 0:
                    meter.reset()
                else:
                    row["partial"] = True  # a longer run will log the whole of it
                seconds = time.perf_counter() - clock - pauses
                row["lr"] = optimizer.param_groups[0]["lr"]
                row["images_per_second"] = (step - clock_step) * settings.global_batch_size / seconds
                progress.set_postfix(step=step, loss=f"{row['loss']:.4f}")
                if tracker is not None:
                    tracker.log(step, row)
                clock, clock_step, pauses = time.perf_counter(), step, 0.0
            # --- save, before anything that could fail
            pause = time.perf_counter()
            if step == settings.max_steps or settings.due(settings.save_every, step):
                if not all_finite(ema.model):
                    raise not_finite("a weight is no finite number", step, run_dir)
                train_state = {"optimizer": optimizer.state_dict(), "meter": meter.state(accelerator)}
                if objective.alignment is not None:
                    train_state["alignment"] = objective.alignment.state_dict()
                if rank == 0:
                    ckpt.write_checkpoint(
                        ckpt.checkpoint_folder(run_dir, step),
                        {"format_version": ckpt.FORMAT_VERSION, "step": step, **config},
                        ema=ema.model.state_dict(),
                        model=denoiser.state_dict(),
                        train_state=train_state,
                    )
                accelerator.wait_for_everyone()
            # --- validate, preview and evaluate the averaged weights
            if len(held_out.labels) and settings.due(settings.validate_every, step):
                loss = validation_loss(
                    ema.model, objective.time_distribution, held_out, autoencoder, accelerator, shape, micro_batch_size
                )
                if tracker is not None:
                    tracker.log(step, {"validation_loss": loss})
            if tracker is not None and settings.due(settings.preview_every, step):
                picture = run_dir / "previews" / f"step_{step:07d}.png"
                write_preview(picture, ema.model, autoencoder, accelerator, shape, sampler)
                tracker.image(step, "preview", picture)
            if evaluation is not None and settings.due(settings.eval_every, step):
                measured = evaluation(ema.model, step)
                if tracker is not None:
                    tracker.log(step, measured)
            pauses += time.perf_counter() - pause  # images_per_second is the rate of training alone
    finally:
        progress.close()
        if tracker is not None:
            tracker.finish()
    if rank == 0:
        log.info("trained to step %d: %s", step, ckpt.checkpoint_folder(run_dir, step))
