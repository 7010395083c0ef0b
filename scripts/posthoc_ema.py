"""Make averaged weights of any length from the snapshots of a run (post-hoc EMA), as checkpoints to
sample from.

python scripts/posthoc_ema.py run=runs/x std=0.07 [decay=0.9999] [step=700] out=DIR
python scripts/posthoc_ema.py run=runs/x std=[0.03,0.05,0.1] out=DIR   # DIR/std_0.03 …
"""

import logging
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from omegaconf import DictConfig

from ddt.checkpoint.folder import write_checkpoint
from ddt.cli import arguments_for, checked, entry_point
from ddt.errors import require
from ddt.files import check_writable
from ddt.training.ema import ConstantDecay, PowerFunction
from ddt.training.posthoc import LARGEST_RESIDUAL, Profile, Reconstruction, combine, find_snapshots, note, reconstruct

log = logging.getLogger(__name__)
NOTABLE_RESIDUAL = 0.05  # above it a warning


def wanted_rules(
    std: list[float] | float | None, decay: list[float] | float | None
) -> dict[str, ConstantDecay | PowerFunction]:
    """Return the rules asked for by the name of their folder; raise UserError for lengths that
    cannot be.
    """
    stds, decays = ([value] if isinstance(value, float) else value or [] for value in (std, decay))
    require(len(stds) + len(decays) > 0, "std: not set; give std= (such as 0.07), decay= (such as 0.9999), or both")
    for value in stds:
        require(0 < value < 0.28, f"std={value}: must lie in 0..0.28, relative to the steps done (all alike: 0.289)")
    for value in decays:
        require(0 < value < 1, f"decay={value}: must lie in 0..1, such as 0.9999")
    rules = {f"std_{value:g}": PowerFunction(value) for value in stds}
    rules |= {f"decay_{value:g}": ConstantDecay(value) for value in decays}
    require(len(rules) == len(stds) + len(decays), "std, decay: two of the lengths have one name; give each once")
    return rules


def check_residual(name: str, made: Reconstruction) -> None:
    """Raise UserError for an average that the snapshots cannot make, warn of a poor one."""
    name, last = name.replace("_", "="), made.wanted.step
    require(
        made.residual <= LARGEST_RESIDUAL,
        f"{name}: the snapshots up to step {last} cannot make this average (error of its profile {made.residual:.2f}, "
        f"at most {LARGEST_RESIDUAL}): it is too short for their spacing, or longer than the run; choose another "
        "length, or train with a smaller trainer.snapshot_every",
    )
    if made.residual > NOTABLE_RESIDUAL:
        log.warning("warning: %s: the error of its profile is %.2f; see profile.png", name, made.residual)


def draw(made: Reconstruction, path: Path) -> None:
    """Write a picture of the wanted profile and of the one that was made."""
    figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
    steps = np.arange(made.wanted.step + 1)
    axes.plot(steps, made.wanted.shares(), color="0.7", linewidth=4, label="wanted")
    axes.plot(steps, made.shares(), color="C3", linewidth=1, label="made of snapshots")
    for end in {profile.step for profile in made.averages}:
        axes.axvline(end, ymax=0.03, color="0.3", linewidth=0.8)
    axes.set(
        xlabel="step (bars: snapshots)", ylabel="share in the average", title=f"relative error {made.residual:.2g}"
    )
    axes.legend(frameon=False)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def posthoc(
    run: str, std: list[float] | float | None, decay: list[float] | float | None, step: int | None,
    powers: list[float] | None, out: str,
) -> None:  # fmt: skip
    """Check all that needs no weights, then read each snapshot once and write a checkpoint for each
    length.
    """
    rules = wanted_rules(std, decay)
    single = isinstance(std, float) != isinstance(decay, float) and len(rules) == 1
    folders = {name: Path(out) if single else Path(out) / name for name in rules}
    for folder in folders.values():
        require(not folder.exists(), f"out={folder}: exists already and is not written over; choose another out=")
    check_writable(Path(out))
    snapshots = find_snapshots(Path(run), step, powers)
    made = {name: reconstruct(snapshots.averages, Profile(rule, snapshots.step)) for name, rule in rules.items()}
    for name, reconstruction in made.items():
        check_residual(name, reconstruction)
    existing = next(folder for folder in Path(out).absolute().parents if folder.exists())
    needed, free = len(made) * snapshots.bytes(), shutil.disk_usage(existing).free
    require(
        needed < free,
        f"out={out}: {needed / 2**30:.2g} GiB are needed, {free / 2**30:.2g} GiB are free; free some space",
    )
    combined = combine(snapshots.parts, np.stack([reconstruction.coefficients for reconstruction in made.values()]))
    for (name, reconstruction), weights in zip(made.items(), combined, strict=True):
        config = {**snapshots.config, "posthoc": note(reconstruction, snapshots)}
        write_checkpoint(folders[name], config, ema=weights)
        draw(reconstruction, folders[name] / "profile.png")
        log.info(
            "%s: error of its profile %.2g; sample with: python sample.py ckpt=%s",
            name,
            reconstruction.residual,
            folders[name],
        )


@entry_point("posthoc_ema")
def main(cfg: DictConfig) -> None:
    """Check, combine, write."""
    posthoc(**arguments_for(posthoc, checked(cfg)))


if __name__ == "__main__":
    main()
