"""Log lines and progress bars, all on stderr: plain messages, whose loss ends nothing."""

import contextlib
import logging
import os
import sys
import warnings
from typing import Any


class SteadyStream:
    """A text stream without OSErrors: on a full disk, or into a closed pipe, a job's log loses
    lines and the job continues.
    """

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        """Write, or drop the text."""
        with contextlib.suppress(OSError):
            return self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush what can be written."""
        with contextlib.suppress(OSError):
            self.stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def logging_setup() -> None:
    """Show the program's own messages as they are, and warnings on one line; of several processes
    only the first shows messages that are no warnings. Stdout and stderr become steady: progress
    bars and log lines never raise.
    """
    for name in ("stdout", "stderr"):
        if not isinstance(getattr(sys, name), SteadyStream):
            setattr(sys, name, SteadyStream(getattr(sys, name)))
    level = logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING
    logging.basicConfig(level=level, format="%(message)s")
    for chatty in ("httpx", "filelock", "torch", "accelerate", "timm"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
