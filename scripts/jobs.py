"""What surrounds a job of an entry point: its exit status and, in a sweep, a clean process after it, the report of
failures at the end, and the way back into a queue.
"""

import contextlib
import gc
import logging
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import torch
from accelerate.state import AcceleratorState
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from ddt.errors import STOPPED_STATUS, Stopped, UserError, first_line, os_error_line

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


class Outcome:
    """What a job of a sweep returns to Hydra, where an exception would end the sweep: overrides and, if it failed, why.

    Hydra reads what jobs return, and hands it to nobody. So each outcome makes itself known where it is made and, for
    jobs that ran in other processes, where it is unpickled.
    """

    known: list["Outcome"] = []  # noqa: RUF012

    def __init__(self, overrides: str, failure: str | None) -> None:
        self.overrides, self.failure = overrides, failure
        Outcome.known.append(self)

    def __reduce__(self) -> tuple[type["Outcome"], tuple[str, str | None]]:
        return Outcome, (self.overrides, self.failure)

    def __str__(self) -> str:
        return f"{self.overrides}: {self.failure}"


def report() -> None:
    """End the process with status 1 and a line for each known job that failed, if any did."""
    failed = [outcome for outcome in Outcome.known if outcome.failure is not None]
    if failed:
        lines = "\n".join(map(str, failed))
        sys.exit(f"{len(failed)} of {len(Outcome.known)} jobs failed:\n{lines}")


@contextlib.contextmanager
def kept_environment(**changes: str) -> Iterator[None]:
    """Change the environment for a while, and put back all that anyone changed meanwhile."""
    before = dict(os.environ)
    os.environ.update(changes)
    try:
        yield
    finally:
        for key in os.environ.keys() - before.keys():
            del os.environ[key]
        os.environ.update(before)


@contextlib.contextmanager
def clean_process() -> Iterator[None]:
    """Leave the process as it was found: the next job of a sweep may follow in it."""
    threads = torch.get_num_threads()
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    root = logging.getLogger()
    level, loggers = root.level, list(root.handlers)
    try:
        with kept_environment():
            yield
    finally:
        wandb = sys.modules.get("wandb")
        if wandb is not None and wandb.run is not None:  # left open by a job that failed before its loop
            wandb.finish(exit_code=1)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for added in [handler for handler in root.handlers if handler not in loggers]:
            root.removeHandler(added)
            added.close()
        root.setLevel(level)
        torch.set_num_threads(threads)
        AcceleratorState._reset_state(reset_partial_state=True)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


class QueuedAgain(SystemExit):
    """A job of submitit's that ends here to begin again later: no failure."""


@contextlib.contextmanager
def back_to_the_queue() -> Iterator[None]:
    """Let a job of Hydra's submitit launcher stop as any other, with everything saved, before it is queued again.

    By itself submitit ends and requeues a job in the handler of the signal (SIGUSR2) that comes before the time limit:
    nothing would be saved. A job that was told to stop for good (a STOP file, SIGTERM, SIGINT) is not queued again.
    """
    requeue: Any = signal.getsignal(signal.SIGUSR2)
    if "SUBMITIT_EXECUTOR" not in os.environ or not callable(requeue):
        yield
        return

    def queue_again() -> None:
        try:
            requeue(signal.SIGUSR2, None)  # ends this process, or raises an error that says why it cannot be queued
        except SystemExit as ended:
            raise QueuedAgain(ended.code) from None

    def stop(signum: int, frame: FrameType | None) -> None:
        if callable(signal.getsignal(signal.SIGUSR1)):
            os.kill(os.getpid(), signal.SIGUSR1)
        else:  # nothing runs yet that could be saved
            queue_again()

    signal.signal(signal.SIGUSR2, stop)
    try:
        yield
    except Stopped as stopped:
        if re.search(r"\b(STOP|SIGTERM|SIGINT)\b", str(stopped)):
            raise
        queue_again()
    finally:
        signal.signal(signal.SIGUSR2, requeue)


def told(error: BaseException, sweep: bool) -> str | None:
    """Return the line that a job ends with, or None where the error is to go on its way."""
    if isinstance(error, (UserError, FloatingPointError)):
        return str(error)
    if isinstance(error, OSError):  # a folder that cannot be written, a full disk
        return os_error_line(error)
    if not sweep or isinstance(error, QueuedAgain):
        return None
    if isinstance(error, SystemExit) and error.code not in (0, None):
        return error.code if isinstance(error.code, str) else f"exit status {error.code}, see above"
    if isinstance(error, Exception):
        traceback.print_exception(error)
        return f"{type(error).__name__}: {first_line(error)}"
    return None


def run_job(task: Callable[[DictConfig], None], cfg: DictConfig) -> Outcome | None:
    """Run a job and leave the process as it was. A failed job of a sweep is shown, and returned as one; any other ends
    the process with its line. A job that was asked to stop ends the process, and so a sweep, with status 85.
    """
    sweep = HydraConfig.get().mode == RunMode.MULTIRUN
    if sweep and "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        line = "-m: a sweep starts its own processes (trainer.num_processes); leave torchrun or accelerate launch out"
        sys.exit(line if os.environ["RANK"] == "0" else 1)
    failure = None
    with clean_process():
        try:
            with back_to_the_queue():
                task(cfg)
        except Stopped as stopped:
            if os.environ.get("RANK", "0") == "0":  # under a launcher all processes stop alike
                sys.stderr.write(f"{stopped}\n")
            sys.exit(STOPPED_STATUS)
        except BaseException as error:
            failure = told(error, sweep)
            if failure is None:
                raise
            if not sweep:
                # until the processes of a launcher meet, those of one machine find the same mistake
                same = os.environ.get("LOCAL_RANK", "0") != "0" and not torch.distributed.is_initialized()
                sys.exit(1 if same else failure)
    if not sweep:
        return None
    outcome = Outcome(" ".join(HydraConfig.get().overrides.task), failure)
    if failure is not None:
        sys.stderr.write(f"{outcome}\n")
    return outcome
