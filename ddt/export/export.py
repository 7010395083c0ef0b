"""A checkpoint in the forms that others read.

format=hub: a checkpoint of this project, with its weights where a hub looks for them:

    model.safetensors   the weights; `manifest.json` says that they are `ema.safetensors` here
    config.json         the checkpoint's, without paths of this machine; under `export` a receipt
    autoencoder/        a copy of an autoencoder that was a local folder; one of the hub stays a
                        name
    README.md           the model card; samples.png where there are samples of these very weights
    manifest.json       size and SHA-256 of each file that loading reads

format=diffusers: what `DDTPipeline.save_pretrained` writes, with card, `ddt.json` (the config.json
above) and `pipeline.py`, by which diffusers finds the class. format=released: a file of weights
under the published key names (`ddt.checkpoint.published`).
"""

import dataclasses
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import ModelHubMixin
from torch import Tensor

from ddt.autoencoder import Autoencoder, build_autoencoder
from ddt.checkpoint import folder as ckpt
from ddt.checkpoint.hub import check_push, is_hub_id, push
from ddt.checkpoint.published import SUFFIXES, check_releasable, write_released
from ddt.errors import require
from ddt.export.model_card import Card
from ddt.files import atomic_folder, check_writable, fsync, reset_permissions, sha256, write_json
from ddt.generation.load import stored_autoencoder
from ddt.metrics.compare import read_evaluation
from ddt.model import Denoiser
from ddt.pictures import imagenet_synsets
from ddt.receipts import revision, version
from ddt.sampling.schedules import content_of
from ddt.version import __version__

log = logging.getLogger(__name__)
Form = Literal["hub", "diffusers", "released"]
# settings of a run that hold paths, by their last name; of each path its own last name is exported
PATHS = ("root", "source_root", "source", "init_from", "weights", "reference", "inception_weights")
# diffusers warns of packages that its files import and that it does not find, and would name PyPI's
# other `ddt`
PIPELINE = '''"""Lets diffusers find the pipeline of this model, whose code is an installed project's."""

import importlib

try:
    DDTPipeline = importlib.import_module("ddt.pipeline").DDTPipeline
except ImportError as error:
    raise ImportError(
        "this model needs the DDT project that exported it (see README.md; PyPI's package ddt is another one): "
        f"{error}"
    ) from error
'''
USAGE = {
    "hub": 'load with: ddt.load_model("{out}"), or sample with: python sample.py ckpt={out}',
    "diffusers": 'load with: ddt.pipeline.DDTPipeline.from_pretrained("{out}")',
    "released": 'load with: ddt.load_released("{out}", encoder_depth={encoder_depth}, patch_size={patch_size})',
}


@dataclasses.dataclass(frozen=True)
class ExportSettings:
    """See conf/export/export.yaml.

    ckpt: run, checkpoint, export or hub id. out: folder to write, or of format=released a file.
    weights: which of the checkpoint's. autoencoder: "checkpoint", or the hub id or folder of
    another one, or of the same where it lies now. metrics: a metrics.json or its folder. push: hub
    id.
    """

    ckpt: str
    format: Form
    out: str
    weights: str = "ema"
    autoencoder: str = "checkpoint"
    metrics: str | None = None
    license: str | None = None
    push: str | None = None

    def __post_init__(self) -> None:
        if self.format != "released":
            return
        require(
            Path(self.out).suffix in SUFFIXES,
            f"out={self.out}: is to be one file; give a name that ends in {' or '.join(SUFFIXES)}",
        )
        chosen = {"autoencoder": self.autoencoder if self.autoencoder != "checkpoint" else None}
        for key, value in {**chosen, "metrics": self.metrics, "license": self.license, "push": self.push}.items():
            require(value is None, f"{key}={value}: has no effect with format=released, which holds weights alone")


def export(settings: ExportSettings) -> None:
    """Check everything, write the export atomically, and push it to the hub where that is asked
    for.

    Raises UserError, among others where `out` exists, for weights that the checkpoint lacks, an
    autoencoder that is not there or another than in training, and a network that the form cannot
    hold.
    """
    out, form = Path(settings.out), settings.format
    require(not out.exists(), f"out={out}: exists already and is not written over; choose another out=")
    check_writable(out)
    folder = ckpt.find_checkpoint(settings.ckpt)
    source = open_source(folder, form, settings.weights, settings.autoencoder)
    network = source.stored["network"]
    if form == "released":
        write_released(out, network, ckpt.read_weights(folder, settings.weights))
    else:
        places, metrics = [folder / "samples", Path(settings.ckpt) / "samples"], None
        if settings.metrics is not None:
            path, metrics = read_metrics(settings.metrics, source.sha256)
            places.insert(0, path.parent)
        if settings.push is not None:
            check_push(settings.push)
        card = Card(settings.push or out.name, metrics, settings.license, find_picture(places, source.sha256))
        with atomic_folder(out) as temporary:
            if form == "hub":
                write_hub(temporary, source, ckpt.read_weights(folder, settings.weights), card)
            else:
                write_diffusers(temporary, source, card)
    sizes = {key: network.get(key) for key in ("encoder_depth", "patch_size")}
    log.info("%s: %s", out, USAGE[form].format(out=out, **sizes))
    if settings.push is not None:
        log.info("%s (private; its settings there make it public)", push(out, settings.push))


@dataclasses.dataclass(frozen=True)
class Source:
    """A checkpoint that is to be exported. folder: where it lies. weights: which of its weights.
    stored: its config.

    autoencoder: the one to put into the export; None where its name is enough, or nothing needs it.
    """

    folder: Path
    weights: str
    stored: dict[str, Any]
    autoencoder: Autoencoder | None

    @property
    def sha256(self) -> str:
        """SHA-256 of the weights."""
        return ckpt.weights_sha256(self.folder, self.weights)

    def config(self, autoencoder: dict[str, Any]) -> dict[str, Any]:
        """Return the config of an export, but for its receipt: the checkpoint's without paths of
        this machine, with the autoencoder's settings as they are in the export.
        """
        sampler = self.stored["sampler"]
        run = {"run": without_paths(self.stored["run"])} if "run" in self.stored else {}
        sampler = {**sampler, "recompute": content_of(sampler.get("recompute"))}
        return {**self.stored, **run, "autoencoder": autoencoder, "sampler": sampler}

    def receipt(self, written: str) -> dict[str, Any]:
        """Return what an export says of itself: which weights, SHA-256 of the checkpoint's file and
        of the one written.
        """
        return {
            "weights": self.stored.get("export", {}).get("weights", self.weights),  # of an export exported again
            "made_from_sha256": self.sha256,
            "weights_sha256": written,
            "ddt_version": __version__,
            "torch": version("torch"),
            "commit": revision(),
        }


def open_source(folder: Path, form: Form, weights: str = "ema", autoencoder: str = "checkpoint") -> Source:
    """Return a checkpoint for an export of some form; see `export` for what is refused."""
    ckpt.check_weights(folder, weights)
    stored = ckpt.read_config(folder)
    if form == "released":
        check_releasable(stored["network"])
        return Source(folder, weights, stored, None)
    source = stored["autoencoder"].get("source")
    named = autoencoder == "checkpoint" and (source is None or is_hub_id(source))
    if named and form == "hub":
        return Source(folder, weights, stored, None)
    found = stored_autoencoder(stored, autoencoder)
    if autoencoder != "checkpoint":
        chosen = {**stored["autoencoder"], "source": autoencoder, "revision": None}
        stored = {**stored, "autoencoder": chosen, "autoencoder_fingerprint": found.fingerprint}
    return Source(folder, weights, stored, found)


def without_paths(values: Any) -> Any:
    """Return plain values in which only the last name of a path is left; hub ids stay."""

    def last_name(key: str, value: Any) -> Any:
        if key not in PATHS or not isinstance(value, str) or value == ckpt.CARRIED or is_hub_id(value):
            return without_paths(value)
        return Path(value).name

    return {key: last_name(key, value) for key, value in values.items()} if isinstance(values, dict) else values


# --- what the model card says


def find_picture(places: Sequence[Path], weights_sha256: str) -> Path | None:
    """Return the grid of the first set of samples among `places` that was sampled with weights of
    this hash.
    """
    for place in places:
        try:
            used = json.loads((place / "receipt.json").read_text())["request"]["checkpoint"]
        except (OSError, ValueError, KeyError, TypeError):  # no set of samples, or none of ours
            continue
        if weights_sha256 in used.values() and (place / "grid.png").is_file():
            return place / "grid.png"
    return None


def read_metrics(entry: str, weights_sha256: str) -> tuple[Path, dict[str, Any]]:
    """Return the file and the content of a metrics.json; raise UserError where it is none, or that
    of other weights.
    """
    path, content = read_evaluation(entry)
    used = content.get("receipt", {}).get("sampling", {}).get("request", {}).get("checkpoint", {})
    require(
        weights_sha256 in used.values(),
        f"metrics={entry}: does not say that its samples were generated with these weights ({weights_sha256[:12]}…); "
        "evaluate samples of this checkpoint, or leave it out",
    )
    return path, content


# --- the folders


def write_hub(folder: Path, source: Source, state: dict[str, Tensor], card: Card) -> None:
    """Write a hub's folder (see the head of this file), which is there and empty. state: the
    weights.
    """
    files = ckpt.write_files(folder, {"model": state})
    autoencoder = source.stored["autoencoder"]
    found = source.autoencoder
    if found is not None and found.network is not None and not is_hub_id(autoencoder["source"]):
        copy_autoencoder(found, autoencoder, folder / ckpt.AUTOENCODER)
        autoencoder = {**autoencoder, "source": ckpt.CARRIED, "revision": None}
        for path in sorted((folder / ckpt.AUTOENCODER).iterdir()):
            files[f"{ckpt.AUTOENCODER}/{path.name}"] = ckpt.manifest_entry(path)
    config = source.config(autoencoder) | {"export": source.receipt(files["model.safetensors"]["sha256"])}
    card.write(folder, "ddt", config, sum(value.numel() for value in state.values()))
    ckpt.write_manifest(folder, config, files, names={"model.safetensors": "ema.safetensors"})


def copy_autoencoder(autoencoder: Autoencoder, settings: dict[str, Any], folder: Path) -> None:
    """Save an autoencoder's network and compare what is read back with it."""
    autoencoder.network.save_pretrained(folder)
    tidy_saved(folder)
    again = build_autoencoder({**settings, "source": str(folder), "revision": None})
    assert again.fingerprint == autoencoder.fingerprint, f"{folder}: other weights than the autoencoder's"


def tidy_saved(folder: Path) -> None:
    """Remove from what diffusers saved where its parts came from, and give files the usual
    permissions.
    """
    for path in folder.rglob("*.json"):
        values = json.loads(path.read_text())
        if values.pop("_name_or_path", None) is not None:
            write_json(path, values)
    for path in folder.rglob("*"):
        if path.is_file():
            reset_permissions(path)
            fsync(path)


def write_diffusers(folder: Path, source: Source, card: Card) -> None:
    """Write the folder of a diffusers pipeline, which is there and empty."""
    from ddt.pipeline import build_pipeline  # diffusers takes a while to import

    assert source.autoencoder is not None
    autoencoder = source.stored["autoencoder"]
    if source.autoencoder.network is not None:
        autoencoder = {**autoencoder, "source": "./vae", "revision": None}
    model = ckpt.load_model(source.folder, source.weights)
    config = source.config(autoencoder)
    build_pipeline(model, config, source.autoencoder, class_labels(config["class_names"])).save_pretrained(folder)
    (folder / "pipeline.py").write_text(PIPELINE)
    config["export"] = source.receipt(sha256(folder / "transformer" / "diffusion_pytorch_model.safetensors"))
    write_json(folder / "ddt.json", config)
    card.write(folder, "diffusers", config, sum(p.numel() for p in model.parameters()))
    tidy_saved(folder)


def class_labels(class_names: list[str]) -> dict[str, str]:
    """Return the names of each class for a pipeline: of ImageNet's synsets all their words."""
    if class_names == imagenet_synsets():
        from timm.data import ImageNetInfo

        class_names = ImageNetInfo().label_descriptions()
    return {str(k): name for k, name in enumerate(class_names)}


class HubModel(ModelHubMixin):
    """A network with the checkpoint it comes from, and huggingface_hub's methods `from_pretrained`,
    `save_pretrained` and `push_to_hub`. The network itself knows no paths.

    Args:
        model: the network, whose weights are saved as they are now.
        checkpoint: the run, checkpoint or export that holds all else: autoencoder, sampler,
            classes.
    """

    def __init__(self, model: Denoiser, checkpoint: str | Path) -> None:
        self.model, self.checkpoint = model, ckpt.find_checkpoint(checkpoint)

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> str | None:
        """Write a hub's folder; raise UserError where there are files already.

        kwargs: as huggingface_hub's `ModelHubMixin.save_pretrained`.
        """
        folder = Path(save_directory)
        require(
            not folder.exists() or (folder.is_dir() and not any(folder.iterdir())),
            f"{folder}: holds files already and is not written over; choose another folder",
        )
        return super().save_pretrained(folder, **kwargs)

    def _save_pretrained(self, save_directory: Path) -> None:
        source = open_source(self.checkpoint, "hub")
        write_hub(save_directory, source, self.model.state_dict(), Card(save_directory.name))

    @classmethod
    def _from_pretrained(cls, *, model_id: str, revision: str | None, **kwargs: Any) -> "HubModel":
        """Load a folder, or a model of the hub at a revision; kwargs: what huggingface_hub passes
        besides.
        """
        folder = ckpt.find_checkpoint(model_id if revision is None else f"{model_id}@{revision}")
        return cls(ckpt.load_model(folder), folder)
