"""The record of a run: `metrics.jsonl` in its folder is the truth, Weights & Biases a sink."""

import json
import logging
import secrets
from pathlib import Path
from typing import Any, Literal

from ddt.errors import first_line, require

log = logging.getLogger(__name__)


def read_rows(path: Path, key: str = "step") -> list[dict[str, Any]]:
    """Return the rows of a file with a JSON object a line, such as `metrics.jsonl`; each has a
    `key`. A last line that a kill cut short is left out with a warning.

    Raises UserError naming any other line that is none.
    """
    lines = path.read_bytes().splitlines()
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except ValueError as error:
            require(number == len(lines), f"{path}: line {number} is damaged ({first_line(error)}); remove it")
            log.warning("%s: the last line was cut short and is left out", path)
            continue
        require(isinstance(row, dict) and key in row, f"{path}: line {number} is damaged (no {key}); remove it")
        rows.append(row)
    return rows


class JsonlTracker:
    """Appends one line of JSON to `metrics.jsonl` for every logged step, and shows it to no one
    else.

    Made by the main process alone. On resume the rows after `step` are cut off, so that a step
    never stands twice, and so is a `partial` row, which a run writes when it ends between two log
    rows: the resumed run logs the whole one, unless it has `ended` and only measures what was
    missing.
    """

    def __init__(self, run_dir: Path, step: int, config: dict[str, Any], ended: bool = False) -> None:
        self.path = run_dir / "metrics.jsonl"
        if self.path.exists():
            rows = [row for row in read_rows(self.path) if row["step"] <= step and (ended or "partial" not in row)]
            temporary = self.path.with_suffix(".tmp")
            temporary.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
            temporary.replace(self.path)
        self.file = self.path.open("ab", buffering=0)
        self.unwritten = b""  # of a full disk

    def log(self, step: int, values: dict[str, float]) -> None:
        """Record values of a step, at once; on a full disk they wait in memory for the next row."""
        failed = bool(self.unwritten)
        self.unwritten += f"{json.dumps({'step': step, **values})}\n".encode()
        try:
            while self.unwritten:
                self.unwritten = self.unwritten[self.file.write(self.unwritten) :]
        except OSError as error:
            if not failed:
                log.warning("warning: %s: cannot be written (%s); rows wait in memory", self.path, error.strerror)

    def image(self, step: int, name: str, path: Path) -> None:
        """Take note of a picture: here it is a file of the run folder already."""

    def finish(self, failed: bool = False) -> None:
        """Close the record of a call that is done, or has stopped or `failed`."""
        if self.unwritten:
            log.warning("warning: %s: lacks its last rows, for which there was no room", self.path)
        self.file.close()


class WandbTracker(JsonlTracker):
    """`metrics.jsonl`, and the same values and pictures to Weights & Biases.

    A resumed run keeps its id. Without a network the run is recorded offline (send it later
    by `wandb sync`), and no error of W&B stops training: it is logged once and metrics.jsonl goes
    on.
    """

    def __init__(
        self,
        run_dir: Path,
        step: int,
        config: dict[str, Any],
        ended: bool = False,
        project: str = "ddt",
        mode: Literal["online", "offline"] = "online",
        init_timeout: int = 60,
    ) -> None:
        import wandb

        super().__init__(run_dir, step, config, ended)
        self.wandb = wandb
        id_file = run_dir / "wandb_id"
        if not id_file.exists():
            id_file.write_text(secrets.token_hex(4))
        arguments: dict[str, Any] = {
            "project": project,
            "name": config["name"],
            "group": config["name"].rpartition("/")[0] or None,  # the runs of a sweep stand together
            "id": id_file.read_text(),
            "resume": "allow",
            "dir": str(run_dir),
            "config": config,
        }
        settings = wandb.Settings(init_timeout=init_timeout, silent=True)
        try:
            self.run = wandb.init(mode=mode, settings=settings, **arguments)
        except Exception as error:  # W&B raises a dozen kinds without a common base; none may stop training
            log.warning("W&B cannot be reached (%s); recording offline under %s", error, run_dir / "wandb")
            arguments["id"] = secrets.token_hex(4)  # the failed attempt may hold the old one
            id_file.write_text(arguments["id"])
            try:
                self.run = wandb.init(mode="offline", settings=settings, **arguments)
            except Exception as second:  # as above
                log.warning("W&B does not start offline either (%s); metrics.jsonl alone records this run", second)
                self.run = None
                return
        self.run.define_metric("*", step_metric="step")  # our own step axis survives a resume from an older checkpoint

    def _send(self, values: dict[str, Any]) -> None:
        if self.run is None:
            return
        try:
            self.run.log(values)
        except Exception as error:  # as above
            log.warning("W&B refused a row (%s); from here on metrics.jsonl alone records this run", error)
            self.run = None

    def log(self, step: int, values: dict[str, float]) -> None:
        """Record values of a step in both places."""
        super().log(step, values)
        self._send({"step": step, **values})

    def image(self, step: int, name: str, path: Path) -> None:
        """Send a picture."""
        self._send({"step": step, name: self.wandb.Image(str(path))})

    def finish(self, failed: bool = False) -> None:
        """Close the record and the W&B run, which its page then calls finished or failed."""
        super().finish()
        if self.run is not None:
            try:
                self.run.finish(exit_code=int(failed))
            except Exception as error:  # as above
                log.warning("W&B did not finish (%s); metrics.jsonl is complete", error)
