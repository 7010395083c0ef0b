"""Functions of the processes of test_launch.py, without its slow imports."""

import atexit
import json
import os
import signal
import time

import torch
from accelerate import Accelerator

import ddt.distributed.launch
from ddt.errors import Stopped, UserError


def wait_for(condition, seconds=60):
    """Wait until a condition holds; fail after `seconds`."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.02)


def report_ready(folder):
    """Write this process's pid: it is ready."""
    (folder / f"pid{os.environ['RANK']}").write_text(str(os.getpid()))


def stop_on_request(folder):
    seen = []
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda signum, frame: seen.append(signum))
    report_ready(folder)
    wait_for(lambda: signal.SIGTERM in seen)
    if os.environ["RANK"] == "0":
        time.sleep(1)  # a checkpoint, while the other has ended
    (folder / f"seen{os.environ['RANK']}").write_text(json.dumps(seen))
    raise Stopped("stopped at step 3")


def wait_long(folder):
    report_ready(folder)
    time.sleep(60)


def survive(folder):
    """Ignore all signals that can be ignored."""
    ddt.distributed.launch.ORPHAN_SECONDS = 0.2
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    wait_long(folder)


def end_together(folder):
    """Write at exit whether the process group still exists."""
    Accelerator(cpu=True).wait_for_everyone()
    atexit.register(lambda: (folder / os.environ["RANK"]).write_text(str(torch.distributed.is_initialized())))


def disagree(folder):
    accelerator, rank = Accelerator(cpu=True), os.environ["RANK"]
    check = ddt.distributed.launch.check_same_on_all_processes
    check(accelerator, {"run_dir": "runs/a", "config": {"trainer": {"max_steps": 3}}})
    mine = {"run_dir": "runs/a", "config": {"trainer": {"max_steps": 3 + int(rank), "seed": int(rank)}}}
    try:
        check(accelerator, mine)
    except UserError as error:
        (folder / rank).write_text(str(error))
        if rank == "0":
            raise
        wait_long(folder)  # a process that does not end by itself
