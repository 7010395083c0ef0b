"""Sample from a run or checkpoint: `python sample.py ckpt=RUN_OR_CHECKPOINT [key=value …]`."""

from pathlib import Path
from typing import Any, Literal

from omegaconf import DictConfig

from ddt import checkpoint as ckpt
from ddt.autoencoder import Autoencoder, build_autoencoder
from ddt.config import check_arguments
from ddt.errors import UserError, require
from ddt.files import sha256
from ddt.generation import image_set, sample_set
from ddt.launch import launch
from ddt.sampling import SamplerSettings
from ddt.training import make_accelerator
from scripts.entry import CONF, checked, entry_point

SAMPLER_KEYS = ("num_steps", "cfg_scale", "cfg_interval", "last_step", "timeshift", "recompute")


def settings_of(
    out: str | None,
    dtype: Literal["bf16", "fp32"] | None,
    batch_size: int,
    num_processes: int | None,
    autoencoder: str,
) -> None:
    """Hold the types of the settings that belong to neither the set nor the sampler."""


def check(config: dict[str, Any], stored: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of `run` from the command line and the checkpoint's config; one line for each problem."""
    chosen = {key: config[key] for key in SAMPLER_KEYS} | {"solver": config["sampler"]}
    chosen = {key: value for key, value in chosen.items() if value != "checkpoint"}
    sampler, problems = check_arguments(SamplerSettings, stored["sampler"] | chosen, "")
    given = {key: config[key] for key in ("num_samples", "classes", "seeds", "seed")}
    which, found = check_arguments(image_set, given, "")
    problems += found
    others, found = check_arguments(
        settings_of, {k: config[k] for k in ("out", "dtype", "batch_size", "num_processes", "autoencoder")}, ""
    )
    problems += found
    if problems:
        raise UserError("\n".join(line.replace("solver=", "sampler=") for line in problems))
    require(others["batch_size"] >= 1, f"batch_size={others['batch_size']}: must be at least 1")
    images = image_set(stored["network"]["num_classes"], **which)
    return {"sampler": SamplerSettings(**sampler), "images": images, **others}


def stored_autoencoder(stored: dict[str, Any], chosen: str) -> Autoencoder:
    """Return the autoencoder of a checkpoint, or the one chosen in its place.

    Raises UserError where the checkpoint's is not there, or has other weights than in training.
    """
    settings = stored["autoencoder"]
    if chosen != "checkpoint":
        require("source" in settings, f"autoencoder={chosen}: this model draws pixels; leave it out")
        return build_autoencoder({**settings, "source": chosen, "revision": None})
    try:
        autoencoder = build_autoencoder(settings)
    except UserError as error:
        raise UserError(f"{error} (or sample with autoencoder=FOLDER)") from error
    expected = stored.get("autoencoder_fingerprint")
    require(
        expected in (None, autoencoder.fingerprint),
        f"autoencoder.source={settings.get('source')}: holds other weights than the run was trained with; name the "
        "right ones with autoencoder=, or choose these explicitly by autoencoder=THIS_SOURCE",
    )
    return autoencoder


def run(folder: Path, stored: dict[str, Any], arguments: dict[str, Any]) -> None:
    """Load the checkpoint and draw the set, on each process."""
    accelerator = make_accelerator("no")
    autoencoder = stored_autoencoder(stored, arguments["autoencoder"])
    sample_set(
        model=ckpt.load_model(folder).to(accelerator.device),
        autoencoder=autoencoder,
        shape=tuple(stored["latent_shape"]),
        images=arguments["images"],
        settings=arguments["sampler"],
        dtype=arguments["dtype"],
        batch_size=arguments["batch_size"],
        out=Path(arguments["out"] or folder / "samples"),
        checkpoint={
            "ema_sha256": sha256(folder / "ema.safetensors"),
            "step": stored["step"],
            "class_names": stored["class_names"],
            "autoencoder_sha256": autoencoder.fingerprint,
        },
        accelerator=accelerator,
    )


@entry_point("sample", CONF / "sample")
def main(cfg: DictConfig) -> None:
    """Compose, check, sample."""
    config = checked(cfg)
    folder = ckpt.find_checkpoint(str(config["ckpt"]))
    stored = ckpt.read_config(folder)
    arguments = check(config, stored)
    launch(run, arguments["num_processes"], folder, stored, arguments)


if __name__ == "__main__":
    main()
