"""Post-hoc EMA: EMA weights of any length after training, from snapshots of others.

EMA weights are linear in the weights w₀ … w_n of all steps; their profile is the share of each
step. A combination of EMAs has the combined profile, so the one nearest to a target profile is a
least-squares problem over steps, solved without reading weights. Source: EDM2 (`ddt.training.ema`),
section 3.2 and appendix C; there in continuous time, here over steps, where it is exact.

Shapes: A EMAs in the snapshots, R rules, E steps at which some EMA ends.
"""

import json
import logging
import shutil
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddt.checkpoint import format as ckpt
from ddt.errors import require
from ddt.figures import GREY, ORANGE, pyplot, save_figure, share_legend
from ddt.files import check_new, check_writable
from ddt.training.ema import Array, Rule, ema_rules
from ddt.training.resume import frozen_differences
from ddt.training.settings import PosthocSettings

log = logging.getLogger(__name__)
LARGEST_RESIDUAL = 0.2  # of a usable reconstruction; docs/training.md: what it means for weights
NOTABLE_RESIDUAL = 0.05  # larger ones are warned of
CUTOFF = 1e-12  # eigenvalues of the products below this share of the largest are rounding errors


# --- profiles


@dataclass(frozen=True)
class Profile:
    """Shares of each step's weights in the EMA by a rule after `step` steps."""

    rule: Rule
    step: int

    def shares(self) -> Array:
        """Return the shares of the initial weights and steps 1 … `step`; their sum is 1."""
        return np.concatenate([self.rule.retention(np.zeros(1), self.step), self.rule.shares(1, self.step)])


def inner_products(profiles: Sequence[Profile]) -> Array:
    """Return the inner products of profiles over all steps.  # (A, A)

    EMAs by one rule are one sequence cut at different steps, so products at steps where one ends
    are enough; each follows from that before. Time: steps × rules²; memory: steps × rules.
    """
    rules = list(dict.fromkeys(profile.rule for profile in profiles))
    which = np.array([rules.index(profile.rule) for profile in profiles])
    ends, place = np.unique([profile.step for profile in profiles], return_inverse=True)
    at_ends, before = np.empty((len(ends), len(rules), len(rules))), 0  # (E, R, R)
    running = np.ones((len(rules), len(rules)))  # before step 1 every EMA is the initial weights
    for number, end in enumerate(ends.tolist()):
        retained = np.array([rule.retention(np.array(before), end) for rule in rules])
        new = np.stack([rule.shares(before + 1, end) for rule in rules])
        running = running * np.outer(retained, retained) + new @ new.T
        at_ends[number], before = running, end
    result = np.empty((len(profiles), len(profiles)))
    for column, profile in enumerate(profiles):
        earlier = ends[place] <= profile.step
        retained = profile.rule.retention(ends[place][earlier], profile.step)
        result[earlier, column] = at_ends[place[earlier], which[earlier], which[column]] * retained
        result[column, earlier] = result[earlier, column]
    return result


@dataclass(frozen=True)
class Reconstruction:
    """A target EMA as a combination of others, with coefficients of sum 1.

    residual: ‖combination − target‖ / ‖target‖ of the profiles.
    """

    target: Profile
    profiles: tuple[Profile, ...]
    coefficients: Array
    residual: float

    def shares(self) -> Array:
        """Return the profile of the combination, as `Profile.shares`."""
        total = np.zeros(self.target.step + 1)
        for coefficient, profile in zip(self.coefficients, self.profiles, strict=True):
            total[: profile.step + 1] += coefficient * profile.shares()
        return total


def reconstruct(profiles: Sequence[Profile], target: Profile) -> Reconstruction:
    """Return the combination of EMAs, none later than the target, whose profile is nearest in L2.

    Coefficients add up to 1, as shares do: what all weights have in common is kept exactly.
    """
    assert all(profile.step <= target.step for profile in profiles)
    full = inner_products([*profiles, target])
    inverse = np.linalg.pinv(full[:-1, :-1], rcond=CUTOFF, hermitian=True)
    free, uniform = inverse @ full[:-1, -1], inverse.sum(1)
    coefficients = free + uniform * (1 - free.sum()) / uniform.sum()  # Lagrange's multiplier for the sum
    square = full[-1, -1] - 2 * coefficients @ full[:-1, -1] + coefficients @ full[:-1, :-1] @ coefficients
    return Reconstruction(target, tuple(profiles), coefficients, float(np.sqrt(max(square, 0.0) / full[-1, -1])))


def check_residual(name: str, ema: Reconstruction) -> None:
    """Raise UserError for an EMA that the snapshots cannot make; warn of a poor one."""
    name, last = name.replace("_", "="), ema.target.step
    require(
        ema.residual <= LARGEST_RESIDUAL,
        f"{name}: the snapshots up to step {last} cannot make this EMA (error of its profile {ema.residual:.2f}, at "
        f"most {LARGEST_RESIDUAL}): it is too short for their spacing, or longer than the run; choose another length, "
        "or train with a smaller trainer.snapshot_every",
    )
    if ema.residual > NOTABLE_RESIDUAL:
        log.warning("warning: %s: the error of its profile is %.2f; see profile.png", name, ema.residual)


# --- snapshots and weights


@dataclass(frozen=True)
class Snapshots:
    """EMAs in a run's snapshots up to a step. weights: (folder, name) of each; profiles: theirs.

    config: of the last snapshot.
    """

    weights: tuple[tuple[Path, str], ...]
    profiles: tuple[Profile, ...]
    config: dict[str, Any]

    @property
    def step(self) -> int:
        """Step of the last snapshot, at which reconstructed EMAs end."""
        return self.config["step"]


def find_snapshots(run_dir: Path, step: int | None = None, powers: Collection[float] | None = None) -> Snapshots:
    """Return a run's snapshots up to `step`, by default the last.

    powers: relative standard deviations of the EMAs to use, by default all. Raises UserError where
    there is no snapshot of the step or a power, or fewer than two snapshots.
    """
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
    configs = {number: ckpt.read_config(folder) for number, folder in used.items()}
    for number, each in configs.items():
        require("run" in each, f"{folders[number]}: was not written by training; move it elsewhere")
    config = configs[last]
    trainer = config["run"]["trainer"]
    rules = ema_rules(trainer["ema_decay"], trainer["ema_decays"], trainer["ema_powers"])
    saved = {std: f"power_{std:g}" for std in trainer["ema_powers"]}
    known = ", ".join(f"{std:g}" for std in saved)
    for std in powers or ():
        require(std in saved, f"powers={std:g}: the run saved no such EMA weights; choose from {known}")
    require(powers is None or len(powers) > 0, f"powers=[]: name at least one of {known}, or null for all")
    for number, each in configs.items():
        changes = frozen_differences(each["run"], config["run"])
        require(
            not changes, f"{folders[number]}: is of another training ({', '.join(changes)} differ); move it elsewhere"
        )
    names = [saved[std] for std in (saved if powers is None else powers)]
    return Snapshots(
        tuple((folder, name) for folder in used.values() for name in names),
        tuple(Profile(rules[name], number) for number in used for name in names),
        config,
    )


def combine(weights: Sequence[tuple[Path, str]], coefficients: Array) -> list[dict[str, Tensor]]:
    """Return combinations of weights: float32 state dicts, summed in float64.

    weights: (folder, name) of each, read one after the other. coefficients: (combinations,
    weights). Memory: 8 bytes per parameter and combination, and 4 per parameter for the reading.
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
        del state  # before the next is read
    for total in totals:
        for key in total:
            total[key] = total[key].float()
    return totals


def receipt(ema: Reconstruction, snapshots: Snapshots) -> dict[str, Any]:
    """Return how EMA weights were made, as plain values for their config."""
    emas = [
        {"step": profile.step, "weights": name, "sha256": ckpt.weights_sha256(folder, name), "coefficient": coefficient}
        for profile, (folder, name), coefficient in zip(
            ema.profiles, snapshots.weights, ema.coefficients.tolist(), strict=True
        )
    ]
    return {**asdict(ema.target.rule), "residual": ema.residual, "emas": emas}


def is_written(folder: Path, made: dict[str, Any]) -> bool:
    """Return whether an earlier call has written the EMA of this receipt."""
    if not (folder / "manifest.json").is_file():
        return False
    return ckpt.read_config(folder).get("posthoc") == json.loads(json.dumps(made))


def plot_profile(ema: Reconstruction, path: Path) -> None:
    """Write a figure of the target profile and the reconstructed one."""
    figure, axes = pyplot().subplots(figsize=(5.5, 3.2))
    steps = np.arange(ema.target.step + 1)
    axes.plot(steps, ema.target.shares(), color=GREY, linewidth=4, label="target")
    axes.plot(steps, ema.shares(), color=ORANGE, linewidth=1, label="from snapshots")
    for end in {profile.step for profile in ema.profiles}:
        axes.axvline(end, ymax=0.03, color="0.3", linewidth=0.8)
    axes.set(xlabel="step (bars: snapshots)", ylabel="share in the EMA", title=f"relative error {ema.residual:.2g}")
    share_legend(figure)
    save_figure(figure, path)


def posthoc_ema(settings: PosthocSettings) -> None:
    """Check all that needs no weights, then read each snapshot once and write the checkpoints."""
    out, folders = Path(settings.out), settings.folders()
    check_writable(out)
    snapshots = find_snapshots(Path(settings.run), settings.step, settings.powers)
    emas = {
        name: reconstruct(snapshots.profiles, Profile(rule, snapshots.step)) for name, rule in settings.rules().items()
    }
    for name, ema in list(emas.items()):
        if is_written(folders[name], receipt(ema, snapshots)):
            log.info("%s: complete, nothing to do", folders[name])
            del emas[name]
        else:
            check_new(folders[name])
            check_residual(name, ema)
    if not emas:
        return
    existing = next(folder for folder in out.absolute().parents if folder.exists())
    needed, free = len(emas) * ckpt.weights_bytes(*snapshots.weights[-1]), shutil.disk_usage(existing).free
    require(
        needed < free,
        f"out={out}: {needed / 2**30:.2g} GiB are needed, {free / 2**30:.2g} GiB are free; free some space",
    )
    combined = combine(snapshots.weights, np.stack([ema.coefficients for ema in emas.values()]))
    for (name, ema), weights in zip(emas.items(), combined, strict=True):
        folder = folders[name]
        ckpt.write_checkpoint(folder, {**snapshots.config, "posthoc": receipt(ema, snapshots)}, ema=weights)
        plot_profile(ema, folder / "profile.png")
        log.info("%s: error of its profile %.2g", folder, ema.residual)
        log.info("sample with: python sample.py ckpt=%s", folder)
