"""Time every part of the project beside a plain eager implementation of the same, in one run.

python scripts/benchmark/__main__.py [model=b_8en4de] [parts=[training,sampling]] [dtype=bf16]
[compile=true] [out=FOLDER]
"""

import datetime
import functools
import importlib.metadata
import logging
import os
import platform
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler tells each start and stop; read when it is loaded

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from torch.multiprocessing.spawn import ProcessException

from benchmarks.candidates import candidates
from ddt.cli import arguments_for, checked, entry_point
from ddt.config import build
from ddt.distributed.compile import compiles
from ddt.distributed.prepare import make_accelerator
from ddt.errors import UserError, first_line, require
from ddt.files import check_writable, write_json
from scripts.benchmark import parts as measured_parts
from scripts.benchmark.growth import growth
from scripts.benchmark.parts import OurTraining, PlainSteps, Setup, check_model, random_target
from scripts.benchmark.report import draw, markdown
from scripts.benchmark.timing import Case, Row, matmul_rate, measure

log = logging.getLogger(__name__)
CASES: dict[str, Callable[[Setup], Iterator[Case]]] = {
    "forward": measured_parts.forward,
    "sampling": measured_parts.sampling,
    "training": measured_parts.training,
    "activations": measured_parts.activations,
    "target": measured_parts.target,
    "autoencoder": measured_parts.autoencoder,
    "loader": measured_parts.loader,
    "average": measured_parts.average,
    "optimizer": measured_parts.optimizer,
    "checkpoint": measured_parts.checkpoint,
    "candidates": candidates,
}
PARTS = (*CASES, "growth")
MOST_MEMORY = 0.45  # of a batch that is the last one tried: twice as large it would not leave enough for compiled ways
PRODUCT = {"cuda": 8192, "cpu": 2048}  # side of the matrices whose product's rate the others are held against


def machine(device: torch.device) -> dict[str, Any]:
    """Return what the seconds depend on beside the settings."""
    info = Path("/proc/cpuinfo")
    told = dict(line.split(":", 1) for line in info.read_text().splitlines() if ":" in line) if info.is_file() else {}
    told = {key.strip(): value.strip() for key, value in told.items()}
    processor = told.get("model name", platform.machine())
    wide = {"avx512f", "avx512_bf16", "amx_bf16"} & set(told.get("flags", "").split())
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else processor,
        "gpus": torch.cuda.device_count(), "processor": processor, "cores": os.cpu_count(),
        "instructions": sorted(wide), "threads": torch.get_num_threads(), "torch": torch.__version__,
        "cuda": torch.version.cuda, "python": platform.python_version(),
        "timm": importlib.metadata.version("timm"), "load": os.getloadavg()[0],
    }  # fmt: skip


def largest_batch(setup: Setup) -> int:
    """Return the largest power of two whose training step fits into the GPU's memory, plain and
    ours side by side, and leaves some of it.
    """
    fits, n = 0, 4
    while True:
        try:
            target = random_target(setup)
            ours = OurTraining(setup, setup.network(), target)
            plain = PlainSteps(setup, ours, compiled=False)
            batch = setup.batch(n)
            ours.step(batch)
            plain.step(batch, plain.eager)
        except torch.OutOfMemoryError:
            require(fits > 0, f"batch_size=max: not even {n} images fit into the memory; choose a smaller model=")
            return fits
        finally:
            ours = plain = batch = None  # type: ignore[assignment]
            torch.cuda.empty_cache()
        _, total = torch.cuda.mem_get_info(setup.device)
        if torch.cuda.max_memory_allocated(setup.device) > MOST_MEMORY * total:
            return n
        fits, n = n, 2 * n


def check(
    parts: list[str], batch_size: int | Literal["max"], sampling_batch_sizes: list[int], latent_size: int,
    num_steps: int, ratios: list[float], align_depth: int, records: int, repeats: int, minutes: float | None,
    threads: int | None, dtype: Literal["bf16", "fp32"] | None, compile: bool | None, profile: bool, out: str | None,
) -> None:  # fmt: skip
    """Refuse settings that cannot be, and folders that would be written over."""
    unknown = [part for part in parts if part not in PARTS]
    require(not unknown, f"parts={','.join(unknown)}: no such part; choose from {', '.join(PARTS)}")
    require(len(parts) > 0, f"parts=[]: names no part; choose from {', '.join(PARTS)}")
    positive = {
        "num_steps": num_steps, "align_depth": align_depth, "records": records, "repeats": repeats,
        "latent_size": latent_size,
    }  # fmt: skip
    for key, value in positive.items():
        require(value >= 1, f"{key}={value}: must be at least 1")
    require(threads is None or threads >= 1, f"threads={threads}: must be at least 1, or null for torch's choice")
    require(minutes is None or minutes > 0, f"minutes={minutes}: must be above 0, or null for no limit")
    require(latent_size % 4 == 0, f"latent_size={latent_size}: must be a multiple of 4, so that half of it has patches")
    require(batch_size == "max" or batch_size >= 1, f"batch_size={batch_size}: must be at least 1, or max on a GPU")
    require(
        batch_size != "max" or torch.cuda.is_available(), "batch_size=max: asks for a GPU's memory; give a number here"
    )
    require(
        len(sampling_batch_sizes) > 0 and min(sampling_batch_sizes) >= 1,
        f"sampling_batch_sizes={sampling_batch_sizes}: give numbers of at least 1",
    )
    require(
        len(ratios) > 0 and ratios[0] == 0, f"ratios={ratios}: must begin with 0, which the others are compared with"
    )
    for ratio in ratios:
        require(
            0 <= ratio < 1 and round(1 / (1 - ratio)) <= num_steps,
            f"ratios={ratios}: each is a share of the num_steps={num_steps} steps without encoder, such as 0.8",
        )
    require(not profile or out is not None, "profile=true: writes tables; give out=FOLDER")
    if out is not None:
        require(not Path(out).is_file(), f"out={out}: is a file; give a folder")
        check_writable(Path(out))
        file = Path(out) / "benchmark.json"
        require(not file.exists(), f"out={out}: holds a benchmark already, which is not written over; choose another")


def run_part(
    part: str, setup: Setup, rate: float, repeats: int, deadline: float, profiles: Path | None
) -> Iterator[Row]:
    """Yield the rows of a part. What fails costs the rest of the part alone."""
    try:
        if part == "growth":
            yield from growth(setup, rate, repeats)
            return
        for case in CASES[part](setup):
            if time.monotonic() > deadline:
                yield {"part": part, "case": case.name, "not_run": f"{case.name} and what follows: out of time"}
                return
            yield from measure(case, setup.device, rate, repeats, deadline, profiles)
    except ImportError as error:
        yield {"part": part, "not_run": first_line(error)}
    except (UserError, RuntimeError, ProcessException) as error:  # memory, kernel, compiler: the other parts go on
        log.warning("%s", first_line(error))
        yield {"part": part, "not_run": first_line(error), "failed": True}


def said(row: Row) -> str:
    """Return what is printed of a row as soon as it is there."""
    if "not_run" in row:
        return f"{row['part']}: not run: {row['not_run']}"
    share = "" if row["share_of_matmul"] is None else f", {row['share_of_matmul']:.0%} of a product's rate"
    if row["part"] == "growth":
        return f"growth, {row['case']} {row['value']:g}: {row['images_per_second']:.3g} images/s{share}"
    faster = "" if row["way"] == row["base"] else f", × {row['ratio']:.2f} of {row['base']}"
    return f"{row['part']}, {row['case']}: {row['way']}: {1000 * row['seconds']:.4g} ms{faster}{share}"


def write(found: dict[str, Any], out: Path) -> None:
    """Write benchmark.json, benchmark.md and benchmark.png."""
    write_json(out / "benchmark.json", found)
    (out / "benchmark.md").write_text(markdown(found))
    draw(found, out / "benchmark.png")


def setup_of(make_model: Callable[..., Any], settings: dict[str, Any], folder: Path) -> Setup:
    """Return what is measured, on this machine's device."""
    if settings["threads"] is not None:
        torch.set_num_threads(settings["threads"])
    cuda = torch.cuda.is_available()
    dtype = settings["dtype"] or ("bf16" if cuda else "fp32")
    accelerator = make_accelerator(dtype)
    names = ("latent_size", "batch_size", "sampling_batch_sizes", "num_steps", "ratios", "align_depth", "records")
    setup = Setup(
        make_model=make_model, device=accelerator.device, dtype=dtype, folder=folder, accelerator=accelerator,
        compile=compiles("compile", settings["compile"], cuda, accelerator.device),
        **{name: settings[name] for name in names},
    )  # fmt: skip
    if setup.batch_size == "max":
        setup.batch_size = largest_batch(setup)
        log.info("batch_size=max: %d", setup.batch_size)
    return setup


def benchmark(make_model: Callable[..., Any], model: str, settings: dict[str, Any], folder: Path) -> bool:
    """Measure, print, and write benchmark.json, benchmark.md and benchmark.png where asked to; tell
    whether all ran.

    folder: for what is written for a while.
    """
    started, out = time.monotonic(), None if settings["out"] is None else Path(settings["out"])
    deadline = started + 60 * (settings["minutes"] or float("inf"))
    profiles = out / "profiles" if out is not None and settings["profile"] else None
    for made in filter(None, (out, profiles)):
        made.mkdir(parents=True, exist_ok=True)
    setup = setup_of(make_model, settings, folder)
    about, size = machine(setup.device), PRODUCT[setup.device.type]
    product = functools.partial(
        matmul_rate, setup.device, torch.bfloat16 if setup.dtype == "bf16" else torch.float32, size
    )
    rate = product()
    log.info("%s, %s: a product of matrices runs at %.3g TFLOP/s", about["device"], setup.dtype, rate / 1e12)
    used = {"model": model, "dtype": setup.dtype, "compile": setup.compile, "batch_size": setup.batch_size}
    found: dict[str, Any] = {
        "kind": "benchmark", "rows": [],
        "matmul": {"flops_per_second": rate, "dtype": setup.dtype, "size": size},
        "machine": about, "settings": {**settings, **used},
        "command": shlex.join(["python", *sys.argv]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }  # fmt: skip
    rows: list[Row] = found["rows"]
    for part in settings["parts"]:
        late = time.monotonic() > deadline
        over: list[Row] = [{"part": part, "not_run": "out of time"}]
        for row in over if late else run_part(part, setup, rate, settings["repeats"], deadline, profiles):
            log.info("%s", said(row))
            rows.append(row)
            if out is not None:  # whoever ends this keeps what there is
                write_json(out / "benchmark.json", found)
        found["minutes"] = (time.monotonic() - started) / 60
        if out is not None:
            write(found, out)
    found["matmul"]["at_the_end"] = product()  # whether the machine is still as fast
    if out is not None:
        write(found, out)
        log.info("written: %s", out / "benchmark.md")
    return not any("failed" in row for row in rows)


@entry_point("benchmark")
def main(cfg: DictConfig) -> None:
    """Check, measure; what failed ends it with status 1."""
    config = checked(cfg)
    settings = arguments_for(check, config)
    check(**settings)
    make_model, name = build(config["model"]), HydraConfig.get().runtime.choices.model
    with torch.device("meta"):
        check_model(make_model(in_channels=1, num_classes=1), settings["align_depth"])
    with tempfile.TemporaryDirectory(prefix="benchmark_") as folder:
        sound = benchmark(make_model, name, settings, Path(folder))
    require(sound, "parts failed: see the lines above")


if __name__ == "__main__":
    main()
