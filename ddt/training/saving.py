"""Checkpoints of a run: when one is written, what happens if it cannot be, and which ones stay."""

import logging
import math
import os
import shutil
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from safetensors import SafetensorError

from ddt.checkpoint import folder as ckpt
from ddt.distributed.prepare import decide_on_main
from ddt.errors import UserError, require
from ddt.files import fsync, temporary_folder, write_json
from ddt.training.settings import TrainerSettings
from ddt.training.state import TrainingState
from ddt.training.tracking import read_rows

log = logging.getLogger(__name__)
MAX_FAILURES = 3  # saves in a row that cannot be written
SPARE = 1.2  # free space that a checkpoint must find, in units of its size
HIGHER_IS_BETTER = ("inception_score", "precision", "recall", "class_accuracy", "authenticity")


def remove(path: Path) -> None:
    """Remove a folder or file, renamed first so that no half of it is ever seen under its name. A
    failure is a warning.
    """
    try:
        if not path.name.startswith("."):
            path = path.rename(path.with_name(f".del-{path.name}"))
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    except OSError as error:  # a network disk keeps what someone still reads
        log.warning("warning: %s: could not be removed (%s)", path, error)


def remove_leftovers(run_dir: Path) -> None:
    """Remove what a killed run left partly written or partly removed."""
    for parent in (run_dir, run_dir / "checkpoints", run_dir / "snapshots"):
        for pattern in (".tmp-*", ".del-*"):
            for left in parent.glob(pattern):
                remove(left)


def export_ema(checkpoint: Path, target: Path) -> None:
    """Put the EMA weights of a checkpoint with their config into a folder that sample.py reads: as
    hard links where the disk has them, which cost no space and stay when the checkpoint is removed.
    """
    temporary = temporary_folder(target)
    manifest = ckpt.read_manifest(checkpoint)
    names = ["config.json", *ckpt.shard_files(checkpoint, "ema.safetensors")]
    for name in names:
        try:
            os.link(checkpoint / name, temporary / name)
        except OSError:  # a disk without links
            shutil.copyfile(checkpoint / name, temporary / name)
            fsync(temporary / name)
    write_json(temporary / "manifest.json", {**manifest, "files": {name: manifest["files"][name] for name in names}})
    if target.exists():
        target.rename(target.with_name(f".del-{target.name}"))
    temporary.rename(target)
    shutil.rmtree(target.with_name(f".del-{target.name}"), ignore_errors=True)


class Saver:
    """Writes the checkpoints of a run, on all processes together. config: what each carries beside
    its step.
    """

    def __init__(
        self, run_dir: Path, settings: TrainerSettings, config: dict[str, Any], accelerator: Accelerator
    ) -> None:
        self.run_dir, self.settings, self.config, self.accelerator = run_dir, settings, config, accelerator
        self.sharded = settings.parallelism == "fsdp"
        self.failures = 0  # in a row

    def size(self, state: TrainingState) -> int:
        """Return the bytes of a checkpoint. All processes call it together."""
        return sum(gather_object([state.bytes()])) if self.sharded else state.bytes()

    def missing_space(self, size: int) -> str:
        """Return what is wrong with the disk for a checkpoint of `size` bytes, or an empty text."""
        free, needed = shutil.disk_usage(self.run_dir).free, SPARE * size
        return "" if free >= needed else f"{needed / 2**30:.2g} GiB are needed, {free / 2**30:.2g} GiB are free"

    def check_space(self, state: TrainingState) -> None:
        """Raise UserError where the disk has no room for a checkpoint. All processes call it
        together.
        """
        size = self.size(state)

        def check() -> None:
            problem = self.missing_space(size)
            require(not problem, f"{self.run_dir}: no room for a checkpoint ({problem}); free some space")

        decide_on_main(self.accelerator, check)

    def save(self, state: TrainingState, last: bool = False) -> None:
        """Write a checkpoint atomically. A failed attempt leaves nothing behind and training
        continues; after three in a row, or with the last one, OSError, the same on all processes.
        """
        folder = ckpt.checkpoint_folder(self.run_dir, state.step)
        problem = self.write(folder, state, self.size(state), state.weights(), state.train_state())
        if not problem:
            self.failures = 0
            if self.accelerator.is_main_process:
                self.update_export(folder)
            return
        self.failures += 1
        text = f"no checkpoint of step {state.step} could be written ({problem})"
        if last or self.failures == MAX_FAILURES:
            raise OSError(0, f"{text}, {self.failures} in a row", str(folder.parent))
        if self.accelerator.is_main_process:
            log.warning("warning: %s: %s; training continues", folder.parent, text)

    def update_export(self, folder: Path) -> None:
        """Update `export/` in the run folder from a checkpoint; a failure is a warning."""
        target = self.run_dir / "export"
        try:
            complete = (target / "manifest.json").is_file()
            if complete and ckpt.weights_sha256(target, "ema") == ckpt.weights_sha256(folder, "ema"):
                return
            export_ema(folder, target)
        except (OSError, UserError) as error:
            log.warning("warning: %s: could not be written (%s)", target, error)

    def snapshot(self, state: TrainingState) -> None:
        """Save the power-function EMAs of a step, of which scripts/posthoc_ema.py makes EMAs of any
        length.
        """
        folder = self.run_dir / "snapshots" / f"step_{state.step:07d}"
        weights = state.weights()
        powers = {name: weights[name] for name in state.emas if name.startswith("power_")}
        mine = sum(4 * value.numel() for ema in powers.values() for value in ema.values())
        problem = self.write(folder, state, sum(gather_object([mine])) if self.sharded else mine, powers)
        if problem and self.accelerator.is_main_process:
            log.warning("warning: %s: could not be written (%s); training continues", folder, problem)

    def remove_snapshots(self, after: int) -> None:
        """Remove the snapshots of steps that the resumed run will take again, perhaps with other
        settings. The main process does it.
        """
        if self.accelerator.is_main_process:
            for step, folder in ckpt.folders_by_step(self.run_dir / "snapshots").items():
                if step > after:
                    remove(folder)

    def restore_folder(self, step: int) -> None:
        """Restore the folder of a run that resumes after `step` to its state then, whenever the run
        was killed.
        """
        newest = ckpt.newest_checkpoint(self.run_dir)
        if newest is not None and self.accelerator.is_main_process:
            self.update_export(newest)
        self.remove_snapshots(after=step)
        self.prune()

    def write(self, folder: Path, state: TrainingState, size: int, weights: Any, train_state: Any = None) -> str:
        """Write a folder of `size` bytes atomically, each process its own files. Returns what went
        wrong or "", the same on all processes.
        """
        accelerator = self.accelerator
        main, temporary = accelerator.is_main_process, folder.parent / f".tmp-{folder.name}"
        problem = ""
        if main:
            try:
                problem = self.missing_space(size)
                if not problem:
                    temporary_folder(folder)
            except OSError as error:
                problem = str(error)
        problem = broadcast_object_list([problem])[0]
        if problem:
            return problem
        mine: dict[str, Any] | str = {}
        if main or self.sharded:
            piece = (accelerator.process_index, accelerator.num_processes) if self.sharded else None
            try:
                mine = ckpt.write_files(temporary, weights, train_state, piece)
            except (OSError, RuntimeError, SafetensorError) as error:  # a full disk, to Python, torch and safetensors
                mine = str(error).splitlines()[0]
        everyone = gather_object([mine])
        problem = next((found for found in everyone if isinstance(found, str)), "")
        if main:
            try:
                if not problem:
                    files = {name: entry for found in everyone for name, entry in found.items()}
                    config = {"step": state.step, **self.config}
                    ckpt.publish_atomically(temporary, folder, config, files)
            except OSError as error:
                problem = str(error)
            if problem:
                shutil.rmtree(temporary, ignore_errors=True)
        return broadcast_object_list([problem])[0]

    def prune(self) -> None:
        """Remove checkpoints, except the last `keep_last`, those of every `keep_every`-th step, and
        the best. The main process does it.
        """
        if self.settings.keep_last is None or not self.accelerator.is_main_process:
            return
        found = ckpt.list_checkpoints(self.run_dir)
        kept = set(list(found)[-self.settings.keep_last :])
        if self.settings.keep_every:
            kept |= {step for step in found if step % self.settings.keep_every == 0}
        best = None if self.settings.keep_best is None else self.best(found, self.settings.keep_best)
        if self.settings.keep_best is not None and best is None:
            return  # any of them may be the best
        for step, folder in found.items():
            if step not in kept and step != best:
                remove(folder)

    def best(self, found: dict[int, Path], metric: str) -> int | None:
        """Return the step of the checkpoint with the best logged value of a metric, the first one
        where they tie.
        """
        path = self.run_dir / "metrics.jsonl"
        rows = read_rows(path) if path.is_file() else []
        measured = [row for row in rows if row["step"] in found]
        values = {row["step"]: row[metric] for row in measured if metric in row and math.isfinite(row[metric])}
        if not values and len(found) > 1:
            known = ", ".join(sorted({key for row in measured for key in row} - {"step"})) or "no numbers"
            log.warning(
                "warning: trainer.keep_best=%s: no checkpoint has this number, so all stay; they have %s", metric, known
            )
        sign = -1 if metric.startswith(HIGHER_IS_BETTER) else 1
        return min(values, key=lambda step: (sign * values[step], step), default=None)
