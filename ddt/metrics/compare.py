"""Evaluations side by side, beside published numbers, and what in their receipts differs."""

import dataclasses
import json
import logging
import re
from collections.abc import Collection, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from ddt.config import did_you_mean
from ddt.errors import UserError, require
from ddt.files import read_json, write_text
from ddt.metrics.ranking import is_number
from ddt.tables import markdown_table

log = logging.getLogger(__name__)
DECIMALS = {"fid": 3, "sfid": 3, "inception_score": 3}  # as papers print them; others get four
FIRST_ROWS = (
    "fid", "sfid", "inception_score", "inception_score_shuffled", "precision", "recall",
    "nearest_train_distance", "nearest_train_distance_real", "authenticity",
)  # fmt: skip
OTHER_KEYS = {
    "identical_samples": int,
    "labels": dict,
    "comparable": bool,
    "not_comparable_because": list,
    "reasons": dict,
    "receipt": dict,
}
# What a receipt records, by dotted key or its beginning, and its name in words, in the order of
# effect: other features make another metric, another device changes the last digits.
REASONS = {
    "features.name": "features",
    "features.weights.tensors_sha256": "weights of the features",
    "features.weights": "weights of the features",
    "features.resize": "resizing before the features",
    "features.dtype": "arithmetic of the features",
    "features": "features",
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
    "sampling": "sampling",
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


@dataclasses.dataclass(frozen=True)
class CompareSettings:
    """What to compare; see conf/compare_metrics.yaml."""

    metrics: list[str] | str
    published: dict[str, Any] | None = None
    out: str | None = None

    def __post_init__(self) -> None:
        require(self.out is None or Path(self.out).suffix == ".md", f"out={self.out}: give a .md file")
        require(self.published != {}, "published={}: name a number, as in published={fid:1.26}, or leave it out")
        require(
            len(self.entries) >= (2 if self.published is None else 1),
            f"metrics=[{','.join(self.entries)}]: give at least two, metrics=[A,B], or one and published=",
        )

    @property
    def entries(self) -> list[str]:
        """The files, or folders that hold one."""
        return [self.metrics] if isinstance(self.metrics, str) else self.metrics


def compare_metrics(settings: CompareSettings) -> None:
    """Show the comparison, and write it to `out` where that is set."""
    paths, evaluations = zip(*map(read_evaluation, settings.entries), strict=True)
    for entry, path in zip(settings.entries, paths, strict=True):
        require(paths.count(path) == 1, f"metrics={entry}: names the same file twice; give each once")
    published = settings.published or {}
    check_published(published, evaluations)
    text = side_by_side(paths, evaluations, published)
    if settings.out is not None:
        file = Path(settings.out)
        free = not file.exists() or (file.is_file() and file.read_bytes() == f"{text}\n".encode())
        require(free, f"out={file}: exists and says something else; choose another out=, or remove it")
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, f"{text}\n")
    log.info("%s", text)


def read_evaluation(entry: str) -> tuple[Path, dict[str, Any]]:
    """Return the file that an entry of `metrics` names, and its content, or raise UserError."""
    path, missing = Path(entry), "no such file"
    if path.is_dir():
        path, missing = path / "metrics.json", "the folder has no metrics.json"
    require(
        path.is_file(),
        f"metrics={entry}: {missing}; give what evaluate.py wrote (a path with a comma or brackets in quotes: "
        """'metrics=["a,b/metrics.json",c]')""",
    )
    try:
        content = read_json(path)
    except UserError as error:
        raise UserError(f"metrics={error}, or evaluate again") from error
    require(is_evaluation(content), f"metrics={path}: is no evaluation; give a metrics.json of evaluate.py")
    return path.resolve(), content


def is_evaluation(content: Any) -> bool:
    """Return whether evaluate.py may have written this: a known metric at least, right types."""
    if not isinstance(content, dict):
        return False
    known = {name for name in content if name in FIRST_ROWS or name == "class_accuracy" or name.startswith("fd_")}
    typed = all(content.get(key) is None or isinstance(content[key], kind) for key, kind in OTHER_KEYS.items())
    return typed and bool(known) and known <= set(numbers_of(content))


def numbers_of(metrics: dict[str, Any]) -> dict[str, float | None]:
    """Return the metrics of an evaluation; null and NaN, which were not computed, are None."""
    return {
        name: value if is_number(value) else None
        for name, value in metrics.items()
        if name not in OTHER_KEYS and (value is None or type(value) in (int, float))
    }


def check_published(published: dict[str, Any], evaluations: Sequence[dict[str, Any]]) -> None:
    """Raise UserError for a published number of no known metric, or one that is not a number."""
    known = list(dict.fromkeys([*FIRST_ROWS, *(name for metrics in evaluations for name in numbers_of(metrics))]))
    for name, value in published.items():
        require(name in known, f"published.{name}: no such metric{did_you_mean(name, known)}")
        is_number = numbers_of({name: value}).get(name) is not None
        require(is_number, f"published.{name}={value}: is not a number; give one, as in published={{fid:1.26}}")


def side_by_side(paths: Sequence[Path], evaluations: Sequence[dict[str, Any]], published: dict[str, float]) -> str:
    """Return Markdown: the table, each against the first, what is not comparable and why."""
    names, first = short_names(paths), evaluations[0]
    lines, obstacles = [table(names, evaluations, published)], []
    for name, metrics in zip(names[1:], evaluations[1:], strict=True):
        differing = [number_differences(first, metrics), *receipt_differences((names[0], name), first, metrics)]
        lines += ["", f"## {name} against {names[0]}", "", *(f"- {line}" for line in differing)]
    for name, metrics in zip(names, evaluations, strict=True):
        reasons = metrics.get("not_comparable_because") or []
        if not reasons and metrics.get("comparable") is False:
            reasons = ["its metrics.json gives no reason"]
        obstacles += [f"- {name}: {reason}" for reason in reasons]
    if obstacles:
        lines += ["", "## Not comparable with published numbers", "", *obstacles]
    return "\n".join(lines)


def short_names(paths: Sequence[Path]) -> list[str]:
    """Return the parts in which paths differ: "a", "b" for runs/{a,b}/metrics.json."""
    parts = [list(path.parts) for path in paths]
    if all(path.name == "metrics.json" for path in paths):
        parts = [each[:-1] for each in parts]
    for end in (0, -1):  # what all begin with, then what all end with
        while min(map(len, parts)) > 1 and len({each[end] for each in parts}) == 1:
            parts = [each[1:] if end == 0 else each[:-1] for each in parts]
    return [str(Path(*each)) for each in parts]


def table(names: list[str], evaluations: Sequence[dict[str, Any]], published: dict[str, float]) -> str:
    """Return a Markdown table: a row per metric, a column per evaluation, then published numbers
    and the differences to them.

    A label that all evaluations share stands in the row's head; where labels differ, or a published
    number without any stands in the row, each cell has its own.
    """
    numbers = [numbers_of(metrics) for metrics in evaluations]
    head = ["", *names, *(["published", *(f"{name} − published" for name in names)] if published else [])]
    rows = []
    for name in in_order([*(name for each in numbers for name in each), *published]):
        values = [each.get(name) for each in numbers]
        labels = [(metrics.get("labels") or {}).get(name) for metrics in evaluations]
        distinct = {label for label, value in zip(labels, values, strict=True) if value is not None}
        in_cells = any(distinct) and (len(distinct) > 1 or name in published)
        marks = [f" ({label or 'no label'})" if in_cells else "" for label in labels]
        decimals = DECIMALS.get(name.removesuffix("_shuffled"), 4)
        row = [f"{name} ({distinct.pop()})" if any(distinct) and not in_cells else name]
        row += ["–" if v is None else f"{v:.{decimals}f}{mark}" for v, mark in zip(values, marks, strict=True)]
        if published:
            theirs = published.get(name)
            row.append("–" if theirs is None else f"{theirs:.{decimals}f}")
            row += ["–" if v is None or theirs is None else f"{v - theirs:+.{decimals}f}" for v in values]
        rows.append(row)
    return markdown_table(head, rows)


def in_order(names: Collection[str]) -> list[str]:
    """Return names of metrics in the order of the table, each once: distances come first."""
    distances = [name for name in names if name.startswith("fd_") and not name.endswith("_real")]
    return list(dict.fromkeys([*distances, *(name for name in FIRST_ROWS if name in names), *names]))


def number_differences(first: dict[str, Any], other: dict[str, Any]) -> str:
    """Return by how much each number differs from the first evaluation's, and which are equal."""
    ours, theirs = numbers_of(first), numbers_of(other)
    both = [(name, ours[name], theirs.get(name)) for name in in_order(ours)]
    change = {name: b - a for name, a, b in both if a is not None and b is not None}
    if not any(change.values()):
        return "all numbers that both have are equal" if change else "they have no number in common"
    differing = ", ".join(f"{name} {value:+.3g}" for name, value in change.items() if value != 0)
    equal = ", ".join(name for name, value in change.items() if value == 0)
    return f"numbers: {differing}" + (f"; equal: {equal}" if equal else "")


def receipt_differences(names: tuple[str, str], first: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Return what differs between the receipts of two evaluations, in the order of effect."""
    receipts = first.get("receipt") or {}, other.get("receipt") or {}
    without = [name for name, receipt in zip(names, receipts, strict=True) if not receipt]
    if without:
        return [f"no receipt in {' and '.join(without)}: differences of the two are not known"]
    entries = [(*reason_of(key), *pair) for key, pair in differences(*receipts).items()]
    entries.sort(key=lambda entry: entry[0])
    unknown = [words for _, words, a, b in entries if MISSING in (a, b)]
    known = [(words, *shown(a, b)) for _, words, a, b in entries if MISSING not in (a, b)]
    lines = [f"{words}: {a} in {names[0]}, {b} in {names[1]}" for words, a, b in known]
    if lines:
        lines = [f"{names[1]} differs from {names[0]} first in: {lines[0]}", *(f"then in: {x}" for x in lines[1:])]
    elif unknown:
        lines = ["what both receipts record is equal"]
    else:
        lines = ["receipts are equal; what makes numbers differ, where any do, is not recorded in them"]
    if unknown:
        lines.append(f"recorded for one of them alone, which may differ too: {', '.join(unknown)}")
    return lines


def differences(first: dict[str, Any], other: dict[str, Any], within: str = "") -> dict[str, tuple[Any, Any]]:
    """Return values that differ between two receipts, by dotted key; MISSING if not recorded.

    Left out is what changes no number: paths, dates, commands, speeds, numbers of processes, batch
    sizes; and the SHA-256 of a file of weights where both receipts know that of its tensors.
    """
    result: dict[str, tuple[Any, Any]] = {}
    both_know = None not in (first.get("tensors_sha256"), other.get("tensors_sha256"))
    needless = "sha256" if both_know else "tensors_sha256"
    for key in dict.fromkeys([*first, *other]):
        dotted = within + key
        if key == needless or (key in CIRCUMSTANCES and dotted != CLASSIFIER_BATCH):
            continue
        if within == "sampling." and key not in OF_SAMPLING:
            continue
        a, b = first.get(key, MISSING), other.get(key, MISSING)
        if isinstance(a, dict) and isinstance(b, dict):
            result |= differences(a, b, f"{dotted}.")
        elif a != b:
            result[dotted] = (a, b)
    return result


def reason_of(dotted: str) -> tuple[int, str]:
    """Return a key's place in the order of effect, and its name in words."""
    fitting = [known for known in REASONS if f"{dotted}.".startswith(f"{known}.")]
    if not fitting:
        return len(REASONS), dotted
    known = max(fitting, key=len)
    detail = dotted.removeprefix(known).removeprefix(".")
    return list(REASONS).index(known), REASONS[known] + (f" ({detail})" if detail else "")


def shown(*values: Any) -> list[str]:
    """Return values as text: a SHA-256 by its first digits, long ones from where they differ."""
    texts = [v if isinstance(v, str) else "none" if v is None else json.dumps(v, ensure_ascii=False) for v in values]
    texts = [f"{v[:12]}…" if re.fullmatch("[0-9a-f]{64}", v) else v for v in texts]
    texts = [f"{v:,}" if type(v) is int else text for v, text in zip(values, texts, strict=True)]
    if max(map(len, texts)) <= LONG:
        return texts
    first = next((i for i, pair in enumerate(zip_longest(*texts)) if len(set(pair)) > 1), 0)
    start = max(0, first - LONG // 3)
    return [f"{'…' * (start > 0)}{v[start : start + LONG]}{'…' * (len(v) > start + LONG)}" for v in texts]
