"""Train a DDT: `python train.py [model=… data=… key=value …]`. The same command again resumes."""

import re
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from ddt.config import build, check_arguments
from ddt.data import fingerprint
from ddt.errors import UserError, require
from ddt.launch import default_processes, launch
from ddt.training import train
from scripts.entry import checked, entry_point


def run_settings(name: str, seed: int) -> None:
    """Hold the types of the settings that stand outside of any group."""
    require(
        re.fullmatch(r"[\w.=,+\[\]-][\w.=,+\[\]/-]*", name) is not None and ".." not in name and name != ".",
        f"name={name}: give a folder name made of letters, digits and _.=,+-",
    )
    require(0 <= seed < 2**63, f"seed={seed}: must be at least 0")


def check(config: dict[str, Any]) -> None:
    """Build what costs nothing and raise one UserError with a line for each setting that cannot be."""
    values, problems = check_arguments(run_settings, {"name": config["name"], "seed": config["seed"]}, "")
    config.update(values)

    def attempt(function: Any, *args: Any, prefix: str = "", **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except (UserError, TypeError) as error:  # TypeError: a file that lacks what its target needs
            problems.append(f"{prefix}{error}")

    if not problems:
        attempt(run_settings, **values)
    settings = attempt(build, config["trainer"])
    if settings is not None and settings.num_processes is None:
        attempt(settings.micro_batches, default_processes())
    attempt(build, config["sampler"], prefix="sampler.")
    with torch.device("meta"):
        network = attempt(build(config["model"]), in_channels=1, num_classes=1)
    attempt(build(config["objective"]), denoiser=network)
    attempt(build(config["optimizer"]), parameters=[torch.nn.Parameter(torch.zeros(1))])
    recompute = config["sampler"].get("recompute")
    if recompute is not None and network is not None and not hasattr(network, "encoder"):
        problems.append(f"sampler.recompute={recompute}: this model has no encoder to share; give null")
    attempt(build, config["alignment"])
    if problems:
        raise UserError("\n".join(problems))


def run(config: dict[str, Any]) -> None:
    """Build everything and train, on each process."""
    torch.manual_seed(config["seed"])  # the initial weights; nothing later draws from the global state
    images, held_out = (build(config["data"])(split=split) for split in ("train", "test"))
    autoencoder = build(config["autoencoder"])
    shape = autoencoder.latent_shape(images.channels, images.image_size)
    patch_size = config["model"]["patch_size"]
    require(
        shape[1] % patch_size == 0 and shape[2] % patch_size == 0,
        f"model.patch_size={patch_size} does not divide the latent size {shape[1]}×{shape[2]}: choose a divisor",
    )
    config = {**config, "data": {**config["data"], "fingerprint": fingerprint(images)}}
    sizes = {"in_channels": shape[0], "num_classes": len(images.class_names)}
    network = build(config["model"])(**sizes)
    network_settings = {key: value for key, value in config["model"].items() if key != "_partial_"} | sizes
    train(
        settings=build(config["trainer"]),
        run_dir=Path(config["run_dir"]),
        config={
            "network": network_settings,
            "latent_shape": list(shape),
            "autoencoder": config["autoencoder"],
            "sampler": {key: value for key, value in config["sampler"].items() if key != "_target_"},
            "class_names": images.class_names,
            "run": {key: value for key, value in config.items() if key != "run_dir"},
        },
        objective=build(config["objective"])(denoiser=network),
        autoencoder=autoencoder,
        images=images,
        held_out=held_out,
        make_optimizer=build(config["optimizer"]),
        make_tracker=build(config["tracker"]),
        sampler=build(config["sampler"]),
    )


@entry_point("train")
def main(cfg: DictConfig) -> None:
    """Compose, check, train."""
    config = checked(cfg)
    check(config)
    hydra_config = HydraConfig.get()
    sweep = hydra_config.mode == RunMode.MULTIRUN
    run_dir = Path(hydra_config.runtime.output_dir) if sweep else Path("runs") / config["name"]
    if sweep:
        config["name"] = f"{config['name']}/{run_dir.name}"
    launch(run, config["trainer"]["num_processes"], {**config, "run_dir": str(run_dir)})


if __name__ == "__main__":
    main()
