"""Checkpoints of a run: how one is written, what happens if that fails, and which ones stay.

The loop copies the state to host memory, and a thread writes the copy while training continues.
"""

import dataclasses
import datetime
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from ddt.checkpoint import format as ckpt
from ddt.distributed.prepare import decide_on_main
from ddt.errors import UserError, first_line, require
from ddt.files import (
    fsync,
    make_temporary_folder,
    remove_temporary_files,
    rename_atomically,
    temporary_path,
    write_json,
)
from ddt.metrics.ranking import is_number, ranked
from ddt.training.settings import TrainerSettings
from ddt.training.state import TrainingState, on_host
from ddt.training.tracking import read_rows

log = logging.getLogger(__name__)
MAX_FAILURES = 3  # saves in a row
SPARE = 1.2  # required free space, in units of a checkpoint's size
WAIT_FOR_SHARDS = datetime.timedelta(hours=1)  # of the slowest process
Files = tuple[Path, int, dict[str, Any], dict[str, Any] | None]  # folder, bytes, weights, train state


def remove(path: Path) -> None:
    """Remove a folder or file, renamed first so that no half of it is seen; warn on failure."""
    try:
        if not path.name.startswith("."):
            path = path.rename(path.with_name(f".del-{path.name}"))
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    except OSError as error:  # a network disk keeps files that are open elsewhere
        log.warning("warning: %s: could not be removed (%s)", path, error)


def remove_leftovers(run_dir: Path) -> None:
    """Remove partly written and partly removed files of a killed run, and nothing of others."""
    remove_temporary_files(run_dir)
    remove_temporary_files(run_dir / "previews")
    for parent, name in ((run_dir, "export"), (run_dir / "checkpoints", "step_*"), (run_dir / "snapshots", "step_*")):
        for left in (*parent.glob(f".tmp-{name}"), *parent.glob(f".del-{name}")):
            remove(left)


def export_ema(checkpoint: Path, target: Path) -> None:
    """Write a folder for sample.py with the EMA weights and config of a checkpoint.

    Hard links where the disk has them: they cost no space and stay when the checkpoint is removed.
    """
    temporary = make_temporary_folder(target)
    manifest = ckpt.read_manifest(checkpoint)
    names = ["config.json", *ckpt.shard_files(checkpoint, "ema.safetensors")]
    for name in names:
        try:
            os.link(checkpoint / name, temporary / name)
        except OSError:  # a disk without links
            shutil.copyfile(checkpoint / name, temporary / name)
            fsync(temporary / name)
    kept = dataclasses.replace(manifest, files={name: manifest.files[name] for name in names})
    write_json(temporary / "manifest.json", dataclasses.asdict(kept))
    if target.exists():
        target.rename(target.with_name(f".del-{target.name}"))
    temporary.rename(target)
    shutil.rmtree(target.with_name(f".del-{target.name}"), ignore_errors=True)


def in_thread(function: Callable[..., str], *args: Any) -> Future[str]:
    """Call a function in a thread, which does not keep Python from ending."""
    future: Future[str] = Future()

    def call() -> None:
        try:
            future.set_result(function(*args))
        except BaseException as error:  # raised where the result is asked for
            future.set_exception(error)

    threading.Thread(target=call, daemon=True).start()
    return future


class Saver:
    """Writes a run's checkpoints, on all processes together, one at a time.

    As a context: no write outlives it. config: of the checkpoints, without the step.
    """

    def __init__(
        self, run_dir: Path, settings: TrainerSettings, config: dict[str, Any], accelerator: Accelerator
    ) -> None:
        self.run_dir, self.settings, self.config, self.accelerator = run_dir, settings, config, accelerator
        self.sharded = settings.parallelism == "fsdp"
        # collectives of the thread must not mix with those of training
        self.group: Any = torch.distributed.new_group(backend="gloo", timeout=WAIT_FOR_SHARDS) if self.sharded else None
        self.writing: Future[str] | None = None  # on all processes, whether or not they write
        self.failures = 0  # in a row
        self.began: float | None = None
        self.longest_write = 0.0  # seconds

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind: type | None, _: BaseException | None, trace: TracebackType | None) -> None:
        if self.writing is not None and kind is not KeyboardInterrupt:  # a second Ctrl-C ends the run at once
            error = self.writing.exception()
            problem = first_line(error) if error else self.writing.result()
            if problem and self.accelerator.is_main_process:
                log.warning("warning: %s: %s", self.run_dir / "checkpoints", problem)

    def size(self, state: TrainingState) -> int:
        """Return the bytes of a checkpoint. All processes call it together."""
        return sum(gather_object([state.bytes()])) if self.sharded else state.bytes()

    def missing_space(self, size: int) -> str:
        """Return why the disk has no room for `size` bytes, or ""."""
        free, needed = shutil.disk_usage(self.run_dir).free, SPARE * size
        return "" if free >= needed else f"{needed / 2**30:.2g} GiB are needed, {free / 2**30:.2g} GiB are free"

    def check_space(self, state: TrainingState) -> None:
        """Raise UserError without room for a checkpoint. All processes call it together."""
        size = self.size(state)
        problem = decide_on_main(self.accelerator, lambda: self.missing_space(size))
        require(not problem, f"{self.run_dir}: no room for a checkpoint ({problem}); free some space")

    def save(self, state: TrainingState, checkpoint: bool = True, snapshot: bool = False) -> None:
        """Begin to write a checkpoint of a step, a snapshot or both. All processes call it
        together, after `wait`.

        A snapshot holds the power-function EMAs, of which scripts/posthoc_ema.py makes others.
        """
        assert self.writing is None, "one write at a time"
        weights, step, files = state.weights(), state.step, list[Files]()
        if snapshot:  # first: it is removed again where the checkpoint fails
            powers = {name: weights[name] for name in state.emas if name.startswith("power_")}
            size = sum(4 * value.numel() for ema in powers.values() for value in ema.values())
            size = sum(gather_object([size])) if self.sharded else size
            files.append((self.run_dir / "snapshots" / f"step_{step:07d}", size, powers, None))
        if checkpoint:
            files.append((ckpt.checkpoint_folder(self.run_dir, step), self.size(state), weights, state.train_state()))
        if self.accelerator.is_main_process or self.sharded:
            self.began = time.perf_counter()
            self.writing = in_thread(self.write, step, on_host(files))
        else:
            self.writing = Future()
            self.writing.set_result("")

    def wait(self, last: bool = False) -> None:
        """Wait for the write under way, if any. All processes call it together.

        Of a checkpoint that could not be written nothing is left, and training continues; after
        three in a row, or if it was the last, it raises OSError on all processes.
        """
        if self.writing is None:
            return
        problem, failures = broadcast_object_list([self.writing.result(), self.failures])
        self.writing, folder = None, self.run_dir / "checkpoints"
        if problem and (last or failures == MAX_FAILURES):
            raise OSError(0, f"{problem}, {failures} in a row", str(folder))
        if problem and self.accelerator.is_main_process:
            log.warning("warning: %s: %s; training continues", folder, problem)

    @property
    def write_seconds(self) -> float:
        """The longest that a write took, or that the one under way has taken until now."""
        began = self.began
        return max(self.longest_write, 0.0 if began is None else time.perf_counter() - began)

    # --- in the thread: on the main process, and on each of a sharded run

    def write(self, step: int, files: list[Files]) -> str:
        """Write snapshot and checkpoint of a step; return why there is no checkpoint, or ""."""
        main, failure = self.accelerator.is_main_process, ""
        for folder, size, weights, train_state in files:
            problem = self.write_atomically(folder, step, size, weights, train_state)
            if train_state is None:
                if problem and main:
                    log.warning("warning: %s: could not be written (%s); training continues", folder, problem)
            elif problem:
                failure, self.failures = f"no checkpoint of step {step} could be written ({problem})", self.failures + 1
            else:
                self.failures = 0
                if main:
                    self.update_export(folder)
                    self.prune()  # a best one stays until a better one has been measured
        self.longest_write, self.began = self.write_seconds, None
        return failure

    def write_atomically(self, folder: Path, step: int, size: int, weights: Any, train_state: Any) -> str:
        """Write a checkpoint or snapshot of `size` bytes, each process its own files.

        `folder` appears by the rename of a complete temporary folder, or not at all. Returns what
        went wrong or "", the same on all processes.
        """
        temporary = temporary_path(folder)

        def start() -> str:
            problem = self.missing_space(size)
            if not problem:
                make_temporary_folder(folder)
            return problem

        problem = self.attempt_on_main(start)
        if problem:
            return problem
        shard = (self.accelerator.process_index, self.accelerator.num_processes) if self.sharded else None
        try:
            mine: Any = ckpt.write_files(temporary, weights, train_state, shard)  # manifest entries
        except OSError as error:
            mine = str(error)
        everyone = [mine]
        if self.sharded:
            everyone *= self.accelerator.num_processes
            torch.distributed.all_gather_object(everyone, mine, group=self.group)

        def finish() -> str:
            for written in everyone:
                if isinstance(written, str):
                    return written
            files = {name: entry for written in everyone for name, entry in written.items()}
            ckpt.write_manifest(temporary, {"step": step, **self.config}, files)
            rename_atomically(temporary, folder)  # from here on the checkpoint exists
            return ""

        problem = self.attempt_on_main(finish)
        if problem and self.accelerator.is_main_process:
            shutil.rmtree(temporary, ignore_errors=True)
        return problem

    def attempt_on_main(self, action: Callable[[], str]) -> str:
        """Call `action` on the main process; return its text, or its OSError's, on all."""
        problem = [""]
        if self.accelerator.is_main_process:
            try:
                problem = [action()]
            except OSError as error:
                problem = [str(error)]
        if self.sharded:
            torch.distributed.broadcast_object_list(problem, group=self.group)
        return problem[0]

    def update_export(self, folder: Path) -> None:
        """Update `export/` in the run folder from a checkpoint; warn on failure."""
        target = self.run_dir / "export"
        try:
            complete = (target / "manifest.json").is_file()
            if not (complete and ckpt.weights_sha256(target, "ema") == ckpt.weights_sha256(folder, "ema")):
                export_ema(folder, target)
        except OSError as error:
            log.warning("warning: %s: could not be written (%s)", target, error)
        except UserError as error:  # a damaged file in it, which may be somebody's
            log.warning("warning: %s: stays as it is (%s); remove it, and the next save writes it again", target, error)

    def restore_folder(self, step: int) -> None:
        """Restore the folder of a run that resumes after `step` to its state then.

        Snapshots of later steps are removed: the resumed run saves them again, perhaps with other
        settings.
        """
        if self.accelerator.is_main_process:
            newest = ckpt.newest_checkpoint(self.run_dir)
            if newest is not None:
                self.update_export(newest)
            for number, folder in ckpt.folders_by_step(self.run_dir / "snapshots").items():
                if number > step:
                    remove(folder)

    def prune(self) -> None:
        """Remove checkpoints but the last `keep_last`, every `keep_every`-th step, the best."""
        settings = self.settings
        if settings.keep_last is None or not self.accelerator.is_main_process:
            return
        checkpoints = ckpt.list_checkpoints(self.run_dir)
        stay = set(list(checkpoints)[-settings.keep_last :])
        if settings.keep_every:
            stay |= {step for step in checkpoints if step % settings.keep_every == 0}
        if settings.keep_best is not None:
            best = self.best(checkpoints, settings.keep_best)
            if best is None:
                return  # any of them may be the best
            stay.add(best)
        for step, folder in checkpoints.items():
            if step not in stay:
                remove(folder)

    def best(self, checkpoints: dict[int, Path], metric: str) -> int | None:
        """Return the step of the checkpoint with the best logged metric, the first of ties."""
        path = self.run_dir / "metrics.jsonl"
        rows = read_rows(path) if path.is_file() else []
        measured = [row for row in rows if row["step"] in checkpoints]
        values = {row["step"]: row[metric] for row in measured if is_number(row.get(metric))}
        if not values and len(checkpoints) > 1:
            known = ", ".join(sorted({key for row in measured for key in row} - {"step"})) or "none"
            log.warning(
                "warning: trainer.keep_best=%s: no checkpoint has this metric, so all stay; logged: %s", metric, known
            )
        return next(iter(ranked(values, metric)), None)
