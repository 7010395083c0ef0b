"""What ends a run early: signals, a STOP file, the time limit, non-finite gradients.

Any process may have a reason; all agree on it and end after the same step.
"""

import logging
import os
import signal
import threading
import time
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Literal

import torch
from torch import Tensor

from ddt.files import read_record, write_json
from ddt.training.settings import MARGIN

log = logging.getLogger(__name__)

REASONS = ("", "SIGTERM", "SIGUSR1", "SIGINT", "the file STOP", "the time limit")  # by code
SIGNALS = {signal.SIGTERM: 1, signal.SIGUSR1: 2, signal.SIGINT: 3}
STOP_FILE, TIME_LIMIT = 4, 5
MAX_SKIPPED = 5  # steps in a row with non-finite gradients
MAX_HALVINGS = 16  # of fp16's loss scale, from torch's initial 2^16 to 1, each by a skipped step
State = Literal["running", "preempted", "done", "failed"]


def read_status(run_dir: Path) -> dict[str, Any]:
    """Return a run's `status.json`, or {} where it has no readable one."""
    return read_record(run_dir / "status.json")


def write_status(run_dir: Path, state: State, step: int, reason: str = "") -> None:
    """Write a run's `status.json`: state, steps done, why it ended. Warn where the disk is full."""
    now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    try:
        write_json(run_dir / "status.json", {"state": state, "step": step, "reason": reason, "time": now})
    except OSError as error:
        log.warning("warning: %s: cannot be written (%s)", run_dir / "status.json", error.strerror)


def end_of_job(max_hours: float | None, started: float) -> float | None:
    """Return when the job ends by `max_hours` and SLURM, in s since the epoch; None: unlimited."""
    ends = [] if max_hours is None else [started + 3600 * max_hours]
    if os.environ.get("SLURM_JOB_END_TIME", "").isdigit():
        ends.append(float(os.environ["SLURM_JOB_END_TIME"]))
    return min(ends, default=None)


def max_skipped(mixed_precision: str) -> int:
    """Return how many steps in a row may be skipped before a run has diverged: in fp16 a loss scale
    that is too large explains some.
    """
    return MAX_SKIPPED + (MAX_HALVINGS if mixed_precision == "fp16" else 0)


class StopRequests:
    """Listens for reasons to stop, as a context; `agreed` exchanges them between processes.

    Args:
        run_dir: where a user may create STOP. end: of the job, in seconds since the epoch, or None.
        device: of the exchange.

    Signal handlers only set a code, and the loop ends after a whole step. A second Ctrl-C
    interrupts at once.
    """

    def __init__(self, run_dir: Path, end: float | None, device: torch.device, rank: int, num_processes: int) -> None:
        self.file, self.end, self.device, self.rank, self.num_processes = (
            run_dir / "STOP", end, device, rank, num_processes,
        )  # fmt: skip
        self.code, self.checked_at = 0, 0.0
        self.pause_seconds = 0.0  # of the longest pause, and of the longest write of a checkpoint
        self.posted: tuple[Tensor, torch.cuda.Event | None] | None = None  # by the step before
        self.handlers: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopRequests":
        if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handlers
            self.handlers = {number: signal.signal(number, self.handle) for number in SIGNALS}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Record a signal."""
        self.code = SIGNALS[signal.Signals(number)]
        if number == signal.SIGINT:
            signal.signal(number, signal.default_int_handler)

    def check(self) -> int:
        """Return this process's code; process 0 checks the clock and, once a second, the file."""
        now = time.time()
        if self.code == 0 and self.rank == 0:
            if self.end is not None and now > self.end - 2 * self.pause_seconds - MARGIN:
                self.code = TIME_LIMIT
            elif now - self.checked_at > 1:
                self.checked_at = now
                if self.file.exists():
                    self.code = STOP_FILE
        return self.code

    def agreed(self, skipped_in_a_row: Tensor) -> tuple[str, int]:
        """Return (reason or "", steps skipped in a row), the same on all processes.

        All call it together after each step. It returns the values of the step before: no device
        sync.
        """
        mine = torch.stack([torch.full_like(skipped_in_a_row, self.check()), skipped_in_a_row])
        if self.num_processes > 1:
            torch.distributed.all_reduce(mine, op=torch.distributed.ReduceOp.MAX)
        ready = None
        if self.device.type == "cuda":
            pinned = torch.empty(2, pin_memory=True)
            pinned.copy_(mine, non_blocking=True)
            ready = torch.cuda.Event()
            ready.record()
            mine = pinned
        before, self.posted = self.posted, (mine, ready)
        if before is None:
            return "", 0
        values, ready = before
        if ready is not None:
            ready.synchronize()
        code, in_a_row = values.tolist()
        return REASONS[int(code)], int(in_a_row)


class Skips:
    """Counts steps skipped for non-finite gradients, on the device."""

    def __init__(self, device: torch.device, state: list[float] | None = None) -> None:
        self.total, self.in_a_row = torch.tensor(state or [0.0, 0.0], device=device)

    def check(self, norm: Tensor) -> Tensor:
        """Return 1.0 where the gradient norm is non-finite and the step is to be skipped, else 0.0.

        The norm is the same on all processes, so they agree without communication.
        """
        skipped = (~norm.isfinite()).float()
        self.total = self.total + skipped
        self.in_a_row = (self.in_a_row + 1) * skipped
        return skipped

    def state(self) -> list[float]:
        """Return the state for a checkpoint; a device sync."""
        return [self.total.item(), self.in_a_row.item()]
