"""Draw the training and validation loss of one or more runs.

python scripts/plot_run.py runs=[runs/digits_nano,runs/other] out=curves.png
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from omegaconf import DictConfig

from ddt.config import check_arguments
from ddt.errors import UserError, require
from ddt.tracking import read_rows
from scripts.entry import checked, entry_point


def rows_of(run: str) -> list[dict[str, float]]:
    """Return the logged rows of a run; raise UserError where there are none."""
    path = Path(run) / "metrics.jsonl"
    require(path.is_file(), f"runs={run}: has no metrics.jsonl; give the folder of a run that has begun")
    rows = read_rows(path)
    require(bool(rows), f"{path}: is empty; wait for the run's first row (trainer.log_every)")
    return rows


def plot(runs: list[str] | str, out: str) -> None:
    """Write a picture with a line a run for the training loss (thin) and the validation loss (marked)."""
    require(Path(out).suffix in (".png", ".pdf", ".svg"), f"out={out}: give a .png, .pdf or .svg file")
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for number, run in enumerate([runs] if isinstance(runs, str) else runs):
        rows, colour = rows_of(run), f"C{number}"
        for key, style in (("loss", {"alpha": 0.5}), ("validation_loss", {"marker": "o", "markersize": 4})):
            points = [(row["step"], row[key]) for row in rows if key in row]
            if points:
                steps, values = zip(*points, strict=True)
                axes.plot(steps, values, color=colour, label=f"{Path(run).name}: {key.replace('_', ' ')}", **style)
    axes.set(xlabel="step", ylabel="flow-matching loss", yscale="log")
    axes.grid(alpha=0.3, which="both")
    axes.legend(frameon=False)
    figure.savefig(out, dpi=120)


@entry_point("plot_run")
def main(cfg: DictConfig) -> None:
    """Check, read, draw."""
    config = checked(cfg)
    values, problems = check_arguments(plot, {key: config[key] for key in ("runs", "out")}, "")
    if problems:
        raise UserError("\n".join(problems))
    plot(**values)


if __name__ == "__main__":
    main()
