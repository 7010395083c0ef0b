"""Plot the losses of one or more runs.

python scripts/plot_run.py runs=[runs/digits_nano,runs/other] [keys=[loss,validation_loss]]
[labels=[baseline,ours]] out=curves.png
"""

import dataclasses
import math
from pathlib import Path

from ddt.cli import command
from ddt.errors import require
from ddt.figures import check_figure

COLUMNS = 3  # panels side by side
SINGLE = 5.5  # inches, width of a figure of one panel


@dataclasses.dataclass(frozen=True)
class PlotRunSettings:
    """See conf/plot_run.yaml. Raises UserError for invalid values."""

    runs: list[str] | str
    keys: list[str] | str
    labels: list[str] | str | None
    out: str

    def __post_init__(self) -> None:
        check_figure(Path(self.out))
        require(self.runs != [], "runs=[]: name at least one run folder")
        require(self.keys != [], "keys=[]: name at least one logged value, such as loss")
        runs, labels = as_list(self.runs), as_list(self.labels or [])
        for run in runs:
            require(metrics_of(run).is_file(), f"runs={run}: has no metrics.jsonl; give the folder of a started run")
        require(
            self.labels is None or len(labels) == len(runs),
            f"labels: are {len(labels)} for {len(runs)} runs; give as many",
        )


def as_list(value: list[str] | str) -> list[str]:
    """Return one value as a list of it, a list as it is."""
    return [value] if isinstance(value, str) else value


def metrics_of(run: str) -> Path:
    """Return the file of a run's logged rows."""
    return Path(run) / "metrics.jsonl"


def rows_of(run: str) -> list[dict[str, float]]:
    """Return the logged rows of a run; raise UserError where there are none."""
    from ddt.training.tracking import read_rows

    path = metrics_of(run)
    rows = read_rows(path)
    require(bool(rows), f"{path}: is empty; wait for the run's first row (trainer.log_every)")
    return rows


@command("plot_run", settings=f"{__name__}.PlotRunSettings")
def main(settings: PlotRunSettings) -> None:
    """Plot a panel per logged key, with a line per run against the step."""
    from ddt.figures import WIDTH, log_scale, pyplot, save_figure, share_legend
    from ddt.metrics.ranking import better, is_number
    from ddt.training.tracking import title

    runs, keys = as_list(settings.runs), as_list(settings.keys)
    labels = as_list(settings.labels or [Path(run).name for run in runs])
    colors = {label: f"C{n}" for n, label in enumerate(dict.fromkeys(labels))}
    rows = [rows_of(run) for run in runs]
    known = {key for logged in rows for row in logged for key in row} - {"step"}
    for key in keys:
        require(key in known, f"keys={key}: no run has logged it; choose from {', '.join(sorted(known))}")
    columns, lines = min(len(keys), COLUMNS), -(-len(keys) // COLUMNS)
    figure = pyplot().figure(figsize=(WIDTH if columns > 1 else SINGLE, 0.4 + (2.4 if columns > 1 else 3) * lines))
    for number, key in enumerate(keys, start=1):
        axes = figure.add_subplot(lines, columns, number)
        finite = []
        for label, logged in zip(labels, rows, strict=True):
            points = [(row["step"], row[key] if is_number(row[key]) else math.nan) for row in logged if key in row]
            finite += [value for _, value in points if not math.isnan(value)]
            marker = {"marker": "o"} if len(points) < 30 else {}
            axes.plot(*zip(*points, strict=True), label=label, color=colors[label], **marker)
        axes.set(xlabel="step", title=title(key))
        if better(key) != "higher" and finite and min(finite) > 0:
            log_scale(axes)
    if len(colors) > 1:
        share_legend(figure)
    save_figure(figure, Path(settings.out))


if __name__ == "__main__":
    main()
