"""Convert a published checkpoint into this project's format.

python scripts/convert_checkpoint.py released=FILE_OR_HUB_ID encoder_depth=22 resolution=256 [autoencoder=sd_ft_ema]
out=DIR
"""

import logging
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from hydra import compose
from omegaconf import DictConfig

from ddt.checkpoint import FORMAT_VERSION, write_checkpoint
from ddt.config import check_arguments
from ddt.errors import UserError, require
from ddt.files import sha256
from ddt.released import architecture, build_from_state, find_released, read_state_dict
from scripts.entry import CONF, checked, entry_point

log = logging.getLogger(__name__)
DOWNSAMPLING = 8  # of the autoencoder that all published models were trained with


def conversion(released: str, encoder_depth: int | None, patch_size: int, resolution: int, out: str) -> None:
    """Hold the types of this script's settings."""


def check(config: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of the conversion; one line for each problem."""
    keys = ("released", "encoder_depth", "patch_size", "resolution", "out")
    values, problems = check_arguments(conversion, {key: config[key] for key in keys}, "")
    known = sorted(int(path.stem.removeprefix("xl_")) for path in (CONF / "sampler").glob("xl_*.yaml"))
    if not problems and values["resolution"] not in known:
        problems.append(
            f"resolution={values['resolution']}: published models exist at {' and '.join(map(str, known))} px"
        )
    if problems:
        raise UserError("\n".join(problems))
    require(
        not Path(values["out"]).exists(),
        f"out={values['out']}: exists already and is not written over; choose another folder",
    )
    return values


@entry_point("convert_checkpoint")
def main(cfg: DictConfig) -> None:
    """Check, read strictly, write."""
    config = checked(cfg)
    values = check(config)
    sampler = checked(compose("train", overrides=[f"sampler=xl_{values['resolution']}"]).sampler)
    path = find_released(values["released"])
    state = read_state_dict(path)
    sizes = architecture(state, values["encoder_depth"], values["patch_size"], path.name)
    model = build_from_state(state, sizes, path.name)
    side = values["resolution"] // DOWNSAMPLING
    log.info(
        "%s: read strictly, %d parameters; writing %s",
        path,
        sum(p.numel() for p in model.parameters()),
        values["out"],
    )
    write_checkpoint(
        Path(values["out"]),
        {
            "format_version": FORMAT_VERSION,
            "step": None,  # the release does not say
            "network": {"_target_": f"ddt.model.{type(model).__name__}", **sizes},
            "latent_shape": [sizes["in_channels"], side, side],
            "autoencoder": config["autoencoder"],
            "sampler": {key: value for key, value in sampler.items() if key != "_target_"},
            "class_names": [str(k) for k in range(sizes["num_classes"])],
            "source": {"file": path.name, "sha256": sha256(path)},
        },
        ema=model.state_dict(),
    )
    log.info("sample with: python sample.py ckpt=%s", values["out"])


if __name__ == "__main__":
    main()
