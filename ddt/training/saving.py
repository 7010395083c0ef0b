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
from ddt.files import fsync, write_json
from ddt.training.settings import TrainerSettings
from ddt.training.state import TRAIN_FORMAT, TrainingState
from ddt.training.tracking import read_rows

log = logging.getLogger(__name__)
MAX_FAILURES = 3  # saves in a row that cannot be written
SPARE = 1.2  # free space that a checkpoint must find, in units of its size
HIGHER_IS_BETTER = ("inception_score", "precision", "recall", "class_accuracy", "authenticity")


def remove(path: Path) -> None:
    """Remove a folder or file; nobody ever sees half of it under its name. What cannot be removed
    is warned of.
    """
    try:
        if not path.name.startswith("."):
            path = path.rename(path.with_name(f".del-{path.name}"))
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    except OSError as error:  # a network disk keeps what someone still reads
        log.warning("warning: %s: could not be removed (%s)", path, error)


def remove_leftovers(run_dir: Path) -> None:
    """Remove what a killed run left half written or half removed."""
    for parent in (run_dir, run_dir / "checkpoints", run_dir / "snapshots"):
        for pattern in (".tmp-*", ".del-*"):
            for left in parent.glob(pattern):
                remove(left)


def export(checkpoint: Path, target: Path) -> None:
    """Put the averaged weights of a checkpoint with their config into a folder that sample.py
    reads: a hard link where the disk has them, so that it costs no space and stays when the
    checkpoint goes.
    """
    temporary = ckpt.temporary_folder(target)
    manifest = ckpt.read_manifest(checkpoint)
    names = ["config.json", *ckpt.pieces(checkpoint, "ema.safetensors")]
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

    def lack_of_space(self, size: int) -> str:
        """Return what is wrong with the disk for a checkpoint of `size` bytes, or an empty text."""
        free, needed = shutil.disk_usage(self.run_dir).free, SPARE * size
        return "" if free >= needed else f"{needed / 2**30:.2g} GiB are needed, {free / 2**30:.2g} GiB are free"

    def check_space(self, state: TrainingState) -> None:
        """Raise UserError where the disk has no room for a checkpoint. All processes call it
        together.
        """
        size = self.size(state)

        def check() -> None:
            lack = self.lack_of_space(size)
            require(not lack, f"{self.run_dir}: no room for a checkpoint ({lack}); free some space")

        decide_on_main(self.accelerator, check)

    def save(self, state: TrainingState, last: bool = False) -> None:
        """Write a checkpoint of a state. An attempt that fails leaves nothing behind, and training
        goes on; after three in a row, or with the last one, OSError, the same on all processes.
        """
        folder = ckpt.checkpoint_folder(self.run_dir, state.step)
        problem = self.write(folder, state, self.size(state), state.weights(), state.train_state())
        if not problem:
            self.failures = 0
            if self.accelerator.is_main_process:
                self.export_ema(folder)
            return
        self.failures += 1
        text = f"no checkpoint of step {state.step} could be written ({problem})"
        if last or self.failures == MAX_FAILURES:
            raise OSError(0, f"{text}, {self.failures} in a row", str(folder.parent))
        if self.accelerator.is_main_process:
            log.warning("warning: %s: %s; training goes on", folder.parent, text)

    def export_ema(self, folder: Path) -> None:
        """Bring `export/` in the run folder up to date with a checkpoint; without it nothing is
        lost.
        """
        target = self.run_dir / "export"
        try:
            complete = (target / "manifest.json").is_file()
            if complete and ckpt.weights_sha256(target, "ema") == ckpt.weights_sha256(folder, "ema"):
                return
            export(folder, target)
        except (OSError, UserError) as error:
            log.warning("warning: %s: could not be written (%s)", target, error)

    def snapshot(self, state: TrainingState) -> None:
        """Keep the power-function averages of a step, from which scripts/posthoc_ema.py makes any
        other.
        """
        folder = self.run_dir / "snapshots" / f"step_{state.step:07d}"
        weights = state.weights()
        powers = {name: weights[name] for name in state.averages if name.startswith("power_")}
        mine = sum(4 * value.numel() for average in powers.values() for value in average.values())
        problem = self.write(folder, state, sum(gather_object([mine])) if self.sharded else mine, powers)
        if problem and self.accelerator.is_main_process:
            log.warning("warning: %s: could not be written (%s); training goes on", folder, problem)

    def drop_snapshots(self, after: int) -> None:
        """Remove snapshots of steps that the run did before it went on from an earlier checkpoint:
        it will do them again, and may then keep others. The main process does it.
        """
        if self.accelerator.is_main_process:
            for step, folder in ckpt.by_step(self.run_dir / "snapshots").items():
                if step > after:
                    remove(folder)

    def restore_folder(self, step: int) -> None:
        """Bring the folder of a run that goes on after `step` to the state that it had then,
        whenever it was killed.
        """
        newest = ckpt.newest_checkpoint(self.run_dir)
        if newest is not None and self.accelerator.is_main_process:
            self.export_ema(newest)
        self.drop_snapshots(after=step)
        self.prune()

    def write(self, folder: Path, state: TrainingState, size: int, weights: Any, train_state: Any = None) -> str:
        """Write a folder of `size` bytes, each process its own files, and return what went wrong,
        or an empty text; the same on all.
        """
        accelerator = self.accelerator
        main, temporary = accelerator.is_main_process, folder.parent / f".tmp-{folder.name}"
        problem = ""
        if main:
            try:
                problem = self.lack_of_space(size)
                if not problem:
                    ckpt.temporary_folder(folder)
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
                    versions = {"format_version": ckpt.FORMAT_VERSION, "train_format": TRAIN_FORMAT}
                    config = {**versions, "step": state.step, **self.config}
                    ckpt.complete(temporary, folder, config, files)
            except OSError as error:
                problem = str(error)
            if problem:
                shutil.rmtree(temporary, ignore_errors=True)
        return broadcast_object_list([problem])[0]

    def prune(self) -> None:
        """Remove the checkpoints that need not stay: all but the last ones, those of every
        `keep_every`-th step, and the best. The main process does it.
        """
        if self.settings.keep_last is None or not self.accelerator.is_main_process:
            return
        found = ckpt.checkpoints(self.run_dir)
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
