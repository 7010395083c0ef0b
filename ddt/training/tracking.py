"""Loggers of a run: `metrics.jsonl` in its folder, and beside it Weights & Biases or TensorBoard.

The file has flat names (`loss`, `validation_loss`, `fid_50k`); dashboards get them in groups
(`train/loss`, `val/loss`, `eval/fid_50k`, `perf/images_per_second`).
"""

import json
import logging
import os
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from ddt.errors import first_line, require
from ddt.files import read_json, write_text
from ddt.metrics.comparability import in_words
from ddt.training.meter import BY_T
from ddt.training.settings import METRIC_SUFFIX
from ddt.training.throughput import PERF_NAMES

log = logging.getLogger(__name__)
Mode = Literal["online", "offline", "disabled"]
TITLES = {
    "loss": "training loss",
    "fm_loss": "flow-matching loss",
    "repa_loss": "alignment loss (1 − cosine)",
    "alignment_cosine": "cosine to the target's features",
    "validation_loss": "validation loss of the EMA weights",
    "grad_norm": "gradient norm before clipping",
    "clipped": "share of clipped steps",
    "skipped_steps": "steps skipped so far",
    "loss_scale": "loss scale of fp16",
    "ema_distance": "EMA's relative distance to the weights",
    "lr": "learning rate",
    "images_per_second": "images per second",
    "data_wait": "share of time waiting for data",
    "tflops_per_process": "TFLOP/s per process",
    "mfu": "model FLOPs utilization",
    "mfu_with_target": "model FLOPs utilization, with target",
    "gpu_memory_gib": "peak GPU memory (GiB)",
}


def read_rows(path: Path, key: str = "step", kind: type = int) -> list[dict[str, Any]]:
    """Return the rows of a JSON-lines file such as `metrics.jsonl`, each an object with a `key` of
    a kind.

    A last line that a kill cut short is left out with a warning; any other bad line is a UserError.
    """
    lines = path.read_bytes().splitlines()
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            require(number == len(lines), f"{path}: line {number} is damaged ({first_line(error)}); remove it")
            log.warning("%s: the last line was cut short and is left out", path)
            continue
        require(
            isinstance(row, dict) and type(row.get(key)) is kind,
            f"{path}: line {number} is damaged (no {key}); remove it",
        )
        rows.append(row)
    return rows


def last_measurement(run_dir: Path) -> float | None:
    """Return what a sweeper may minimise of a run: the last value of its `trainer.keep_best`, or
    else of its validation loss, or else of its training loss; None where nothing was logged.
    """
    rows = read_rows(run_dir / "metrics.jsonl")
    trainer = read_json(run_dir / "config.json")["trainer"]
    values = {key: float(value) for row in rows for key, value in row.items()}
    return next((values[key] for key in (trainer["keep_best"], "validation_loss", "loss") if key in values), None)


def configured_mode() -> Any:
    """Return the mode of W&B where none is given: of WANDB_MODE, or of W&B's settings files."""
    if "WANDB_MODE" in os.environ:
        return os.environ["WANDB_MODE"]
    import wandb

    return wandb.setup(wandb.Settings(silent=True)).settings.mode


def dashboard_name(name: str) -> str:
    """Return the name of a value on a dashboard: that of `metrics.jsonl` in its group."""
    if name == "validation_loss":
        return "val/loss"
    if name in PERF_NAMES:
        return f"perf/{name}"
    return f"eval/{name}" if METRIC_SUFFIX.search(name) else f"train/{name}"


def title(name: str) -> str:
    """Return a value of `metrics.jsonl` in words, with its unit, as the title of a figure."""
    if name.startswith(f"{BY_T}/"):
        return f"flow-matching loss, t in {name.removeprefix(f'{BY_T}/').replace('-', '–')}"
    if METRIC_SUFFIX.search(name):
        metric, _, count = name.rpartition("_")
        return in_words(metric, count.upper())
    return TITLES.get(name, name.replace("_", " "))


class JsonlTracker:
    """Appends one line of JSON to `metrics.jsonl` per logged step, on the main process.

    On resume the rows after `step` are removed, so that no step is logged twice, and so is a
    `partial` row, written where a run ends between two log rows: the resumed run logs all of it,
    unless it has `ended` and only measures what is missing.
    """

    packages: tuple[str, ...] = ()  # that it needs

    @classmethod
    def check(cls, **settings: Any) -> None:
        """Raise UserError where its settings cannot work, before anything is built."""

    def __init__(self, run_dir: Path, step: int, config: dict[str, Any], ended: bool = False) -> None:
        self.path, self.last_step = run_dir / "metrics.jsonl", 0  # of the rows that stay
        if self.path.exists():
            rows = [row for row in read_rows(self.path) if row["step"] <= step and (ended or "partial" not in row)]
            write_text(self.path, "".join(f"{json.dumps(row)}\n" for row in rows))
            self.last_step = max((row["step"] for row in rows), default=0)
        self.file = self.path.open("ab", buffering=0)
        self.unwritten = b""  # while the disk is full

    def log(self, step: int, values: dict[str, float]) -> None:
        """Append a step's values at once; on a full disk they wait in memory for the next row."""
        failed = bool(self.unwritten)
        self.unwritten += f"{json.dumps({'step': step, **values})}\n".encode()
        try:
            while self.unwritten:
                self.unwritten = self.unwritten[self.file.write(self.unwritten) :]
        except OSError as error:
            if not failed:
                log.warning("warning: %s: cannot be written (%s); rows wait in memory", self.path, error.strerror)

    def image(self, step: int, name: str, path: Path) -> None:
        """Log an image file; it is in the run folder already."""

    def finish(self, failed: bool = False) -> None:
        """Close the log of a run that is done, has stopped or `failed`."""
        if self.unwritten:
            log.warning("warning: %s: lacks its last rows, the disk was full", self.path)
        self.file.close()


class WandbTracker(JsonlTracker):
    """Logs to `metrics.jsonl` and, with images, to Weights & Biases.

    mode: "online", "offline", "disabled" (metrics.jsonl alone); None takes that of WANDB_MODE or of
    W&B's own settings, or else online. A run folder has one id, so that a resumed run, with or
    without a network, is one run on W&B. Without a network the run is logged offline (`wandb sync`
    uploads it), and no error of W&B stops training: it is reported once and metrics.jsonl
    continues.
    """

    packages = ("wandb",)

    @classmethod
    def check(cls, mode: Mode | None = None, **_: Any) -> None:
        """Raise UserError where W&B would ask for a login: nobody may be there to answer."""
        if (mode or configured_mode()) != "online":
            return
        import wandb

        try:
            problem = "" if wandb.login(prompt=False, verify=False) else "no login of W&B on this machine"
        except Exception as error:  # W&B's errors have no common base
            problem = first_line(error)
        require(not problem, f"tracker=wandb: {problem}; run wandb login, or give tracker.mode=offline")

    def __init__(
        self,
        run_dir: Path,
        step: int,
        config: dict[str, Any],
        ended: bool = False,
        project: str = "ddt",
        entity: str | None = None,
        tags: Sequence[str] = (),
        mode: Mode | None = None,
        init_timeout: int = 60,
    ) -> None:
        super().__init__(run_dir, step, config, ended)
        import wandb

        self.wandb = wandb
        self.run: Any = None
        chosen = mode or configured_mode()
        if chosen == "disabled":
            return
        id_file = run_dir / "wandb_id"
        if not id_file.exists():
            write_text(id_file, secrets.token_hex(4))
        arguments: dict[str, Any] = {
            "project": project,
            "entity": entity,
            "tags": list(tags),
            "name": config["name"],
            "group": config["name"].rpartition("/")[0] or None,  # of a sweep
            "id": id_file.read_text(),
            "resume": "allow",
            "dir": str(run_dir),
            "config": config,
        }
        settings = wandb.Settings(init_timeout=init_timeout, silent=True)
        try:
            self.run = wandb.init(mode=chosen, settings=settings, **arguments)
        except Exception as error:  # W&B's errors have no common base; none may stop training
            log.warning("W&B cannot be reached (%s); logging offline under %s", first_line(error), run_dir / "wandb")
            wandb.teardown()  # its service may hold the id for the failed attempt
            try:
                self.run = wandb.init(mode="offline", settings=settings, **arguments)
            except Exception as second:  # as above
                log.warning("W&B does not start offline either (%s); this run is logged to metrics.jsonl alone", second)
        if self.run is not None:
            self.run.define_metric("*", step_metric="step")  # W&B's own axis cannot go back on resume
            later = f"offline; later: wandb sync {Path(self.run.dir).parent}"
            log.info("W&B: %s", later if self.run.offline else self.run.url)

    def _send(self, values: dict[str, Any]) -> None:
        if self.run is None:
            return
        try:
            self.run.log(values)
        except Exception as error:  # as above
            log.warning("W&B refused a row (%s); from here on this run is logged to metrics.jsonl alone", error)
            self.run = None

    def log(self, step: int, values: dict[str, float]) -> None:
        """Log a step's values to both."""
        super().log(step, values)
        self._send({"step": step, **{dashboard_name(name): value for name, value in values.items()}})

    def image(self, step: int, name: str, path: Path) -> None:
        """Log an image file."""
        self._send({"step": step, f"images/{name}": self.wandb.Image(str(path))})

    def finish(self, failed: bool = False) -> None:
        """Close both; the W&B run is then finished or failed."""
        super().finish()
        if self.run is not None:
            try:
                self.run.finish(exit_code=int(failed))
            except Exception as error:  # as above
                log.warning("W&B did not finish (%s); metrics.jsonl is complete", error)


class TensorBoardTracker(JsonlTracker):
    """Logs to `metrics.jsonl` and, with images, to TensorBoard's files in `tensorboard/` of the run
    folder: `tensorboard --logdir runs` shows all runs. A resumed run hides what it logs again.
    """

    packages = ("tensorboard",)

    def __init__(self, run_dir: Path, step: int, config: dict[str, Any], ended: bool = False) -> None:
        super().__init__(run_dir, step, config, ended)
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=step + 1 if step else None)
        log.info("TensorBoard: tensorboard --logdir %s", run_dir)

    def log(self, step: int, values: dict[str, float]) -> None:
        """Log a step's values to both."""
        super().log(step, values)
        for name, value in values.items():
            self.writer.add_scalar(dashboard_name(name), value, step)

    def image(self, step: int, name: str, path: Path) -> None:
        """Log an image file."""
        with Image.open(path) as picture:
            self.writer.add_image(f"images/{name}", np.asarray(picture.convert("RGB")), step, dataformats="HWC")

    def finish(self, failed: bool = False) -> None:
        """Close both."""
        super().finish()
        self.writer.close()
