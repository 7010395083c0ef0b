"""Log lines and progress, all on stderr: plain messages, whose loss ends nothing."""

import contextlib
import logging
import os
import sys
import warnings
from typing import Any

from tqdm import tqdm

LINE_SECONDS = 30  # between two lines of progress where there is no terminal


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


class Lines:
    """Makes a line of each state of a progress bar, which would be written over the one before."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def write(self, text: str) -> None:
        """Write a line, if there is anything to say."""
        if text.strip():
            self.stream.write(f"{text.strip()}\n")

    def flush(self) -> None:
        """Flush the stream."""
        self.stream.flush()


def on_terminal() -> bool:
    """Whether someone watches: bars move on a terminal, and a log gets lines."""
    return sys.stderr.isatty()


def progress_bar(**options: Any) -> tqdm:
    """Return a tqdm bar; where stderr is no terminal it is a line each half minute."""
    if on_terminal():
        return tqdm(mininterval=1.0, **options)
    seen = "{percentage:.0f}% of {total_fmt}" if options.get("total") else "{n_fmt}"
    form = "{desc}: " + seen + "{unit}, {rate_fmt}, {elapsed}" + (", {remaining} left" if options.get("total") else "")
    # no line before the first half minute: short work is over by then
    return tqdm(file=Lines(sys.stderr), mininterval=LINE_SECONDS, delay=LINE_SECONDS, bar_format=form, **options)


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
    for chatty in ("httpx", "filelock", "torch", "accelerate", "timm", "fontTools"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
