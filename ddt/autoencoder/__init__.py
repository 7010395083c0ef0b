"""Latent spaces: one file a kind, registered here; `Autoencoder` (base.py) says what one is."""

from typing import Any

from ddt.autoencoder.base import Autoencoder
from ddt.autoencoder.diffusers import KLAutoencoder, TinyAutoencoder
from ddt.autoencoder.identity import Identity
from ddt.errors import UserError

AUTOENCODERS: dict[str, Any] = {
    f"ddt.autoencoder.{kind.__name__}": kind for kind in (Identity, KLAutoencoder, TinyAutoencoder)
}


def build_autoencoder(settings: dict[str, Any], outline: bool = False) -> Autoencoder:
    """Build the autoencoder of a checkpoint's settings: `_target_` of `AUTOENCODERS` and arguments.

    outline: on the meta device, without weights, to count its cost.
    """
    arguments = dict(settings)
    target = arguments.pop("_target_", None)
    if target not in AUTOENCODERS:
        raise UserError(f"autoencoder._target_={target}: unknown, choose from {', '.join(AUTOENCODERS)}")
    kind = AUTOENCODERS[target]
    return kind.outline(**arguments) if outline else kind(**arguments)
