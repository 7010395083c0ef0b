"""Launch a function on several processes of this machine, one per GPU, and forward signals to them.

SIGTERM and SIGUSR1 are forwarded, and the processes end by themselves. The first SIGINT is
forwarded as SIGTERM: a terminal's Ctrl-C reached them already, and a second SIGINT would end them
at once.
"""

import atexit
import contextlib
import logging
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch.multiprocessing.spawn import ProcessException, ProcessExitedException
from tqdm import tqdm

from ddt.config import flat
from ddt.errors import Stopped, UserError, os_error_line, require
from ddt.logs import logging_setup

MAX_CPU_PROCESSES = 16  # whatever the number of cores
GRACE_SECONDS = 10  # for the other processes to end when one has failed, and again after SIGTERM
# Imported once, not by each process. Not ddt itself: the server lacks the command's sys.path, so
# that another installed copy might be taken.
PRELOADED = ["accelerate", "torch.distributed.fsdp", "torchvision.utils"]
ORPHAN_SECONDS = 120  # for a last checkpoint when the parent process is gone


def default_processes() -> int:
    """Return the number of visible GPUs, or 1 on the CPU."""
    return max(1, torch.cuda.device_count())


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def _end_with_parent() -> None:
    """End this process some time after its parent, however that ended.

    torch has Linux send SIGINT then, but training takes that as a request to stop; and no signal
    comes where the parent ends while this process still imports. `join` waits for a closed pipe,
    which is never missed.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    time.sleep(ORPHAN_SECONDS)
    os._exit(1)


def _call(function: Callable[..., None], args: tuple[Any, ...]) -> None:
    """Call the function of one process, then destroy its process group.

    The threads of a group that is left to the end of Python may abort the process.
    """
    function(*args)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _worker(
    rank: int, function: Callable[..., None], num_processes: int, port: int, errors: Any, args: tuple[Any, ...]
) -> None:
    """Call the function as process `rank`; put a UserError, Stopped … into the queue `errors`."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
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
    logging_setup()
    tqdm.set_lock(threading.RLock())  # its default is a semaphore, which a killed process leaves behind
    try:
        _call(function, args)
    except Stopped as stopped:  # no failure: the other processes continue to their end
        errors.put(stopped)
    except (UserError, FloatingPointError, KeyboardInterrupt) as error:
        errors.put(error)
        sys.exit(1)
    except OSError as error:  # as the line to print: not all kinds can be pickled
        errors.put(UserError(os_error_line(error)))
        sys.exit(1)
    atexit._run_exitfuncs()
    sys.stderr.flush()
    os._exit(0)  # all is done: C++ threads of torch and gloo may abort a process that Python takes down


@contextlib.contextmanager
def _forward_signals(children: list[Any], received: list[int]) -> Iterator[None]:
    """Forward signals to the children, the first SIGINT as SIGTERM, and append them to `received`.

    The second SIGINT raises KeyboardInterrupt.
    """

    def forward(signum: int, frame: FrameType | None) -> None:
        if signum == signal.SIGINT and signum in received:
            raise KeyboardInterrupt
        for child in children:
            if child.is_alive():
                os.kill(child.pid, signal.SIGTERM if signum == signal.SIGINT else signum)
        received.append(signum)

    before = {number: signal.signal(number, forward) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _failure(error: ProcessException, received: list[int]) -> BaseException:
    """Return the exception to raise for a process that put no error into the queue."""
    if signal.SIGINT in received:
        return KeyboardInterrupt()
    if not isinstance(error, ProcessExitedException):
        return error  # unexpected, with its traceback
    if error.signal_name is None:
        return SystemExit(error.exit_code)
    if signal.Signals[error.signal_name] in received:  # forwarded to processes that do not handle it
        return Stopped(f"ended by {error.signal_name}; the same command resumes from what is complete")
    return UserError(
        f"process {error.error_index} was ended by {error.signal_name} (no memory?); run the same command again"
    )


def _spawn(function: Callable[..., None], num_processes: int, args: tuple[Any, ...]) -> None:
    """Start the processes, wait for all and raise the error of the first that failed."""
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)  # the cause is raised below
    multiprocessing.set_forkserver_preload(PRELOADED)
    queue = torch.multiprocessing.get_context("forkserver").SimpleQueue()
    children: list[Any] = []
    received: list[int] = []
    failure: BaseException | None = None
    with _forward_signals(children, received):
        try:
            worker_args = (function, num_processes, _free_port(), queue, args)
            context = torch.multiprocessing.start_processes(
                _worker, worker_args, num_processes, join=False, start_method="forkserver"
            )
            children += context.processes
            for signum in set(received) - {signal.SIGINT}:  # received while they were started
                os.kill(os.getpid(), signum)
            while not context.join(grace_period=GRACE_SECONDS):
                pass
        except ProcessException as error:
            failure = _failure(error, received)
        finally:
            for child in children:
                child.kill()  # only a second Ctrl-C finds one alive
                child.join()
    errors = []
    while not queue.empty():
        errors.append(queue.get())
    # the other processes fail for the same reason as the first, or because of it
    raised = next((error for error in errors if not isinstance(error, Stopped)), failure or next(iter(errors), None))
    if raised is not None:
        raise raised


def launch(function: Callable[..., None], num_processes: int | None, *args: Any) -> None:
    """Call `function(*args)` on `num_processes` processes of this machine and wait for them.

    None: every visible GPU, or one CPU process. A single process is this one. Under `torchrun` or
    `accelerate launch` nothing is started: this process is one of theirs. The function and its
    arguments must be picklable.

    Raises UserError for an impossible number or a killed process, and what the function raises: of
    several processes the first UserError, FloatingPointError, OSError (as a UserError) or Stopped.
    """
    require(
        num_processes is None or num_processes >= 1,
        f"num_processes={num_processes}: must be at least 1, or null for every visible GPU",
    )
    if "RANK" in os.environ:
        world = int(os.environ.get("WORLD_SIZE", "1"))
        require(
            num_processes in (None, world),
            f"num_processes={num_processes}: {world} processes were launched already; leave it out, or start the "
            "command without a launcher",
        )
        _call(function, args)
        return
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "1")
    require(
        tasks == "1",
        f"srun: started {tasks} tasks that know nothing of each other; start one a node, by `srun torchrun …` as in "
        "scripts/slurm/train.sbatch, or a single one",
    )
    num_processes = num_processes or default_processes()
    if num_processes == 1:
        function(*args)
        return
    gpus = torch.cuda.device_count()
    most = max(MAX_CPU_PROCESSES, os.cpu_count() or 1)
    require(
        gpus > 0 or num_processes <= most,
        f"num_processes={num_processes}: choose at most {most} on this machine, which has no GPU",
    )
    require(
        gpus == 0 or num_processes <= gpus,
        f"num_processes={num_processes}, but {gpus} GPUs are visible: choose at most {gpus}",
    )
    _spawn(function, num_processes, args)


def check_same_on_all_processes(accelerator: Accelerator, values: dict[str, Any]) -> None:
    """Raise UserError on all processes where their (nested) plain values differ.

    It names the first key that differs, its values and their processes.
    """
    everyone = [flat(own) for own in gather_object([values])]
    for key in dict.fromkeys(key for values in everyone for key in values):
        ranks: dict[str, list[str]] = {}
        for rank, own in enumerate(everyone):
            ranks.setdefault(repr(own[key]) if key in own else "not set", []).append(str(rank))
        listed = ", ".join(f"{value} (process {' '.join(numbers)})" for value, numbers in ranks.items())
        require(len(ranks) == 1, f"{key}: is not the same on all processes: {listed}; start all with the same command")
