"""Evaluate a set of samples against a reference: images → features (`metrics.features`) →
statistics (`metrics.frechet`) → metrics (`metrics.scores`) → `metrics.json` with a receipt.
"""

import datetime
import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from ddt.config import Choice
from ddt.distributed.prepare import make_accelerator
from ddt.errors import UserError, require
from ddt.files import check_writable, find_record, read_record, write_json
from ddt.generation.receipt import RECEIPT, is_receipt_of
from ddt.metrics.comparability import labels, order_matters, order_warning, reasons_not_comparable
from ddt.metrics.copies import CountedImages, copies_reason
from ddt.metrics.features import Extractor, check_images, extract
from ddt.metrics.images import SAMPLES, ImageSource, StoredImages, pick
from ddt.metrics.reference import Reference, check_reference, load_reference
from ddt.metrics.scores import Prepared, Scores, prepare, score
from ddt.metrics.settings import EvaluateSettings, PrDtype
from ddt.pictures import image_grid, write_png
from ddt.receipts import circumstances, without_paths

log = logging.getLogger(__name__)
NUM_PAIRS = 10  # in nearest.png
LONG_LIST = 1000  # entries; of longer lists in a sampling receipt only the length is recorded


def run(settings: EvaluateSettings, data: Choice | None, samples: StoredImages) -> None:
    """Load everything, measure, and log the metrics; every process calls it."""
    assert settings.features is not None
    accelerator = make_accelerator(timeout=datetime.timedelta(days=1))  # main's metrics may take hours
    reference, extractor = load_reference(settings.reference, data, settings.features, accelerator.device)
    out = samples.default_out if settings.out is None else Path(settings.out)
    metrics = evaluate(samples, reference, extractor, out, accelerator, settings.pr_dtype)
    if metrics is not None:
        log_metrics(metrics)


def log_metrics(metrics: dict[str, Any]) -> None:
    """Log each number with its label, and why they are not comparable."""
    width = max(map(len, metrics["labels"].values()))
    for name, label in metrics["labels"].items():
        value = metrics[name]
        text = f"– ({metrics['reasons'][name]})" if value is None else f"{value:.4f}"
        log.info("%s  %s", label.ljust(width), text)
    for reason in metrics["not_comparable_because"]:
        log.info("not comparable with published numbers: %s", reason)


def evaluate(
    samples: ImageSource,
    reference: Reference,
    extractor: Extractor,
    out: Path,
    accelerator: Accelerator,
    pr_dtype: PrDtype = "float16",
    prepared: Prepared | None = None,
) -> dict[str, Any] | None:
    """Measure samples, write `metrics.json` and `nearest.png` (the samples nearest to images of the
    reference, each above its image) into `out`, and return the content of metrics.json on the main
    process, None on the others. All processes call it together.

    Beside the metrics of `scores.score` it holds `identical_samples`, how many are copies of
    another; `labels`, the name of each number; `reasons`, why one is None; `comparable` and
    `not_comparable_because`, as to published numbers; and a `receipt` of all inputs. prepared: the
    reference, if it has been measured already. Raises UserError for samples that do not fit, and an
    `out` that holds another evaluation.
    """
    require(len(samples) >= 2, f"samples={samples.name}: holds one image; statistics need at least 2")
    check_images(samples, "samples", extractor)
    check_reference(reference, extractor)
    classes = intended_classes(samples, extractor)
    inputs: dict[str, Any] = {}
    if accelerator.is_main_process:
        inputs = inputs_of(samples, reference, extractor, pr_dtype)
        refuse_other_evaluation(out, inputs)
        check_writable(out)
    prepared = prepared or prepare(reference, extractor, accelerator)
    counted = CountedImages(samples)
    features, copies = extract(counted, extractor, accelerator, "samples"), counted.copies()
    if features is None:
        return None
    scores = score(features, classes, prepared, extractor, pr_dtype)
    metrics: dict[str, Any] = dict(scores.metrics)
    reasons = reasons_not_comparable(metrics, len(samples), samples.size, reference, extractor, pr_dtype)
    if inputs["samples"]["sha256"] == reference.sha256:
        reasons.append("the samples are the reference itself")
    if copies > 0:
        reasons.append(copies_reason(copies, len(samples)))
    if order_matters(metrics):
        log.warning("warning: %s", order_warning(metrics))
    metrics |= {
        "identical_samples": copies,
        "labels": labels(scores.metrics, len(samples), reference, extractor, pr_dtype),
        "comparable": not reasons,
        "not_comparable_because": reasons,
        **({"reasons": scores.reasons} if scores.reasons else {}),
        "receipt": {**inputs, **circumstances(accelerator.device, ("torch", "numpy", "torch-fidelity", "timm"))},
    }
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "metrics.json", metrics)
    log.info("%s", out / "metrics.json")
    if reference.images is not None and samples.size == reference.images.size:
        write_pairs(out / "nearest.png", samples, reference.images, scores)
    return metrics


def intended_classes(samples: ImageSource, extractor: Extractor) -> np.ndarray | None:
    """Return the class of each sample, int64 (n,), or None where unknown or not used."""
    classes = samples.labels() if extractor.own_classes else None
    count = extractor.spaces.get("probabilities", 0)
    if classes is not None and not (classes.min() >= 0 and classes.max() < count):
        raise UserError(f"samples={samples.name}: arr_1 holds classes outside of 0..{count - 1}")
    return classes


def inputs_of(samples: ImageSource, reference: Reference, extractor: Extractor, pr_dtype: PrDtype) -> dict[str, Any]:
    """Return the receipt of the inputs; reads all files once, for their hashes."""
    sha256 = samples.sha256
    sampling_receipt(Path(reference.name), reference.sha256)  # raises, where it is a set of another receipt
    return {
        "samples": {
            "path": samples.name,
            "sha256": sha256,
            "count": len(samples),
            "size": list(samples.size),
            "channels": samples.channels,
        },
        "reference": reference.identity(),
        "features": {**extractor.identity(), "pr_dtype": pr_dtype},
        **sampling_receipt(Path(samples.name), sha256),
    }


def sampling_receipt(samples: Path, sha256: str) -> dict[str, Any]:
    """Return {"sampling": receipt} where sample.py wrote one beside this samples.npz of a SHA-256.

    Raises UserError for that of another set, and a damaged one.
    """
    path = samples.with_name(RECEIPT)
    if samples.name != SAMPLES or not path.is_file():
        return {}
    receipt = read_record(path)
    require(
        is_receipt_of(receipt, sha256),
        f"{path}: is not the receipt of {samples}: one of both was damaged or replaced; sample again, or move the "
        "receipt away",
    )
    return {"sampling": shorten(receipt)}


def shorten(values: Any) -> Any:
    """Return plain values with long lists, such as 50,000 seeds, replaced by their length."""
    if isinstance(values, dict):
        return {key: shorten(value) for key, value in values.items()}
    if isinstance(values, list):
        return f"{len(values)} values" if len(values) > LONG_LIST else [shorten(value) for value in values]
    return values


def refuse_other_evaluation(out: Path, inputs: dict[str, Any]) -> None:
    """Raise UserError where `out` is a file, holds metrics of other inputs, or nearest.png of no
    evaluation.
    """
    path = find_record(out, ["metrics.json"], "out", written=["nearest.png"])
    if path is None:
        return
    try:
        receipt = read_record(path)["receipt"]
        same = receipt["samples"]["sha256"] == inputs["samples"]["sha256"] and all(
            without_paths(receipt[key]) == without_paths(inputs[key]) for key in ("reference", "features")
        )
    except (KeyError, TypeError):
        same = False
    require(same, f"{path}: belongs to another evaluation and is not written over; choose another out=")


def write_pairs(path: Path, samples: ImageSource, training: ImageSource, scores: Scores) -> None:
    """Write a grid of the samples nearest to a training image, that image below each, with
    their distance between.
    """
    assert scores.distances is not None and scores.nearest is not None  # noqa: PT018
    order = torch.argsort(scores.distances, stable=True)[:NUM_PAIRS].tolist()
    pairs = [pick(samples, order), pick(training, scores.nearest[order].tolist())]
    captions = [f"{scores.distances[k].item():.3g}" for k in order] + [""] * len(order)
    images = torch.from_numpy(np.concatenate(pairs)).permute(0, 3, 1, 2)
    write_png(path, image_grid(images, len(order), captions, rows=["sample", "reference"]))
