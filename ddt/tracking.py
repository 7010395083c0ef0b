"""The record of a run: `metrics.jsonl` in its folder is the truth, Weights & Biases a sink."""

import json
import logging
import secrets
from pathlib import Path
from typing import Any, Literal

log = logging.getLogger(__name__)


class JsonlTracker:
    """Appends one line of JSON to `metrics.jsonl` for every logged step, and shows it to no one else.

    Made by the main process alone. On resume the rows after `step` are cut off, so that a step never stands twice.
    """

    def __init__(self, run_dir: Path, step: int, config: dict[str, Any]) -> None:
        self.path = run_dir / "metrics.jsonl"
        if self.path.exists():
            rows = [row for row in self.path.read_text().splitlines() if json.loads(row)["step"] <= step]
            temporary = self.path.with_suffix(".tmp")
            temporary.write_text("".join(f"{row}\n" for row in rows))
            temporary.replace(self.path)
        self.file = self.path.open("a")

    def log(self, step: int, values: dict[str, float]) -> None:
        """Record values of a step, flushed at once."""
        self.file.write(json.dumps({"step": step, **values}) + "\n")
        self.file.flush()

    def image(self, step: int, name: str, path: Path) -> None:
        """Take note of a picture: here it is a file of the run folder already."""

    def finish(self) -> None:
        """Close the record."""
        self.file.close()


class WandbTracker(JsonlTracker):
    """`metrics.jsonl`, and the same values and pictures to Weights & Biases.

    A resumed run goes on under its id. Without a network the run is recorded offline (send it later by
    `wandb sync`), and no error of W&B stops training: it is logged once and metrics.jsonl goes on.
    """

    def __init__(
        self,
        run_dir: Path,
        step: int,
        config: dict[str, Any],
        project: str = "ddt",
        mode: Literal["online", "offline"] = "online",
        init_timeout: int = 60,
    ) -> None:
        import wandb

        super().__init__(run_dir, step, config)
        self.wandb = wandb
        id_file = run_dir / "wandb_id"
        if not id_file.exists():
            id_file.write_text(secrets.token_hex(4))
        arguments: dict[str, Any] = {
            "project": project,
            "name": config["name"],
            "id": id_file.read_text(),
            "resume": "allow",
            "dir": str(run_dir),
            "config": config,
        }
        settings = wandb.Settings(init_timeout=init_timeout, silent=True)
        try:
            self.run = wandb.init(mode=mode, settings=settings, **arguments)
        except wandb.Error as error:
            log.warning("W&B cannot be reached (%s); recording offline under %s", error, run_dir / "wandb")
            self.run = wandb.init(mode="offline", settings=settings, **arguments)
        self.run.define_metric("*", step_metric="step")  # our own step axis survives a resume from an older checkpoint

    def _send(self, values: dict[str, Any]) -> None:
        if self.run is None:
            return
        try:
            self.run.log(values)
        except (self.wandb.Error, OSError) as error:
            log.warning("W&B refused a row (%s); from here on metrics.jsonl alone records this run", error)
            self.run = None

    def log(self, step: int, values: dict[str, float]) -> None:
        """Record values of a step in both places."""
        super().log(step, values)
        self._send({"step": step, **values})

    def image(self, step: int, name: str, path: Path) -> None:
        """Send a picture."""
        self._send({"step": step, name: self.wandb.Image(str(path))})

    def finish(self) -> None:
        """Close the record and the W&B run."""
        super().finish()
        if self.run is not None:
            self.run.finish()
