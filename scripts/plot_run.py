"""Draw the losses of one or more runs.

python scripts/plot_run.py runs=[runs/digits_nano,runs/other] [keys=[loss,validation_loss]]
out=curves.png
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from omegaconf import DictConfig

from ddt.cli import arguments_for, checked, entry_point
from ddt.errors import require
from ddt.training.tracking import read_rows

COLUMNS = 3  # panels side by side


def rows_of(run: str) -> list[dict[str, float]]:
    """Return the logged rows of a run; raise UserError where there are none."""
    path = Path(run) / "metrics.jsonl"
    require(path.is_file(), f"runs={run}: has no metrics.jsonl; give the folder of a run that has begun")
    rows = read_rows(path)
    require(bool(rows), f"{path}: is empty; wait for the run's first row (trainer.log_every)")
    return rows


def plot(runs: list[str] | str, keys: list[str] | str, out: str) -> None:
    """Write a picture with a panel for each logged key and in it a line a run, against the step."""
    require(Path(out).suffix in (".png", ".pdf", ".svg"), f"out={out}: give a .png, .pdf or .svg file")
    runs, keys = ([value] if isinstance(value, str) else value for value in (runs, keys))
    require(len(runs) > 0, "runs=[]: name at least one run folder")
    require(len(keys) > 0, "keys=[]: name at least one logged value, such as loss")
    rows = {run: rows_of(run) for run in runs}
    known = {key for logged in rows.values() for row in logged for key in row} - {"step"}
    for key in keys:
        require(key in known, f"keys={key}: no run has logged it; choose from {', '.join(sorted(known))}")
    columns, lines = min(len(keys), COLUMNS), -(-len(keys) // COLUMNS)
    figure = plt.figure(figsize=(1 + 4.5 * columns, 4 * lines), layout="constrained")
    for number, key in enumerate(keys, start=1):
        axes = figure.add_subplot(lines, columns, number)
        lowest = float("inf")
        for color, (run, logged) in enumerate(rows.items()):
            points = [(row["step"], row[key]) for row in logged if key in row]
            if points:
                steps, values = zip(*points, strict=True)
                lowest = min(lowest, *values)
                marker = {"marker": "o", "markersize": 3} if len(points) < 30 else {}
                axes.plot(steps, values, color=f"C{color}", label=Path(run).name, **marker)
        axes.set(xlabel="step", title=key.replace("_", " "), yscale="log" if lowest > 0 else "linear")
        axes.grid(alpha=0.3, which="both")
        axes.legend(frameon=False)
    figure.savefig(out, dpi=120)


@entry_point("plot_run")
def main(cfg: DictConfig) -> None:
    """Check, read, draw."""
    plot(**arguments_for(plot, checked(cfg)))


if __name__ == "__main__":
    main()
