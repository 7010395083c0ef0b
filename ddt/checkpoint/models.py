"""The published models by name, and whether a `ckpt=` names anything: known without torch."""

import dataclasses
from pathlib import Path
from typing import Any

from ddt.errors import UserError
from ddt.hub import is_hub_id, local_path

RAE = "nyu-visionx/RAE-collections:DiTs/Dinov2/wReg_base"


@dataclasses.dataclass(frozen=True)
class PublishedModel:
    """source: a hub id, or `owner/name:FILE` of one that holds several.

    settings: what the file does not say, as of `ConvertSettings`.
    """

    source: str
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)


# A guide lies beside each DiT^DH. No commit is known here to pin them by: a converted checkpoint
# holds the file's SHA-256 (`source`).
PUBLISHED = {
    "ddt-xl-256": PublishedModel("MCG-NJU/DDT-XL-22en6de-R256", {"encoder_depth": 22, "resolution": 256}),
    "ddt-xl-512": PublishedModel("MCG-NJU/DDT-XL-22en6de-R512", {"encoder_depth": 22, "resolution": 512}),
    "ditdh-xl-256": PublishedModel(f"{RAE}/ImageNet256/DiTDH-XL/stage2_model.pt"),
    "ditdh-s-256": PublishedModel(f"{RAE}/ImageNet256/DiTDH-S_ep14/stage2_model.pt"),
    "ditdh-xl-512": PublishedModel(f"{RAE}/ImageNet512/DiTDH-XL_ep400/stage2_model.pt"),
    "ditdh-s-512": PublishedModel(f"{RAE}/ImageNet512/DiTDH-S_ep20/stage2_model.pt"),
}

ADVICE = f"give a checkpoint's file, its folder, a hub id, owner/name:FILE of one, or {', '.join(PUBLISHED)}"


def list_models() -> list[str]:
    """Return the names that `load_model` and `ckpt=` take without a path."""
    return list(PUBLISHED)


def is_remote(source: str) -> bool:
    """Return whether a `ckpt=` names a model of the hub, a published one too, and no path here."""
    return is_hub_id(source) or (source in PUBLISHED and not Path(source).exists())


def check_exist(*sources: str | None) -> None:
    """Raise UserError where one of some `ckpt=` is neither a path nor a model of the hub."""
    for source in sources:
        if not (source is None or Path(source).exists() or is_remote(source)):
            raise no_checkpoint(source, "no such folder")


def hub_file(source: str) -> tuple[str, str] | None:
    """Return the hub id and the file of `owner/name:FILE`, None for any other source."""
    repository, _, file = source.partition(":")
    return (repository, file) if file and is_hub_id(repository) else None


def check_released(source: str, key: str) -> None:
    """Raise UserError, naming `key`, where there can be no weights file of `source`: it is neither
    a path, nor a hub id, a file of one, or a name in `PUBLISHED`.
    """
    if source not in PUBLISHED and hub_file(source) is None:
        local_path(source, f"{key}={source}", ADVICE)


def no_checkpoint(source: str | Path, why: str) -> UserError:
    """Return the error for a path that leads to no checkpoint."""
    return UserError(
        f"{source}: {why}; give a run folder such as runs/digits_nano, one of its checkpoints/step_*, or a published "
        f"model ({', '.join(PUBLISHED)})"
    )
