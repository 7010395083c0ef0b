"""A checkpoint as sampling sees it: its sampler and autoencoder, and what a user may put in their
place.
"""

from pathlib import Path
from typing import Any

import torch

from ddt.autoencoder import Autoencoder, build_autoencoder
from ddt.checkpoint import folder as ckpt
from ddt.config import check_arguments, shown
from ddt.distributed.compile import compile_blocks
from ddt.errors import UserError, require
from ddt.generation.generator import Dtype, Generator, cast_weights, usual_dtype
from ddt.generation.image_set import ImageSet, image_set
from ddt.sampling.fitting import check_fitted
from ddt.sampling.schedules import parse_schedule, read_schedule
from ddt.sampling.settings import SamplerSettings
from ddt.sampling.solvers import STOCHASTIC

SAMPLER_KEYS = [key for key in SamplerSettings.__dataclass_fields__ if key != "solver"]
ADAPTIVE_IGNORES = ("last_step", "timeshift")


def sampler_of(config: dict[str, Any], stored: dict[str, Any]) -> SamplerSettings:
    """Return the sampler of a checkpoint's config with the settings of `config` in their place,
    `sampler` and `SAMPLER_KEYS`, but for those that are "checkpoint".

    Raises UserError with a line for each that is none.
    """
    chosen = {key: config[key] for key in SAMPLER_KEYS} | {"solver": config["sampler"]}
    chosen = {key: value for key, value in chosen.items() if value != "checkpoint"}
    values, problems = check_arguments(SamplerSettings, applicable(stored["sampler"] | chosen, chosen), "")
    require(not problems, "\n".join(line.replace("solver=", "sampler=") for line in problems))
    settings = SamplerSettings(**values)
    for key in ADAPTIVE_IGNORES:
        require(
            settings.solver != "adaptive" or key not in chosen,
            f"{key}={chosen.get(key)}: sampler=adaptive chooses its own steps; leave it out",
        )
    network = stored["network"]
    require(
        settings.recompute is None or network["_target_"].endswith(".DDT"),
        f"recompute={settings.recompute}: this model has no encoder to share; give null",
    )
    if isinstance(settings.recompute, str) and parse_schedule(settings.recompute, settings.num_steps)[0] == "file":
        check_fitted(read_schedule(Path(settings.recompute)), settings, None)
    guiding = [key for key in ("cfg_interval", "cfg_steps") if chosen.get(key) is not None]
    if guiding and settings.cfg_scale != 1 and settings.solver != "adaptive":
        guidance, times = settings.guidance(), settings.call_times()
        require(
            any(guidance.active(t, step) for step, inside in enumerate(times) for t in inside),
            f"{guiding[0]}={shown(chosen[guiding[0]])}: guides none of the {settings.num_steps} steps, whose times are "
            f"{', '.join(f'{times[k][0]:.3f}' for k in range(min(3, len(times))))}, …; choose others, or cfg_scale=1",
        )
    return settings


def images_of(config: dict[str, Any], stored: dict[str, Any]) -> ImageSet:
    """Return the images that `num_samples`, `classes`, `seeds` and `seed` of `config` mean for a
    checkpoint; raise UserError with a line for each that cannot be.
    """
    given = {key: config[key] for key in ("num_samples", "classes", "seeds", "seed")}
    which, problems = check_arguments(image_set, given, "")
    require(not problems, "\n".join(problems))
    return image_set(stored["network"]["num_classes"], **which)


def applicable(values: dict[str, Any], chosen: dict[str, Any]) -> dict[str, Any]:
    """Return a sampler's settings without those of the checkpoint that the chosen ones leave
    without effect.
    """
    solver, idle = values.get("solver"), set()
    if solver not in STOCHASTIC:
        idle |= {"sde_diffusion", "sde_last"}
    idle |= {"recompute", "cfg_steps", "forecast_order"} if solver == "adaptive" else {"tolerance"}
    if values.get("recompute") is None:
        idle.add("forecast_order")
    return {key: value for key, value in values.items() if key in chosen or key not in idle}


def check_guide_config(stored: dict[str, Any], guide: dict[str, Any], scale: float) -> None:
    """Raise UserError where a guide's checkpoint speaks of other latents or classes, or guides
    nothing.
    """
    require(scale != 1, "guide: has no effect with cfg_scale=1; choose another scale, or leave the guide out")
    for key in ("latent_shape", "class_names", "autoencoder_fingerprint"):
        ours, theirs = stored.get(key), guide.get(key)
        require(
            None in (ours, theirs) or ours == theirs,
            f"guide: has another {key} than the model; give a weaker checkpoint of the same data",
        )


def stored_autoencoder(stored: dict[str, Any], chosen: str) -> Autoencoder:
    """Return the autoencoder of a checkpoint, or the one chosen in its place.

    Raises UserError where the checkpoint's is not there, or has other weights than in training, or
    other latents.
    """
    settings = stored["autoencoder"]
    if chosen != "checkpoint":
        require("source" in settings, f"autoencoder={chosen}: this model draws pixels; leave it out")
        autoencoder = build_autoencoder({**settings, "source": chosen, "revision": None})
    else:
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
    channels = autoencoder.latent_channels
    require(
        channels in (None, stored["latent_shape"][0]),
        f"autoencoder: has {channels} latent channels, the model {stored['latent_shape'][0]}; choose the model's own",
    )
    return autoencoder


def load_generator(
    folder: Path,
    settings: SamplerSettings,
    autoencoder: Autoencoder,
    device: torch.device,
    weights: str = "ema",
    guide: Path | None = None,
    dtype: Dtype | None = None,
    cache_gib: float = 4,
    compiled: bool = False,
) -> Generator:
    """Load the networks that draw images, a checkpoint's `weights` and a guide's; `autoencoder` is
    the checkpoint's (`stored_autoencoder`).

    dtype None: what is usual on the device. Raises UserError for files that are not there, or not
    as they were.
    """
    stored = ckpt.read_config(folder)
    model = ckpt.load_model(folder, weights)
    guiding = None if guide is None else ckpt.load_model(guide)
    dtype = dtype or usual_dtype(device)
    for network in filter(None, (model, guiding)):
        network.to(device)
        if dtype == "bf16":
            cast_weights(network)
        if compiled:
            compile_blocks(network, dynamic=True)  # batches of B and 2B, and a smaller last one
    return Generator(
        model=model,
        autoencoder=autoencoder.to(device),
        shape=tuple(stored["latent_shape"]),
        settings=settings,
        recompute=None,
        dtype=dtype,
        device=device,
        guide=guiding,
        cache_bytes=cache_gib * 2**30,
        compiled=compiled,
    )


def checkpoint_receipt(folder: Path, weights: str, generator: Generator) -> dict[str, Any]:
    """Return what the receipt of a set says of the checkpoint it is drawn with."""
    stored = ckpt.read_config(folder)
    return {
        **ckpt.weights_receipt(folder, weights),
        "step": stored["step"],
        "class_names": stored["class_names"],
        "autoencoder_sha256": generator.autoencoder.fingerprint,
    }


def guide_receipt(folder: Path) -> dict[str, Any]:
    """Return what the receipt of a set says of the guide it is drawn with."""
    return {"ema_sha256": ckpt.weights_sha256(folder, "ema"), "step": ckpt.read_config(folder)["step"]}
