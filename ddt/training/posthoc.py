"""Post-hoc EMA: EMA weights of any length after training, from snapshots of others.

EMA weights are linear in the weights w₀ … w_n of all steps: their profile is the share that each
step has in them. A combination of EMAs has the combined profile, so the one nearest to a wanted
profile is a least-squares problem over steps, solved without reading any weights. Source: EDM2
(`ddt.training.ema`), section 3.2 and appendix C; there in continuous time, here over steps, where
it is exact.

Shapes: A EMAs that snapshots hold, R rules, E steps at which some EMA ends.
"""

import logging
import shutil
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
from ddt.files import check_writable
from ddt.training.ema import ConstantDecay, PowerFunction, ema_rules, power_exponent
from ddt.training.resume import frozen_differences

log = logging.getLogger(__name__)
Rule = ConstantDecay | PowerFunction
Array = NDArray[np.float64]
LARGEST_RESIDUAL = 0.2  # of a reconstruction that is of use; docs/training.md says what it does to weights
NOTABLE_RESIDUAL = 0.05  # above it a warning
CUTOFF = 1e-12  # eigenvalues of the products, relative to the largest, below which they are rounding alone


@dataclass(frozen=True)
class PosthocSettings:
    """See conf/posthoc_ema.yaml. std, decay: lengths of the EMAs to make, one or a list of each."""

    run: str
    std: list[float] | float | None
    decay: list[float] | float | None
    step: int | None
    powers: list[float] | None
    out: str

    def rules(self) -> dict[str, Rule]:
        """Return the rules asked for by the name of their folder."""
        stds, decays = ([value] if isinstance(value, float) else value or [] for value in (self.std, self.decay))
        require(len(stds) + len(decays) > 0, "std: not set; give std= (such as 0.07), decay= (such as 0.9999), or both")
        for std in stds:
            require(0 < std < 0.28, f"std={std}: must lie in 0..0.28, relative to the steps done (all alike: 0.289)")
        for decay in decays:
            require(0 < decay < 1, f"decay={decay}: must lie in 0..1, such as 0.9999")
        rules: dict[str, Rule] = {f"std_{std:g}": PowerFunction(std) for std in stds}
        rules |= {f"decay_{decay:g}": ConstantDecay(decay) for decay in decays}
        require(len(rules) == len(stds) + len(decays), "std, decay: two of the lengths have one name; give each once")
        return rules

    def __post_init__(self) -> None:
        self.rules()

    def folders(self) -> dict[str, Path]:
        """Return the folder of each EMA: `out` of a single number, else one in it."""
        single = isinstance(self.std, float) != isinstance(self.decay, float) and len(self.rules()) == 1
        return {name: Path(self.out) if single else Path(self.out) / name for name in self.rules()}


# --- profiles


@dataclass(frozen=True)
class Profile:
    """The EMA by a rule after `step` steps, as the share that each step's weights have in it."""

    rule: Rule
    step: int

    def shares(self) -> Array:
        """Return the share of the initial weights and of those after steps 1 … `step`; the sum is
        1.
        """
        return np.concatenate([retention(self.rule, np.zeros(1), self.step), shares(self.rule, 1, self.step)])


def retention(rule: Rule, start: Array, end: int) -> Array:
    """Return which part of an EMA after `start` steps is left in it after `end`: the product of 1 −
    rate.
    """
    if isinstance(rule, ConstantDecay):
        return rule.decay ** (end - start)
    return (start / end) ** (power_exponent(rule.std) + 1)


def shares(rule: Rule, first: int, last: int) -> Array:
    """Return the shares of steps `first` … `last`, counted from 1, in the EMA after step `last`.

    Of a power function (i^(γ+1) − (i−1)^(γ+1)) / last^(γ+1), of a constant decay (1 −
    d)·d^(last−i).
    """
    steps = np.arange(first, last + 1, dtype=np.float64)
    if isinstance(rule, ConstantDecay):
        return (1 - rule.decay) * retention(rule, steps, last)
    with np.errstate(divide="ignore"):  # log 0 at step 1, whose rate is 1
        rates = -np.expm1((power_exponent(rule.std) + 1) * np.log1p(-1 / steps))
    return rates * retention(rule, steps, last)


def inner_products(profiles: Sequence[Profile]) -> Array:
    """Return the inner products of profiles over all steps.  # (A, A)

    All EMAs by one rule are one sequence, cut at different steps, so products at the steps where
    one ends are enough; they follow from one such step to the next. Time grows with steps × rules²,
    memory with steps × rules.
    """
    rules = list(dict.fromkeys(profile.rule for profile in profiles))
    which = np.array([rules.index(profile.rule) for profile in profiles])
    ends, place = np.unique([profile.step for profile in profiles], return_inverse=True)
    at_ends, before = np.empty((len(ends), len(rules), len(rules))), 0  # (E, R, R)
    running = np.ones((len(rules), len(rules)))  # before step 1 every EMA is the initial weights
    for number, end in enumerate(ends.tolist()):
        left = np.array([retention(rule, np.array(before), end) for rule in rules])
        new = np.stack([shares(rule, before + 1, end) for rule in rules])
        running = running * np.outer(left, left) + new @ new.T
        at_ends[number], before = running, end
    result = np.empty((len(profiles), len(profiles)))
    for column, profile in enumerate(profiles):
        earlier = ends[place] <= profile.step
        left = retention(profile.rule, ends[place][earlier], profile.step)
        result[earlier, column] = at_ends[place[earlier], which[earlier], which[column]] * left
        result[column, earlier] = result[earlier, column]
    return result


@dataclass(frozen=True)
class Reconstruction:
    """How a wanted EMA is made of others. coefficients: of each, with the sum 1. residual: ‖made −
    wanted‖ / ‖wanted‖ over the profiles.
    """

    wanted: Profile
    profiles: tuple[Profile, ...]
    coefficients: Array
    residual: float

    def shares(self) -> Array:
        """Return the profile that the combination has, as `Profile.shares`."""
        total = np.zeros(self.wanted.step + 1)
        for coefficient, profile in zip(self.coefficients, self.profiles, strict=True):
            total[: profile.step + 1] += coefficient * profile.shares()
        return total


def reconstruct(profiles: Sequence[Profile], wanted: Profile) -> Reconstruction:
    """Return the combination of EMAs, none later than the wanted one, whose profile is nearest to
    it in L2.

    Coefficients add up to 1, as shares do: what all weights have in common is kept exactly.
    """
    assert all(profile.step <= wanted.step for profile in profiles)
    full = inner_products([*profiles, wanted])
    inverse = np.linalg.pinv(full[:-1, :-1], rcond=CUTOFF, hermitian=True)
    free, uniform = inverse @ full[:-1, -1], inverse.sum(1)
    coefficients = free + uniform * (1 - free.sum()) / uniform.sum()  # Lagrange's multiplier for the sum
    square = full[-1, -1] - 2 * coefficients @ full[:-1, -1] + coefficients @ full[:-1, :-1] @ coefficients
    return Reconstruction(wanted, tuple(profiles), coefficients, float(np.sqrt(max(square, 0.0) / full[-1, -1])))


def check_residual(name: str, made: Reconstruction) -> None:
    """Raise UserError for EMA weights that the snapshots cannot make, warn of poor ones."""
    name, last = name.replace("_", "="), made.wanted.step
    require(
        made.residual <= LARGEST_RESIDUAL,
        f"{name}: the snapshots up to step {last} cannot make this EMA (error of its profile {made.residual:.2f}, at "
        f"most {LARGEST_RESIDUAL}): it is too short for their spacing, or longer than the run; choose another length, "
        "or train with a smaller trainer.snapshot_every",
    )
    if made.residual > NOTABLE_RESIDUAL:
        log.warning("warning: %s: the error of its profile is %.2f; see profile.png", name, made.residual)


# --- snapshots and weights


@dataclass(frozen=True)
class Snapshots:
    """What snapshots of a run hold up to a step. weights: folder and name of each EMA; profiles:
    theirs, in the same order; config: that of the last snapshot.
    """

    weights: tuple[tuple[Path, str], ...]
    profiles: tuple[Profile, ...]
    config: dict[str, Any]

    @property
    def step(self) -> int:
        """The step of the last snapshot, at which EMAs made of them end."""
        return self.config["step"]


def find_snapshots(run_dir: Path, step: int | None = None, powers: Collection[float] | None = None) -> Snapshots:
    """Return a run's snapshots up to `step`, by default the last.

    powers: the relative standard deviations of the EMAs to use, by default all that the run kept.
    Raises UserError where there is no snapshot of the step, fewer than two up to it, or none of a
    power.
    """
    require(run_dir.is_dir(), f"run={run_dir}: no such folder; give that of a run, such as runs/digits_nano")
    folders = ckpt.folders_by_step(run_dir / "snapshots")
    for folder in folders.values():
        ckpt.read_manifest(folder)
    require(
        len(folders) > 0,
        f"run={run_dir}: has no snapshots; train with trainer.ema_powers=[0.05,0.1] and trainer.snapshot_every=, some "
        "30 to 100 of them over the run",
    )
    last = max(folders) if step is None else step
    nearest = ", ".join(map(str, sorted(sorted(folders, key=lambda number: abs(number - last))[:2])))
    require(last in folders, f"step={last}: the run has no snapshot of it; the nearest: {nearest}")
    used = {number: folder for number, folder in folders.items() if number <= last}
    require(
        len(used) >= 2,
        f"run={run_dir}: {folders[last]} is the only snapshot up to step {last}; at least 2 are needed, more are "
        "better",
    )
    config = ckpt.read_config(folders[last])
    trainer = config["run"]["trainer"]
    rules = ema_rules(trainer["ema_decay"], trainer["ema_decays"], trainer["ema_powers"])
    kept = {rule.std: name for name, rule in rules.items() if isinstance(rule, PowerFunction)}
    known = ", ".join(f"{std:g}" for std in kept)
    for std in powers or ():
        require(std in kept, f"powers={std:g}: the run kept no such EMA weights; choose from {known}")
    require(powers is None or len(powers) > 0, f"powers=[]: name at least one of {known}, or null for all")
    for folder in used.values():
        changes = frozen_differences(ckpt.read_config(folder)["run"], config["run"])
        require(not changes, f"{folder}: is of another training ({', '.join(changes)} differ); move it elsewhere")
    names = [kept[std] for std in (kept if powers is None else powers)]
    return Snapshots(
        tuple((folder, name) for folder in used.values() for name in names),
        tuple(Profile(rules[name], number) for number in used for name in names),
        config,
    )


def combine(weights: Sequence[tuple[Path, str]], coefficients: Array) -> list[dict[str, Tensor]]:
    """Return combinations of weights: float32 state dicts, added up in float64.

    weights: folder and name of each, read one after the other. coefficients: (combinations,
    weights).
    Memory: 8 bytes a number and combination, and 4 a number for the weights being read.
    """
    totals: list[dict[str, Tensor]] = [{} for _ in coefficients]
    for (folder, name), column in zip(weights, coefficients.T, strict=True):
        state = ckpt.read_weights(folder, name)
        for total, coefficient in zip(totals, column.tolist(), strict=True):
            if not total:
                total.update({key: torch.zeros_like(value, dtype=torch.float64) for key, value in state.items()})
            assert total.keys() == state.keys(), f"{folder}: holds other tensors"
            for key, value in state.items():
                total[key].add_(value, alpha=coefficient)
        del state  # before the next ones are read
    for total in totals:
        for key in total:
            total[key] = total[key].float()
    return totals


def receipt(made: Reconstruction, snapshots: Snapshots) -> dict[str, Any]:
    """Return how EMA weights were made, as plain values for their config."""
    rule = made.wanted.rule
    length = {"decay": rule.decay} if isinstance(rule, ConstantDecay) else {"std": rule.std}
    averages = [
        {"step": profile.step, "weights": name, "sha256": ckpt.weights_sha256(folder, name), "coefficient": coefficient}
        for profile, (folder, name), coefficient in zip(
            made.profiles, snapshots.weights, made.coefficients.tolist(), strict=True
        )
    ]
    return {**length, "residual": made.residual, "averages": averages}


def plot_profile(made: Reconstruction, path: Path) -> None:
    """Write a figure of the wanted profile and of the one that was made."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    steps = np.arange(made.wanted.step + 1)
    axes.plot(steps, made.wanted.shares(), color="0.7", linewidth=4, label="wanted")
    axes.plot(steps, made.shares(), color="C3", linewidth=1, label="made of snapshots")
    for end in {profile.step for profile in made.profiles}:
        axes.axvline(end, ymax=0.03, color="0.3", linewidth=0.8)
    axes.set(xlabel="step (bars: snapshots)", ylabel="share in the EMA", title=f"relative error {made.residual:.2g}")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=100)


def posthoc_ema(settings: PosthocSettings) -> None:
    """Check all that needs no weights, then read each snapshot once and write a checkpoint for each
    length.
    """
    out, folders = Path(settings.out), settings.folders()
    for folder in folders.values():
        require(not folder.exists(), f"out={folder}: exists already and is not written over; choose another out=")
    check_writable(out)
    snapshots = find_snapshots(Path(settings.run), settings.step, settings.powers)
    wanted = {name: Profile(rule, snapshots.step) for name, rule in settings.rules().items()}
    made = {name: reconstruct(snapshots.profiles, profile) for name, profile in wanted.items()}
    for name, reconstruction in made.items():
        check_residual(name, reconstruction)
    existing = next(folder for folder in out.absolute().parents if folder.exists())
    needed, free = len(made) * ckpt.weights_bytes(*snapshots.weights[-1]), shutil.disk_usage(existing).free
    require(
        needed < free,
        f"out={out}: {needed / 2**30:.2g} GiB are needed, {free / 2**30:.2g} GiB are free; free some space",
    )
    combined = combine(snapshots.weights, np.stack([reconstruction.coefficients for reconstruction in made.values()]))
    for (name, reconstruction), ema in zip(made.items(), combined, strict=True):
        folder = folders[name]
        ckpt.write_checkpoint(folder, {**snapshots.config, "posthoc": receipt(reconstruction, snapshots)}, ema=ema)
        plot_profile(reconstruction, folder / "profile.png")
        log.info("%s: error of its profile %.2g", folder, reconstruction.residual)
        log.info("sample with: python sample.py ckpt=%s", folder)
