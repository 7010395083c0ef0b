"""Settings that a resumed run must share with its checkpoint; all others may change."""

import json
import logging
from pathlib import Path
from typing import Any

from ddt.checkpoint.format import read_config
from ddt.config import flat
from ddt.errors import require

log = logging.getLogger(__name__)
FROZEN = ("model", "data", "autoencoder", "alignment", "objective", "optimizer", "seed", "init_from")
FROZEN_TRAINER = (
    "global_batch_size", "ema_decay", "ema_decays", "ema_powers", "warmup_steps", "lr_schedule", "clip_norm",
)  # fmt: skip
# settings that change no result: paths (fingerprints identify the content), and sizes of chunks
FREE = (
    "model.activation_checkpointing",
    "data.root",
    "data.source_root",
    "data.skip_broken",  # of the steps until now none read a broken image
    "autoencoder.source",
    "autoencoder.revision",
    "autoencoder.chunk_size",
    "alignment.weights",
    "alignment.compile",
)


def differences(old: dict[str, Any], new: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the settings that differ between two configs, as dotted key → (old, new)."""
    a, b = (flat(json.loads(json.dumps(config))) for config in (old, new))  # as read from a checkpoint
    return {key: (a.get(key), b.get(key)) for key in sorted(a.keys() | b.keys()) if a.get(key) != b.get(key)}


def frozen_differences(old: dict[str, Any], new: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the differences between two runs' configs that make them different trainings."""
    trainer = [f"trainer.{key}" for key in FROZEN_TRAINER]
    if new["trainer"]["lr_schedule"] != "constant":
        trainer.append("trainer.max_steps")  # the learning rate depends on it
    return {
        key: pair
        for key, pair in differences(old, new).items()
        if (key.split(".")[0] in FROZEN or key in trainer) and key not in FREE
    }


def described(key: str, old: Any, new: Any) -> str:
    """Return a difference in words; two hashes would say nothing."""
    group, _, name = key.partition(".")
    if name != "fingerprint" or None in (old, new):
        return f"{key} {old} -> {new}"
    if group != "data":
        return f"{key}: its weights changed"
    # hash of the list, then, of files, one of their contents: `Images.fingerprint`
    same_list = "-" in new and old.partition("-")[0] == new.partition("-")[0]
    return f"{key}: {'contents of images changed' if same_list else 'the list of images changed'}"


def check_same_training(checkpoint: Path, config: dict[str, Any]) -> None:
    """Raise UserError where a checkpoint is not of `config`'s training; log other changes."""
    saved = read_config(checkpoint)
    frozen = frozen_differences(saved["run"], config["run"])
    changes = ", ".join(described(key, old, new) for key, (old, new) in frozen.items())
    require(not frozen, f"{checkpoint}: belongs to another training ({changes}); give this one another name=")
    for key, (old, new) in differences(saved["run"], config["run"]).items():
        log.info("changed since the checkpoint: %s %s -> %s", key, old, new)
    require(
        saved["latent_shape"] == config["latent_shape"],
        f"{checkpoint}: was trained on latents of shape {saved['latent_shape']}, not {config['latent_shape']}; give "
        "this one another name=",
    )
