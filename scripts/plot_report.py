"""Redraw the figure of a report from its numbers: of a benchmark, a guidance search, a sharing
curve or a sweep.

python -m scripts.plot_report report=docs/benchmarks/sharing_curve_digits.json out=curve.pdf
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ddt.cli import command
from ddt.errors import require
from ddt.figures import check_figure
from ddt.files import read_json


@dataclasses.dataclass(frozen=True)
class PlotReportSettings:
    """See conf/plot_report.yaml. Raises UserError for invalid values."""

    report: str
    out: str

    def __post_init__(self) -> None:
        check_figure(Path(self.out))
        require(Path(self.report).is_file(), f"report={self.report}: no such file")


def draw_benchmark(content: dict[str, Any], out: Path) -> None:
    """Draw a benchmark.json."""
    from scripts.benchmark.run import draw

    draw(content["rows"], out)


def draw_guidance(content: dict[str, Any], out: Path) -> None:
    """Draw a search.json."""
    from scripts.studies.guidance.report import draw

    draw(content, out)


def draw_sharing(content: dict[str, Any], out: Path) -> None:
    """Draw a sharing_curve.json."""
    from ddt.metrics.comparability import in_words, short
    from scripts.studies.sharing.report import draw

    draw(content["summary"], in_words(content["metric"], short(content["request"]["num_samples"])), out)


def draw_sweep(content: dict[str, Any], out: Path) -> None:
    """Draw a report.json of a sweep."""
    from scripts.studies.sweep.report import Setting, draw

    fields = [field.name for field in dataclasses.fields(Setting)]
    settings = [Setting(**{name: row[name] for name in fields}) for row in content["means"]]
    draw(settings, content["metric"], content["request"]["x"], out)


# by the entries that tell each kind of report
KINDS: dict[tuple[str, ...], Callable[[dict[str, Any], Path], None]] = {
    ("kind", "rows", "matmul"): draw_benchmark,
    ("points", "winners", "metric"): draw_guidance,
    ("schedules", "summary", "metric"): draw_sharing,
    ("means", "published", "metric", "request"): draw_sweep,
}


@command("plot_report", settings=f"{__name__}.PlotReportSettings")
def main(settings: PlotReportSettings) -> None:
    """Tell the kind of the report by its entries, and draw it."""
    content = read_json(Path(settings.report))
    draw = next((draw for keys, draw in KINDS.items() if set(keys) <= set(content)), None)
    require(
        draw is not None,
        f"report={settings.report}: is no benchmark.json, search.json, sharing_curve.json or report.json of a sweep",
    )
    assert draw is not None
    draw(content, Path(settings.out))
    require(
        Path(settings.out).is_file(), f"report={settings.report}: compares no way with a plain one; nothing is drawn"
    )


if __name__ == "__main__":
    main()
