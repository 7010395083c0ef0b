"""Errors that entry points print as one line, without a traceback: user mistakes and stops."""

import re
from collections.abc import Callable
from typing import Any

MANY = 1_000_000_000  # more than any count of steps or images
MAX_BATCH = 1_000_000  # images
MAX_CLASSES = 10_000_000
MAX_WORKERS = 128  # loading processes of a process: a typo must not take the machine down
STOPPED_STATUS = 85  # exit status of a run that stopped on request and can be resumed; torchrun turns it into 1


class UserError(ValueError):
    """A user's mistake: the message names the key or file and the fix."""


class Stopped(Exception):
    """A run stopped on request with everything saved; the same command resumes it.

    Entry points print the message and exit with `STOPPED_STATUS`.
    """


def require(condition: bool, message: str) -> None:
    """Raise `UserError(message)` unless `condition` holds."""
    if not condition:
        raise UserError(message)


def require_count(key: str, value: float | None, least: float = 1, most: float = MANY, hint: str = "") -> None:
    """Raise UserError unless a setting lies in least..most; None is left to the setting's type.

    most: so that a typo fills no memory and starts no million processes. hint: what else there is.
    """
    if value is None:
        return
    require(value >= least, f"{key}={value}: must be at least {least:,}{hint}")
    require(value <= most, f"{key}={value}: must be at most {most:,}{hint}")


def collect_errors(*calls: Callable[[], Any]) -> list[Any]:
    """Return the result of each call, or raise one UserError with the messages of all that fail."""
    results, problems = [], []
    for call in calls:
        try:
            results.append(call())
        except UserError as error:
            problems.append(str(error))
    require(not problems, "\n".join(problems))
    return results


def brief(text: str, limit: int = 160) -> str:
    """Return a text of others as one line of at most `limit` characters, without terminal codes."""
    text = re.sub(r"\x1b\[[0-9;?]*[ -/]*[@-~]", "", text)
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, shortened, or its type where that is empty."""
    return brief((str(error).strip().splitlines() or [""])[0]) or type(error).__name__


def reason(error: BaseException) -> str:
    """Return the first lines of an error's message as one, shortened: lists of weights are long."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return brief(" ".join(brief(line, 100) for line in lines[:3])) or type(error).__name__


def os_error_line(error: OSError) -> str:
    """Return an OSError as one line that names the file and the fix."""
    return f"{error.filename or 'input or output'}: {error.strerror or error}; check the path and the disk"
