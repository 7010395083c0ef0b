"""Checkpoints that are written late; imports little, for spawned processes do."""

import contextlib
import os
import threading
from unittest import mock

from ddt.checkpoint import format as ckpt
from ddt.training.stopping import StopRequests


@contextlib.contextmanager
def written_late(step, until):
    """Let the write of a step's checkpoint wait until the training has taken `until` steps."""
    taken, begun, write, agreed = 0, threading.Event(), ckpt.write_files, StopRequests.agreed

    def counted(self, *args):
        nonlocal taken
        taken += 1
        if taken == until:
            begun.set()
        return agreed(self, *args)

    def late(folder, *args):
        if folder.name == f".tmp-step_{step:07d}":
            assert begun.wait(60), f"no step was taken while the checkpoint of step {step} was written"
        return write(folder, *args)

    with mock.patch.object(StopRequests, "agreed", counted), mock.patch.object(ckpt, "write_files", late):
        yield


@contextlib.contextmanager
def late_shards():
    """Let process 1 fail to write its shard of step 3, and write that of step 6 after step 8."""
    write = ckpt.write_files

    def failing(folder, *args):
        if folder.name == ".tmp-step_0000003":
            raise OSError(28, "No space left on device")
        return write(folder, *args)

    with contextlib.ExitStack() as stack:
        if os.environ["RANK"] == "1":
            stack.enter_context(mock.patch.object(ckpt, "write_files", failing))
            stack.enter_context(written_late(6, until=8))
        yield
