"""The one exception that entry points print as a single line, without a traceback."""


class UserError(ValueError):
    """A user's mistake: the message names the key or file and the fix, and is the whole story."""


def require(condition: bool, message: str) -> None:
    """Raise `UserError(message)` unless `condition` holds."""
    if not condition:
        raise UserError(message)
