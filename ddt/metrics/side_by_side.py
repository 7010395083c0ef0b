"""Evaluations side by side: a table of their numbers, and what in their receipts explains that they
differ.
"""

import json
import math
import re
from collections.abc import Collection
from itertools import zip_longest
from pathlib import Path
from typing import Any

DECIMALS = {"fid": 3, "sfid": 3, "inception_score": 3}  # as papers print them; others get four
FIRST_ROWS = (
    "fid", "sfid", "inception_score", "inception_score_shuffled", "precision", "recall",
    "nearest_train_distance", "nearest_train_distance_real", "authenticity",
)  # fmt: skip
NO_METRICS = {"labels": dict, "comparable": bool, "not_comparable_because": list, "reasons": dict, "receipt": dict}
# What a receipt records, by dotted key or the beginning of one, and its name in words. First stands
# what changes the numbers most: other features make another metric, another device the last digits.
REASONS = {
    "features.name": "features",
    "features.weights.tensors_sha256": "weights of the features",
    "features.weights": "weights of the features",
    "features.resize": "resizing before the features",
    "features.dtype": "arithmetic of the features",
    "features": "features",
    "reference.data": "reference",
    "reference.sha256": "reference file",
    "reference.statistics": "where the reference's statistics come from",
    "reference.count": "number of reference images",
    "reference": "reference",
    "samples.count": "number of samples",
    "samples.size": "size of the samples",
    "samples.channels": "channels of the samples",
    "sampling.request.checkpoint.ema_sha256": "weights of the model",
    "sampling.request.checkpoint.step": "training step of the model",
    "sampling.request.guide": "guide",
    "sampling.request.checkpoint.autoencoder_sha256": "autoencoder",
    "sampling.request.checkpoint": "checkpoint",
    "sampling.request.sampler.solver": "solver",
    "sampling.request.sampler.num_steps": "number of steps",
    "sampling.request.sampler.cfg_scale": "guidance scale",
    "sampling.request.sampler.cfg_interval": "guidance interval",
    "sampling.request.sampler": "sampler",
    "sampling.recompute_steps": "steps at which the encoder runs",
    "sampling.request.dtype": "arithmetic of the sampling",
    "sampling.request.classes": "classes",
    "sampling.request.seeds": "seeds",
    "sampling": "how the samples were drawn",
    "features.pr_dtype": "arithmetic of precision and recall",
    "samples.sha256": "the samples' own file",
    "samples": "samples",
    "versions": "versions of the evaluation",
    "sampling.versions": "versions of the sampling",
    "sampling.device": "device of the sampling",
    "device": "device of the evaluation",
}
OF_SAMPLING = ("request", "recompute_steps", "versions", "device")  # the rest follows from these or is about speed
CIRCUMSTANCES = ("path", "date", "command", "images_per_second", "num_processes", "batch_size")
CLASSIFIER_BATCH = "features.batch_size"  # of the classifier's training, which makes its features
MISSING = object()
LONG = 60  # characters of a value from which on a part of it is shown


def in_order(names: Collection[str]) -> list[str]:
    """Return names of metrics in the order of the table, each once: distances, the other first
    rows, then all else.
    """
    distances = [name for name in names if name.startswith("fd_") and not name.endswith("_real")]
    return list(dict.fromkeys([*distances, *sorted(set(names) & set(FIRST_ROWS), key=FIRST_ROWS.index), *names]))


def numbers_of(metrics: dict[str, Any]) -> dict[str, float | None]:
    """Return the metrics of an evaluation; None, as for null and NaN, is one that could not be
    computed.
    """
    names = [name for name in metrics if name not in NO_METRICS]
    held = {name: metrics[name] for name in names if metrics[name] is None or type(metrics[name]) in (int, float)}
    return {name: v if v is not None and math.isfinite(v) else None for name, v in held.items()}


def is_evaluation(content: Any) -> bool:
    """Tell whether what a JSON file holds is what evaluate.py writes: at least one known metric,
    and sound types.
    """
    if not isinstance(content, dict):
        return False
    known = {name for name in content if name in FIRST_ROWS or name == "class_accuracy" or name.startswith("fd_")}
    sound = all(content.get(key) is None or isinstance(content[key], kind) for key, kind in NO_METRICS.items())
    return sound and bool(known) and known <= set(numbers_of(content))


def short_names(paths: list[Path]) -> list[str]:
    """Return the parts of absolute paths that tell them apart, at least one of each: "a" and "b"
    for runs/a/metrics.json and runs/b/metrics.json.
    """
    parts = [list(path.parts) for path in paths]
    if all(path.name == "metrics.json" for path in paths):
        parts = [each[:-1] for each in parts]
    for end in (0, -1):  # what all begin with, then what all end with
        while min(map(len, parts)) > 1 and len({each[end] for each in parts}) == 1:
            parts = [each[1:] if end == 0 else each[:-1] for each in parts]
    return [str(Path(*each)) for each in parts]


def table(names: list[str], evaluations: list[dict[str, Any]], published: dict[str, float]) -> list[str]:
    """Return the lines of a Markdown table with a row for each metric and a column for each
    evaluation.

    With published numbers, they and each evaluation's difference to them are the last columns. A
    label that all evaluations share stands in the row's head; where labels differ, or a published
    number without any stands in the row, each cell has its own.
    """
    numbers = [numbers_of(metrics) for metrics in evaluations]
    head = ["", *names] + (["published", *(f"{name} − published" for name in names)] if published else [])
    rows: list[list[str]] = [[cell.replace("|", "\\|") for cell in head]]
    for name in in_order([*(name for each in numbers for name in each), *published]):
        values = [each.get(name) for each in numbers]
        labels = [(metrics.get("labels") or {}).get(name) for metrics in evaluations]
        given = {label for label, value in zip(labels, values, strict=True) if value is not None}
        in_cells = any(given) and (len(given) > 1 or name in published)
        marks = [f" ({label or 'no label'})" if in_cells else "" for label in labels]
        decimals = DECIMALS.get(name.removesuffix("_shuffled"), 4)
        row = [f"{name} ({given.pop()})" if any(given) and not in_cells else name]
        row += ["–" if v is None else f"{v:.{decimals}f}{mark}" for v, mark in zip(values, marks, strict=True)]
        if published:
            theirs = published.get(name)
            row.append("–" if theirs is None else f"{theirs:.{decimals}f}")
            row += ["–" if v is None or theirs is None else f"{v - theirs:+.{decimals}f}" for v in values]
        rows.append(row)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
    padded = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in rows]
    return [f"| {' | '.join(row)} |" for row in padded]


def differences(first: dict[str, Any], other: dict[str, Any], within: str = "") -> dict[str, tuple[Any, Any]]:
    """Return the values that differ between two receipts, by dotted key, MISSING for one that is
    not recorded.

    Left out is what changes no number: paths, dates, commands, speeds, numbers of processes, batch
    sizes; and the SHA-256 of a file of weights where both receipts know that of its tensors.
    """
    found: dict[str, tuple[Any, Any]] = {}
    both_know = None not in (first.get("tensors_sha256"), other.get("tensors_sha256"))
    needless = "sha256" if both_know else "tensors_sha256"
    for key in [*first, *(key for key in other if key not in first)]:
        dotted = within + key
        if key == needless or (key in CIRCUMSTANCES and dotted != CLASSIFIER_BATCH):
            continue
        if within == "sampling." and key not in OF_SAMPLING:
            continue
        a, b = first.get(key, MISSING), other.get(key, MISSING)
        if isinstance(a, dict) and isinstance(b, dict):
            found |= differences(a, b, f"{dotted}.")
        elif a != b:
            found[dotted] = (a, b)
    return found


def reason_of(dotted: str) -> tuple[int, str]:
    """Return the place of a key in the order of importance, and its name in words."""
    fitting = [known for known in REASONS if f"{dotted}.".startswith(f"{known}.")]
    if not fitting:
        return len(REASONS), dotted
    known = max(fitting, key=len)
    detail = dotted.removeprefix(known).removeprefix(".")
    return list(REASONS).index(known), REASONS[known] + (f" ({detail})" if detail else "")


def shown(*values: Any) -> list[str]:
    """Return values as text: a SHA-256 by its first digits, long ones from shortly before where
    they part.
    """
    texts = [v if isinstance(v, str) else "none" if v is None else json.dumps(v, ensure_ascii=False) for v in values]
    texts = [f"{v[:12]}…" if re.fullmatch("[0-9a-f]{64}", v) else v for v in texts]
    texts = [f"{v:,}" if type(v) is int else text for v, text in zip(values, texts, strict=True)]
    if max(map(len, texts)) <= LONG:
        return texts
    apart = next((i for i, pair in enumerate(zip_longest(*texts)) if len(set(pair)) > 1), 0)
    start = max(0, apart - LONG // 3)
    return [f"{'…' * (start > 0)}{v[start : start + LONG]}{'…' * (len(v) > start + LONG)}" for v in texts]


def numbers_apart(first: dict[str, Any], other: dict[str, Any]) -> str:
    """Return by how much each number of an evaluation differs from the first one's, and which are
    equal.
    """
    ours, theirs = numbers_of(first), numbers_of(other)
    both = [(name, ours[name], theirs.get(name)) for name in in_order(ours)]
    apart = {name: b - a for name, a, b in both if a is not None and b is not None}
    if not any(apart.values()):
        return "all numbers that both have are equal" if apart else "they have no number in common"
    differing = ", ".join(f"{name} {value:+.3g}" for name, value in apart.items() if value != 0)
    equal = ", ".join(name for name, value in apart.items() if value == 0)
    return f"numbers: {differing}" + (f"; equal: {equal}" if equal else "")


def reasons_apart(names: tuple[str, str], first: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Return lines that say what differs between the receipts of two evaluations, the weightiest
    first.
    """
    receipts = [metrics.get("receipt") or {} for metrics in (first, other)]
    lacking = [name for name, receipt in zip(names, receipts, strict=True) if not receipt]
    if lacking:
        return [f"no receipt in {' and '.join(lacking)}: what the two differ in cannot be told"]
    found = [(*reason_of(key), *pair) for key, pair in differences(receipts[0], receipts[1]).items()]
    found.sort(key=lambda entry: entry[0])
    unknown = [words for _, words, a, b in found if MISSING in (a, b)]
    known = [(words, *shown(a, b)) for _, words, a, b in found if MISSING not in (a, b)]
    lines = [f"{words}: {a} in {names[0]}, {b} in {names[1]}" for words, a, b in known]
    if lines:
        lines = [
            f"{names[1]} differs from {names[0]} first in: {lines[0]}",
            *(f"then in: {line}" for line in lines[1:]),
        ]
    elif unknown:
        lines = ["what both receipts record is equal"]
    else:
        lines = ["receipts are equal; what makes numbers differ, where any do, is not recorded in them"]
    if unknown:
        lines.append(f"recorded for one of them alone, which may differ too: {', '.join(unknown)}")
    return lines


def side_by_side(paths: list[Path], evaluations: list[dict[str, Any]], published: dict[str, float]) -> str:
    """Return a Markdown text: the table, each later evaluation against the first, and what compares
    with no published number.
    """
    names = short_names(paths)
    lines = table(names, evaluations, published)
    for name, metrics in zip(names[1:], evaluations[1:], strict=True):
        pair = (names[0], name)
        said = [numbers_apart(evaluations[0], metrics), *reasons_apart(pair, evaluations[0], metrics)]
        lines += ["", f"## {name} against {names[0]}", "", *(f"- {line}" for line in said)]
    return "\n".join(lines + not_comparable(names, evaluations))


def not_comparable(names: list[str], evaluations: list[dict[str, Any]]) -> list[str]:
    """Return the lines that say which evaluations compare with no published number, and why; none
    where all do.
    """
    obstacles = []
    for name, metrics in zip(names, evaluations, strict=True):
        reasons = metrics.get("not_comparable_because") or []
        if not reasons and metrics.get("comparable") is False:
            reasons = ["its metrics.json gives no reason"]
        obstacles += [f"- {name}: {reason}" for reason in reasons]
    return ["", "## Not comparable with published numbers", "", *obstacles] if obstacles else []


def beside_published(metrics: dict[str, Any], published: dict[str, float]) -> str:
    """Return a Markdown text that lays one evaluation beside published numbers."""
    names = ["measured"]
    return "\n".join(table(names, [metrics], published) + not_comparable(names, [metrics]))
