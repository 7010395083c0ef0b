"""The training loop, to be read from top to bottom.

Shapes: B micro-batch, C H W latent. A step is a function of (seed, step) and the weights: batches
come from `ddt.data.stream`, and nothing random happens in here.
"""

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ddt.checkpoint import format as ckpt
from ddt.distributed.prepare import clip_gradients, gradient_norm, micro_batch
from ddt.errors import Stopped
from ddt.logs import on_terminal
from ddt.precision import autocast, check_dtype, deterministic, products
from ddt.training.latents import to_latents
from ddt.training.measurements import due_measurements
from ddt.training.run import BaseRun, Run, build_run
from ddt.training.settings import TrainerSettings, TrainSettings
from ddt.training.start import Session, start
from ddt.training.state import TrainingState
from ddt.training.stopping import Skips, max_skipped

log = logging.getLogger(__name__)


def train(settings: TrainSettings) -> None:
    """Build what the settings describe and train, on each process; see `run_training`."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    check_dtype("trainer.mixed_precision", settings.trainer.mixed_precision, device)  # before images are listed
    run = build_run(settings)
    run_training(run, start(run), lambda session: training_step(run, session))


def run_training(
    run: BaseRun, started: AbstractContextManager[Session | None], step: Callable[[Session], None]
) -> None:
    """Train until `trainer.max_steps`, resuming from the newest intact checkpoint of the run's
    folder, if any.

    started: what the loop works with, or None where the run is complete. step: takes one optimizer
    step. The folder gets `config.json`, `status.json`, `metrics.jsonl`, `checkpoints/`, `export/`,
    `previews/`.

    Raises UserError where a setting is impossible or the checkpoint belongs to another training,
    Stopped when the run was asked to end early (`ddt.training.stopping`), FloatingPointError when
    gradients stay non-finite, OSError when checkpoints cannot be written.
    """
    run_dir, trainer = run.settings.run_dir, run.settings.trainer
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with deterministic(trainer.deterministic), products(device, trainer.mixed_precision), started as session:
        if session is None:
            return
        if session.missing:  # a run may be killed between its checkpoint and its measurements
            session.measure(session.missing, session.state.ema.network(), session.state.step, session.tracker)
            session.saver.prune()
            session.clock.start()
        with session.saver:
            stopped = train_steps(run, session, step)
        state = session.state
        if session.accelerator.is_main_process:
            (run_dir / "STOP").unlink(missing_ok=True)  # it has been obeyed, or came too late
        if stopped and state.step < trainer.max_steps:
            raise Stopped(f"{run_dir}: stopped by {stopped} at step {state.step}; the same command resumes from there")
    if session.accelerator.is_main_process:
        log.info("trained to step %d: %s", state.step, ckpt.checkpoint_folder(run_dir, state.step))
        log.info(run.what_next)


def training_step(run: Run, session: Session) -> None:
    """Take one optimizer step: gradients summed over micro-batches, averaged over processes."""
    settings, state, accelerator = run.settings.trainer, session.state, session.accelerator
    set_lr(state.optimizer, settings.lr_factor(state.step))
    align = state.step < run.alignment.end_step
    target = run.alignment.target if align else None
    for micro in range(session.num_micro):
        with session.clock.waiting():
            batch = next(session.batches)
        with micro_batch(session.model, accelerator, last=micro == session.num_micro - 1):
            with autocast(accelerator.device, settings.mixed_precision):
                inputs = to_latents(batch, run.autoencoder, accelerator.device, target)  # (B, C, H, W)
                losses = session.model(**inputs, align=align)
            state.scaler.scale(losses["loss"] / session.num_micro).backward()
        state.meter.add(losses, 1 / session.num_micro)
    optimizer_step(state, settings.clip_norm)
    session.clock.with_target = target is not None


def train_steps(run: BaseRun, session: Session, step: Callable[[Session], None]) -> str:
    """Take the optimizer steps of a run; return why it stopped before the last one, "" if it did
    not.
    """
    settings, state, clock, stopped = run.settings.trainer, session.state, session.clock, ""
    while state.step < settings.max_steps and not stopped:
        step(session)
        clock.steps += 1
        session.progress.update(settings.global_batch_size)

        # --- whether to continue, the same on all processes
        session.requests.pause_seconds = clock.longest_pause + session.saver.write_seconds
        stopped, skipped_in_a_row = session.requests.agreed(state.skipped_in_a_row)
        if skipped_in_a_row >= max_skipped(settings.mixed_precision):
            session.saver.wait()
            raise diverged(
                f"{skipped_in_a_row} steps in a row had non-finite gradients", run, state.step, skipped_in_a_row
            )
        last = state.step == settings.max_steps

        # --- log
        if last or state.step % settings.log_every == 0:
            log_row(session, settings)

        # --- save, before anything that could fail; measure the EMA weights while it is written
        saves = last or bool(stopped) or settings.due(settings.save_every, state.step)
        snapshots = settings.due(settings.snapshot_every, state.step)
        # a stopped run has no time to measure: the resumed one makes up for it
        names = due_measurements(settings, run.held_out, state.step) if last or not stopped else []
        if saves or snapshots or names:
            with clock.pause():
                if saves or snapshots:
                    session.saver.wait()  # one write at a time
                    if not state.finite():
                        raise diverged("a weight is NaN or infinite", run, state.step, skipped_in_a_row)
                    state.check_agreement()
                    session.saver.save(state, checkpoint=saves, snapshot=snapshots)
                if names:
                    session.measure(names, state.ema.network(), state.step, session.tracker)
                if last or stopped:
                    session.saver.wait(last=True)
                    session.saver.prune()
    return stopped


def set_lr(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set the learning rates to their base times a factor."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor


def optimizer_step(state: TrainingState, clip_norm: float | None) -> None:
    """Update weights and EMAs by the accumulated gradients, and end the step."""
    norm, skipped = update(state, clip_norm)
    state.meter.end_step(norm, clip_norm, skipped)


def update(state: TrainingState, clip_norm: float | None) -> tuple[Tensor, Tensor]:
    """Update weights and EMAs by the accumulated gradients; see `update_weights`."""
    norm, skipped = update_weights(state.parameters, state.optimizer, state.scaler, state.skips, clip_norm)
    state.step += 1
    for ema in state.emas.values():
        ema.update(state.network_parameters, state.step, skipped)
    return norm, skipped


def update_weights(
    parameters: list[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    skips: Skips,
    clip_norm: float | None,
) -> tuple[Tensor, Tensor]:
    """Update weights by the accumulated gradients, scaled down to `clip_norm` where their norm is
    larger; return the norm, and 1 where the step was skipped, scalars.

    Non-finite gradients change nothing but the counts, and lower the loss scale of fp16. No device
    sync.
    """
    scaler.unscale_(optimizer)
    norm = gradient_norm(parameters)
    skipped = skips.check(norm)  # 1 where a gradient is non-finite, and the step changes nothing
    if clip_norm is not None:
        clip_gradients(parameters, norm, clip_norm)
    optimizer.found_inf = skipped  # type: ignore[attr-defined]  # as GradScaler does for a fused optimizer
    optimizer.step()
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return norm, skipped


def log_row(session: Session, settings: TrainerSettings) -> None:
    """Log the means since the last row. All processes call it together; a device sync."""
    state = session.state
    row: dict[str, Any] = state.row() | session.clock.row()
    if state.step % settings.log_every == 0:
        state.meter.reset()
    else:
        row["partial"] = True  # a longer run will log the whole interval
    show_row(session, row, settings.max_steps)
    if session.tracker is not None:
        session.tracker.log(state.step, row)
    session.clock.start()


def show_row(session: Session, row: dict[str, Any], max_steps: int) -> None:
    """Show a row beside the progress bar, or on a line of a log."""
    if "loss" not in row:  # all steps were skipped
        return
    progress, step, loss = session.progress, session.state.step, f"{row['loss']:.4f}"
    if on_terminal():
        progress.set_postfix(step=step, loss=loss)
    elif session.accelerator.is_main_process:
        rate = row["images_per_second"]
        left = tqdm.format_interval((max_steps - step) * session.clock.images / rate)
        log.info("step %d of %d: loss %s, %.4g images/s, %s left", step, max_steps, loss, rate, left)


def diverged(problem: str, run: BaseRun, step: int, skipped_in_a_row: int) -> FloatingPointError:
    """Return the error that ends a diverged run, with the last checkpoint from before its gradients
    became non-finite: the weights of a later one are finite, but led there.

    skipped_in_a_row: of the steps before the present one.
    """
    checkpoints = ckpt.list_checkpoints(run.settings.run_dir)
    good = [folder for number, folder in checkpoints.items() if number < step - skipped_in_a_row]
    last = f"the last good checkpoint, for init_from, is {good[-1]}" if good else "there is no checkpoint from before"
    return FloatingPointError(
        f"{problem} at step {step}: try a lower optimizer.lr or another seed in a run of another name; {last}"
    )
