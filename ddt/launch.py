"""Start a function on several processes of this machine, one for each GPU."""

import logging
import os
import socket
import sys
import threading
from collections.abc import Callable
from typing import Any

import torch
from tqdm import tqdm

from ddt.errors import UserError, os_error_line

MAX_CPU_PROCESSES = 16  # whatever the number of cores


def default_processes() -> int:
    """Return one process for each visible GPU, or one on the CPU."""
    return max(1, torch.cuda.device_count())


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def _worker(
    rank: int, function: Callable[..., None], num_processes: int, port: int, told: Any, args: tuple[Any, ...]
) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(num_processes),
        LOCAL_WORLD_SIZE=str(num_processes),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    if not torch.cuda.is_available():
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // num_processes))
    logging.basicConfig(level=logging.INFO if rank == 0 else logging.WARNING, format="%(message)s")
    tqdm.set_lock(threading.RLock())  # its own would be a semaphore, which a process that is ended leaves behind
    try:
        function(*args)
    except (UserError, FloatingPointError, OSError) as error:
        with told.get_lock():  # the first process that fails tells why; the others fail for the same reason or for that
            if not told.value:
                sys.stderr.write(f"{os_error_line(error) if isinstance(error, OSError) else error}\n")
                sys.stderr.flush()
            told.value = 1
        sys.exit(1)


def launch(function: Callable[..., None], num_processes: int | None, *args: Any) -> None:
    """Call `function(*args)` on `num_processes` processes of this machine and wait for them.

    None means every visible GPU, or one CPU process. One process is this one. Under `torchrun` or `accelerate launch`
    this process is one of theirs already, and nothing is started. The function and its arguments must be picklable.

    Raises UserError for a number that cannot be; exits with status 1 where a process ends with a user's mistake.
    """
    if num_processes is not None and num_processes < 1:
        raise UserError(f"num_processes={num_processes}: must be at least 1, or null for every visible GPU")
    if "RANK" in os.environ:
        world = int(os.environ.get("WORLD_SIZE", "1"))
        if num_processes not in (None, world):
            raise UserError(
                f"num_processes={num_processes}: {world} processes were launched already; leave it out, or start the "
                "command without a launcher"
            )
        function(*args)
        return
    num_processes = num_processes or default_processes()
    if num_processes == 1:
        function(*args)
        return
    gpus = torch.cuda.device_count()
    most = max(MAX_CPU_PROCESSES, os.cpu_count() or 1)
    if gpus == 0 and num_processes > most:
        raise UserError(f"num_processes={num_processes}: choose at most {most} on this machine, which has no GPU")
    if 0 < gpus < num_processes:
        raise UserError(f"num_processes={num_processes}, but {gpus} GPUs are visible: choose at most {gpus}")
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)  # the cause has been told
    told = torch.multiprocessing.get_context("spawn").Value("i", 0)
    try:
        torch.multiprocessing.spawn(_worker, (function, num_processes, _free_port(), told, args), nprocs=num_processes)
    except torch.multiprocessing.ProcessExitedException as error:
        if error.signal_name is not None:
            sys.exit(
                f"process {error.error_index} was ended by {error.signal_name} (no memory?); run the same command again"
            )
        sys.exit(error.exit_code or 1)
