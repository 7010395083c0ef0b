"""Which value of a metric is best: one that is null, NaN or infinite never is."""

import sys
from collections.abc import Mapping
from typing import Any, Literal, TypeGuard, TypeVar

# by how the names of metrics begin
LOWER_IS_BETTER = ("fid", "sfid", "fd_", "loss", "validation_loss", "fm_loss", "repa_loss")
HIGHER_IS_BETTER = ("inception_score", "precision", "recall", "class_accuracy", "authenticity")
Key = TypeVar("Key")


def is_number(value: Any) -> TypeGuard[float]:
    """Return whether a value is a finite number."""
    is_float = isinstance(value, int | float) and not isinstance(value, bool)
    return is_float and abs(value) <= sys.float_info.max


def better(metric: str) -> Literal["lower", "higher"] | None:
    """Return whether the lower or higher value of a metric is better; None where neither is."""
    if metric.startswith(LOWER_IS_BETTER):
        return "lower"
    return "higher" if metric.startswith(HIGHER_IS_BETTER) else None


def ranked(values: Mapping[Key, Any], metric: str) -> list[Key]:
    """Return the keys of finite values, the best first, ties in their order.

    Of a metric without a better direction the lowest is first.
    """
    sign = -1 if better(metric) == "higher" else 1
    return sorted((key for key, value in values.items() if is_number(value)), key=lambda key: sign * values[key])
