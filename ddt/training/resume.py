"""Whether a run's folder is of this training: the settings that a resumed run must share with its
checkpoint. All others may change.
"""

import json
import logging
from pathlib import Path
from typing import Any

from ddt.checkpoint.format import read_training
from ddt.config import flat
from ddt.errors import require
from ddt.files import find_record, read_record
from ddt.training.stopping import read_status

log = logging.getLogger(__name__)
FROZEN = (
    "model", "data", "autoencoder", "alignment", "objective", "optimizer", "seed", "init_from",
    "decoder", "reconstruction",
)  # fmt: skip
FROZEN_TRAINER = (
    "global_batch_size", "ema_decay", "ema_decays", "ema_powers", "warmup_steps", "lr_schedule", "decay_after",
    "decay_end", "lr_end", "clip_norm",
)  # fmt: skip
# what a run writes; a folder with one of them is no new one
OUTPUTS = (
    "config.json", "status.json", "metrics.jsonl", "evaluation.json", "checkpoints", "export", "snapshots", "previews",
)  # fmt: skip
# settings that change no result: paths (fingerprints identify the content), and sizes of chunks
FREE = (
    "model.activation_checkpointing",
    "data.root",
    "data.source_root",
    "data.labels",
    "data.class_names",
    "data.skip_broken",  # of the steps until now none read a broken image
    "autoencoder.source",
    "autoencoder.encoder_weights",
    "autoencoder.decoder",
    "autoencoder.statistics",
    "autoencoder.revision",
    "autoencoder.chunk_size",
    "alignment.weights",
    "reconstruction.vgg_weights",
    "reconstruction.lpips_weights",
    "reconstruction.dino_weights",
)


def differences(old: dict[str, Any], new: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the settings that differ between two configs, as dotted key → (old, new)."""
    a, b = (flat(json.loads(json.dumps(config))) for config in (old, new))  # as read from a checkpoint
    return {key: (a.get(key), b.get(key)) for key in sorted(a.keys() | b.keys()) if a.get(key) != b.get(key)}


def frozen_differences(old: dict[str, Any], new: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the differences between two runs' configs that make them different trainings."""
    trainer = [f"trainer.{key}" for key in FROZEN_TRAINER]
    if new["trainer"]["lr_schedule"] != "constant" and new["trainer"]["decay_end"] is None:
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


def check_place(run_dir: Path) -> None:
    """Raise UserError for a run folder inside a checkpoint, an export or other outputs of a run.

    Beside a run's outputs is room for the jobs of a sweep of its name.
    """
    folder = run_dir.absolute()
    for outer in (folder, *folder.parents):
        checkpoint = (outer / "manifest.json").is_file()
        run = (outer / "config.json").is_file() and (outer / "status.json").is_file()
        output = run and not {*folder.relative_to(outer).parts[:1]}.isdisjoint(OUTPUTS)
        kind = "a checkpoint" if checkpoint else "the outputs of a run"
        require(not checkpoint and not output, f"{run_dir}: lies inside {kind}, {outer}; give another name=")


def check_same_training(path: Path, saved: dict[str, Any], config: dict[str, Any]) -> None:
    """Raise UserError where a run's settings `saved` in `path` are of another training."""
    frozen = frozen_differences(saved, config)
    changes = [described(key, old, new) for key, (old, new) in frozen.items()]
    more = f" and {len(changes) - 5} more" if len(changes) > 5 else ""
    require(
        not changes,
        f"{path}: belongs to another training ({', '.join(changes[:5])}{more}); give this one another name=",
    )


def check_run_folder(run_dir: Path, config: dict[str, Any]) -> None:
    """Raise UserError unless a run's folder is new, or this training's, with checkpoints or with
    nothing but a start in it. config: of the run.
    """
    record = find_record(run_dir, ["config.json"], "name", written=OUTPUTS)
    if record is None:
        return
    check_same_training(record, read_record(record), config)
    exported = run_dir / "export" / "config.json"
    if exported.is_file():  # it is replaced by that of each checkpoint
        check_same_training(exported.parent, read_record(exported).get("run", {}), config)
    left = [name for name in ("export", "snapshots") if (run_dir / name).exists()]
    ended = read_status(run_dir).get("state") in ("done", "preempted")
    require(
        any((run_dir / "checkpoints").glob("*")) or not (left or ended),
        f"{run_dir}: holds {' and '.join([*left, 'metrics.jsonl'])} of this training but no checkpoint of it; put "
        "checkpoints/ back, or give another name=",
    )


def check_checkpoint(checkpoint: Path, config: dict[str, Any]) -> None:
    """Raise UserError where a checkpoint is of another training; log settings that have changed.

    config: what the run's checkpoints hold.
    """
    saved = read_training(checkpoint)
    require("run" in saved, f"{checkpoint}: was not written by training; give this one another name=")
    check_same_training(checkpoint, saved["run"], config["run"])
    for key, (old, new) in differences(saved["run"], config["run"]).items():
        log.info("changed since the checkpoint: %s %s -> %s", key, old, new)
    require(
        saved["latent_shape"] == config["latent_shape"],
        f"{checkpoint}: was trained on latents of shape {saved['latent_shape']}, not {config['latent_shape']}; give "
        "this one another name=",
    )
