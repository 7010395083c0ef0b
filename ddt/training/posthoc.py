"""Averages of any length after training, from snapshots of others (post-hoc EMA).

Every average of the weights w₀ … w_n is linear in them: its profile says what share of it each step
has. A combination of averages has the combined profile, so the one nearest to a wanted profile is a
problem of least squares over steps that needs no weights at all. Source: EDM2 (`ddt.training.ema`),
section 3.2 and appendix C; there in continuous time, here over steps, where it is exact.

Shapes: A averages at hand, R rules, E steps at which some average ends.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ddt.checkpoint import folder as ckpt
from ddt.errors import require
from ddt.training.ema import ConstantDecay, PowerFunction, ema_rules, power_exponent

Rule = ConstantDecay | PowerFunction
Array = NDArray[np.float64]
LARGEST_RESIDUAL = 0.2  # of a reconstruction that is of use; docs/averages.md says what it does to weights
CUTOFF = 1e-12  # eigenvalues of the products, relative to the largest, below which they are rounding alone


@dataclass(frozen=True)
class Profile:
    """The average by a rule after `step` steps, as the share that the weights of each step have in
    it.
    """

    rule: Rule
    step: int

    def shares(self) -> Array:
        """Return the share of the initial weights and of those after steps 1 … `step`; their sum is
        1.
        """
        return np.concatenate([remains(self.rule, np.zeros(1), self.step), shares(self.rule, 1, self.step)])


def remains(rule: Rule, start: Array, end: int) -> Array:
    """Return which part of an average after `start` steps is left in it after `end`: the product of
    1 − rate.
    """
    if isinstance(rule, ConstantDecay):
        return rule.decay ** (end - start)
    return (start / end) ** (power_exponent(rule.std) + 1)


def shares(rule: Rule, first: int, last: int) -> Array:
    """Return the shares of steps `first` … `last`, counted from 1, in the average after step
    `last`.

    Of a power function (i^(γ+1) − (i−1)^(γ+1)) / last^(γ+1), of a constant decay (1 −
    d)·d^(last−i).
    """
    steps = np.arange(first, last + 1, dtype=np.float64)
    if isinstance(rule, ConstantDecay):
        return (1 - rule.decay) * remains(rule, steps, last)
    with np.errstate(divide="ignore"):  # log 0 at step 1, whose rate is 1
        rates = -np.expm1((power_exponent(rule.std) + 1) * np.log1p(-1 / steps))
    return rates * remains(rule, steps, last)


def products(profiles: Sequence[Profile]) -> Array:
    """Return the inner products of profiles over all steps.  # (A, A)

    All averages by one rule are one sequence, cut at different steps, so products at the steps
    where one ends are enough; they follow from one such step to the next. Time grows with steps ×
    rules², memory with steps × rules.
    """
    rules = list(dict.fromkeys(profile.rule for profile in profiles))
    which = np.array([rules.index(profile.rule) for profile in profiles])
    ends, place = np.unique([profile.step for profile in profiles], return_inverse=True)
    at_ends, before = np.empty((len(ends), len(rules), len(rules))), 0  # (E, R, R)
    running = np.ones((len(rules), len(rules)))  # before step 1 every average is the initial weights
    for number, end in enumerate(ends.tolist()):
        left = np.array([remains(rule, np.array(before), end) for rule in rules])
        new = np.stack([shares(rule, before + 1, end) for rule in rules])
        running = running * np.outer(left, left) + new @ new.T
        at_ends[number], before = running, end
    result = np.empty((len(profiles), len(profiles)))
    for column, profile in enumerate(profiles):
        earlier = ends[place] <= profile.step
        left = remains(profile.rule, ends[place][earlier], profile.step)
        result[earlier, column] = at_ends[place[earlier], which[earlier], which[column]] * left
        result[column, earlier] = result[earlier, column]
    return result


@dataclass(frozen=True)
class Reconstruction:
    """How a wanted average is made of others. coefficients: of each, with the sum 1. residual:
    ‖made − wanted‖ / ‖wanted‖ over the profiles.
    """

    wanted: Profile
    averages: tuple[Profile, ...]
    coefficients: Array
    residual: float

    def shares(self) -> Array:
        """Return the profile that the combination has, as `Profile.shares`."""
        total = np.zeros(self.wanted.step + 1)
        for coefficient, profile in zip(self.coefficients, self.averages, strict=True):
            total[: profile.step + 1] += coefficient * profile.shares()
        return total


def reconstruct(averages: Sequence[Profile], wanted: Profile) -> Reconstruction:
    """Return the combination of averages, none later than the wanted one, whose profile is nearest
    to it in L2.

    Coefficients add up to 1, as shares of an average do: what all weights have in common is then
    kept exactly.
    """
    assert all(profile.step <= wanted.step for profile in averages)
    full = products([*averages, wanted])
    inverse = np.linalg.pinv(full[:-1, :-1], rcond=CUTOFF, hermitian=True)
    free, uniform = inverse @ full[:-1, -1], inverse.sum(1)
    coefficients = free + uniform * (1 - free.sum()) / uniform.sum()  # Lagrange's multiplier for the sum
    square = full[-1, -1] - 2 * coefficients @ full[:-1, -1] + coefficients @ full[:-1, :-1] @ coefficients
    return Reconstruction(wanted, tuple(averages), coefficients, float(np.sqrt(max(square, 0.0) / full[-1, -1])))


@dataclass(frozen=True)
class Snapshots:
    """What snapshots of a run offer up to a step. parts: folder and name of each average's weights;
    averages: their profiles, in the same order; config: that of the last snapshot.
    """

    parts: tuple[tuple[Path, str], ...]
    averages: tuple[Profile, ...]
    config: dict[str, Any]

    @property
    def step(self) -> int:
        """The step of the last snapshot, whose weights an average of them ends with."""
        return self.config["step"]

    def bytes(self) -> int:
        """Return the size on disk of one average."""
        folder, name = self.parts[-1]
        files = ckpt.read_manifest(folder)["files"]
        return sum(files[file]["size"] for file in ckpt.pieces(folder, f"{name}.safetensors"))


def find_snapshots(run_dir: Path, step: int | None = None, powers: Collection[float] | None = None) -> Snapshots:
    """Return a run's snapshots up to `step`, by default the last.

    powers: the relative standard deviations of the averages to use, by default all that the run
    kept. Raises UserError where there is no snapshot of the step, fewer than two up to it, or none
    of a power.
    """
    require(run_dir.is_dir(), f"run={run_dir}: no such folder; give that of a run, such as runs/digits_nano")
    found = ckpt.by_step(run_dir / "snapshots")
    for folder in found.values():
        ckpt.read_manifest(folder)
    require(
        len(found) > 0,
        f"run={run_dir}: has no snapshots; train with trainer.ema_powers=[0.05,0.1] and trainer.snapshot_every=, some "
        "30 to 100 of them over the run",
    )
    last = max(found) if step is None else step
    nearest = ", ".join(map(str, sorted(sorted(found, key=lambda number: abs(number - last))[:2])))
    require(last in found, f"step={last}: the run has no snapshot of it; the nearest: {nearest}")
    used = {number: folder for number, folder in found.items() if number <= last}
    require(
        len(used) >= 2,
        f"run={run_dir}: {found[last]} is the only snapshot up to step {last}; at least 2 are needed, more are better",
    )
    config = ckpt.read_config(found[last])
    trainer = config["run"]["trainer"]
    rules = ema_rules(trainer["ema_decay"], trainer["ema_decays"], trainer["ema_powers"])
    kept = {rule.std: name for name, rule in rules.items() if isinstance(rule, PowerFunction)}
    known = ", ".join(f"{std:g}" for std in kept)
    for std in powers or ():
        require(std in kept, f"powers={std:g}: the run kept no such average; choose from {known}")
    require(powers is None or len(powers) > 0, f"powers=[]: name at least one of {known}, or null for all")
    parts, averages = [], []
    for number, folder in used.items():
        changes = ckpt.frozen_differences(ckpt.read_config(folder)["run"], config["run"])
        require(not changes, f"{folder}: is of another training ({', '.join(changes)} differ); move it elsewhere")
        for std in kept if powers is None else powers:
            parts.append((folder, kept[std]))
            averages.append(Profile(rules[kept[std]], number))
    return Snapshots(tuple(parts), tuple(averages), config)


def combine(parts: Sequence[tuple[Path, str]], coefficients: Array) -> list[dict[str, Tensor]]:
    """Return combinations of weights: float32 state dicts, added up in float64.

    parts: folder and name of each average's weights, read one after the other. coefficients:
    (combinations, parts).
    Memory: 8 bytes a weight and combination, and 4 a weight for the one being read.
    """
    totals: list[dict[str, Tensor]] = [{} for _ in coefficients]
    for (folder, name), column in zip(parts, coefficients.T, strict=True):
        weights = ckpt.read_weights(folder, name)
        for total, coefficient in zip(totals, column.tolist(), strict=True):
            if not total:
                total.update({key: torch.zeros_like(value, dtype=torch.float64) for key, value in weights.items()})
            assert total.keys() == weights.keys(), f"{folder}: holds other tensors"
            for key, value in weights.items():
                total[key].add_(value, alpha=coefficient)
        del weights  # before the next ones are read
    for total in totals:
        for key in total:
            total[key] = total[key].float()
    return totals


def note(made: Reconstruction, snapshots: Snapshots) -> dict[str, Any]:
    """Return how an average was made, as plain values for its config."""
    rule = made.wanted.rule
    length = {"decay": rule.decay} if isinstance(rule, ConstantDecay) else {"std": rule.std}
    averages = [
        {
            "step": profile.step,
            "weights": name,
            "sha256": ckpt.weights_sha256(folder, name),
            "coefficient": coefficient,
        }
        for profile, (folder, name), coefficient in zip(
            made.averages, snapshots.parts, made.coefficients.tolist(), strict=True
        )
    ]
    return {**length, "residual": made.residual, "averages": averages}
