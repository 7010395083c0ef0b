"""The step of a decoder's training and what comes before the first one; the loop around it is
`ddt.training.loop`.

Shapes: B micro-batch, C h w tokens, H W pixels.
Source: Zheng et al., arXiv 2510.11690, as its published decoders were trained.
"""

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ddt.data.stream import ReconstructionStream
from ddt.distributed.prepare import broadcast_weights, decide_on_main, micro_batch
from ddt.objective.discriminator import judging
from ddt.precision import autocast, check_dtype
from ddt.training.decoder.measurements import DecoderMeasurements
from ddt.training.decoder.run import DecoderRun, build_run
from ddt.training.decoder.settings import DecoderSettings
from ddt.training.decoder.state import DecoderState
from ddt.training.ema import EMA, ema_rules
from ddt.training.loop import run_training, set_lr, update, update_weights
from ddt.training.saving import Saver
from ddt.training.start import (
    Session,
    agreed_processes,
    announce,
    find_start,
    locked,
    log_complete,
    open_batches,
    restore,
)
from ddt.training.throughput import Clock


def train(settings: DecoderSettings) -> None:
    """Build what the settings describe and train, on each process; see `run_training`."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    check_dtype("trainer.mixed_precision", settings.trainer.mixed_precision, device)  # before images are listed
    run = build_run(settings)
    run_training(run, start(run), lambda session: decoder_step(run, session))


def decoder_step(run: DecoderRun, session: Session) -> None:
    """Take one optimizer step of the decoder, then one of the discriminator, where it learns."""
    settings, trainer, state = run.settings.reconstruction, run.settings.trainer, session.state
    device, dtype = session.accelerator.device, trainer.mixed_precision
    judge = None if state.discrimination is None else state.discrimination.network
    learns = judge is not None and state.step >= settings.discriminator_start
    if state.step < settings.gan_start:
        judge = None
    seen = []  # of the discriminator
    set_lr(state.optimizer, trainer.lr_factor(state.step))
    for micro in range(session.num_micro):
        with session.clock.waiting():
            batch = {key: value.to(device, non_blocking=True) for key, value in next(session.batches).items()}
        tokens, targets = run.autoencoder.encode(batch["images"]), batch["images"].float() / 255
        of_judged, *of_seen = batch["augment_uniform"]  # (5, B) each
        with (
            micro_batch(session.model, session.accelerator, last=micro == session.num_micro - 1),
            contextlib.nullcontext() if judge is None else judging(judge),
        ):
            with autocast(device, dtype):
                losses = session.model(tokens, targets, batch["noise"], batch["noise_uniform"], judge, of_judged)
            (losses["loss"] / session.num_micro).backward()
        state.meter.add(losses, 1 / session.num_micro)
        if learns:
            seen.append((tokens, targets, torch.cat(of_seen, dim=1)))
    norm, skipped = update(state, trainer.clip_norm)
    if seen:
        skipped = torch.maximum(skipped, discriminator_step(run, session, seen))
    state.meter.end_step(norm, trainer.clip_norm, skipped)


def discriminator_step(run: DecoderRun, session: Session, seen: list[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    """Take one optimizer step of the discriminator; return 1 where it was skipped.

    seen: tokens (B, C, h, w), targets (B, 3, H, W) in [0, 1] and uniform numbers (5, 2·B) of each
    micro-batch. Its fakes are made anew, by the updated decoder and without noise.
    """
    trainer, state, device = run.settings.trainer, session.state, session.accelerator.device
    set_lr(state.discriminator_optimizer, trainer.lr_factor(state.discriminator_steps))
    for number, (tokens, targets, augment_uniform) in enumerate(seen, start=1):
        with micro_batch(state.discriminator, session.accelerator, last=number == len(seen)):
            with autocast(device, trainer.mixed_precision):
                loss = state.discriminator(state.objective.fakes(tokens), targets, augment_uniform)
            (loss / len(seen)).backward()
        state.meter.add({"discriminator_loss": loss}, 1 / len(seen))
    _, skipped = update_weights(
        list(state.discrimination.parameters()), state.discriminator_optimizer, state.scaler,
        state.discriminator_skips, trainer.clip_norm,
    )  # fmt: skip
    state.discriminator_steps += 1
    return skipped


@contextlib.contextmanager
def start(run: DecoderRun) -> Iterator[Session | None]:
    """Lock the run's folder, resume from its newest intact checkpoint or start, and yield what the
    loop works with; None where the run is complete.

    Raises UserError where a setting is impossible or the checkpoint belongs to another training.
    """
    started = time.time()
    settings, trainer, run_dir = run.settings, run.settings.trainer, run.settings.run_dir
    accelerator = agreed_processes(run)
    num_processes, device = accelerator.num_processes, accelerator.device
    micro_batch_size, num_micro = trainer.micro_batches(num_processes)
    with contextlib.ExitStack() as stack:
        stack.enter_context(locked(run_dir, accelerator))
        model, state = resume_or_start(run, accelerator)
        saver = Saver(run_dir, trainer, run.config, accelerator)
        missing = restore(run, state, saver)
        if state.step >= trainer.max_steps and not missing:
            longer = "raise trainer.max_steps" if trainer.may_end_later else "start another, of another name=,"
            log_complete(run_dir, state, longer)
            yield None
            return
        stream = ReconstructionStream(run.images, settings.seed, run.latent_shape)
        batches = open_batches(run, stream, state)
        measure = DecoderMeasurements(run, micro_batch_size, accelerator)
        requests, tracker, progress = announce(run, state, started, stack)
        clock = Clock(device, num_processes, trainer.global_batch_size, 0, 0, trainer.mixed_precision)
        yield Session(
            accelerator, model, state, saver, measure, missing, requests, tracker, batches, clock, progress, num_micro
        )


def resume_or_start(run: DecoderRun, accelerator: Accelerator) -> tuple[nn.Module, DecoderState]:
    """Return the model to call and the state of a run, from its newest intact checkpoint or from
    the start, and move all networks to the device.

    Raises UserError where the checkpoint belongs to another training.
    """
    trainer, objective, discrimination = run.settings.trainer, run.objective, run.discrimination
    newest = decide_on_main(accelerator, lambda: find_start(run))
    rules = ema_rules(trainer.ema_decay, trainer.ema_decays, trainer.ema_powers)
    broadcast_weights(objective, accelerator)
    emas = {name: EMA(objective.network, rule) for name, rule in rules.items()}
    for ema in emas.values():
        ema.place(accelerator.device, sharded=False)
    run.autoencoder.to(accelerator.device)
    if objective.lpips is not None:
        objective.lpips.to(accelerator.device)
    model: Any = accelerator.prepare(objective)
    build = run.settings.optimizer.build
    of_discriminator: tuple[Any, ...] = ()
    if discrimination is not None:
        broadcast_weights(discrimination, accelerator)
        discrimination.network.features.to(accelerator.device)
        discriminator = accelerator.prepare(discrimination)
        of_discriminator = discrimination, discriminator, build(named_parameters=discrimination.named_parameters())
    optimizer = build(named_parameters=objective.named_parameters())
    state = DecoderState(objective, optimizer, emas, accelerator, *of_discriminator)
    if newest is not None:
        state.load(newest)
    accelerator.wait_for_everyone()  # no process writes before all have read
    return model, state
