"""Initialising a new run from the weights of another run or of a published checkpoint.

Loading is strict. Only the number of classes may differ: the label table is then new.
"""

import dataclasses
import inspect
import logging
from pathlib import Path
from typing import Any

from torch import Tensor

from ddt.checkpoint import format as ckpt
from ddt.checkpoint.config import other_autoencoder
from ddt.checkpoint.published import WEIGHTS, find_released, read_released
from ddt.class_names import imagenet_synsets
from ddt.errors import UserError, require
from ddt.model import NETWORKS, Denoiser
from ddt.objective import Objective
from ddt.training.ema import EMA

log = logging.getLogger(__name__)
# settings that change no name or shape of the weights, or whose weights are new
MAY_DIFFER = ("num_classes", "adaln_init", "activation_checkpointing")
NUM_IMAGENET = 1000  # classes


@dataclasses.dataclass(frozen=True)
class Source:
    """Weights to start from: raw, EMA and projector (None: no projector)."""

    name: str
    network: dict[str, Any]
    model: dict[str, Tensor]
    ema: dict[str, Tensor]
    alignment: dict[str, Tensor] | None
    autoencoder: dict[str, Any] | None = None  # a config's `autoencoder` and fingerprint; None: unknown
    class_names: list[str] | None = None  # None: unknown


def find_source(init_from: str) -> tuple[Path, bool]:
    """Return (checkpoint folder, True) or (published file, False), or raise UserError."""
    path = Path(init_from)
    if (path / "manifest.json").is_file() or (path / "checkpoints").is_dir():
        try:
            return ckpt.find_checkpoint(path), True
        except UserError as error:
            raise UserError(f"init_from={error}") from error
    return find_released(init_from, "init_from"), False


def read_source(init_from: str, network: dict[str, Any]) -> Source:
    """Read the weights of `init_from`: where it has raw or EMA weights alone, these stand for both.

    encoder_depth and patch_size are not in a published file; they are taken from `network`, the
    settings of the new run.
    """
    path, is_checkpoint = find_source(init_from)
    if is_checkpoint:
        config, names = ckpt.read_config(path), ckpt.weights_names(path)
        read = {name: ckpt.read_weights(path, name) for name in ("model", "ema") if name in names}
        trained = (path / "train_state.pt").is_file()  # a converted checkpoint holds weights alone
        return Source(
            name=str(path),
            network=config["network"],
            model=read.get("model", read.get("ema", {})),
            ema=read.get("ema", read.get("model", {})),
            alignment=ckpt.read_train_state(path).get("alignment") if trained else None,
            autoencoder={key: config.get(key) for key in ("autoencoder", "autoencoder_fingerprint")},
            class_names=config.get("class_names"),
        )
    try:
        released = read_released(path, network.get("encoder_depth"), network["patch_size"], network["_target_"])
    except UserError as error:
        raise UserError(f"init_from={error}") from error
    read = {part: released.weights(part) for part in WEIGHTS if released.parts[part]}
    projector = released.parts["projector"]
    synsets = imagenet_synsets()  # every published model of a thousand classes is one of ImageNet
    return Source(
        name=str(path),
        network=released.network,
        model=read.get("model", read.get("ema", {})),
        ema=read.get("ema", read.get("model", {})),
        alignment={f"projector.{key}": value.float() for key, value in projector.items()} or None,
        class_names=synsets if released.network["num_classes"] == len(synsets) else None,
    )


def with_defaults(network: dict[str, Any]) -> dict[str, Any]:
    """Return a network's settings completed by the defaults of its constructor."""
    parameters = inspect.signature(NETWORKS[network["_target_"]]).parameters
    defaults = {name: p.default for name, p in parameters.items() if p.default is not inspect.Parameter.empty}
    return defaults | network


def check_network(source: Source, network: dict[str, Any]) -> None:
    """Raise UserError where source and new run differ in more weights than the label table."""
    old, new = with_defaults(source.network), with_defaults(network)
    differing = [
        f"{'objective' if key == 'prediction' else 'model'}.{key} {old.get(key)} -> {new.get(key)}"
        for key in sorted(old.keys() | new.keys())
        if key not in MAY_DIFFER and old.get(key) != new.get(key)
    ]
    require(not differing, f"init_from={source.name}: is another network ({', '.join(differing)})")


def with_new_table(weights: dict[str, Tensor], network: Denoiser) -> dict[str, Tensor]:
    """Return weights with the label table of `network`, except the null label's row."""
    key = network.label_table
    table = network.get_parameter(key).detach().cpu().clone()
    table[-1] = weights[key][-1]
    return {**weights, key: table}


def initialise(init_from: str, config: dict[str, Any], objective: Objective, emas: dict[str, EMA]) -> None:
    """Load `init_from` into a new run's denoiser, its EMAs and, where it fits, its projector.

    The denoiser takes the source's raw weights (EMA weights where it has no others), each EMA the
    source's EMA weights. With another number of classes all rows of the label table but the null
    label's are new. Raises UserError where the source is another network or cannot be read.
    """
    network = config["network"]
    source = read_source(init_from, network)
    check_network(source, network)
    raw, ema_weights = source.model, source.ema
    old, new = source.network["num_classes"], network["num_classes"]
    if old != new:
        raw, ema_weights = (with_new_table(weights, objective.denoiser) for weights in (raw, ema_weights))
    objective.denoiser.load_state_dict(raw, strict=True)
    for ema in emas.values():
        ema.model.load_state_dict(ema_weights, strict=True)
    table = "label table loaded" if old == new else f"label table new ({old} -> {new} classes)"
    projector = "no projector"
    if objective.alignment is not None:
        state = source.alignment or {}
        shapes = [{k: v.shape for k, v in each.items()} for each in (objective.alignment.state_dict(), state)]
        fits = shapes[0] == shapes[1]
        if fits:
            objective.alignment.load_state_dict(state, strict=True)
        projector = "projector loaded" if fits else "projector new"
    log.info("init_from=%s: raw and EMA weights loaded, %s, %s", source.name, table, projector)
    if old == new and source.class_names not in (None, config["class_names"]):
        pairs = zip(source.class_names, config["class_names"], strict=True)
        changed = [(number, *names) for number, names in enumerate(pairs) if names[0] != names[1]]
        log.warning(
            "init_from=%s: has as many classes, but others: %d rows of the label table change their class, the first "
            "is %d, from %s to %s", source.name, len(changed), *changed[0],
        )  # fmt: skip
    if source.autoencoder is not None and other_autoencoder(source.autoencoder, config) is not None:
        log.warning("init_from=%s: was trained on latents of another autoencoder than this run's", source.name)
