"""Settings of the app."""

import dataclasses
import re
from pathlib import Path

from ddt.checkpoint.models import check_exist
from ddt.errors import require, require_count
from ddt.precision import Dtype

DEMO = "runs/demo"


@dataclasses.dataclass(frozen=True)
class AppSettings:
    """See conf/app.yaml. Raises UserError for wrong values."""

    ckpt: str | None = None
    weights: str = "ema"
    guide: str | None = None
    autoencoder: str = "checkpoint"
    dtype: Dtype | None = None
    batch_size: int = 64
    max_images: int = 64
    max_steps: int = 1000
    max_queue: int = 16
    host: str = "127.0.0.1"
    port: int = 7860
    root_path: str = ""

    def __post_init__(self) -> None:
        for key in ("batch_size", "max_images", "max_steps", "max_queue"):
            require_count(key, getattr(self, key), 1, 100_000)
        require(self.host != "", "host=: is empty; leave it out for 127.0.0.1, or give 0.0.0.0")
        require(
            re.fullmatch(r"|(/|https?://)\S*[^/\s]", self.root_path) is not None,
            f"root_path={self.root_path}: give the path at which a proxy serves the page, such as /ddt",
        )
        require(1 <= self.port <= 65535, f"port={self.port}: must lie in 1..65535")
        check_exist(self.ckpt, self.guide)
        require(
            self.ckpt is not None or Path(DEMO).exists(),
            f"ckpt: not set, and there is no {DEMO}; run bash scripts/demo.sh first, or give ckpt=RUN_OR_CHECKPOINT",
        )
