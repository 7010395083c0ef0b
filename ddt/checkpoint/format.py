"""Checkpoint folders with everything that sampling needs.

    config.json         network, latents, autoencoder, sampler and the run's settings, plain values
    ema.safetensors     EMA weights: what samples are generated with
    ema_0.999.safetensors, power_0.05.safetensors   further EMA weights, where the run keeps them
    model.safetensors   raw weights           (only in checkpoints that training resumes from)
    train_state.pt      optimizer and meters  (likewise)
    manifest.json       written last: format version, size and SHA-256 of each file

Written atomically: all files go to a temporary folder, the manifest last, then the folder is
renamed (`ddt.files.rename_atomically`): here for one process, in training by
`ddt.training.saving.Saver.write_atomically`. Read with `weights_only=True` and checked against the
manifest.

A hub expects weights in model.safetensors, so the manifest of an export (`ddt.export`) has `names`:
what that file is called here. A run under FSDP writes weights and state in shards, joined along
the first dimension: `ema-00000-of-00002.safetensors` is the shard of rank 0 of 2. A run folder
holds its checkpoints as `checkpoints/step_0000700`.
"""

import dataclasses
import hashlib
import logging
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ddt.checkpoint import config as contents
from ddt.checkpoint.config import FORMAT_VERSION, Manifest, OtherVersion
from ddt.checkpoint.models import PUBLISHED, is_remote, no_checkpoint
from ddt.errors import UserError, reason, require
from ddt.files import atomic_folder, check_new, file_errors, fsync, reset_permissions, sha256, write_json
from ddt.hub import fetch, is_hub_id
from ddt.model import Denoiser, load_network
from ddt.tensor_files import foreign, read_tensors, state_dict
from ddt.version import __version__

log = logging.getLogger(__name__)
AUTOENCODER = "autoencoder"  # folder of an autoencoder inside an export …
BUNDLED = f"./{AUTOENCODER}"  # … and its `source` in the export's config
WEIGHTS = {"ema": "EMA", "model": "raw"}  # their names in receipts
OTHER = "use another checkpoint"

Shard = tuple[int, int]  # (rank, number of processes) of a sharded run


# --- writing


def shard_name(name: str, shard: Shard | None) -> str:
    """Return the name of a file such as `ema.safetensors`, or of a process's shard of it."""
    stem, suffix = name.rsplit(".", 1)
    return name if shard is None else f"{stem}-{shard[0]:05d}-of-{shard[1]:05d}.{suffix}"


def manifest_entry(path: Path) -> dict[str, Any]:
    """Return a file's entry in the manifest."""
    return {"size": path.stat().st_size, "sha256": sha256(path)}


def write_files(
    folder: Path,
    weights: dict[str, dict[str, Tensor]],
    train_state: dict[str, Any] | None = None,
    shard: Shard | None = None,
) -> dict[str, dict[str, Any]]:
    """Write state dicts and train state, forced to disk; return their manifest entries."""
    written = []
    for name, state in weights.items():
        for key in state:
            assert not key.startswith(("module.", "_orig_mod.")), f"{key}: a name of a wrapper (DDP, compile)"
        written.append(folder / shard_name(f"{name}.safetensors", shard))
        with file_errors(written[-1]):
            save_file({k: v.detach().cpu().contiguous() for k, v in state.items()}, written[-1])
        reset_permissions(written[-1])
    if train_state is not None:
        written.append(folder / shard_name("train_state.pt", shard))
        with file_errors(written[-1]):
            torch.save(train_state, written[-1])
    for path in written:
        fsync(path)
    return {path.name: manifest_entry(path) for path in written}


def write_manifest(
    folder: Path, config: dict[str, Any], files: dict[str, dict[str, Any]], names: dict[str, str] | None = None
) -> None:
    """Write config.json and manifest.json, forced to disk, beside the other files of a folder.

    files: their manifest entries. names: file → its usual name, where a hub needs another one.
    """
    write_json(folder / "config.json", config)
    files = {"config.json": manifest_entry(folder / "config.json"), **dict(sorted(files.items()))}
    write_json(folder / "manifest.json", dataclasses.asdict(Manifest(FORMAT_VERSION, __version__, files, names or {})))
    for name in ("config.json", "manifest.json"):
        fsync(folder / name)


def write_checkpoint(
    folder: Path, config: dict[str, Any], train_state: dict[str, Any] | None = None, **weights: dict[str, Tensor]
) -> None:
    """Write a checkpoint folder atomically from one process; raise UserError where it exists.

    config: plain values. train_state: anything that loads with `weights_only=True`. weights: state
    dicts by name, such as `ema=` and `model=`. `training.saving` writes those of a run.
    """
    check_new(folder)
    with atomic_folder(folder) as temporary:  # renamed to `folder` at the end of the block
        write_manifest(temporary, config, write_files(temporary, weights, train_state))


# --- lookup


def checkpoint_folder(run_dir: Path, step: int) -> Path:
    """Return the folder of a run's checkpoint at a step."""
    return run_dir / "checkpoints" / f"step_{step:07d}"


def folders_by_step(parent: Path) -> dict[int, Path]:
    """Return the folders `step_0000700` in a folder by step, ascending."""
    steps = {int(m[1]): path for path in parent.glob("step_*") if (m := re.fullmatch(r"step_(\d{7,})", path.name))}
    return dict(sorted(steps.items()))


def list_checkpoints(run_dir: Path) -> dict[int, Path]:
    """Return a run's complete checkpoints by step, ascending."""
    folders = folders_by_step(run_dir / "checkpoints")
    return {step: folder for step, folder in folders.items() if (folder / "manifest.json").is_file()}


def newest_checkpoint(run_dir: Path) -> Path | None:
    """Return the run's complete checkpoint of the highest step, or None."""
    return next(reversed(list_checkpoints(run_dir).values()), None)


def newest_intact_checkpoint(run_dir: Path) -> Path | None:
    """Return the newest checkpoint whose checksums all match, or None where a run has none.

    Newer damaged ones are reported and renamed `damaged_step_…`: training resumes from the one
    before and writes these steps again. Raises UserError where only damaged ones are left.
    """
    for folder in reversed(folders_by_step(run_dir / "checkpoints").values()):
        try:
            for name in read_manifest(folder).files:
                verify_file(folder, name)
        except OtherVersion:
            raise
        except UserError as error:  # an OSError of the disk is no damage, and ends the command
            aside = folder.with_name(f"damaged_{folder.name}")
            while aside.exists():
                aside = aside.with_name(f"{aside.name}_")
            log.warning("%s; it is set aside as %s and the checkpoint before it used", str(error).split(";")[0], aside)
            folder.rename(aside)
        else:
            return folder
    damaged = ", ".join(sorted(folder.name for folder in (run_dir / "checkpoints").glob("damaged_*")))
    require(
        not damaged,
        f"{run_dir}: no intact checkpoint is left ({damaged}); give another name=, or remove the folder to start again",
    )
    return None


def find_checkpoint(run_or_checkpoint: str | Path) -> Path:
    """Return a checkpoint folder: the path itself, the newest of a run, a downloaded hub model, or
    a converted published model.

    A hub model is `owner/name` or `owner/name@revision`, a published one a name of
    `ddt.list_models`. Raises UserError for anything else.
    """
    from ddt.checkpoint.named import named_checkpoint  # which writes with this module

    path = Path(run_or_checkpoint)
    if (path / "manifest.json").is_file():
        return path
    if is_remote(str(run_or_checkpoint)):
        find = named_checkpoint if str(run_or_checkpoint) in PUBLISHED else download
        return find(str(run_or_checkpoint))
    newest = newest_checkpoint(path)
    if newest is None:
        require(
            not path.is_file(),
            f"{path}: is a file; a published checkpoint becomes a folder by scripts/convert_checkpoint.py",
        )
        raise no_checkpoint(path, "holds no complete checkpoint" if path.is_dir() else "no such folder")
    return newest


def download(source: str) -> Path:
    """Return the local folder of a hub model, `owner/name[@revision]`, downloaded unless cached.

    Raises UserError where the download fails or the model is not one of this project's.
    """

    def ours(names: list[str]) -> list[str]:
        require(
            "manifest.json" in names,
            f"{source}: is on the hub, but no model of this project (no manifest.json); a published checkpoint goes "
            "through scripts/convert_checkpoint.py",
        )
        return [name for name in names if name.endswith((".json", ".safetensors"))]

    def complete(folder: Path) -> bool:
        return all((folder / name).is_file() for name in read_manifest(folder).files)

    advice = "give a run folder such as runs/digits_nano, one of its checkpoints/step_*, or the name of a model there"
    return fetch(source, source, ours, advice, complete)


# --- reading


def read_manifest(folder: Path) -> Manifest:
    """Return a manifest; UserError where it is missing, damaged or of another format version."""
    path = folder / "manifest.json"
    require(path.is_file(), f"{folder}: has no manifest.json; remove the folder to continue without it")
    return contents.read_manifest(path)


def verify_file(folder: Path, name: str) -> Path:
    """Return the path of a file, checked against the manifest; UserError where it is damaged."""
    path, files = folder / name, read_manifest(folder).files
    require(name in files, f"{folder}: has no {name}; training can resume only from a checkpoint that training wrote")
    require(path.is_file(), f"{path}: is missing; put it back, or remove {folder}")
    if manifest_entry(path) != files[name]:
        raise UserError(f"{path}: damaged ({damage(path, files[name])}); put it back, or remove {folder}")
    return path


def damage(path: Path, expected: dict[str, Any]) -> str:
    """Return what happened to a file that is not as its manifest says."""
    if path.suffix == ".json":
        unix = path.read_bytes().replace(b"\r\n", b"\n")
        if hashlib.sha256(unix).hexdigest() == expected["sha256"]:
            return "its line ends were converted to CRLF, as git's core.autocrlf does"
    kind = foreign(path)
    return kind if "LFS" in kind or "empty" in kind else "its checksum differs from the manifest's"


def read_config(folder: Path) -> dict[str, Any]:
    """Return a checkpoint's config.json, checked (`ddt.checkpoint.config`), with the real path of a
    bundled autoencoder.
    """
    config = contents.read_config(verify_file(folder, "config.json"))
    if config["autoencoder"].get("source") == BUNDLED:
        config["autoencoder"]["source"] = str(folder / AUTOENCODER)
    return config


def read_training(folder: Path) -> dict[str, Any]:
    """Return the checked config.json of a checkpoint that training resumes from, whatever it
    trains.
    """
    return contents.read_config(verify_file(folder, "config.json"), of_decoder=True)


def shard_files(folder: Path, name: str) -> list[str]:
    """Return the files of `name`, such as "ema.safetensors": the one, or its shards in order."""
    stem, suffix = name.rsplit(".", 1)
    pattern = re.compile(rf"{re.escape(stem)}-\d+-of-\d+\.{suffix}")
    manifest = read_manifest(folder)
    single = next((file for file, usual in manifest.names.items() if usual == name), name)
    return sorted(file for file in manifest.files if pattern.fullmatch(file)) or [single]


def join_shards(shards: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return full tensors from the shards of each process; scalars are the same in all."""
    if len(shards) == 1:
        return shards[0]
    return {
        key: torch.cat([shard[key] for shard in shards if key in shard]) if value.ndim else value
        for key, value in shards[0].items()
    }


def weights_names(folder: Path) -> list[str]:
    """Return the names of a checkpoint's weights: "ema", and perhaps "model" and further EMAs."""
    manifest = read_manifest(folder)
    files = {manifest.names.get(file, file) for file in manifest.files}
    own = [file for file in files if file.endswith(".safetensors") and "/" not in file]  # not an autoencoder's
    return sorted({re.sub(r"(-\d+-of-\d+)?\.safetensors$", "", file) for file in own})


def check_weights(folder: Path, name: str) -> None:
    """Raise UserError, with the names there are, where a checkpoint has no weights `name`."""
    known = weights_names(folder)
    require(name in known, f"weights={name}: {folder} has no {name}.safetensors; choose from {', '.join(known)}")


def weights_sha256(folder: Path, name: str) -> str:
    """Return the SHA-256 of a file of weights, or that of its shards' digests."""
    files = read_manifest(folder).files
    digests = [files[file]["sha256"] for file in shard_files(folder, f"{name}.safetensors")]
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def weights_bytes(folder: Path, name: str) -> int:
    """Return the size on disk of a checkpoint's weights."""
    files = read_manifest(folder).files
    return sum(files[file]["size"] for file in shard_files(folder, f"{name}.safetensors"))


def weights_receipt(folder: Path, name: str) -> dict[str, str]:
    """Return the entries of a checkpoint's weights in a receipt: hash and usual name."""
    original = read_config(folder).get("export", {}).get("weights", name)  # an export's `ema` may have been `model`
    return {f"{name}_sha256": weights_sha256(folder, name), "weights": WEIGHTS.get(original, original)}


def read_weights(folder: Path, name: str) -> dict[str, Tensor]:
    """Return the state dict `name` of a checkpoint, such as "ema", on the CPU, checked.

    Raises UserError where it has no such weights, and for damaged files.
    """
    check_weights(folder, name)
    paths = [verify_file(folder, file) for file in shard_files(folder, f"{name}.safetensors")]
    try:
        return join_shards([state_dict(read_tensors(path, advice=OTHER), str(path), OTHER) for path in paths])
    except RuntimeError as error:  # shards of tensors that do not fit
        raise UserError(f"{paths[0]}: is no shard of the same weights as {paths[-1]}; {OTHER}") from error


def read_train_state(folder: Path) -> dict[str, Any]:
    """Return a checkpoint's optimizer state, projector, meters and counts, on the CPU, checked."""
    paths = [verify_file(folder, file) for file in shard_files(folder, "train_state.pt")]
    shards = [read_tensors(path, advice=OTHER) for path in paths]
    state = shards[0]
    require(all(isinstance(shard, dict) for shard in shards), f"{paths[0]}: holds no state of a training; {OTHER}")
    if len(shards) > 1:
        optimizers = [shard["optimizer"]["state"] for shard in shards]
        for index in optimizers[0]:
            optimizers[0][index] = join_shards([optimizer[index] for optimizer in optimizers])
        if "alignment" in state:
            state["alignment"] = join_shards([shard["alignment"] for shard in shards])
    return state


def load_model(run_or_checkpoint: str | Path, weights: str = "ema", revision: str | None = None) -> Denoiser:
    """Load a network from a run, checkpoint, export or hub id: float32, on the CPU, in eval mode.

    weights: "ema", "model" (raw), or further EMA weights that the run keeps, such as "ema_0.999" or
    "power_0.05". revision: commit, branch or tag on the hub. Raises UserError for any other path,
    missing weights and damaged files.
    """
    require(
        revision is None or is_hub_id(str(run_or_checkpoint)),
        f"revision={revision}: has no effect with {run_or_checkpoint}, which is no model of the hub; leave it out",
    )
    folder = find_checkpoint(run_or_checkpoint if revision is None else f"{run_or_checkpoint}@{revision}")
    network, state = read_config(folder)["network"], read_weights(folder, weights)
    try:
        return load_network(network, state)
    except UserError as error:
        raise UserError(f"{folder}: config.json and the {weights} weights do not fit: {reason(error)}") from error
