"""Lengths of a training: steps, or epochs, which become steps when the images are counted."""

import dataclasses
import re
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from pydantic import StringConstraints

from ddt.errors import MANY, require

EPOCHS = r"^ *([0-9]+(?:\.[0-9]+)?) *epochs? *$"  # 80epochs
if TYPE_CHECKING:
    Steps = int  # what all code but this file and the settings' own checks sees: `in_steps` comes first
else:
    Steps = int | Annotated[str, StringConstraints(pattern=EPOCHS)]
LENGTHS: tuple[Any, ...] = (Steps, Steps | None)
Settings = TypeVar("Settings")


def are_steps(*lengths: Steps | None) -> bool:
    """Return whether none of these lengths is still in epochs."""
    return not any(isinstance(length, str) for length in lengths)


def in_epochs(settings: Any) -> dict[str, float]:
    """Return the lengths of a settings dataclass that are in epochs, by the name of the field."""
    lengths = {
        field.name: getattr(settings, field.name) for field in dataclasses.fields(settings) if field.type in LENGTHS
    }
    found = {name: re.match(EPOCHS, value) for name, value in lengths.items() if isinstance(value, str)}
    return {name: float(match[1]) for name, match in found.items() if match}


def epoch_steps(num_images: int, global_batch_size: int) -> int:
    """Return the steps of an epoch: every image once, but the last ones, which fill no batch.

    0 where not even one batch is filled.
    """
    return num_images // global_batch_size


def in_steps(settings: Settings, num_images: int, global_batch_size: int, prefix: str) -> Settings:
    """Return a settings dataclass with all lengths in steps; prefix: of its keys, in messages.

    Raises UserError for an epoch without a step, and as the dataclass itself.
    """
    found, size = in_epochs(settings), epoch_steps(num_images, global_batch_size)
    for name, epochs in found.items():
        key = f"{prefix}.{name}={getattr(settings, name)}"
        require(
            size > 0,
            f"{key}: {num_images:,} images fill no batch of trainer.global_batch_size={global_batch_size}; give steps",
        )
        require(epochs * size < MANY, f"{key}: too many; give fewer")
    return dataclasses.replace(settings, **{name: round(epochs * size) for name, epochs in found.items()})  # type: ignore[type-var]
