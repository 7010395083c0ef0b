"""A checkpoint in the forms that others read: a model hub's folder, a diffusers pipeline, the
published key names.

The folder of a hub is a checkpoint of this project, its weights in `model.safetensors`, where a hub
looks for them:

    model.safetensors   the weights; `manifest.json` says that they are `ema.safetensors` here
    config.json         the checkpoint's, without paths of this machine; under `export` a receipt
    autoencoder/        a copy of an autoencoder that was a local folder; one of the hub stays a
    name README.md           the model card; samples.png where there are samples of these very
    weights manifest.json       size and SHA-256 of each file that loading reads

That of diffusers is what `DDTPipeline.save_pretrained` writes, with card, `ddt.json` (the
config.json above) and `pipeline.py`, by which diffusers finds the class.
"""

import dataclasses
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from ddt.autoencoder import Autoencoder, build_autoencoder
from ddt.autoencoder.diffusers import DiffusersAutoencoder
from ddt.checkpoint import folder as ckpt
from ddt.checkpoint.hub import is_hub_id
from ddt.checkpoint.published import check_releasable, write_released
from ddt.errors import UserError, require
from ddt.export.model_card import model_card
from ddt.files import fsync, sha256, share, write_json
from ddt.generation.load import stored_autoencoder
from ddt.metrics.compare import is_evaluation
from ddt.pictures import imagenet_synsets
from ddt.receipts import version
from ddt.sampling.schedules import content_of
from ddt.version import __version__
from scripts.machine import ROOT, output_of

Form = Literal["hub", "diffusers", "released"]
PICTURE = "samples.png"
# settings of a run that say where something lay, by their last name; what it was stays, by its own
# last name
PLACES = ("root", "source_root", "source", "init_from", "weights", "reference", "inception_weights")
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


def without_places(values: Any) -> Any:
    """Return plain values in which only the last name of a path is left; names of a hub stay."""

    def placeless(key: str, value: Any) -> Any:
        if key not in PLACES or not isinstance(value, str) or value == ckpt.CARRIED or is_hub_id(value):
            return without_places(value)
        return Path(value).name

    return {key: placeless(key, value) for key, value in values.items()} if isinstance(values, dict) else values


def commit() -> str | None:
    """Return the commit of this code, where it is a clone; None elsewhere."""
    return output_of("git", "-C", str(ROOT), "rev-parse", "HEAD") if (ROOT / ".git").exists() else None


def exported_config(stored: dict[str, Any], autoencoder: dict[str, Any], receipt: dict[str, Any]) -> dict[str, Any]:
    """Return the config of an export: the checkpoint's without paths of this machine, with the
    autoencoder's settings as they are in the export, and the receipt.
    """
    sampler = {**stored["sampler"], "recompute": content_of(stored["sampler"].get("recompute"))}
    run = {"run": without_places(stored["run"])} if "run" in stored else {}
    return {**stored, **run, "autoencoder": autoencoder, "sampler": sampler, "export": receipt}


def receipt_of(stored: dict[str, Any], weights: str, made_from: str, written: str) -> dict[str, Any]:
    """Return what an export says of itself: which weights, SHA-256 of the checkpoint's file and of
    the one written.
    """
    return {
        "weights": stored.get("export", {}).get("weights", weights),  # of an export that is exported again
        "made_from_sha256": made_from,
        "weights_sha256": written,
        "ddt_version": __version__,
        "torch": version("torch"),
        "commit": commit(),
    }


def copy_autoencoder(autoencoder: DiffusersAutoencoder, folder: Path) -> None:
    """Save an autoencoder's network and compare what is read back with it."""
    autoencoder.network.save_pretrained(folder)
    tidy_saved(folder)
    again = build_autoencoder({"_target_": f"ddt.autoencoder.{type(autoencoder).__name__}", "source": str(folder)})
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
            share(path)
            fsync(path)


def picture_of(places: Sequence[Path], weights_sha256: str) -> Path | None:
    """Return the grid of a set of samples that was drawn with weights of this hash, of the first
    place that has one.
    """
    for place in places:
        try:
            drawn = json.loads((place / "receipt.json").read_text())["request"]["checkpoint"]
        except (OSError, ValueError, KeyError, TypeError):  # no set of samples, or none of ours
            continue
        if weights_sha256 in drawn.values() and (place / "grid.png").is_file():
            return place / "grid.png"
    return None


def read_metrics(path: Path, weights_sha256: str) -> dict[str, Any]:
    """Return the content of a metrics.json; raise UserError where it is none, or that of other
    weights.
    """
    path = path / "metrics.json" if path.is_dir() else path
    require(path.is_file(), f"metrics={path}: no such file; give what evaluate.py wrote, or leave it out")
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"metrics={path}: damaged or no JSON ({error}); evaluate again") from error
    require(is_evaluation(content), f"metrics={path}: is no evaluation; give a metrics.json of evaluate.py")
    drawn = content.get("receipt", {}).get("sampling", {}).get("request", {}).get("checkpoint", {})
    require(
        weights_sha256 in drawn.values(),
        f"metrics={path}: does not say that its samples were drawn with these weights ({weights_sha256[:12]}…); "
        "evaluate samples of this checkpoint, or leave it out",
    )
    return content


def labels_of(class_names: list[str]) -> dict[str, str]:
    """Return the names of each class for a pipeline: of ImageNet's synsets all their words."""
    if class_names == imagenet_synsets():
        from timm.data import ImageNetInfo

        class_names = ImageNetInfo().label_descriptions()
    return {str(k): name for k, name in enumerate(class_names)}


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

    def made_from(self) -> str:
        """Return the SHA-256 of the weights."""
        return ckpt.weights_sha256(self.folder, self.weights)


@dataclasses.dataclass(frozen=True)
class Card:
    """What a model card says that no checkpoint holds; see `model_card`. picture: a file, or None."""

    name: str
    metrics: dict[str, Any] | None = None
    license: str | None = None
    picture: Path | None = None

    def write(self, folder: Path, form: str, config: dict[str, Any], parameters: int) -> None:
        """Write README.md, and the picture it shows, into a folder."""
        if self.picture is not None:
            shutil.copyfile(self.picture, folder / PICTURE)
        picture = None if self.picture is None else PICTURE
        text = model_card(self.name, form, config, parameters, self.metrics, self.license, picture)
        (folder / "README.md").write_text(text)


def open_source(folder: Path, form: Form, weights: str = "ema", autoencoder: str = "checkpoint") -> Source:
    """Return a checkpoint for an export of some form, with what has to be carried along.

    autoencoder: "checkpoint", or the hub name or folder of another one, or of the same where it
    lies now. Raises UserError for weights that it lacks, an autoencoder that is not there or other
    than in training, and for a network that the form cannot hold.
    """
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


def write_hub(folder: Path, source: Source, state: dict[str, Tensor], card: Card) -> None:
    """Write a hub's folder (see the head of this file), which is there and empty. state: the
    weights.
    """
    files = ckpt.write_files(folder, {"model": state})
    autoencoder = source.stored["autoencoder"]
    if isinstance(source.autoencoder, DiffusersAutoencoder) and not is_hub_id(autoencoder["source"]):
        copy_autoencoder(source.autoencoder, folder / ckpt.AUTOENCODER)
        autoencoder = {**autoencoder, "source": ckpt.CARRIED, "revision": None}
        for path in sorted((folder / ckpt.AUTOENCODER).iterdir()):
            files[f"{ckpt.AUTOENCODER}/{path.name}"] = ckpt.entry(path)
    receipt = receipt_of(source.stored, source.weights, source.made_from(), files["model.safetensors"]["sha256"])
    config = exported_config(source.stored, autoencoder, receipt)
    card.write(folder, "hub", config, sum(value.numel() for value in state.values()))
    ckpt.write_manifest(folder, config, files, names={"model.safetensors": "ema.safetensors"})


def write_diffusers(folder: Path, source: Source, card: Card) -> None:
    """Write the folder of a diffusers pipeline, which is there and empty."""
    from ddt.pipeline import build_pipeline  # diffusers takes a while to import

    assert source.autoencoder is not None
    autoencoder = source.stored["autoencoder"]
    if isinstance(source.autoencoder, DiffusersAutoencoder):
        autoencoder = {**autoencoder, "source": "./vae", "revision": None}
    model = ckpt.load_model(source.folder, source.weights)
    stored = exported_config(source.stored, autoencoder, {})
    build_pipeline(model, stored, source.autoencoder, labels_of(stored["class_names"])).save_pretrained(folder)
    (folder / "pipeline.py").write_text(PIPELINE)
    written = sha256(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    stored["export"] = receipt_of(source.stored, source.weights, source.made_from(), written)
    write_json(folder / "ddt.json", stored)
    card.write(folder, "diffusers", stored, sum(p.numel() for p in model.parameters()))
    tidy_saved(folder)


def export(source: Source, form: Form, out: Path, card: Card) -> None:
    """Write a checkpoint in a form, a folder or of "released" a file `out`, whole or not at all; it
    must not exist (UserError).
    """
    require(not out.exists(), f"out={out}: exists already and is not written over; choose another out=")
    if form == "released":
        state = ckpt.read_weights(source.folder, source.weights)
        write_released(out, state, source.stored["network"].get("encoder_depth"))
        return
    temporary = ckpt.temporary_folder(out)
    try:
        if form == "hub":
            write_hub(temporary, source, ckpt.read_weights(source.folder, source.weights), card)
        else:
            write_diffusers(temporary, source, card)
        ckpt.give_name(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
