"""Export of a checkpoint.

format=hub: a checkpoint of this project under the file names of a hub:

    model.safetensors   the weights; `manifest.json` calls them `ema.safetensors`
    config.json         the checkpoint's, paths shortened to their last name; a receipt: `export`
    autoencoder/        a copy of a local autoencoder; one of the hub stays a name
    README.md           the model card; samples.png where there are samples of these weights
    manifest.json       size and SHA-256 of each file that loading reads

format=diffusers: `DDTPipeline.save_pretrained`, which writes the code too, the card and `ddt.json`
(the config.json above). format=released: one file of weights under the published key names
(`ddt.checkpoint.published`).
"""

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelHubMixin
from torch import Tensor

from ddt.autoencoder import Autoencoder, autoencoder_class, build_autoencoder
from ddt.autoencoder.base import UnknownShape
from ddt.checkpoint import format as ckpt
from ddt.checkpoint.published import check_releasable, sizes_to_load, write_released
from ddt.checkpoint.settings import ExportSettings, Form
from ddt.class_names import imagenet_info, imagenet_synsets
from ddt.errors import require
from ddt.export.model_card import Card
from ddt.files import atomic_folder, check_new, fsync, read_json, read_record, reset_permissions, sha256, write_json
from ddt.generation.load import stored_autoencoder
from ddt.generation.receipt import RECEIPT, is_receipt_of
from ddt.hub import check_push, is_hub_id, push
from ddt.metrics.compare import read_evaluation
from ddt.model import Denoiser
from ddt.receipts import nested, revision, version
from ddt.sampling.schedules import content_of
from ddt.version import __version__

log = logging.getLogger(__name__)
# last names of a run's settings that hold paths
PATHS = (
    "root",
    "source_root",
    "source",
    "init_from",
    "weights",
    "reference",
    "inception_weights",
    "labels",
    "class_names",
)
IN_SOURCE = ("encoder_weights", "decoder", "statistics")  # … and of an RAE, or a path in its source
USAGE = {
    "hub": 'load with: ddt.load_model("{out}"), or sample with: python sample.py ckpt={out}',
    "diffusers": 'load with: diffusers.DiffusionPipeline.from_pretrained("{out}", trust_remote_code=True)',
    "released": 'load with: ddt.load_released("{out}"{sizes})',
}


def export(settings: ExportSettings) -> None:
    """Check everything, write the export atomically, and push it to the hub if `push` is set.

    Raises UserError where `out` exists, for missing weights, an autoencoder that is missing or not
    the one of training, and a network without published names.
    """
    out, form = Path(settings.out), settings.format
    check_new(out)
    folder = ckpt.find_checkpoint(settings.ckpt)
    source = open_source(folder, form, settings.weights, settings.autoencoder)
    network = source.stored["network"]
    if form == "released":
        state = ckpt.read_weights(folder, settings.weights)
        write_released(out, network, state, tuple(source.stored["latent_shape"]))
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
    sizes = "".join(f", {key}={value}" for key, value in sizes_to_load(network).items()) if form == "released" else ""
    log.info("%s: %s", out, USAGE[form].format(out=out, sizes=sizes))
    if settings.push is not None:
        log.info("%s (private; its settings there make it public)", push(out, settings.push))


@dataclasses.dataclass(frozen=True)
class Source:
    """A checkpoint to export. weights: name of those to export. stored: its config.

    autoencoder: to copy into the export; None where its name is enough, or it is not needed.
    """

    folder: Path
    weights: str
    stored: dict[str, Any]
    autoencoder: Autoencoder | None

    @property
    def sha256(self) -> str:
        """SHA-256 of the weights in the checkpoint."""
        return ckpt.weights_sha256(self.folder, self.weights)

    def image_size(self) -> int | None:
        """Return the pixels per side of the images, None where unknown."""
        try:
            known = self.autoencoder or build_autoencoder(self.stored["autoencoder"], outline=True)
        except UnknownShape:
            stated: int | None = self.stored.get("run", {}).get("data", {}).get("image_size")
            return stated
        return known.image_size(tuple(self.stored["latent_shape"]))

    def config(self, autoencoder: dict[str, Any]) -> dict[str, Any]:
        """Return the export's config without receipt; autoencoder: its settings there."""
        sampler = self.stored["sampler"]
        run = {"run": shorten_paths(self.stored["run"])} if "run" in self.stored else {}
        sampler = {**sampler, "recompute": content_of(sampler.get("recompute"))}
        return {**self.stored, **run, "autoencoder": autoencoder, "sampler": sampler}

    def receipt(self, written: str) -> dict[str, Any]:
        """Return the receipt of an export. written: SHA-256 of the file of weights written."""
        return {
            "weights": self.stored.get("export", {}).get("weights", self.weights),  # of an export of an export
            "made_from_sha256": self.sha256,
            "weights_sha256": written,
            "ddt_version": __version__,
            "torch": version("torch"),
            "commit": revision(),
        }


def open_source(folder: Path, form: Form, weights: str = "ema", autoencoder: str = "checkpoint") -> Source:
    """Return a checkpoint to export as `form`; raises UserError as `export`."""
    ckpt.check_weights(folder, weights)
    stored = ckpt.read_config(folder)
    if form == "released":
        check_releasable(stored["network"])
        return Source(folder, weights, stored, None)
    kind = autoencoder_class(stored["autoencoder"])
    named = autoencoder == "checkpoint" and kind.on_hub(stored["autoencoder"])
    if named and form == "hub":
        return Source(folder, weights, stored, None)
    loaded = stored_autoencoder(stored, autoencoder)
    if autoencoder != "checkpoint":
        chosen = kind.moved(stored["autoencoder"], autoencoder)
        stored = {**stored, "autoencoder": chosen, "autoencoder_fingerprint": loaded.fingerprint}
    return Source(folder, weights, stored, loaded)


def shorten_paths(values: Any) -> Any:
    """Return plain values with paths shortened to their last name; hub ids stay."""

    def last_name(key: str, value: Any) -> Any:
        if not isinstance(value, str) or value == ckpt.BUNDLED or is_hub_id(value):
            return shorten_paths(value)
        return Path(value).name if key in PATHS or (key in IN_SOURCE and Path(value).is_absolute()) else value

    return {key: last_name(key, value) for key, value in values.items()} if isinstance(values, dict) else values


# --- for the model card


def find_picture(places: Sequence[Path], weights_sha256: str) -> Path | None:
    """Return the grid of the first set of samples in `places` that is of these weights."""
    for place in places:
        receipt, grid = place / RECEIPT, place / "grid.png"
        used = nested(read_record(receipt), "request", "checkpoint") if receipt.is_file() and grid.is_file() else None
        npz = place / "samples.npz"
        if isinstance(used, dict) and weights_sha256 in used.values() and npz.is_file():
            if is_receipt_of(read_record(receipt), sha256(npz)):
                return grid
            log.warning("warning: %s: is not the file of its receipt, so its grid.png is left out", npz)
    return None


def read_metrics(entry: str, weights_sha256: str) -> tuple[Path, dict[str, Any]]:
    """Return path and content of a metrics.json; UserError where it is not of samples of these
    weights.
    """
    path, content = read_evaluation(entry)
    sampling = nested(content, "receipt", "sampling")
    used = nested(sampling, "request", "checkpoint")
    require(
        isinstance(used, dict) and weights_sha256 in used.values(),
        f"metrics={entry}: does not say that its samples were generated with these weights ({weights_sha256[:12]}…); "
        "evaluate samples of this checkpoint, or leave it out",
    )
    require(
        is_receipt_of(sampling, nested(content, "receipt", "samples", "sha256")),
        f"metrics={entry}: its numbers are of other samples than those of its receipt; evaluate samples of this "
        "checkpoint again, or leave it out",
    )
    return path, content


# --- folders


def write_hub(folder: Path, source: Source, state: dict[str, Tensor], card: Card) -> None:
    """Write the files of format=hub into an empty folder. state: the weights."""
    files = ckpt.write_files(folder, {"model": state})
    autoencoder = source.stored["autoencoder"]
    loaded = source.autoencoder
    if loaded is not None and not loaded.on_hub(autoencoder):
        copied = copy_autoencoder(loaded, autoencoder, folder / ckpt.AUTOENCODER)
        autoencoder = {**copied, "source": ckpt.BUNDLED}
        for path in sorted((folder / ckpt.AUTOENCODER).iterdir()):
            files[f"{ckpt.AUTOENCODER}/{path.name}"] = ckpt.manifest_entry(path)
    config = source.config(autoencoder) | {"export": source.receipt(files["model.safetensors"]["sha256"])}
    card.write(folder, "ddt", config, sum(value.numel() for value in state.values()), source.image_size())
    ckpt.write_manifest(folder, config, files, names={"model.safetensors": "ema.safetensors"})


def copy_autoencoder(autoencoder: Autoencoder, settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Save an autoencoder, load it again and compare the weights; return the copy's settings."""
    autoencoder.save(folder)
    tidy_saved(folder)
    copied = autoencoder.moved(settings, str(folder))
    assert build_autoencoder(copied).fingerprint == autoencoder.fingerprint, f"{folder}: other weights"
    return copied


def tidy_saved(folder: Path) -> None:
    """Remove local paths from files that diffusers saved; give them the usual permissions."""
    for path in folder.rglob("*.json"):
        values = read_json(path)
        if values.pop("_name_or_path", None) is not None:
            write_json(path, values)
    for path in folder.rglob("*"):
        if path.is_file():
            reset_permissions(path)
            fsync(path)


def write_diffusers(folder: Path, source: Source, card: Card) -> None:
    """Write the files of format=diffusers into an empty folder."""
    from ddt.pipeline import build_pipeline  # diffusers takes a while to import

    assert source.autoencoder is not None
    autoencoder = source.stored["autoencoder"]
    if source.autoencoder.network is not None:
        autoencoder = {**shorten_paths(autoencoder), "source": "./vae", "revision": None}
    model = ckpt.load_model(source.folder, source.weights)
    config = source.config(autoencoder)
    labels = class_labels(config["class_names"])
    build_pipeline(model, config, source.autoencoder, labels).save_pretrained(folder)
    config["export"] = source.receipt(sha256(folder / "transformer" / "diffusion_pytorch_model.safetensors"))
    write_json(folder / "ddt.json", config)
    card.write(folder, "diffusers", config, sum(p.numel() for p in model.parameters()), source.image_size())
    tidy_saved(folder)


def class_labels(class_names: list[str]) -> dict[str, str]:
    """Return the names by class for a pipeline; ImageNet's synsets become their words."""
    if class_names == imagenet_synsets():
        class_names = imagenet_info().label_descriptions()
    return {str(k): name for k, name in enumerate(class_names)}


class HubModel(ModelHubMixin):
    """A network with huggingface_hub's `from_pretrained`, `save_pretrained` and `push_to_hub`.

    checkpoint: the run, checkpoint or export with autoencoder, sampler and classes.
    """

    def __init__(self, model: Denoiser, checkpoint: str | Path) -> None:
        self.model, self.checkpoint = model, ckpt.find_checkpoint(checkpoint)

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> str | None:
        """Write a folder of format=hub; raise UserError where it is not empty.

        kwargs: of huggingface_hub's `ModelHubMixin.save_pretrained`.
        """
        folder = Path(save_directory)
        check_new(folder, "save_directory")
        return super().save_pretrained(folder, **kwargs)

    def _save_pretrained(self, save_directory: Path) -> None:
        source = open_source(self.checkpoint, "hub")
        write_hub(save_directory, source, self.model.state_dict(), Card(save_directory.name))

    @classmethod
    def _from_pretrained(cls, *, model_id: str, revision: str | None, **kwargs: Any) -> "HubModel":
        """Load a folder, or a hub model at a revision; kwargs: others of huggingface_hub."""
        folder = ckpt.find_checkpoint(model_id if revision is None else f"{model_id}@{revision}")
        return cls(ckpt.load_model(folder), folder)
