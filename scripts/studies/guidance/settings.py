"""What a guidance search is asked for: its axes, its checkpoints, its points, and what makes two
searches one.
"""

from pathlib import Path
from typing import Any

from ddt.checkpoint import folder as ckpt
from ddt.config import parse
from ddt.errors import require
from ddt.files import sha256
from ddt.generation.generator import Dtype
from ddt.generation.settings import SAMPLER_KEYS, SamplerOverrides
from ddt.model import network_class
from ddt.sampling.schedules import content_of
from ddt.sampling.settings import SamplerSettings
from scripts.studies.guidance.points import Axes, Checkpoint, Point, points_of

AXES = ("ckpt", "weights", "recompute", "timeshift", "cfg_scale", "cfg_interval")


def listed(key: str, value: Any) -> Any:
    """Return an axis as the list of its values where one value stands for it: 2, [0.3,1], or the
    steps [0,5,10].
    """
    numbers = isinstance(value, list) and bool(value) and all(isinstance(v, int | float) for v in value)
    single = not isinstance(value, list) or (key in ("recompute", "cfg_interval") and numbers)
    return [value] if single else value


def find_checkpoints(paths: list[str], weights: list[str]) -> list[Checkpoint]:
    """Return the checkpoints that paths mean; raise UserError where they do not belong in one
    search.
    """
    folders = [ckpt.find_checkpoint(path) for path in paths]
    require(len({f.resolve() for f in folders}) == len(folders), f"ckpt={paths}: two of them are one checkpoint")
    names = [folder.resolve().name for folder in folders]
    if len(set(names)) < len(names):  # the same step of several runs
        names = [f"{folder.resolve().parent.parent.name}-{folder.name}" for folder in folders]
    require(len(set(names)) == len(names), f"ckpt={paths}: runs of the same name; rename the folder of one")
    found = [Checkpoint(name, f, ckpt.read_config(f)) for name, f in zip(names, folders, strict=True)]
    for other in found:
        for key in ("latent_shape", "class_names", "autoencoder_fingerprint"):
            require(
                found[0].stored.get(key) == other.stored.get(key),
                f"ckpt={other.folder}: has another {key} than {found[0].folder}; search them one by one",
            )
        for kind in weights:
            ckpt.check_weights(other.folder, kind)
    return found


def search_points(config: dict[str, Any], checkpoints: list[Checkpoint]) -> list[Point]:
    """Return the points, each with a sampler as sample.py makes it of the command line and the
    checkpoint.
    """
    shares = any(value is not None for value in config["recompute"])

    def settings_of(checkpoint: Checkpoint, chosen: dict[str, Any]) -> SamplerSettings:
        values = {**config, **chosen}
        if shares and chosen["recompute"] is None:
            values["forecast_order"] = 0  # of the others
        overrides = parse(SamplerOverrides, {key: values[key] for key in ("sampler", *SAMPLER_KEYS)})
        stored = checkpoint.stored
        return overrides.resolve(stored["sampler"], network_class(stored["network"]).shares_encoder)

    axes = Axes(checkpoints, **{key: config[key] for key in AXES if key != "ckpt"})
    return points_of(axes, settings_of)


def request_of(config: dict[str, Any], checkpoints: list[Checkpoint], dtype: Dtype, device: str) -> dict[str, Any]:
    """Return what makes two searches one: all that a number in their results depends on."""
    keys = ("reference", "features", "metric", "num_samples", "top", "final_samples", "repeats", "autoencoder")
    reference = Path(config["reference"])
    return {
        **{key: config[key] for key in (*keys, "inception_weights", "pr_dtype")},
        "reference_sha256": sha256(reference) if reference.is_file() else None,
        "checkpoints": {
            c.name: {"step": c.stored["step"], "sha256": c.hashes(), "sampler": c.stored["sampler"]}
            for c in checkpoints
        },
        **{key: config[key] for key in AXES if key not in ("ckpt", "recompute")},
        "recompute": [content_of(value) for value in config["recompute"]],
        **{key: config[key] for key in ("sampler", *SAMPLER_KEYS) if key not in AXES},
        "dtype": dtype,
        "device": device,
    }
