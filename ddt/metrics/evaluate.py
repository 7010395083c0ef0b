"""Evaluate a set of samples against a reference; needs no model.

Three layers: images → features (`metrics.features`), features → statistics (`metrics.statistics`),
statistics → metrics (`metrics.scores`). Here they are put together, and what comes out is written
down.
"""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from ddt.errors import UserError, require
from ddt.files import check_writable
from ddt.metrics.comparability import labels, obstacles, order_matters, order_warning
from ddt.metrics.features import Extractor, check_images, extract
from ddt.metrics.precision_recall import PrDtype
from ddt.metrics.reference import Reference, check_reference
from ddt.metrics.scores import Prepared, Scores, prepare, score
from ddt.metrics.sources import ImageSource, pick
from ddt.pictures import image_grid, write_png
from ddt.receipts import refuse_other_evaluation, sampling_receipt, write_metrics

log = logging.getLogger(__name__)
NUM_PAIRS = 10  # nearest pairs that are shown


def intended_classes(samples: ImageSource, extractor: Extractor) -> np.ndarray | None:
    """Return the class that each sample was drawn of, int64 (n,), where an extractor has a use for
    it, else None.

    Raises UserError for a class that it does not know.
    """
    found = samples.labels() if extractor.own_classes else None
    count = extractor.spaces.get("probabilities", 0)
    if found is not None and not (found.min() >= 0 and found.max() < count):
        raise UserError(f"samples={samples.name}: arr_1 holds classes outside of 0..{count - 1}")
    return found


def inputs_of(samples: ImageSource, reference: Reference, extractor: Extractor, pr_dtype: PrDtype) -> dict[str, Any]:
    """Return what a receipt says of an evaluation's inputs; reads all files once, for their hashes."""
    return {
        "samples": {
            "path": samples.name,
            "sha256": samples.sha256,
            "count": len(samples),
            "size": list(samples.size),
            "channels": samples.channels,
        },
        "reference": reference.identity(),
        "features": {**extractor.identity(), "pr_dtype": pr_dtype},
        **sampling_receipt(Path(samples.name), len(samples)),
    }


def write_pairs(path: Path, samples: ImageSource, training: ImageSource, scores: Scores) -> None:
    """Draw the samples that are nearest to a training image, that image below each, where they are
    of one size.
    """
    assert scores.distances is not None
    assert scores.nearest is not None
    if samples.size != training.size:
        return  # features compare images of two sizes, a grid does not hold them
    order = torch.argsort(scores.distances, stable=True)[:NUM_PAIRS].tolist()
    pairs = [pick(samples, order), pick(training, scores.nearest[order].tolist())]
    captions = [f"{scores.distances[k].item():.3g}" for k in order] + ["reference"] * len(order)
    write_png(path, image_grid(torch.from_numpy(np.concatenate(pairs)).permute(0, 3, 1, 2), len(order), captions))


def evaluate(
    samples: ImageSource,
    reference: Reference,
    extractor: Extractor,
    out: Path,
    accelerator: Accelerator,
    pr_dtype: PrDtype = "float16",
    prepared: Prepared | None = None,
) -> dict[str, Any] | None:
    """Measure samples, write `metrics.json` and `nearest.png` into `out`, and return the former's
    content on the main process, None on the others. All processes call it together.

    `prepared` is the reference where it has been measured already. Beside the metrics of
    `scores.score` there are `labels`, what each number is called; `reasons`, why one is None; and
    `comparable` and `not_comparable_because`, whether they may stand beside published ones.
    `nearest.png` shows the samples that are nearest to images of the reference, each above its
    image.

    Raises UserError for samples that do not fit, and an `out` that holds another evaluation.
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
    features = extract(samples, extractor, accelerator, "samples")
    if features is None:
        return None
    scores = score(features, classes, prepared, extractor, pr_dtype)
    metrics: dict[str, Any] = dict(scores.metrics)
    found = obstacles(metrics, len(samples), samples.size, reference, extractor, pr_dtype)
    if inputs["samples"]["sha256"] == reference.sha256:
        found.append("the samples are the reference itself")
    if order_matters(metrics):
        log.warning("warning: %s", order_warning(metrics))
    metrics |= {
        "labels": labels(scores.metrics, len(samples), reference, extractor, pr_dtype),
        "comparable": not found,
        "not_comparable_because": found,
        **({"reasons": scores.reasons} if scores.reasons else {}),
    }
    write_metrics(out, metrics, inputs, accelerator.device)
    if reference.images is not None:
        write_pairs(out / "nearest.png", samples, reference.images, scores)
    return metrics
