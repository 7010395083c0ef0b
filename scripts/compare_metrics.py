"""Lay evaluations side by side and say what in their receipts makes two differ.

python scripts/compare_metrics.py metrics=[A,B,…] [published={fid:1.26,inception_score:310.6}]
[out=FILE.md]
"""

import json
import logging
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from omegaconf import DictConfig

from ddt.cli import arguments_for, checked, entry_point
from ddt.config import did_you_mean
from ddt.errors import UserError, require
from ddt.metrics.side_by_side import FIRST_ROWS, is_evaluation, numbers_of, side_by_side

log = logging.getLogger(__name__)


def read_evaluation(entry: str) -> tuple[Path, dict[str, Any]]:
    """Return the file that an entry of `metrics` means and its content; raise UserError where it is
    no evaluation.
    """
    path = Path(entry) / "metrics.json" if Path(entry).is_dir() else Path(entry)
    held = "the folder has no metrics.json" if Path(entry).is_dir() else "no such file"
    require(
        path.is_file(),
        f"metrics={entry}: {held}; give what evaluate.py wrote (a path with a comma or brackets in quotes: "
        """'metrics=["a,b/metrics.json",c]')""",
    )
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"metrics={path}: damaged or no JSON ({error}); evaluate again") from error
    require(is_evaluation(content), f"metrics={path}: is no evaluation; give a metrics.json of evaluate.py")
    return path.resolve(), content


def check_published(published: dict[str, Any], evaluations: list[dict[str, Any]]) -> None:
    """Raise UserError for a published number of no known metric, or that is no number."""
    known = list(dict.fromkeys([*FIRST_ROWS, *(name for metrics in evaluations for name in numbers_of(metrics))]))
    for name, value in published.items():
        require(name in known, f"published.{name}: no such metric{did_you_mean(name, known)}")
        is_number = numbers_of({name: value}).get(name) is not None
        require(is_number, f"published.{name}={value}: is no number; give one, as in published={{fid:1.26}}")


def compare_metrics(metrics: list[str] | str, published: dict[str, Any] | None, out: str | None) -> None:
    """Print the comparison, and write it to `out` where that is given."""
    require(out is None or Path(out).suffix == ".md", f"out={out}: give a .md file")
    require(published != {}, "published={}: name a number, as in published={fid:1.26}, or leave it out")
    entries = [metrics] if isinstance(metrics, str) else metrics
    enough = len(entries) >= (2 if published is None else 1)
    require(enough, f"metrics=[{','.join(entries)}]: give at least two, metrics=[A,B], or one and published=")
    paths, evaluations = zip(*map(read_evaluation, entries), strict=True)
    for entry, path in zip(entries, paths, strict=True):
        require(paths.count(path) == 1, f"metrics={entry}: names the same file twice; give each once")
    check_published(published or {}, list(evaluations))
    text = side_by_side(list(paths), list(evaluations), published or {})
    if out is not None:
        content, file = f"{text}\n".encode(), Path(out)
        free = not file.exists() or (file.is_file() and file.read_bytes() == content)
        require(free, f"out={out}: exists and says something else; choose another out=, or remove it")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    log.info("%s", text)


@entry_point("compare_metrics")
def main(cfg: DictConfig) -> None:
    """Check, read, compare."""
    compare_metrics(**arguments_for(compare_metrics, checked(cfg)))


if __name__ == "__main__":
    main()
