"""Plot the losses of one or more runs.

python scripts/plot_run.py runs=[runs/digits_nano,runs/other] [keys=[loss,validation_loss]]
out=curves.png
"""

import dataclasses
import math
from pathlib import Path

from ddt.cli import command
from ddt.errors import require
from ddt.files import check_new

COLUMNS = 3  # panels side by side


@dataclasses.dataclass(frozen=True)
class PlotRunSettings:
    """See conf/plot_run.yaml. Raises UserError for invalid values."""

    runs: list[str] | str
    keys: list[str] | str
    out: str

    def __post_init__(self) -> None:
        require(Path(self.out).suffix in (".png", ".pdf", ".svg"), f"out={self.out}: give a .png, .pdf or .svg file")
        check_new(Path(self.out))
        require(self.runs != [], "runs=[]: name at least one run folder")
        require(self.keys != [], "keys=[]: name at least one logged value, such as loss")


def rows_of(run: str) -> list[dict[str, float]]:
    """Return the logged rows of a run; raise UserError where there are none."""
    from ddt.training.tracking import read_rows

    path = Path(run) / "metrics.jsonl"
    require(path.is_file(), f"runs={run}: has no metrics.jsonl; give the folder of a started run")
    rows = read_rows(path)
    require(bool(rows), f"{path}: is empty; wait for the run's first row (trainer.log_every)")
    return rows


@command("plot_run", settings=f"{__name__}.PlotRunSettings")
def main(settings: PlotRunSettings) -> None:
    """Plot a panel per logged key, with a line per run against the step."""
    from ddt.metrics.ranking import is_number
    from ddt.pictures import pyplot, save_figure

    runs, keys = ([value] if isinstance(value, str) else value for value in (settings.runs, settings.keys))
    rows = {run: rows_of(run) for run in runs}
    known = {key for logged in rows.values() for row in logged for key in row} - {"step"}
    for key in keys:
        require(key in known, f"keys={key}: no run has logged it; choose from {', '.join(sorted(known))}")
    columns, lines = min(len(keys), COLUMNS), -(-len(keys) // COLUMNS)
    figure = pyplot().figure(figsize=(1 + 4.5 * columns, 4 * lines))
    for number, key in enumerate(keys, start=1):
        axes = figure.add_subplot(lines, columns, number)
        for run, logged in rows.items():
            points = [(row["step"], row[key] if is_number(row[key]) else math.nan) for row in logged if key in row]
            marker = {"marker": "o", "markersize": 3} if len(points) < 30 else {}
            axes.plot([step for step, _ in points], [value for _, value in points], label=Path(run).name, **marker)
        finite = [row[key] for logged in rows.values() for row in logged if is_number(row.get(key))]
        positive = len(finite) > 0 and min(finite) > 0
        axes.set(xlabel="step", title=key.replace("_", " "), yscale="log" if positive else "linear")
        axes.legend()
    save_figure(figure, Path(settings.out))


if __name__ == "__main__":
    main()
