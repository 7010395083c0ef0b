"""The settings of the benchmark, the count of kernels, simulated ranks and the GPU check."""

import dataclasses
import math
from pathlib import Path
from typing import Literal

from ddt.config import Choice
from ddt.errors import MAX_BATCH, require, require_count
from ddt.files import check_new, check_writable
from ddt.flow import MAX_STEPS
from ddt.precision import Dtype


@dataclasses.dataclass(frozen=True)
class BenchmarkSettings:
    """See conf/benchmark.yaml. Raises UserError for wrong values and results in the way."""

    model: Choice
    choices: dict[str, str]
    parts: list[str]
    latent_size: int
    batch_size: int | Literal["max"]
    sampling_batch_sizes: list[int]
    num_steps: int
    ratios: list[float]
    align_depth: int
    records: int
    dtype: Dtype | None
    compile: bool | None
    threads: int | None
    repeats: int
    minutes: float | None
    profile: bool
    out: str | None

    def __post_init__(self) -> None:
        for key, most in (
            ("num_steps", MAX_STEPS), ("align_depth", 1000), ("records", 10_000_000), ("repeats", 1000),
            ("latent_size", 4096),
        ):  # fmt: skip
            require_count(key, getattr(self, key), 1, most)
        threads, minutes, batch_size, sizes = self.threads, self.minutes, self.batch_size, self.sampling_batch_sizes
        require_count("threads", threads, 1, 1024, ", or null for torch's choice")
        require(minutes is None or minutes > 0, f"minutes={minutes}: must be above 0, or null for no limit")
        require(self.latent_size % 2 == 0, f"latent_size={self.latent_size}: must be a multiple of 2")
        if batch_size == "max":
            import torch

            require(torch.cuda.is_available(), "batch_size=max: asks for a GPU's memory; give a number here")
        else:
            require_count("batch_size", batch_size, 1, MAX_BATCH, ", or max on a GPU")
        require(
            min(sizes, default=0) >= 1 and max(sizes) <= MAX_BATCH,
            f"sampling_batch_sizes={sizes}: give numbers of 1 to {MAX_BATCH:,}",
        )
        ratios = f"ratios={self.ratios}"
        require(self.ratios[:1] == [0], f"{ratios}: must begin with 0, which the others are compared with")
        for ratio in self.ratios:
            require(
                0 <= ratio < 1 and round(1 / (1 - ratio)) <= self.num_steps,
                f"{ratios}: each is a share of the num_steps={self.num_steps} steps without encoder, such as 0.8",
            )
        require(not self.profile or self.out is not None, "profile=true: writes tables; give out=FOLDER")
        if self.out is not None:
            check_new(Path(self.out))
        self.check_parts()

    def check_parts(self) -> None:
        """Raise UserError for unknown parts; last, for the parts import torch."""
        from scripts.benchmark.run import PARTS  # which says what torch reads when it is loaded

        unknown = [part for part in self.parts if part not in PARTS]
        require(not unknown, f"parts={','.join(unknown)}: no such part; choose from {', '.join(PARTS)}")
        require(len(self.parts) > 0, f"parts=[]: names no part; choose from {', '.join(PARTS)}")


@dataclasses.dataclass(frozen=True)
class KernelSettings:
    """See conf/kernels.yaml. Raises UserError for wrong values and results in the way."""

    model: Choice
    choices: dict[str, str]
    channels: int
    latent_size: int
    batch_size: int
    sampling_batch_size: int
    dtype: Dtype
    assemble: bool
    matmul_tflops: float
    product_tflops: float
    copy_tbs: float
    out: str | None

    def __post_init__(self) -> None:
        for key in ("channels", "latent_size", "batch_size", "sampling_batch_size"):
            require_count(key, getattr(self, key), 1, 65_536)
        for key in ("matmul_tflops", "product_tflops", "copy_tbs"):
            require(getattr(self, key) > 0, f"{key}={getattr(self, key)}: must be above 0")
        if self.out is not None:
            check_new(Path(self.out))


@dataclasses.dataclass(frozen=True)
class RanksSettings:
    """See conf/ranks.yaml. Raises UserError for wrong values and results in the way."""

    model: Choice
    choices: dict[str, str]
    ranks: list[int]
    images: int
    channels: int
    latent_size: int
    tflops: float
    node: int
    node_gbs: float
    network_gbs: float
    out: str | None

    def __post_init__(self) -> None:
        for key in ("images", "channels", "latent_size", "node"):
            require_count(key, getattr(self, key), 1, 65_536)
        require(len(self.ranks) > 0, "ranks=[]: names no number of processes; give [8,64,1024]")
        for number in self.ranks:
            require_count("ranks", number, 2, 65_536)
        for key in ("tflops", "node_gbs", "network_gbs"):
            require(0 < getattr(self, key) < math.inf, f"{key}={getattr(self, key)}: must be above 0")
        if self.out is not None:
            require(Path(self.out).suffix == ".json", f"out={self.out}: give a .json file")
            check_new(Path(self.out))


@dataclasses.dataclass(frozen=True)
class GpuCheckSettings:
    """See conf/gpu_check.yaml. Raises UserError for wrong values and results in the way."""

    out: str
    minutes: float
    checks: list[str] | None
    device: Literal["cuda", "cpu"]
    size: Literal["full", "tiny"]

    def __post_init__(self) -> None:
        require(self.minutes > 0, f"minutes={self.minutes:g}: must be above 0")
        out = Path(self.out)
        require(not out.exists() or out.is_dir(), f"out={out}: is a file; give a folder")
        check_writable(out)
        require(
            (out / "gpu_check.json").is_file() or not (out / "gpu_check.md").exists(),
            f"out={out}: holds gpu_check.md, but no gpu_check.json; choose another folder",
        )
        self.check_device()
        require(len(self.chosen) > 0, f"out={out}: holds the results of all these checks; choose another folder")

    def check_device(self) -> None:
        """Raise UserError for unknown checks and a missing GPU; last, for both import torch."""
        import torch

        from scripts.benchmark.all_checks import CHECKS

        for name in self.checks or ():
            require(name in CHECKS, f"checks={name}: no such check; choose from {', '.join(CHECKS)}")
        require(
            self.device == "cpu" or torch.cuda.is_available(),
            "device=cuda: torch finds no GPU here; give device=cpu size=tiny to try the check itself",
        )

    @property
    def chosen(self) -> list[str]:
        """The checks to run: those that OUT has no whole result of."""
        from scripts.benchmark.all_checks import CHECKS, finished, read_results

        done = finished(read_results(Path(self.out)))
        return [name for name in CHECKS if name in (self.checks or CHECKS) and name not in done]
