"""The settings of the report of a sweep."""

import dataclasses
from pathlib import Path

from ddt.errors import require
from ddt.files import check_writable
from scripts.studies.study import Row, resume_study


@dataclasses.dataclass(frozen=True)
class SweepSettings:
    """See conf/study/sweep.yaml. Raises UserError for wrong values."""

    sweep: list[str] | str
    out: str
    metric: str | None
    x: str

    def __post_init__(self) -> None:
        require(self.x != "seed", "x=seed: the means are over seeds; give another setting, such as model.encoder_depth")
        require(len(self.request["sweep"]) > 0, "sweep=[]: name at least one folder")
        for root in self.request["sweep"]:
            require(
                Path(root).is_dir(),
                f"sweep={root}: no such folder; give the folder of a sweep, such as runs/encoder_depth",
            )
        resume_study(Path(self.out), self.request, "report.json", "report")
        check_writable(Path(self.out))

    @property
    def request(self) -> Row:
        """The settings that the report depends on."""
        sweep = [self.sweep] if isinstance(self.sweep, str) else self.sweep
        return {"sweep": sweep, "metric": self.metric, "x": self.x}
