"""Checkpoints: written whole or not at all, read with `weights_only=True`, everything that sampling needs inside.

A checkpoint is a folder:

    config.json         the network, latents, autoencoder, sampler and the run's settings, as plain values
    ema.safetensors     averaged weights: what samples are drawn with
    model.safetensors   raw weights           (only in checkpoints that training can go on from)
    train_state.pt      optimizer and meters  (likewise)
    manifest.json       written last: format version, size and SHA-256 of each file

It is written under a temporary name and renamed when complete. A run folder holds them as `checkpoints/step_0000700`.
"""

import json
import re
import shutil
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ddt.errors import UserError, require
from ddt.files import fsync, sha256, share, write_json
from ddt.model import DDT, Denoiser, DiT
from ddt.version import __version__

FORMAT_VERSION = 1
WeightsName = Literal["ema", "model"]
NETWORKS: dict[str, type[DDT] | type[DiT]] = {"ddt.model.DDT": DDT, "ddt.model.DiT": DiT}


def write_checkpoint(
    folder: Path,
    config: dict[str, Any],
    ema: dict[str, Tensor],
    model: dict[str, Tensor] | None = None,
    train_state: dict[str, Any] | None = None,
) -> None:
    """Write a checkpoint folder atomically; it must not exist yet (UserError).

    config holds plain values only; ema and model are state dicts with clean names; train_state is anything that
    loads with `weights_only=True`.
    """
    require(not folder.exists(), f"{folder}: exists already and is not written over; choose another folder")
    for name in (*ema, *(model or {})):
        assert not name.startswith(("module.", "_orig_mod.")), f"{name}: a wrapper's name must not be saved"
    temporary = folder.parent / f".tmp-{folder.name}"
    shutil.rmtree(temporary, ignore_errors=True)  # left by a run that was killed while writing
    temporary.mkdir(parents=True)
    write_json(temporary / "config.json", config)
    for name, weights in (("ema", ema), ("model", model)):
        if weights is not None:
            save_file(
                {k: v.detach().cpu().contiguous() for k, v in weights.items()},
                temporary / f"{name}.safetensors",
            )
            share(temporary / f"{name}.safetensors")
    if train_state is not None:
        torch.save(train_state, temporary / "train_state.pt")
    files = {path.name: {"size": path.stat().st_size, "sha256": sha256(path)} for path in sorted(temporary.iterdir())}
    manifest = {"format_version": FORMAT_VERSION, "ddt_version": __version__, "files": files}
    write_json(temporary / "manifest.json", manifest)
    for path in temporary.iterdir():
        fsync(path)
    fsync(temporary)
    temporary.rename(folder)
    fsync(folder.parent)


def checkpoint_folder(run_dir: Path, step: int) -> Path:
    """Return the folder of a run's checkpoint at a step."""
    return run_dir / "checkpoints" / f"step_{step:07d}"


def newest_checkpoint(run_dir: Path) -> Path | None:
    """Return the run's complete checkpoint of the highest step, or None."""
    folders = (run_dir / "checkpoints").glob("step_*")
    steps = {
        int(m[1]): f for f in folders if (m := re.fullmatch(r"step_(\d+)", f.name)) and (f / "manifest.json").is_file()
    }
    return steps[max(steps)] if steps else None


def refuse_incomplete(run_dir: Path) -> None:
    """Raise UserError where a run holds a checkpoint folder without manifest: training would meet it again."""
    for folder in sorted((run_dir / "checkpoints").glob("step_*")):
        require(
            (folder / "manifest.json").is_file(),
            f"{folder}: has no manifest.json; remove the folder to go on without it",
        )


def find_checkpoint(run_or_checkpoint: str | Path) -> Path:
    """Return the checkpoint folder that a path means: itself, or the newest of a run. Raises UserError for neither."""
    path = Path(run_or_checkpoint)
    if (path / "manifest.json").is_file():
        return path
    newest = newest_checkpoint(path)
    if newest is None:
        state = "holds no complete checkpoint" if path.is_dir() else "no such folder"
        raise UserError(
            f"{path}: {state}; give a run folder such as runs/digits_nano, or one of its checkpoints/step_*"
        )
    return newest


def verified(folder: Path, name: str) -> Path:
    """Return the path of a checkpoint's file after comparing it with the manifest; raise UserError naming a damaged
    one.
    """
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        expected = manifest["files"].get(name)
        version = manifest["format_version"]
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise UserError(f"{folder / 'manifest.json'}: damaged; use another checkpoint of the run") from error
    require(
        version == FORMAT_VERSION,
        f"{folder}: format version {version}, this code reads {FORMAT_VERSION}; see CHANGELOG.md",
    )
    path = folder / name
    require(
        expected is not None,
        f"{folder}: has no {name}; training can go on only from a checkpoint that training wrote",
    )
    require(path.is_file(), f"{path}: is missing; remove {folder} to use the checkpoint before it")
    require(
        path.stat().st_size == expected["size"] and sha256(path) == expected["sha256"],
        f"{path}: damaged (its checksum differs from the manifest's); remove {folder} to use the checkpoint before it",
    )
    return path


def read_config(folder: Path) -> dict[str, Any]:
    """Return a checkpoint's config.json, checked against its manifest."""
    return json.loads(verified(folder, "config.json").read_text())


def read_weights(folder: Path, name: str) -> dict[str, Tensor]:
    """Return the state dict "ema" or "model" of a checkpoint, on the CPU, checked against its manifest."""
    path = verified(folder, f"{name}.safetensors")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path}: damaged ({error}); use another checkpoint") from error


def read_train_state(folder: Path) -> dict[str, Any]:
    """Return the optimizer state and meters of a checkpoint, on the CPU, checked against its manifest."""
    return torch.load(verified(folder, "train_state.pt"), map_location="cpu", weights_only=True)


def build_network(settings: dict[str, Any]) -> Denoiser:
    """Build the network that `settings` describe: `_target_`, one of `NETWORKS`, and its constructor's arguments."""
    arguments = dict(settings)
    target = arguments.pop("_target_", None)
    require(target in NETWORKS, f"model._target_={target}: unknown network, choose from {', '.join(NETWORKS)}")
    return NETWORKS[target](**arguments)


def load_model(run_or_checkpoint: str | Path, weights: WeightsName = "ema") -> Denoiser:
    """Load one of this project's networks from a run or checkpoint: float32, on the CPU, in eval mode.

    weights: "ema" are the averaged ones, "model" the raw ones. Settings come from inside the checkpoint.
    Raises UserError for a path that is neither, for weights that it lacks, and for damaged files.
    """
    folder = find_checkpoint(run_or_checkpoint)
    config = read_config(folder)
    with torch.device("meta"):
        model = build_network(config["network"])
    model.load_state_dict(read_weights(folder, weights), strict=True, assign=True)
    return model.eval().requires_grad_(True)


# What a resumed run must share with its checkpoint (docs: design of resuming). Everything else may change.
FROZEN = ("model", "data", "autoencoder", "alignment", "objective", "optimizer", "seed", "init_from")
# … but for these, which change no number: where things lie (fingerprints hold what they are) and how much at once
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
FROZEN_TRAINER = ("global_batch_size", "ema_decay", "warmup_steps", "lr_schedule")


def differences(old: dict[str, Any], new: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the settings that differ between two configs, as dotted key → (old, new)."""

    def flat(node: Any, prefix: str) -> dict[str, Any]:
        if isinstance(node, dict) and node:
            return {
                k: v
                for key, value in node.items()
                for k, v in flat(value, f"{prefix}.{key}" if prefix else key).items()
            }
        return {prefix: node}

    a, b = (flat(json.loads(json.dumps(config)), "") for config in (old, new))  # as a checkpoint holds them
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
