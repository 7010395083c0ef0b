"""The training loop, to be read from top to bottom.

Shapes: B micro-batch, C H W latent. Batches come from `data.TrainingStream`, so that a step is a
function of (seed, step) and the weights: nothing random happens in here.
"""

import contextlib
import datetime
import functools
import logging
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import filelock
import torch
from accelerate import Accelerator
from torch import nn
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from ddt.autoencoder import Autoencoder
from ddt.checkpoint import folder as ckpt
from ddt.data.images import Images
from ddt.data.stream import PositionSampler, TrainingStream, load_batches
from ddt.distributed.compile import compile_blocks, compiles
from ddt.distributed.launch import agree
from ddt.distributed.prepare import begin_alike, main_decides, make_accelerator, micro_batch, prepare
from ddt.errors import Stopped, UserError, first_line, require
from ddt.files import write_json
from ddt.objective import FlowMatching
from ddt.objective.alignment import REPA, Dispersive, Target
from ddt.sampling.settings import SamplerSettings
from ddt.training.ema import EMA, average_rules
from ddt.training.evaluation import OnlineEvaluation
from ddt.training.init_from import initialise
from ddt.training.measurements import Measurements, due, missing
from ddt.training.monitoring import to_latents
from ddt.training.saving import Saver, sweep
from ddt.training.settings import TrainerSettings
from ddt.training.state import TRAIN_FORMAT, TrainingState
from ddt.training.stopping import MAX_SKIPPED, StopRequests, end_of_job, read_status, write_status
from ddt.training.throughput import Clock, target_flops, training_flops
from ddt.training.tracking import JsonlTracker

log = logging.getLogger(__name__)
PATIENCE = datetime.timedelta(hours=1)  # for process 0 to save and to score while the others wait


def check_same_training(saved: dict[str, Any], now: dict[str, Any], folder: Path) -> None:
    """Raise UserError where a checkpoint's configuration and the present one describe different
    trainings; log other changes.
    """
    frozen = ckpt.frozen_differences(saved, now)
    if frozen:
        changes = ", ".join(f"{key} {old} -> {new}" for key, (old, new) in frozen.items())
        raise UserError(f"{folder}: belongs to another training ({changes}); give this one another name=")
    for key, (old, new) in ckpt.differences(saved, now).items():
        log.info("changed since the checkpoint: %s %s -> %s", key, old, new)


def not_finite(what: str, step: int, run_dir: Path) -> FloatingPointError:
    """Return the error that ends a diverged run, with the last checkpoint whose weights were
    finite.
    """
    good = ckpt.newest_checkpoint(run_dir)
    return FloatingPointError(
        f"{what} at step {step}: try a lower optimizer.lr or another seed in a run of another name; "
        f"{f'the last good checkpoint, for init_from, is {good}' if good else 'there is no checkpoint yet'}"
    )


@contextlib.contextmanager
def reserved(run_dir: Path, accelerator: Accelerator) -> Iterator[None]:
    """Hold a run's folder for this command, on all processes; raise UserError where another one
    trains in it.

    The lock is the operating system's and goes with the process, however that ends.
    """
    new = [folder for folder in (run_dir, *run_dir.parents) if not folder.exists()]
    lock = filelock.FileLock(run_dir / ".lock")

    def take() -> None:
        run_dir.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout as error:
            raise UserError(
                f"{run_dir}: another command is training in this folder; wait for it, or give this one another name="
            ) from error

    main_decides(accelerator, take)
    try:
        yield
    finally:
        if accelerator.is_main_process:
            if new and os.listdir(run_dir) == [".lock"]:  # refused before anything was written
                (run_dir / ".lock").unlink()
                with contextlib.suppress(OSError):  # beside it another run may have begun
                    for folder in new:
                        folder.rmdir()
            lock.release()


@contextlib.contextmanager
def reported(run_dir: Path, state: TrainingState) -> Iterator[None]:
    """Keep `status.json` of a run true: running, and at the end done, preempted or failed, with the
    reason.
    """
    main = state.accelerator.is_main_process
    if main:
        write_status(run_dir, "running", state.step)
    try:
        yield
    except Stopped as stop:
        if main:
            write_status(run_dir, "preempted", state.step, str(stop))
        raise
    except (UserError, FloatingPointError, OSError) as error:  # any process may be the one that fails
        write_status(run_dir, "failed", state.step, first_line(error))
        raise
    except BaseException as error:  # it may be another process that failed, and that has told why
        if read_status(run_dir).get("state") != "failed":
            write_status(run_dir, "failed", state.step, first_line(error))
        raise
    if main:
        write_status(run_dir, "done", state.step)


def begin(
    settings: TrainerSettings,
    run_dir: Path,
    config: dict[str, Any],
    objective: FlowMatching,
    make_optimizer: Callable[..., torch.optim.Optimizer],
    init_from: str | None,
    accelerator: Accelerator,
    compiled: bool,
) -> tuple[nn.Module, TrainingState]:
    """Return the model to call and the state of a run, from its newest sound checkpoint or from the
    start. compiled: whether the model's blocks are, those of averages never.

    Raises UserError where the checkpoint belongs to another training.
    """
    if accelerator.is_main_process:
        sweep(run_dir)
    newest = main_decides(accelerator, lambda: ckpt.sound_checkpoint(run_dir))
    if newest is not None:
        saved = ckpt.read_config(newest)
        require(
            saved.get("train_format") == TRAIN_FORMAT,
            f"{newest}: was written by another version, which kept other things for training; its weights can start a "
            f"new run: init_from={newest} and another name=",
        )
        check_same_training(saved["run"], config["run"], newest)
        require(
            saved["latent_shape"] == config["latent_shape"],
            f"{newest}: was trained on latents of shape {saved['latent_shape']}, not {config['latent_shape']}; give "
            "this one another name=",
        )
    begin_alike(objective, accelerator)
    rules = average_rules(settings.ema_decay, settings.ema_decays, settings.ema_powers)
    averages = {name: EMA(objective.denoiser, rule) for name, rule in rules.items()}
    if newest is None and init_from is not None:
        initialise(
            init_from, config["network"], config["autoencoder_fingerprint"], config["class_names"], objective, averages
        )
    if compiled:
        compile_blocks(objective.denoiser, dynamic=False)  # all micro-batches are of one size
    model = prepare(objective, accelerator, settings.parallelism)
    for average in averages.values():
        average.place(accelerator.device, sharded=settings.parallelism == "fsdp")
    state = TrainingState(objective, make_optimizer(objective.named_parameters()), averages, accelerator)
    if newest is not None:
        state.load(newest)
    accelerator.wait_for_everyone()  # nobody writes before all have read
    return model, state


def finish(tracker: JsonlTracker, kind: type[BaseException] | None, *_: Any) -> None:
    """Close a run's record, on the way out of its context."""
    tracker.finish(failed=kind is not None)


def alignment_end(alignment: REPA | Dispersive | None) -> float:
    """Return the step from which on the alignment is left out."""
    if alignment is None:
        return 0
    return math.inf if alignment.until_step is None else alignment.until_step


def progress_bar(settings: TrainerSettings, name: str, step: int, shown: bool) -> tqdm:
    """Return the bar of a run, in images."""
    size = settings.global_batch_size
    total, initial = settings.max_steps * size, step * size
    return tqdm(
        total=total, initial=initial, unit="img", unit_scale=True, desc=name, disable=not shown, mininterval=1.0
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
    """Train until `settings.max_steps`, going on from the newest sound checkpoint of `run_dir`, if
    any.

    Args:
        settings: how long, how large, how often.
        run_dir: gets `config.json`, `status.json`, `metrics.jsonl`, `checkpoints/`, `export/`,
        `previews/`.
        config: what checkpoints carry inside: `network`, `latent_shape`, `autoencoder`, `sampler`,
            `class_names`, and under `run` the whole configuration, which a resumed run is compared
            with.
        objective: the denoiser with its loss, initialised alike on all processes. autoencoder,
        images, held_out: the border to pixels, the training images, the validation images (may be
        none).
        make_optimizer: parameters → optimizer. make_tracker: (run_dir, step, config) → tracker, on
        process 0 alone.
        sampler: for the preview grids.
        alignment: how a hidden layer is aligned, where the objective does; target: the network
            whose features it is aligned to, where they do not come from a cache.
        init_from: run, checkpoint or published file whose weights a new run starts from
        (`ddt.training.init_from`).
        make_evaluation: accelerator → evaluation of samples every `settings.eval_every` steps, on
        all processes.

    Raises UserError where a setting is impossible or the checkpoint belongs to another training,
    Stopped when the run was asked to end early (`ddt.training.stopping`), FloatingPointError when
    gradients are no finite numbers any more, OSError when checkpoints cannot be written.
    """
    # --- processes and devices
    started = time.time()
    accelerator = make_accelerator(settings.mixed_precision, PATIENCE)
    rank, num_processes, device = accelerator.process_index, accelerator.num_processes, accelerator.device
    require(
        settings.num_processes in (None, num_processes),
        f"trainer.num_processes={settings.num_processes}, but {num_processes} processes run: launch as many",
    )
    agree(accelerator, {"run folder": str(run_dir.resolve()), **config["run"]})
    micro_batch_size, num_micro = settings.micro_batches(num_processes)
    compiled = compiles("trainer.compile", settings.compile, device.type == "cuda", device)
    shape: tuple[int, int, int] = tuple(config["latent_shape"])

    with contextlib.ExitStack() as stack:
        # --- weights, averages and optimizer, from a checkpoint where there is one
        stack.enter_context(reserved(run_dir, accelerator))
        autoencoder = autoencoder.to(device)
        target = target.to(device) if target is not None else None
        flops = training_flops(objective, shape), target_flops(target, images.image_size)
        model, state = begin(settings, run_dir, config, objective, make_optimizer, init_from, accelerator, compiled)
        saver = Saver(run_dir, settings, config, accelerator)
        saver.tidy(state.step)
        left = main_decides(accelerator, lambda: missing(settings, held_out, run_dir, state.step))
        if state.step >= settings.max_steps and not left:
            constant = settings.lr_schedule == "constant"
            longer = "raise trainer.max_steps" if constant else "start another run with init_from="
            log.info("%s: complete at step %d; %s to train longer", run_dir, state.step, longer)
            if rank == 0 and read_status(run_dir).get("state") != "done":  # it was killed in the last moment
                write_status(run_dir, "done", state.step)
            return
        saver.check_space(state)
        evaluation = None if make_evaluation is None else make_evaluation(accelerator)
        measure = Measurements(
            run_dir, objective, autoencoder, held_out, sampler, shape, micro_batch_size, evaluation, accelerator
        )

        # --- the record and the data, both from this step on
        if rank == 0:
            begun = f"resuming at step {state.step}" if state.step else "training"
            log.info("%s: %s to step %d", run_dir, begun, settings.max_steps)
            write_json(run_dir / "config.json", {**config["run"], "num_processes": num_processes})
            if evaluation is not None:
                evaluation.keep_receipt(run_dir / "evaluation.json")
        stack.enter_context(reported(run_dir, state))
        stack.enter_context(logging_redirect_tqdm())  # no line is written into the bar
        requests = stack.enter_context(
            StopRequests(run_dir, end_of_job(settings.max_hours, started), device, rank, num_processes)
        )
        tracker = None
        if rank == 0:
            ended = state.step >= settings.max_steps
            tracker = make_tracker(run_dir=run_dir, step=state.step, config=config["run"], ended=ended)
            stack.push(functools.partial(finish, tracker))
        layout = settings.global_batch_size, micro_batch_size, rank, num_processes
        align_until = alignment_end(alignment)
        needs_target = alignment is not None and alignment.needs_target
        read_until = align_until * settings.global_batch_size if needs_target else 0
        stream = TrainingStream(images, config["run"]["seed"], shape, autoencoder.stochastic, read_until)
        positions = PositionSampler(state.step, settings.max_steps, *layout)
        batches = load_batches(stream, positions, settings.num_workers, pin_memory=device.type == "cuda")
        progress = stack.enter_context(progress_bar(settings, run_dir.name, state.step, shown=rank == 0))
        optimizer = state.optimizer
        if state.step < settings.max_steps and (num_processes > 1 or compiled):
            # DDP sorts its buckets anew after its first backward pass. One discarded pass over the
            # run's first positions makes the first step after a resume add gradients in the same
            # order as the uninterrupted run. It compiles, too, before the clock starts.
            align = align_until > 0
            first = stream[next(iter(PositionSampler(0, 1, *layout)))]
            batch = to_latents(first, autoencoder, accelerator, target if align else None)
            accelerator.backward(model(**batch, align=align)["loss"])
            optimizer.zero_grad(set_to_none=True)
        if tracker is not None and state.step == 0:
            measure.show(images, tracker)
        if left:
            measure(left, state.ema.network(), state.step, tracker)
        clock = Clock(device, num_processes, settings.global_batch_size, *flops, settings.mixed_precision)
        stopped = ""
        while state.step < settings.max_steps and not stopped:
            # --- one optimizer step: gradients summed over micro-batches, averaged over processes
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * settings.lr_factor(state.step)
            align = state.step < align_until
            for micro in range(num_micro):
                with clock.waiting():
                    read = next(batches)
                batch = to_latents(read, autoencoder, accelerator, target if align else None)
                with micro_batch(model, accelerator, last=micro == num_micro - 1):
                    losses = model(**batch, align=align)
                    accelerator.backward(losses["loss"] / num_micro)
                state.meter.add(losses, 1 / num_micro)
            state.update(settings.clip_norm)
            clock.steps += 1
            progress.update(settings.global_batch_size)

            # --- whether to go on, the same on all processes
            stopped, skipped_in_a_row = requests.agreed(state.skips.in_a_row)
            if skipped_in_a_row >= MAX_SKIPPED:
                raise not_finite(
                    f"{skipped_in_a_row} steps in a row had gradients that are no finite numbers", state.step, run_dir
                )
            last = state.step == settings.max_steps

            # --- log
            if last or state.step % settings.log_every == 0:
                row: dict[str, Any] = state.row()
                row |= clock.row(align and target is not None)
                if state.step % settings.log_every == 0:
                    state.meter.reset()
                else:
                    row["partial"] = True  # a longer run will log the whole of it
                if "loss" in row:
                    progress.set_postfix(step=state.step, loss=f"{row['loss']:.4f}")
                if tracker is not None:
                    tracker.log(state.step, row)
                clock.start()
            # --- save, before anything that could fail; then measure the averaged weights
            saves = last or bool(stopped) or settings.due(settings.save_every, state.step)
            snaps = settings.due(settings.snapshot_every, state.step)
            # what a stopped run has no time for, the call that goes on makes up for
            names = due(settings, held_out, state.step) if last or not stopped else []
            if saves or snaps or names:
                with clock.pause():
                    if saves or snaps:
                        if not state.finite():
                            raise not_finite("a weight is no finite number", state.step, run_dir)
                        state.check_agreement()
                    if snaps:
                        saver.snapshot(state)  # first, for it goes again where the checkpoint does not come to be
                    if saves:
                        saver.save(state, last=last or bool(stopped))
                    if names:
                        measure(names, state.ema.network(), state.step, tracker)
                    if saves:
                        saver.prune()
                requests.pause_seconds = clock.longest_pause
        if rank == 0:
            (run_dir / "STOP").unlink(missing_ok=True)  # it has been obeyed, or came too late
        if stopped and state.step < settings.max_steps:
            raise Stopped(f"{run_dir}: stopped by {stopped} at step {state.step}; the same command goes on from there")
    if rank == 0:
        log.info("trained to step %d: %s", state.step, ckpt.checkpoint_folder(run_dir, state.step))
        log.info("draw images with: python sample.py ckpt=%s", run_dir)
