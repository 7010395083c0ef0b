"""What ends a run before its last step: signals, a STOP file, the clock, non-finite gradients.

Every process may have a reason; all learn of it together and end after the same step.
"""

import json
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

from ddt.files import write_json

log = logging.getLogger(__name__)

REASONS = ("", "SIGTERM", "SIGUSR1", "SIGINT", "the file STOP", "the time limit")  # the code that processes exchange
SIGNALS = {signal.SIGTERM: 1, signal.SIGUSR1: 2, signal.SIGINT: 3}
STOP_FILE, TIME_LIMIT = 4, 5
MARGIN = 60  # seconds that are left for the last save, beside twice the longest pause so far
MAX_SKIPPED = 5  # steps in a row without finite gradients
State = Literal["running", "preempted", "done", "failed"]


def read_status(run_dir: Path) -> dict[str, Any]:
    """Return a run's `status.json`, empty where it has none that can be read."""
    try:
        return json.loads((run_dir / "status.json").read_text())
    except (OSError, ValueError):
        return {}


def write_status(run_dir: Path, state: State, step: int, reason: str = "") -> None:
    """Write a run's `status.json`: its state, the steps it has done, and why it ended. A full disk
    is warned of.
    """
    now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    try:
        write_json(run_dir / "status.json", {"state": state, "step": step, "reason": reason, "time": now})
    except OSError as error:
        log.warning("warning: %s: cannot be written (%s)", run_dir / "status.json", error.strerror)


def end_of_job(max_hours: float | None, started: float) -> float | None:
    """Return when this job ends, in seconds since the epoch, by `trainer.max_hours` and SLURM;
    None: nobody knows.
    """
    ends = [] if max_hours is None else [started + 3600 * max_hours]
    if os.environ.get("SLURM_JOB_END_TIME", "").isdigit():
        ends.append(float(os.environ["SLURM_JOB_END_TIME"]))
    return min(ends, default=None)


class StopRequests:
    """Listens for reasons to stop, as a context; `agreed` tells all processes of them.

    Args:
        run_dir: holds STOP when someone has touched it. end: of the job, in seconds since the
        epoch, or None.
        device: where processes talk. num_processes: how many.

    Nothing is saved in a signal handler: it leaves a note, and the loop ends after a whole step. A
    second Ctrl-C interrupts at once.
    """

    def __init__(self, run_dir: Path, end: float | None, device: torch.device, rank: int, num_processes: int) -> None:
        self.file, self.end, self.device, self.rank, self.num_processes = (
            run_dir / "STOP", end, device, rank, num_processes,
        )  # fmt: skip
        self.code, self.looked = 0, 0.0
        self.pause_seconds = 0.0  # the longest that the loop was busy saving and measuring
        self.posted: tuple[Tensor, torch.cuda.Event | None] | None = None
        self.before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopRequests":
        if threading.current_thread() is threading.main_thread():  # Python takes signals nowhere else
            self.before = {number: signal.signal(number, self.note) for number in SIGNALS}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def note(self, number: int, frame: FrameType | None) -> None:
        """Remember a signal."""
        self.code = SIGNALS[signal.Signals(number)]
        if number == signal.SIGINT:
            signal.signal(number, signal.default_int_handler)

    def look(self) -> int:
        """Return this process's reason; process 0 looks for the file, once a second, and at the
        clock.
        """
        now = time.time()
        if self.code == 0 and self.rank == 0:
            if self.end is not None and now > self.end - 2 * self.pause_seconds - MARGIN:
                self.code = TIME_LIMIT
            elif now - self.looked > 1:
                self.looked = now
                if self.file.exists():
                    self.code = STOP_FILE
        return self.code

    def agreed(self, skipped_in_a_row: Tensor) -> tuple[str, int]:
        """Post this process's reason and how many steps in a row were left out; return those posted
        one step before, the same on all processes, "" being no reason. All call it together after
        each step.

        Reading a step late, nobody waits for the device to finish this one.
        """
        mine = torch.stack([torch.full_like(skipped_in_a_row, self.look()), skipped_in_a_row])
        if self.num_processes > 1:
            torch.distributed.all_reduce(mine, op=torch.distributed.ReduceOp.MAX)
        ready = None
        if self.device.type == "cuda":
            here = torch.empty(2, pin_memory=True)
            here.copy_(mine, non_blocking=True)
            ready = torch.cuda.Event()
            ready.record()
            mine = here
        before, self.posted = self.posted, (mine, ready)
        if before is None:
            return "", 0
        values, ready = before
        if ready is not None:
            ready.synchronize()
        code, in_a_row = values.tolist()
        return REASONS[int(code)], int(in_a_row)


class Skips:
    """Counts, on the device, the steps that were skipped for non-finite gradients."""

    def __init__(self, device: torch.device, state: list[float] | None = None) -> None:
        self.total, self.in_a_row = torch.tensor(state or [0.0, 0.0], device=device)

    def check(self, norm: Tensor) -> Tensor:
        """Return 1.0 on the device where a step's gradient norm is non-finite and the step must be
        skipped, else 0.0. The norm is the same on all processes, so they agree without
        communication.
        """
        skipped = (~norm.isfinite()).float()
        self.total = self.total + skipped
        self.in_a_row = (self.in_a_row + 1) * skipped
        return skipped

    def state(self) -> list[float]:
        """Return the state for a checkpoint; a device sync."""
        return [self.total.item(), self.in_a_row.item()]
