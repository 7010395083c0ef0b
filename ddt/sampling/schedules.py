"""Recompute schedules: the steps at which a shared encoder runs. Source: method.md 4.

Written as `uniform:5` (every 5th step), `dp:50` (50 steps, fitted to the model), a list of steps,
or a JSON file of `python -m scripts.studies.sharing.fit`. Shapes: N steps.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ddt.errors import UserError, require
from ddt.files import read_json, write_json

if TYPE_CHECKING:
    import numpy as np

FORMAT_VERSION = 1
MAX_TEMPLATES = 100_000  # of a fit
FORMS = "write uniform:5, dp:50, a list of steps [0,5,10], a schedule file SOMETHING.json, or null"
FIT = "python -m scripts.studies.sharing.fit"


def uniform_schedule(num_steps: int, every: int) -> list[int]:
    """Return the steps 0, every, 2·every, … below num_steps; UserError where either is below 1."""
    require(num_steps >= 1, f"num_steps={num_steps}: must be at least 1")
    require(every >= 1, f"recompute every {every} steps: must be at least 1 (1 means no sharing)")
    return list(range(0, num_steps, every))


def optimal_schedule(similarity: np.ndarray, budget: int) -> list[int]:
    """Return the `budget` steps, 0 among them, that minimise Σ over segments [a, b) of Σ_l
    (1 − similarity[a, l]), similarity (N, N) of z_t between steps.

    Exact, by dynamic programming in O(N²·budget). Raises UserError for an array that is not square
    or not finite, and a budget out of 1..N.
    """
    import numpy as np  # settings are parsed without

    similarity = np.asarray(similarity, dtype=np.float64)
    require(
        similarity.ndim == 2 and similarity.shape[0] == similarity.shape[1] and similarity.size > 0,
        f"similarity has shape {similarity.shape}: expected (N, N)",
    )
    require(bool(np.isfinite(similarity).all()), "similarity: holds NaN or infinite values")
    num_steps = len(similarity)
    require(1 <= budget <= num_steps, f"budget={budget}: must lie in 1..{num_steps}, the number of steps")
    cost = np.full((num_steps, num_steps + 1), np.inf)  # cost[a, b] of the segment [a, b)
    for a in range(num_steps):
        cost[a, a + 1 :] = np.cumsum(1 - similarity[a, a:])
    best = cost[0]  # best[b]: the least cost of the steps 0..b−1 in the segments so far
    choices = []  # for each further segment and b, where that segment starts
    for _ in range(budget - 1):
        through = best[:num_steps, None] + cost  # (start, end)
        choices.append(through.argmin(axis=0))
        best = through.min(axis=0)
    starts = [num_steps]
    for choice in reversed(choices):
        starts.append(int(choice[starts[-1]]))
    return [0, *reversed(starts[1:])]


def check_schedule(recompute: Sequence[int], num_steps: int) -> list[int]:
    """Return the sorted steps; UserError unless they are distinct, in range, and 0 among them."""
    steps = sorted(set(recompute))
    require(len(steps) == len(recompute), f"recompute={list(recompute)}: a step is named twice")
    require(bool(steps) and steps[0] == 0, f"recompute={list(recompute)}: step 0 must be among them, there is no z yet")
    require(
        steps[-1] < num_steps, f"recompute={list(recompute)}: step {steps[-1]} does not exist, num_steps={num_steps}"
    )
    return steps


@dataclasses.dataclass(frozen=True)
class Schedule:
    """A parsed schedule; "all" is the encoder at every step."""

    kind: Literal["all", "steps", "uniform", "dp", "file"]
    number: int = 0  # uniform: every `number`-th step; dp: `number` steps
    steps: list[int] | None = None  # sorted, of "steps" and "uniform"


def parse_schedule(recompute: str | Sequence[int] | None, num_steps: int) -> Schedule:
    """Parse a schedule for num_steps steps, reading no file; UserError where it is none."""
    if recompute is None:
        return Schedule("all")
    if not isinstance(recompute, str):
        return Schedule("steps", steps=check_schedule(recompute, num_steps))
    if recompute.endswith(".json"):
        return Schedule("file")
    kind, _, number = recompute.partition(":")
    require(kind in ("uniform", "dp") and number.isdecimal(), f"recompute={recompute}: {FORMS}")
    in_range = 1 <= int(number) <= num_steps
    if kind == "dp":
        require(
            in_range,
            f"recompute={recompute}: the encoder runs at 1..num_steps={num_steps} of the steps; choose such a number",
        )
        return Schedule("dp", int(number))
    require(
        in_range,
        f"recompute={recompute}: choose 1..num_steps={num_steps} (uniform:1 shares nothing, uniform:{num_steps} "
        "runs the encoder once)",
    )
    return Schedule("uniform", int(number), uniform_schedule(num_steps, int(number)))


def write_schedule(path: Path, content: dict[str, Any]) -> None:
    """Write a fitted schedule (`fitting.fit_schedule`) as JSON."""
    write_json(path, {"format_version": FORMAT_VERSION, **content})


def read_schedule(path: Path) -> dict[str, Any]:
    """Return the content of a schedule file; UserError where it is none."""
    require(path.is_file(), f"recompute={path}: no such file; {FIT} writes schedules")
    try:
        content = read_json(path)
        steps, grid = content["recompute_steps"], content["time_grid"]
        valid = content["format_version"] == FORMAT_VERSION and all(type(step) is int for step in steps)
        valid = valid and all(isinstance(t, float) for t in grid) and isinstance(content["guidance"], dict)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"recompute={path}: is no schedule file; fit it again with {FIT}") from error
    require(valid, f"recompute={path}: is a schedule file of another version; fit it again with {FIT}")
    check_schedule(steps, len(grid) - 1)
    return content


def content_of(recompute: str | Sequence[int] | None) -> str | Sequence[int] | None:
    """Return a schedule as written, a file as its steps: receipts compare content, not names."""
    if isinstance(recompute, str) and recompute.endswith(".json"):
        return read_schedule(Path(recompute))["recompute_steps"]
    return recompute
