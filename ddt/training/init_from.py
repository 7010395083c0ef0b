"""Starting a new run from the weights of another: a run of this project, or a published checkpoint.

Everything is loaded strictly. The one part that may differ is the number of classes: the label
table is then new.
"""

import dataclasses
import inspect
import logging
from pathlib import Path
from typing import Any

from torch import Tensor

from ddt.checkpoint import folder as ckpt
from ddt.checkpoint.published import architecture, build_from_state, find_released, read_parts
from ddt.errors import UserError, require
from ddt.objective import Objective
from ddt.training.ema import EMA

log = logging.getLogger(__name__)
# Settings of a network that change none of its weights' names and shapes, or whose weights are made
# anew.
MAY_DIFFER = ("num_classes", "adaln_init", "activation_checkpointing")
TABLE = "y_embedder.embedding_table.weight"


@dataclasses.dataclass
class Source:
    """What a run can start from: raw and averaged weights, the projector where there is one."""

    name: str
    network: dict[str, Any]
    autoencoder: str | None  # its fingerprint, where known
    class_names: list[str] | None  # where known
    model: dict[str, Tensor]
    ema: dict[str, Tensor]
    alignment: dict[str, Tensor] | None


def find_source(init_from: str) -> tuple[Path, bool]:
    """Return the checkpoint folder (True) or the published file (False) that `init_from` means.

    Raises UserError, naming init_from, where it is neither.
    """
    path = Path(init_from)
    try:
        if (path / "manifest.json").is_file() or (path / "checkpoints").is_dir():
            return ckpt.find_checkpoint(path), True
        return find_released(init_from), False
    except UserError as error:
        message = str(error).removeprefix("released=").removeprefix(f"{init_from}: ")
        raise UserError(f"init_from={init_from}: {message}") from error


def read_source(init_from: str, network: dict[str, Any]) -> Source:
    """Read the weights that `init_from` names: of one of our checkpoints, or of a published file,
    whose encoder_depth and patch_size are taken from `network`, the new run's settings.
    """
    path, ours = find_source(init_from)
    if ours:
        config = ckpt.read_config(path)
        ema = ckpt.read_weights(path, "ema")
        trained = (path / "train_state.pt").is_file()  # a converted checkpoint holds averaged weights alone
        return Source(
            name=str(path),
            network=config["network"],
            autoencoder=config.get("autoencoder_fingerprint"),
            class_names=config["class_names"] if trained else None,
            model=ckpt.read_weights(path, "model") if trained else dict(ema),
            ema=ema,
            alignment=ckpt.read_train_state(path).get("alignment") if trained else None,
        )
    parts = read_parts(path)
    sizes = architecture(parts.ema, network.get("encoder_depth"), network["patch_size"], path.name)
    ema = build_from_state(parts.ema, sizes, path.name).state_dict()
    return Source(
        name=str(path),
        network={"_target_": f"ddt.model.{'DDT' if 'encoder_depth' in sizes else 'DiT'}", **sizes},
        autoencoder=None,
        class_names=None,
        model=build_from_state(parts.raw, sizes, path.name).state_dict() if parts.raw else ema,
        ema=ema,
        alignment={f"projector.{key}": value.float() for key, value in parts.projector.items()} or None,
    )


def with_defaults(network: dict[str, Any]) -> dict[str, Any]:
    """Return a network's settings with those that it leaves to its constructor."""
    parameters = inspect.signature(ckpt.NETWORKS[network["_target_"]]).parameters
    left = {name: p.default for name, p in parameters.items() if p.default is not inspect.Parameter.empty}
    return left | network


def check_network(source: Source, network: dict[str, Any]) -> None:
    """Raise UserError where the source's network has other weights than the new run's, the label
    table apart.
    """
    theirs, ours = with_defaults(source.network), with_defaults(network)
    differing = [
        f"model.{key} {theirs.get(key)} -> {ours.get(key)}"
        for key in sorted(theirs.keys() | ours.keys())
        if key not in MAY_DIFFER and theirs.get(key) != ours.get(key)
    ]
    require(not differing, f"init_from={source.name}: is another network ({', '.join(differing)})")


def with_new_table(weights: dict[str, Tensor], fresh: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights with the label table of `fresh`, but for its last row, the null label's,
    which stays.
    """
    (key,) = (name for name in fresh if name.endswith(TABLE))
    table = fresh[key].clone()
    table[-1] = weights[key][-1]
    return {**weights, key: table}


def initialise(
    init_from: str,
    network: dict[str, Any],
    autoencoder: str | None,
    class_names: list[str],
    objective: Objective,
    averages: dict[str, EMA],
) -> None:
    """Fill a new run's denoiser, its averages and, where it fits, its projector from `init_from`;
    log what was loaded.

    The denoiser takes the source's raw weights (its averaged ones where it holds no others), each
    average takes the source's average. With another number of classes the rows of the label table
    are new, the null label's apart. Raises UserError where the source is another network or a file
    cannot be read.
    """
    source = read_source(init_from, network)
    check_network(source, network)
    denoiser = objective.denoiser
    model, averaged = source.model, source.ema
    classes, wanted = source.network["num_classes"], network["num_classes"]
    if classes != wanted:
        fresh = {key: value.detach().cpu() for key, value in denoiser.state_dict().items()}
        model, averaged = with_new_table(model, fresh), with_new_table(averaged, fresh)
    denoiser.load_state_dict(model, strict=True)
    for average in averages.values():
        average.model.load_state_dict(averaged, strict=True)
    table = "label table loaded" if classes == wanted else f"label table new ({classes} -> {wanted} classes)"
    projector = "no projector"
    if objective.alignment is not None:
        mine = {key: value.shape for key, value in objective.alignment.state_dict().items()}
        theirs = source.alignment or {}
        fits = mine == {key: value.shape for key, value in theirs.items()}
        if fits:
            objective.alignment.load_state_dict(theirs, strict=True)
        projector = "projector loaded" if fits else "projector new"
    log.info("init_from=%s: weights and their average loaded, %s, %s", source.name, table, projector)
    if classes == wanted and source.class_names not in (None, class_names):
        log.warning(
            "init_from=%s: has as many classes, but others; each row of the label table goes on as another's",
            source.name,
        )
    if source.autoencoder != autoencoder and source.autoencoder is not None:
        log.warning("init_from=%s: was trained on latents of another autoencoder than this run's", source.name)
