"""Before the first step: the run's folder, its processes, and the state it resumes from or begins
with.
"""

import contextlib
import dataclasses
import datetime
import logging
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import Dataset
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from ddt.checkpoint import format as ckpt
from ddt.data.stream import TrainingStream, check_shared_memory, load_batches, micro_batch_positions
from ddt.distributed.compile import compile_blocks, compiles
from ddt.distributed.graphs import block_work, graph_blocks, uses_graphs
from ddt.distributed.launch import check_same_on_all_processes
from ddt.distributed.prepare import broadcast_weights, decide_on_main, make_accelerator, prepare
from ddt.errors import Stopped, UserError, first_line, require
from ddt.files import lock_folder, write_json
from ddt.logs import on_terminal, progress_bar
from ddt.precision import autocast
from ddt.training.ema import EMA, ema_rules
from ddt.training.init_from import initialise
from ddt.training.latents import to_latents
from ddt.training.measurements import Measurements, missing_measurements
from ddt.training.resume import check_checkpoint, check_place, check_run_folder
from ddt.training.run import BaseRun, Run, build_evaluation
from ddt.training.saving import Saver, remove_leftovers
from ddt.training.state import TrainingState
from ddt.training.stopping import StopRequests, end_of_job, read_status, write_status
from ddt.training.throughput import Clock, target_flops, training_flops
from ddt.training.tracking import JsonlTracker

log = logging.getLogger(__name__)
WAIT_FOR_MAIN = datetime.timedelta(hours=1)  # while process 0 saves and scores


@dataclasses.dataclass
class Session:
    """What the loop works with, on each process. model: the objective, prepared for many processes.
    missing: what was not measured of the present step. tracker: on process 0 alone.
    """

    accelerator: Accelerator
    model: nn.Module
    state: Any  # TrainingState
    saver: Saver
    measure: Callable[[list[str], Any, int, JsonlTracker | None], None]
    missing: list[str]
    requests: StopRequests
    tracker: JsonlTracker | None
    batches: Iterator[dict[str, torch.Tensor]]
    clock: Clock
    progress: tqdm
    num_micro: int


@contextlib.contextmanager
def start(run: Run) -> Iterator[Session | None]:
    """Lock the run's folder, resume from its newest intact checkpoint or start, and yield what the
    loop works with; None where the run is complete.

    Raises UserError where a setting is impossible or the checkpoint belongs to another training.
    """
    started = time.time()
    settings, trainer, run_dir = run.settings, run.settings.trainer, run.settings.run_dir
    accelerator = agreed_processes(run)
    rank, num_processes, device = accelerator.process_index, accelerator.num_processes, accelerator.device
    micro_batch_size, num_micro = trainer.micro_batches(num_processes)
    compiled = compiles("trainer.compile", trainer.compile, device.type == "cuda", device)
    work = block_work(run.objective.denoiser, run.latent_shape, micro_batch_size)
    graphed = uses_graphs(trainer.cuda_graphs, compiled, trainer.parallelism == "fsdp", work, device)

    with contextlib.ExitStack() as stack:
        stack.enter_context(locked(run_dir, accelerator))
        run.autoencoder.to(device)
        if run.alignment.target is not None:
            run.alignment.target.to(device)
            if compiled:
                run.alignment.target.compile()
        flops = (
            training_flops(run.objective, run.latent_shape),
            target_flops(run.alignment.target, run.images.image_size),
        )
        model, state = resume_or_start(run, accelerator, compiled)
        saver = Saver(run_dir, trainer, run.config, accelerator)
        missing = restore(run, state, saver)
        if state.step >= trainer.max_steps and not missing:
            longer = "raise trainer.max_steps" if trainer.may_end_later else "start another with init_from="
            log_complete(run_dir, state, longer)
            yield None
            return
        align_until = run.alignment.end_step * trainer.global_batch_size if run.alignment.needs_features else 0
        stream = TrainingStream(run.images, settings.seed, run.latent_shape, run.autoencoder.stochastic, align_until)
        batches = open_batches(run, stream, state)
        evaluation = build_evaluation(run, accelerator)
        measure = Measurements(run, micro_batch_size, evaluation, accelerator)
        requests, tracker, progress = announce(run, state, started, stack)
        if rank == 0 and evaluation is not None:
            evaluation.write_receipt(run_dir / "evaluation.json")

        if state.step < trainer.max_steps and (num_processes > 1 or compiled):
            batch = stream[next(positions(run, accelerator, 0))]
            warm_up(run, model, state, batch, accumulates=num_micro > 1 if graphed else None)
        if tracker is not None and state.step == 0:
            measure.show_training_images(run.images, tracker)
        clock = Clock(device, num_processes, trainer.global_batch_size, *flops, trainer.mixed_precision)
        yield Session(
            accelerator, model, state, saver, measure, missing, requests, tracker, batches, clock, progress, num_micro
        )


def agreed_processes(run: BaseRun) -> Accelerator:
    """Return the Accelerator of this process; raise UserError where other processes run than were
    asked for, or with other settings.
    """
    accelerator, trainer = make_accelerator(WAIT_FOR_MAIN), run.settings.trainer
    require(
        trainer.num_processes in (None, accelerator.num_processes),
        f"trainer.num_processes={trainer.num_processes}, but {accelerator.num_processes} processes run: launch as many",
    )
    folder = str(run.settings.run_dir.resolve())
    check_same_on_all_processes(accelerator, {"run folder": folder, **run.config["run"]})
    return accelerator


def restore(run: BaseRun, state: TrainingState, saver: Saver) -> list[str]:
    """Restore a run's folder to its state after the present step; return what was not measured of
    it. Raises UserError without room for another checkpoint, where one is to come.
    """
    saver.restore_folder(state.step)
    trainer, run_dir = run.settings.trainer, run.settings.run_dir
    missing = decide_on_main(
        state.accelerator, lambda: missing_measurements(trainer, run.held_out, run_dir, state.step)
    )
    if not missing:  # or else once they are measured, which says which checkpoint is the best
        saver.prune()
    if state.step < trainer.max_steps or missing:
        saver.check_space(state)
    return missing


def positions(run: BaseRun, accelerator: Accelerator, step: int) -> Iterator[list[int]]:
    """Yield the positions of each micro-batch of this process, from a step to the last one."""
    trainer, num_processes = run.settings.trainer, accelerator.num_processes
    micro_batch_size, _ = trainer.micro_batches(num_processes)
    return micro_batch_positions(
        step, trainer.max_steps, trainer.global_batch_size, micro_batch_size, accelerator.process_index, num_processes
    )


def open_batches(run: BaseRun, stream: Dataset, state: TrainingState) -> Iterator[dict[str, torch.Tensor]]:
    """Return the micro-batches of the steps to come, loaded from the first that is asked for on;
    raise UserError at once where the shared memory has no room for them.
    """
    trainer, accelerator = run.settings.trainer, state.accelerator
    if state.step < trainer.max_steps:
        first = next(positions(run, accelerator, state.step))
        check_shared_memory(stream, first, trainer.num_workers, "trainer.num_workers")
    coming = positions(run, accelerator, state.step)
    return load_batches(stream, coming, trainer.num_workers, pin_memory=accelerator.device.type == "cuda")


def log_complete(run_dir: Path, state: TrainingState, longer: str) -> None:
    """Log that a run is complete, and how to train longer."""
    log.info("%s: complete at step %d; %s to train longer", run_dir, state.step, longer)
    main = state.accelerator.is_main_process
    if main and read_status(run_dir).get("state") != "done":  # killed between its end and this line
        write_status(run_dir, "done", state.step)


def announce(
    run: BaseRun, state: TrainingState, started: float, stack: contextlib.ExitStack
) -> tuple[StopRequests, JsonlTracker | None, tqdm]:
    """Say that a run begins, in its folder too; return what listens for requests to stop, its
    tracker (on process 0 alone) and its progress bar, all of which end with the stack.

    started: when the command began, in s since the epoch.
    """
    accelerator, trainer, run_dir = state.accelerator, run.settings.trainer, run.settings.run_dir
    rank, num_processes = accelerator.process_index, accelerator.num_processes
    if rank == 0:
        begins = f"resuming at step {state.step}" if state.step else "training"
        log.info("%s: %s to step %d; the same command resumes it", run_dir, begins, trainer.max_steps)
        log.info("%s", "\n".join(header(run, accelerator)))
        write_json(run_dir / "config.json", {**run.config["run"], "num_processes": num_processes})
    stack.enter_context(reported_status(run_dir, state))
    stack.enter_context(logging_redirect_tqdm())  # log lines go above the bar
    end = end_of_job(trainer.max_hours, started)
    requests = stack.enter_context(StopRequests(run_dir, end, accelerator.device, rank, num_processes))
    tracker = open_tracker(run, state.step, stack) if rank == 0 else None
    size = trainer.global_batch_size
    bar = progress_bar(
        total=trainer.max_steps * size, initial=state.step * size, unit="img", unit_scale=True, desc=run_dir.name,
        disable=rank != 0 or not on_terminal(),  # a log gets a line with each row
    )  # fmt: skip
    return requests, tracker, stack.enter_context(bar)


def header(run: BaseRun, accelerator: Accelerator) -> list[str]:
    """Return the lines that a run begins with: what is trained, on what, where."""
    trainer, choices, (c, h, w) = run.settings.trainer, run.settings.choices, run.latent_shape
    counts = {name: sum(p.numel() for p in part.parameters() if p.requires_grad) for name, part in run.trained.items()}
    split = " + ".join(f"{name} {number / 1e6:.1f}M" for name, number in counts.items())
    n, device = accelerator.num_processes, accelerator.device
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    compiled = any(block._compiled_call_impl is not None for part in run.trained.values() for block in part.modules())
    images, held_out = len(run.images.labels), len(run.held_out.labels)
    micro, num_micro = trainer.micro_batches(n)
    epochs = trainer.max_steps * trainer.global_batch_size / images
    parts = f"{n} process{'es' * (n > 1)} × {num_micro} micro-batch{'es' * (num_micro > 1)} × {micro} images"
    lines = {
        "parameters": f"{sum(counts.values()) / 1e6:.1f}M: {split}",
        "device": f"{n} × {where}, {trainer.mixed_precision}{', compiled' if compiled else ''}",
        "data": f"{choices['data']}: {images:,} images, {held_out:,} held out, {len(run.images.class_names)} classes",
        "latents": f"{c}×{h}×{w} of {run.images.image_size}×{run.images.image_size} px, {choices['autoencoder']}",
        "batch": f"{trainer.global_batch_size} = {parts}; {epochs:.4g} epochs in all",
    }
    return [f"{name:<11} {line}" for name, line in lines.items()]


def warm_up(
    run: Run, model: nn.Module, state: TrainingState, batch: dict[str, torch.Tensor], accumulates: bool | None
) -> None:
    """Run one discarded forward and backward pass, on the first positions of the run.

    DDP sorts its buckets anew after its first backward pass: with it behind, the first step after a
    resume adds gradients in the same order as the uninterrupted run. It compiles, too, before the
    clock starts. accumulates: of `graph_blocks`; None: no graphs.
    """
    align = run.alignment.end_step > 0
    device = state.accelerator.device
    with autocast(device, run.settings.trainer.mixed_precision):
        inputs = to_latents(batch, run.autoencoder, device, run.alignment.target if align else None)
        losses = model(**inputs, align=align)
    losses["loss"].backward()
    state.optimizer.zero_grad(set_to_none=True)
    if accumulates is not None:
        with autocast(device, run.settings.trainer.mixed_precision):
            graph_blocks(run.objective.denoiser, lambda: run.objective(**inputs, align=align), accumulates)


def open_tracker(run: BaseRun, step: int, stack: contextlib.ExitStack) -> JsonlTracker:
    """Return the run's tracker, which is closed with the stack, as failed if an error passes."""
    tracker: JsonlTracker = run.settings.tracker.build(
        run_dir=run.settings.run_dir, step=step, config=run.config["run"],
        ended=step >= run.settings.trainer.max_steps,
    )  # fmt: skip

    def close(kind: type[BaseException] | None, *_: Any) -> None:
        tracker.finish(failed=kind is not None)

    stack.push(close)
    if tracker.last_step < step - step % run.settings.trainer.log_every:
        log.warning(
            "warning: %s: lacks the rows after step %d, though the run has trained on", tracker.path, tracker.last_step
        )
    return tracker


def resume_or_start(run: Run, accelerator: Accelerator, compiled: bool) -> tuple[nn.Module, TrainingState]:
    """Return the model to call and the state of a run, from its newest intact checkpoint or from
    the start.

    Raises UserError where the checkpoint belongs to another training.
    """
    settings, trainer, objective = run.settings, run.settings.trainer, run.objective
    newest = decide_on_main(accelerator, lambda: find_start(run))
    broadcast_weights(objective, accelerator)
    rules = ema_rules(trainer.ema_decay, trainer.ema_decays, trainer.ema_powers)
    emas = {name: EMA(objective.denoiser, rule) for name, rule in rules.items()}
    if newest is None and settings.init_from is not None:
        initialise(settings.init_from, run.config, objective, emas)
    if compiled:
        compile_blocks(objective.denoiser, dynamic=False)  # all micro-batches have one size
    model = prepare(objective, accelerator, trainer.parallelism, trainer.mixed_precision, trainer.reshard_after_forward)
    for ema in emas.values():
        ema.place(accelerator.device, sharded=trainer.parallelism == "fsdp", compiled=compiled)
    optimizer = settings.optimizer.build(named_parameters=objective.named_parameters())
    state = TrainingState(objective, optimizer, emas, accelerator, trainer.mixed_precision)
    if newest is not None:
        state.load(newest)
    accelerator.wait_for_everyone()  # no process writes before all have read
    return model, state


def find_start(run: BaseRun) -> Path | None:
    """Return the checkpoint that a run resumes from, None where it starts, on process 0 alone.

    Raises UserError where its folder is of another training, before anything in it changes.
    """
    run_dir = run.settings.run_dir
    check_run_folder(run_dir, run.config["run"])
    remove_leftovers(run_dir)
    newest = ckpt.newest_intact_checkpoint(run_dir)
    if newest is not None:
        check_checkpoint(newest, run.config)
    return newest


@contextlib.contextmanager
def locked(run_dir: Path, accelerator: Accelerator) -> Iterator[None]:
    """Lock a run's folder, on all processes; raise UserError where another command trains in it."""
    check_place(run_dir)
    new = [folder for folder in (run_dir, *run_dir.parents) if not folder.exists()]
    message = f"{run_dir}: another command is training in this folder; wait for it, or give this one another name="
    with contextlib.ExitStack() as stack:
        decide_on_main(accelerator, lambda: stack.enter_context(lock_folder(run_dir, message)))
        try:
            yield
        finally:
            if accelerator.is_main_process and new and os.listdir(run_dir) == [".lock"]:  # refused before any writing
                (run_dir / ".lock").unlink()
                with contextlib.suppress(OSError):  # another run may have started beside it
                    for folder in new:
                        folder.rmdir()


@contextlib.contextmanager
def reported_status(run_dir: Path, state: TrainingState) -> Iterator[None]:
    """Keep a run's `status.json` up to date: running, then done, preempted or failed."""
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
    except BaseException as error:  # another process may have failed first and given the reason
        if read_status(run_dir).get("state") != "failed":
            write_status(run_dir, "failed", state.step, first_line(error))
        raise
    if main:
        write_status(run_dir, "done", state.step)
