"""What `config.json` and `manifest.json` of a checkpoint or export hold, checked once when they are
read, before anything is built: they may come from others.
"""

import dataclasses
import re
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from ddt.autoencoder import autoencoder_class
from ddt.config import check_call, convert, parse
from ddt.errors import UserError, brief, reason, require
from ddt.files import read_json
from ddt.model import network_class
from ddt.sampling.settings import SamplerSettings

FORMAT_VERSION = 2
MAX_SIDE = 8_192  # of a latent, or of an image in pixel space
SHARD = re.compile(r"(.+)-\d{5}-of-(\d{5})(\.\w+)")


class OtherVersion(UserError):
    """A checkpoint has a format version that this code does not read."""


@dataclasses.dataclass(frozen=True)
class Manifest:
    """manifest.json. files: name → `size`, `sha256`. names: file → usual name, in an export."""

    format_version: int
    ddt_version: str
    files: dict[str, dict[str, Any]]
    names: dict[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, entry in self.files.items():
            path, shown = PurePosixPath(name), f"files: {brief(name, 60)}"
            inside = bool(path.parts) and not path.is_absolute() and ".." not in path.parts
            require(inside and name.isprintable() and "\\" not in name, f"{shown}: is no file of the folder")
            size, digest = entry.get("size"), entry.get("sha256")
            known = type(size) is int and size >= 0 and isinstance(digest, str) and len(entry) == 2
            require(known and re.fullmatch("[0-9a-f]{64}", str(digest)) is not None, f"{shown}: has no size and sha256")
        for stem, count, suffix in {match.groups() for match in map(SHARD.fullmatch, self.files) if match}:
            shards = (f"{stem}-{rank:05d}-of-{count}{suffix}" for rank in range(int(count)))
            lacking = next((name for name in shards if name not in self.files), None)
            require(lacking is None, f"files: {lacking} is missing beside its other shards")
        require(self.names.keys() <= self.files.keys(), "names: names a file that is not among files")
        usual = [self.names.get(name, name) for name in self.files]
        require(len(set(usual)) == len(usual), "names: two files have one usual name")


@dataclasses.dataclass(frozen=True)
class Config:
    """config.json: what sampling needs, and where the weights come from.

    step: None where unknown. network, autoencoder: `_target_` and arguments. sampler: arguments of
    `SamplerSettings`. run: all settings of the training. source: a published file, by name and
    hash. export, posthoc: receipts.
    """

    step: int | None
    network: dict[str, Any]
    latent_shape: tuple[int, int, int]
    autoencoder: dict[str, Any]
    sampler: dict[str, Any]
    class_names: list[str]
    autoencoder_fingerprint: str | None = None
    run: dict[str, Any] | None = None
    source: dict[str, str] | None = None
    export: dict[str, str | None] | None = None
    posthoc: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        require(self.step is None or self.step >= 0, f"step={self.step}: must be at least 0, or null")
        require(self.step is not None or self.run is None, "step=null: a run of training has its step")


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """config.json of a training of an autoencoder's decoder: what resuming needs."""

    step: int
    latent_shape: tuple[int, int, int]
    autoencoder: dict[str, Any]
    decoder: dict[str, Any]
    run: dict[str, Any]


# of a run's settings, those that are read from a checkpoint
RUN: dict[str, Any] = {
    "seed": int,
    "data._target_": str,
    "data.fingerprint": str | None,
    "optimizer._target_": str,
    "optimizer.lr": float,
    "trainer.global_batch_size": int,
    "trainer.lr_schedule": str,
    "trainer.mixed_precision": str,
}
RUN_OPTIONAL: dict[str, Any] = {
    "init_from": str | None,
    "data.image_size": int | None,
    "objective._target_": str,
    "alignment._target_": str | None,
    "trainer.ema_decay": float,
    "trainer.ema_decays": list[float],
    "trainer.ema_powers": list[float],
}


def plain(value: Any) -> Any:
    """Return a value as JSON has it: tuples as lists."""
    return [plain(each) for each in value] if isinstance(value, list | tuple) else value


def check_run(run: dict[str, Any]) -> dict[str, Any]:
    """Return a run's settings, those of `RUN` converted; UserError for others in their place."""
    checked = dict(run)
    for key, hint in (RUN | RUN_OPTIONAL).items():
        group, _, name = key.rpartition(".")
        part = checked.get(group, {}) if group else checked
        if key in RUN_OPTIONAL and (part is None or (isinstance(part, dict) and name not in part)):
            continue
        require(isinstance(part, dict) and name in part, f"run.{key}: not set")
        value, problems = convert(part[name], hint, f"run.{key}")
        require(not problems, "\n".join(problems))
        part = {**part, name: value}
        checked = {**checked, group: part} if group else part
    return checked


def check_sides(key: str, sides: Sequence[int], patch_size: Any) -> None:
    """Raise UserError unless a network of `patch_size` takes latents of these H and W."""
    for side in sides:
        require(1 <= side <= MAX_SIDE, f"{key}={list(sides)}: must lie in 1..{MAX_SIDE}")
        fits = type(patch_size) is int and patch_size >= 1 and side % patch_size == 0
        require(fits, f"network.patch_size={patch_size}: does not divide the latents' {side}")


def called(function: Callable[..., Any], node: dict[str, Any], prefix: str) -> dict[str, Any]:
    """Return the settings of a `_target_`, its arguments converted; raise UserError for others."""
    arguments, problems = check_call(function, {key: v for key, v in node.items() if key != "_target_"}, prefix)
    require(not problems, "\n".join(problems))
    return {"_target_": node["_target_"], **{key: plain(value) for key, value in arguments.items()}}


def check_config(values: dict[str, Any]) -> dict[str, Any]:
    """Return the content of a config.json as plain values of the right types, without nulls where
    they mean nothing; raise UserError for anything else.
    """
    config = parse(Config, values)
    network = called(network_class(config.network), config.network, "network")
    sampler = parse(SamplerSettings, config.sampler, "sampler")
    checked = {
        "network": network,
        "autoencoder": called(autoencoder_class(config.autoencoder), config.autoencoder, "autoencoder"),
        "sampler": {key: plain(getattr(sampler, key)) for key in config.sampler},
        "run": None if config.run is None else check_run(config.run),
    }
    for key, expected in (("in_channels", config.latent_shape[0]), ("num_classes", len(config.class_names))):
        require(
            network[key] == expected, f"network.{key}={network[key]}: latents or classes of the file are {expected}"
        )
    check_sides("latent_shape", config.latent_shape[1:], network["patch_size"])
    found = {field.name: plain(getattr(config, field.name)) for field in dataclasses.fields(config)} | checked
    optional = [field.name for field in dataclasses.fields(config) if field.default is None]
    return {key: found[key] for key in values if key not in optional or found[key] is not None}


def other_latents(ours: dict[str, Any], theirs: dict[str, Any]) -> str | None:
    """Return the first key by which the latents or classes of two checkpoints' configs differ, or
    None; of the autoencoders as `other_autoencoder`.
    """
    different = (key for key in ("latent_shape", "class_names") if ours[key] != theirs[key])
    return next(different, other_autoencoder(ours, theirs))


def other_autoencoder(ours: dict[str, Any], theirs: dict[str, Any]) -> str | None:
    """Return the first key by which the autoencoders of two configs differ, or None: the
    fingerprints or, where one is unknown, as it is of a converted checkpoint, the settings that
    latents depend on.
    """
    prints = [config.get("autoencoder_fingerprint") for config in (ours, theirs)]
    if None not in prints:
        return None if prints[0] == prints[1] else "autoencoder_fingerprint"
    first, second = (config["autoencoder"] for config in (ours, theirs))
    keys = ("_target_", *autoencoder_class(first).latents_by)
    return next((f"autoencoder.{key}" for key in keys if (first.get(key) or None) != (second.get(key) or None)), None)


def check_decoder_config(values: dict[str, Any]) -> dict[str, Any]:
    """Return the content of a decoder's config.json, checked; raise UserError for anything else."""
    config = parse(DecoderConfig, values)
    return dataclasses.asdict(config) | {"latent_shape": list(config.latent_shape), "run": check_run(config.run)}


def read_config(path: Path, of_decoder: bool = False) -> dict[str, Any]:
    """Return the content of a checked config.json; UserError names the file.

    of_decoder: it may be that of an autoencoder's decoder, which samples nothing.
    """
    values = read_json(path)
    try:
        if "decoder" not in values:
            return check_config(values)
        require(
            of_decoder,
            f"{path.parent}: is an autoencoder's decoder, which samples nothing; train in its latents, with "
            f"autoencoder.decoder={path.parent / 'ema.safetensors'}",
        )
        return check_decoder_config(values)
    except UserError as error:
        raise named(path, error) from error


def read_manifest(path: Path) -> Manifest:
    """Return the content of a checked manifest.json; UserError names the file."""
    values = read_json(path)
    version = values.get("format_version")
    if type(version) is int and version != FORMAT_VERSION:
        raise OtherVersion(
            f"{path}: format version {brief(str(version), 20)}, this code reads {FORMAT_VERSION}; see CHANGELOG.md"
        )
    try:
        return parse(Manifest, values)
    except UserError as error:
        raise named(path, error) from error


def named(path: Path, error: UserError) -> UserError:
    """Return an error as one line that begins with the file's name."""
    text = str(error)
    if text.startswith((str(path), f"{path.parent}:")):
        return error
    return UserError(f"{path}: {reason(error)}; it is damaged, or not written by this project")
