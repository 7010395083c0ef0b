"""Latent spaces: one file per kind, registered here; `Autoencoder` (base.py) says what one is."""

from typing import Any

from torch import Tensor

from ddt.autoencoder.base import Autoencoder
from ddt.autoencoder.diffusers import KLAutoencoder, TinyAutoencoder
from ddt.autoencoder.identity import Identity
from ddt.autoencoder.rae import RAE
from ddt.config import check_call, parse
from ddt.errors import UserError, brief, require

AUTOENCODERS: dict[str, Any] = {
    f"ddt.autoencoder.{kind.__name__}": kind for kind in (Identity, KLAutoencoder, TinyAutoencoder, RAE)
}


def autoencoder_class(settings: dict[str, Any]) -> Any:
    """Return the class named by `_target_` of an autoencoder's settings; UserError if unknown."""
    target = settings.get("_target_")
    if not isinstance(target, str) or target not in AUTOENCODERS:
        known = ", ".join(AUTOENCODERS)
        raise UserError(f"autoencoder._target_={brief(str(target), 60)}: unknown, choose from {known}")
    return AUTOENCODERS[target]


def part_of_autoencoder(state: dict[str, Tensor]) -> str | None:
    """Return what weights are, where they are a known part of an autoencoder, and its setting."""
    parts = (part for kind in AUTOENCODERS.values() for part in kind.parts)
    return next((what for name, what in parts if name in state), None)


def build_autoencoder(settings: dict[str, Any], outline: bool = False) -> Autoencoder:
    """Build the autoencoder of a checkpoint's settings: `_target_` of `AUTOENCODERS` and arguments.

    outline: on the meta device, without weights, to count its cost. Raises UserError for unknown or
    missing arguments and wrong types, and as the autoencoder itself.
    """
    kind = autoencoder_class(settings)
    arguments = {key: value for key, value in settings.items() if key != "_target_"}
    if not outline:
        return parse(kind, arguments, "autoencoder")
    arguments, problems = check_call(kind, arguments, "autoencoder")
    require(not problems, "\n".join(problems))
    return kind.outline(arguments)
