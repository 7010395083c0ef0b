"""What the studies share: checkpoint and reference, a folder that a killed study resumes in, and
the report: means with their deviation, Markdown, figure, JSON.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ddt.config import Choice
from ddt.errors import require, require_count
from ddt.files import find_record, lock_folder, read_record, remove_temporary_files, write_json, write_text
from ddt.generation.settings import SamplerOverrides
from ddt.metrics.ranking import is_number
from ddt.metrics.settings import FeatureSettings
from ddt.receipts import circumstances, command_line
from ddt.sampling.settings import SamplerSettings

if TYPE_CHECKING:
    import torch

    from ddt.autoencoder import Autoencoder
    from ddt.metrics.features import Extractor
    from ddt.metrics.reference import Reference

log = logging.getLogger(__name__)
MAX_REPEATS = 1000
Row = dict[str, Any]
Spread = dict[str, float | None]  # mean, and standard deviation (None of one repeat)


def check_counts(settings: Any, **most: int) -> None:
    """Raise UserError where a setting is below 1 or above its number in `most`."""
    for key, limit in most.items():
        require_count(key, getattr(settings, key), 1, limit)


def unshared_sampler(overrides: SamplerOverrides, path: str) -> tuple[Path, dict[str, Any], SamplerSettings]:
    """Return folder and config of a checkpoint, and its sampler with `overrides`, without sharing.

    Reads no weights. Raises UserError for a network without encoder and a solver without steps.
    """
    from ddt.checkpoint import format as ckpt
    from ddt.model import network_class

    folder = ckpt.find_checkpoint(path)
    stored = ckpt.read_config(folder)
    kind = network_class(stored["network"])
    require(kind.shares_encoder, f"ckpt={path}: {kind.__name__} has no encoder to share; choose a DDT")
    unshared = dataclasses.replace(overrides, recompute=None, forecast_order=0)
    settings = unshared.resolve(stored["sampler"], shares_encoder=True, base_depth=stored["network"].get("base_depth"))
    require(
        not settings.adaptive,
        "sampler=adaptive: chooses its own steps, so there is no schedule for it; choose another sampler",
    )
    return folder, stored, settings


def load_comparison(
    reference: str, data: Choice | None, features: FeatureSettings | None, autoencoder: Autoencoder, shape: list[int],
    device: torch.device,
) -> tuple[Reference, Extractor]:  # fmt: skip
    """Return reference and extractor, after checks that they suit latents of `shape` (C, H, W).

    data: the data set that `reference` names, None where it is a path.
    """
    from ddt.metrics.reference import check_reference, load_reference

    assert features is not None, "check_features has refused none"
    if data is not None:
        train = data.build(split="train")
        own = list(autoencoder.latent_shape(train.channels, train.image_size))
        require(
            own == list(shape),
            f"reference={reference}: has latents of shape {own}, the model {list(shape)}; give its own data",
        )
    base, extractor = load_reference(reference, data, features, device)
    require(
        autoencoder.latent_channels is not None or shape[0] == extractor.channels,
        f"features={extractor.name}: reads images of {extractor.channels} channels, this model samples {shape[0]}; "
        "choose other features",
    )
    check_reference(base, extractor)
    return base, extractor


# --- the folder


def resume_study(out: Path, request: Row, file: str, study: str, working: str = "") -> Row | None:
    """Return the JSON `file` in `out` where an earlier call made the same request, None if empty.

    Raises UserError for any other content. working: a folder in `out` that does not count.
    """
    record = find_record(out, [file], "out", own=[working])
    if record is None:
        return None
    earlier = read_record(record)
    same = earlier.get("request") == json.loads(json.dumps(request))
    require(same, f"out={out}: holds another {study} and is not written over; choose another out=")
    return earlier


def is_complete(result: Path) -> bool:
    """Return whether the JSON file of a complete study exists, and log it."""
    if result.exists():
        log.info("%s: complete, nothing to do", result)
    return result.exists()


@contextlib.contextmanager
def working_folder(out: Path, name: str) -> Iterator[None]:
    """Lock `out`/`name` for one process (UserError); remove it when the study is complete."""
    message = f"out={out}: another command is sampling for this study; wait for it, or choose another out="
    with lock_folder(out / name, message):
        remove_temporary_files(out / name)  # of a killed call
        yield
        shutil.rmtree(out / name)


# --- the report


def spread(values: Sequence[float | None]) -> Spread | None:
    """Return mean and standard deviation (divided by count − 1); None where a value is missing."""
    if not all(map(is_number, values)):
        return None
    return {"mean": float(np.mean(values)), "sd": float(np.std(values, ddof=1)) if len(values) > 1 else None}


def mean_sd(value: Spread | None, digits: int, sign: str = "") -> str:
    """Return "mean ± sd" as text, – for None."""
    if value is None:
        return "–"
    text = f"{value['mean']:{sign}.{digits}f}"
    return text if value["sd"] is None else f"{text} ± {value['sd']:.{digits}f}"


def number(value: float | None, digits: int) -> str:
    """Return a number as text, – for null, NaN and infinite ones."""
    return f"{value:.{digits}f}" if is_number(value) else "–"


def write_numbers(path: Path, numbers: Row, device: torch.device) -> None:
    """Write a study's numbers as JSON, with command, device, versions and date."""
    write_json(path, {**numbers, "command": command_line(), **circumstances(device)})


def write_report(
    path: Path, numbers: Row, text: str, draw: Callable[[Path], None], device: torch.device, **origin: Any
) -> None:
    """Write PATH.md, PATH.png and, last, PATH.json, which makes the study complete."""
    import torch

    write_text(path.with_suffix(".md"), f"{text}\n")
    draw(path.with_suffix(".png"))
    origin = {"threads": torch.get_num_threads(), "cores": os.cpu_count(), **origin}
    write_numbers(path.with_suffix(".json"), {**numbers, **origin}, device)
    log.info("%s\n%s", text, path.with_suffix(".png"))


def draw_similarity(axes: Any, values: np.ndarray, steps: list[int]) -> Any:
    """Draw z's similarity between steps (T, T) and the segments that share z; return the image."""
    count = len(values)
    image = axes.imshow(values, origin="lower", extent=(0, count, 0, count), cmap="viridis")
    for start, end in zip(steps, [*steps[1:], count], strict=True):
        axes.plot([start, end, end, start, start], [start, start, end, end, start], color="white")
    axes.set(xlabel="step", ylabel="step")
    axes.grid(False)
    return image
