"""What entry points print as a single line, without a traceback: a user's mistake, or a run that
was asked to stop.
"""

from collections.abc import Callable
from typing import Any

STOPPED_STATUS = 85  # exit status of a run that stopped on request and can resume; launchers may turn it into 1


class UserError(ValueError):
    """A user's mistake: the message names the key or file and the fix, and is the whole story."""


class Stopped(Exception):
    """A run ended before its last step because it was asked to, with everything saved; the same
    command resumes.

    Entry points print the message and exit with `STOPPED_STATUS`.
    """


def require(condition: bool, message: str) -> None:
    """Raise `UserError(message)` unless `condition` holds."""
    if not condition:
        raise UserError(message)


def collected(*calls: Callable[[], Any]) -> list[Any]:
    """Return what each call returns; raise one UserError with the lines of all of them that raise
    one.
    """
    results, problems = [], []
    for call in calls:
        try:
            results.append(call())
        except UserError as error:
            problems.append(str(error))
    require(not problems, "\n".join(problems))
    return results


def first_line(error: BaseException) -> str:
    """Return the first line of what an error says, or its kind where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def os_error_line(error: OSError) -> str:
    """Return what an operating system's error says as one line that names the file and the fix."""
    return f"{error.filename or 'input or output'}: {error.strerror or error}; check the path and the disk"
