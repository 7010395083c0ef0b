"""Checkpoints: written whole or not at all, read with `weights_only=True`, everything that sampling
needs inside.

A checkpoint is a folder:

    config.json         the network, latents, autoencoder, sampler and the run's settings, as plain values
    ema.safetensors     averaged weights: what samples are drawn with
    model.safetensors   raw weights           (only in checkpoints that training can go on from)
    train_state.pt      optimizer and meters  (likewise)
    ema_0.999.safetensors, power_0.05.safetensors   further averages, where the run keeps them
    manifest.json       written last: format version, size and SHA-256 of each file; in an export (`ddt.export.export`), whose
                        weights a model hub wants in model.safetensors, also `names`: what that file
                        is called here

A run that shards its weights writes each but the first and last in pieces,
`ema-00000-of-00002.safetensors` being that of process 0 of 2; joined along the first dimension they
are the whole.

A checkpoint is written under a temporary name and renamed when complete. A run folder holds them as
`checkpoints/step_0000700`.
"""

import hashlib
import json
import logging
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ddt.checkpoint.hub import download, is_hub_id
from ddt.config import flat
from ddt.errors import UserError, require
from ddt.files import fsync, sha256, share, write_json
from ddt.model import Denoiser, build_network
from ddt.version import __version__

log = logging.getLogger(__name__)
FORMAT_VERSION = 1
AUTOENCODER = "autoencoder"  # the folder of the autoencoder that an export carries …
CARRIED = f"./{AUTOENCODER}"  # … and what its config calls it


Piece = tuple[int, int]  # (process, processes) of a sharded run


def file_name(name: str, piece: Piece | None) -> str:
    """Return what a file of a checkpoint is called, such as `ema.safetensors`, or the piece of it."""
    stem, suffix = name.rsplit(".", 1)
    return name if piece is None else f"{stem}-{piece[0]:05d}-of-{piece[1]:05d}.{suffix}"


def entry(path: Path) -> dict[str, Any]:
    """Return what a manifest says of a file."""
    return {"size": path.stat().st_size, "sha256": sha256(path)}


def write_files(
    folder: Path,
    weights: dict[str, dict[str, Tensor]],
    train_state: dict[str, Any] | None = None,
    piece: Piece | None = None,
) -> dict[str, dict[str, Any]]:
    """Write state dicts and train state into a folder, to disk; return size and SHA-256 of each
    file by its name.
    """
    written = []
    for name, state in weights.items():
        for key in state:
            assert not key.startswith(("module.", "_orig_mod.")), f"{key}: a wrapper's name must not be saved"
        path = folder / file_name(f"{name}.safetensors", piece)
        save_file({k: v.detach().cpu().contiguous() for k, v in state.items()}, path)
        share(path)
        written.append(path)
    if train_state is not None:
        written.append(folder / file_name("train_state.pt", piece))
        torch.save(train_state, written[-1])
    for path in written:
        fsync(path)
    return {path.name: entry(path) for path in written}


def temporary_folder(folder: Path) -> Path:
    """Make and return the empty folder in which a checkpoint is written, without what a killed run
    left there.
    """
    temporary = folder.parent / f".tmp-{folder.name}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    return temporary


def write_manifest(folder: Path, config: dict[str, Any], files: dict[str, dict[str, Any]], **more: Any) -> None:
    """Add config and manifest, with `more` in it, to a folder whose files are written, and force
    them to disk.
    """
    write_json(folder / "config.json", config)
    path = folder / "config.json"
    files = {path.name: entry(path), **dict(sorted(files.items()))}
    manifest = {"format_version": FORMAT_VERSION, "ddt_version": __version__, **more, "files": files}
    write_json(folder / "manifest.json", manifest)
    for path in (folder / "config.json", folder / "manifest.json"):
        fsync(path)


def give_name(temporary: Path, folder: Path) -> None:
    """Give a folder that is complete its name, on disk."""
    fsync(temporary)
    temporary.rename(folder)
    fsync(folder.parent)


def complete(temporary: Path, folder: Path, config: dict[str, Any], files: dict[str, dict[str, Any]]) -> None:
    """Add config and manifest to a checkpoint whose files are written, and give it its name."""
    write_manifest(temporary, config, files)
    give_name(temporary, folder)


def write_checkpoint(
    folder: Path, config: dict[str, Any], train_state: dict[str, Any] | None = None, **weights: dict[str, Tensor]
) -> None:
    """Write a checkpoint folder atomically; it must not exist yet (UserError).

    config holds plain values only; train_state is anything that loads with `weights_only=True`;
    weights are state dicts with clean names, `ema=` and `model=` among them.
    """
    require(not folder.exists(), f"{folder}: exists already and is not written over; choose another folder")
    temporary = temporary_folder(folder)
    complete(temporary, folder, config, write_files(temporary, weights, train_state))


def checkpoint_folder(run_dir: Path, step: int) -> Path:
    """Return the folder of a run's checkpoint at a step."""
    return run_dir / "checkpoints" / f"step_{step:07d}"


def by_step(parent: Path) -> dict[int, Path]:
    """Return the folders `step_0000700` of a folder by their step, in order; others are none of
    ours.
    """
    steps = {int(m[1]): path for path in parent.glob("step_*") if (m := re.fullmatch(r"step_(\d{7,})", path.name))}
    return {step: steps[step] for step in sorted(steps)}


def checkpoints(run_dir: Path) -> dict[int, Path]:
    """Return a run's complete checkpoints by their step, in order."""
    found = by_step(run_dir / "checkpoints")
    return {step: folder for step, folder in found.items() if (folder / "manifest.json").is_file()}


def newest_checkpoint(run_dir: Path) -> Path | None:
    """Return the run's complete checkpoint of the highest step, or None."""
    return next(reversed(checkpoints(run_dir).values()), None)


def sound_checkpoint(run_dir: Path) -> Path | None:
    """Return the newest checkpoint whose files are all as they were written, or None where a run
    has none yet.

    Newer ones that are not are named and set aside as `damaged_step_…`: training goes on from the
    one before and will write these steps again. Raises UserError where none is left.
    """
    for folder in reversed(by_step(run_dir / "checkpoints").values()):
        try:
            for name in read_manifest(folder)["files"]:
                verified(folder, name)
        except OtherVersion:
            raise
        except UserError as error:  # an error of the disk itself is no damage, and ends the command
            aside = folder.with_name(f"damaged_{folder.name}")
            while aside.exists():
                aside = aside.with_name(f"{aside.name}_")
            log.warning("%s; it is set aside as %s and the checkpoint before it used", str(error).split(";")[0], aside)
            folder.rename(aside)
        else:
            return folder
    damaged = sorted((run_dir / "checkpoints").glob("damaged_*"))
    require(
        not damaged,
        f"{run_dir}: no sound checkpoint is left ({', '.join(folder.name for folder in damaged)}); give another name=, "
        "or remove the folder to begin again",
    )
    return None


def find_checkpoint(run_or_checkpoint: str | Path) -> Path:
    """Return the checkpoint folder that a path means: itself, or the newest of a run; of what is no
    path here but the name of a model on the hub, `owner/name` or `owner/name@revision`, the
    downloaded one. Raises UserError for neither.
    """
    path = Path(run_or_checkpoint)
    if (path / "manifest.json").is_file():
        return path
    if is_hub_id(str(run_or_checkpoint)):
        return download(str(run_or_checkpoint))
    newest = newest_checkpoint(path)
    if newest is None:
        state = "holds no complete checkpoint" if path.is_dir() else "no such folder"
        raise UserError(
            f"{path}: {state}; give a run folder such as runs/digits_nano, or one of its checkpoints/step_*"
        )
    return newest


class OtherVersion(UserError):
    """A checkpoint is of a format that this code does not read."""


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return a checkpoint's manifest; raise UserError where it is missing, damaged or of another
    format version.
    """
    path = folder / "manifest.json"
    require(path.is_file(), f"{folder}: has no manifest.json; remove the folder to go on without it")
    try:
        manifest = json.loads(path.read_text())
        version, _ = manifest["format_version"], manifest["files"].items()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: damaged; use another checkpoint of the run") from error
    if version != FORMAT_VERSION:
        raise OtherVersion(f"{folder}: format version {version}, this code reads {FORMAT_VERSION}; see CHANGELOG.md")
    return manifest


def verified(folder: Path, name: str) -> Path:
    """Return the path of a checkpoint's file after comparing it with the manifest; raise UserError
    naming a damaged one.
    """
    path, expected = folder / name, read_manifest(folder)["files"].get(name)
    require(
        expected is not None,
        f"{folder}: has no {name}; training can go on only from a checkpoint that training wrote",
    )
    require(path.is_file(), f"{path}: is missing; put it back, or remove {folder}")
    require(
        path.stat().st_size == expected["size"] and sha256(path) == expected["sha256"],
        f"{path}: damaged (its checksum differs from the manifest's); put it back, or remove {folder}",
    )
    return path


def pieces(folder: Path, name: str) -> list[str]:
    """Return the files that a file of a checkpoint consists of: itself, or its pieces in order."""
    stem, suffix = name.rsplit(".", 1)
    pattern = re.compile(rf"{re.escape(stem)}-\d+-of-\d+\.{suffix}")
    manifest = read_manifest(folder)
    whole = next((file for file, ours in manifest.get("names", {}).items() if ours == name), name)
    return sorted(file for file in manifest["files"] if pattern.fullmatch(file)) or [whole]


def joined(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return whole tensors from the pieces of each process; scalars are the same in all."""
    if len(parts) == 1:
        return parts[0]
    return {
        key: torch.cat([part[key] for part in parts if key in part]) if value.ndim else value
        for key, value in parts[0].items()
    }


def weights_names(folder: Path) -> list[str]:
    """Return the weights that a checkpoint holds: "ema", and "model" or further averages where it
    has them.
    """
    manifest = read_manifest(folder)
    files = {manifest.get("names", {}).get(file, file) for file in manifest["files"]}
    own = [file for file in files if file.endswith(".safetensors") and "/" not in file]  # not an autoencoder's
    return sorted({re.sub(r"(-\d+-of-\d+)?\.safetensors$", "", file) for file in own})


def weights_sha256(folder: Path, name: str) -> str:
    """Return what tells a checkpoint's weights from others: the SHA-256 of their file, or of its
    pieces' digests.
    """
    files = read_manifest(folder)["files"]
    digests = [files[file]["sha256"] for file in pieces(folder, f"{name}.safetensors")]
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def weights_receipt(folder: Path, name: str) -> dict[str, str]:
    """Return what a receipt says of a checkpoint's weights: their hash, and what people call them."""
    told = read_config(folder).get("export", {}).get("weights", name)  # an export's `ema` may have been another average
    return {f"{name}_sha256": weights_sha256(folder, name), "weights": {"ema": "EMA", "model": "raw"}.get(told, told)}


def check_weights(folder: Path, name: str) -> None:
    """Raise UserError where a checkpoint has no weights of a name, naming those it has."""
    known = weights_names(folder)
    require(name in known, f"weights={name}: {folder} has no {name}.safetensors; choose from {', '.join(known)}")


def read_config(folder: Path) -> dict[str, Any]:
    """Return a checkpoint's config.json, checked against its manifest; an autoencoder that an
    export carries is named by where it lies now.
    """
    config = json.loads(verified(folder, "config.json").read_text())
    if config.get("autoencoder", {}).get("source") == CARRIED:
        config["autoencoder"]["source"] = str(folder / AUTOENCODER)
    return config


def read_weights(folder: Path, name: str) -> dict[str, Tensor]:
    """Return the state dict `name` of a checkpoint, such as "ema", on the CPU, checked against its
    manifest.

    Raises UserError where it has none of this name, naming those it has, and for damaged files.
    """
    check_weights(folder, name)
    paths = [verified(folder, file) for file in pieces(folder, f"{name}.safetensors")]
    try:
        return joined([load_file(path) for path in paths])
    except SafetensorError as error:
        raise UserError(f"{paths[0]}: damaged ({error}); use another checkpoint") from error


def read_train_state(folder: Path) -> dict[str, Any]:
    """Return the optimizer state, projector, meters and counts of a checkpoint, on the CPU, checked
    against its manifest.
    """
    paths = [verified(folder, file) for file in pieces(folder, "train_state.pt")]
    states = [torch.load(path, map_location="cpu", weights_only=True) for path in paths]
    state = states[0]
    if len(states) > 1:
        for index in state["optimizer"]["state"]:
            state["optimizer"]["state"][index] = joined([each["optimizer"]["state"][index] for each in states])
        if "alignment" in state:
            state["alignment"] = joined([each["alignment"] for each in states])
    return state


def load_model(run_or_checkpoint: str | Path, weights: str = "ema", revision: str | None = None) -> Denoiser:
    """Load one of this project's networks from a run, a checkpoint, an export or the hub
    (`owner/name`): float32, on the CPU, in eval mode.

    weights: "ema" are the averaged ones, "model" the raw ones, "ema_0.999" or "power_0.05" a
    further average that the run kept. revision: commit, branch or tag on the hub. Settings come
    from inside the checkpoint. Raises UserError for a path that is neither, for weights that it
    lacks, and for damaged files.
    """
    require(
        revision is None or is_hub_id(str(run_or_checkpoint)),
        f"revision={revision}: has no effect with {run_or_checkpoint}, which is no model of the hub; leave it out",
    )
    folder = find_checkpoint(run_or_checkpoint if revision is None else f"{run_or_checkpoint}@{revision}")
    config = read_config(folder)
    with torch.device("meta"):
        model = build_network(config["network"])
    model.load_state_dict(read_weights(folder, weights), strict=True, assign=True)
    return model.eval().requires_grad_(True)


# What a resumed run must share with its checkpoint (docs: design of resuming). Everything else may
# change.
FROZEN = ("model", "data", "autoencoder", "alignment", "objective", "optimizer", "seed", "init_from")
# … but for these, which change no number: where things lie (fingerprints hold what they are) and
# how much at once
FREE = (
    "model.activation_checkpointing",
    "data.root",
    "data.source_root",
    "autoencoder.source",
    "autoencoder.revision",
    "autoencoder.chunk_size",
    "alignment.weights",
    "alignment.compile",
)
FROZEN_TRAINER = (
    "global_batch_size", "ema_decay", "ema_decays", "ema_powers", "warmup_steps", "lr_schedule", "clip_norm",
)  # fmt: skip


def differences(old: dict[str, Any], new: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the settings that differ between two configs, as dotted key → (old, new)."""
    a, b = (flat(json.loads(json.dumps(config))) for config in (old, new))  # as a checkpoint holds them
    return {key: (a.get(key), b.get(key)) for key in sorted(a.keys() | b.keys()) if a.get(key) != b.get(key)}


def frozen_differences(old: dict[str, Any], new: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return those differences between two runs' configs that make them two different trainings."""
    trainer = [f"trainer.{key}" for key in FROZEN_TRAINER]
    if new["trainer"]["lr_schedule"] != "constant":
        trainer.append("trainer.max_steps")  # the learning rate depends on it
    return {
        key: pair
        for key, pair in differences(old, new).items()
        if (key.split(".")[0] in FROZEN or key in trainer) and key not in FREE
    }
