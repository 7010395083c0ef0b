"""Run a benchmark: settings, rows, and the report as JSON, Markdown and a figure."""

import datetime
import importlib.metadata
import logging
import os
import platform
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler logs each start and stop; read when it is loaded

import torch

from ddt.config import Choice
from ddt.distributed.compile import compiles
from ddt.distributed.prepare import make_accelerator
from ddt.errors import UserError, first_line, require
from ddt.figures import BLUE, GREY, WIDTH, label_bars, pyplot, save_figure, share_legend
from ddt.files import write_json, write_text
from ddt.precision import choose_dtype, torch_dtype
from ddt.receipts import command_line
from ddt.tables import markdown_table
from scripts.benchmark.parts import PARTS, OurTraining, Setup, check_model, plain_training, random_target
from scripts.benchmark.settings import BenchmarkSettings
from scripts.benchmark.timing import Row, matmul_rate, measure

log = logging.getLogger(__name__)
MOST_MEMORY = 0.45  # above this share no larger batch is tried: twice as large leaves too little for compiled ways
MATMUL_SIZE = {"cuda": 8192, "cpu": 2048}  # side of the matrices whose product's rate is the yardstick
LONGEST = 4.0  # times as fast, at which a bar of the figure ends
HEADS = (
    "case", "way", "ms", "× base", "bound", "× first", "bound of that", "images/s", "of a product's rate", "peak MiB",
    "error",
)  # fmt: skip


def machine(device: torch.device) -> dict[str, Any]:
    """Return processor, GPUs, threads, versions and load."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    cpu = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    processor = cpu.get("model name", platform.machine())
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else processor,
        "gpus": torch.cuda.device_count(), "processor": processor, "cores": os.cpu_count(),
        "instructions": sorted({"avx512f", "avx512_bf16", "amx_bf16"} & set(cpu.get("flags", "").split())),
        "threads": torch.get_num_threads(), "torch": torch.__version__, "cuda": torch.version.cuda,
        "python": platform.python_version(), "timm": importlib.metadata.version("timm"), "load": os.getloadavg()[0],
    }  # fmt: skip


def largest_batch(setup: Setup) -> int:
    """Return the largest power of two whose training step, plain beside ours, fits the GPU."""
    fits, n = 0, 4
    while True:
        try:
            ours = OurTraining(setup, setup.network(), random_target(setup))
            plain = plain_training(setup, ours)
            batch = setup.batch(n)
            ours.step(batch)
            plain.step(batch)
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


def set_up(settings: BenchmarkSettings, folder: Path) -> Setup:
    """Return the set-up on this machine's device. folder: for temporary files."""
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    cuda = torch.cuda.is_available()
    accelerator = make_accelerator()
    dtype = choose_dtype(settings.dtype, accelerator.device)

    def make_model(**changes: Any) -> Any:
        return Choice(settings.model.target, {**settings.model.settings, **changes}).build()

    sizes = ("latent_size", "batch_size", "sampling_batch_sizes", "num_steps", "ratios", "align_depth", "records")
    setup = Setup(
        make_model=make_model, device=accelerator.device, dtype=dtype, folder=folder, accelerator=accelerator,
        compile=compiles("compile", settings.compile, cuda, accelerator.device),
        **{name: getattr(settings, name) for name in sizes},
    )  # fmt: skip
    with torch.device("meta"):
        check_model(setup.make_model(in_channels=1, num_classes=1), setup.align_depth)
    if settings.batch_size == "max":
        setup.batch_size = largest_batch(setup)
        log.info("batch_size=max: %d", setup.batch_size)
    return setup


def run_part(
    part: str, setup: Setup, rate: float, repeats: int, deadline: float, profiles: Path | None
) -> Iterator[Row]:
    """Yield the rows of a part; an error ends this part alone."""
    try:
        for case in PARTS[part](setup):
            if time.monotonic() > deadline:
                yield {"part": part, "case": case.name, "not_run": f"{case.name} and what follows: out of time"}
                return
            yield from measure(case, setup.device, rate, repeats, deadline, profiles)
    except ImportError as error:
        yield {"part": part, "not_run": first_line(error)}
    except (UserError, RuntimeError) as error:  # memory, kernel, compiler: the other parts run
        log.warning("%s", first_line(error))
        yield {"part": part, "not_run": first_line(error), "failed": True}


def row_line(row: Row) -> str:
    """Return the log line of a row."""
    if "not_run" in row:
        return f"{row['part']}: not run: {row['not_run']}"
    share = "" if row["share_of_matmul"] is None else f", {row['share_of_matmul']:.0%} of a product's rate"
    faster = "" if row["way"] == row["base"] else f", × {row['ratio']:.2f} of {row['base']}"
    return f"{row['part']}, {row['case']}: {row['way']}: {1000 * row['seconds']:.4g} ms{faster}{share}"


def benchmark(settings: BenchmarkSettings) -> None:
    """Measure and write benchmark.json, .md and .png; raise UserError last if a part failed."""
    started, out = time.monotonic(), None if settings.out is None else Path(settings.out)
    deadline = started + 60 * (settings.minutes or float("inf"))
    profiles = out / "profiles" if out is not None and settings.profile else None
    with tempfile.TemporaryDirectory(prefix="benchmark_") as folder:
        setup = set_up(settings, Path(folder))
        for output in filter(None, (out, profiles)):
            output.mkdir(parents=True, exist_ok=True)
        about, size = machine(setup.device), MATMUL_SIZE[setup.device.type]
        matmul = setup.device, torch_dtype(setup.dtype), size
        rate = matmul_rate(*matmul)
        log.info("%s, %s: a product of matrices runs at %.3g TFLOP/s", about["device"], setup.dtype, rate / 1e12)
        resolved = {"model": settings.choices["model"], "batch_size": setup.batch_size, "dtype": setup.dtype,
                    "compile": setup.compile}  # fmt: skip
        rows: list[Row] = []
        result: dict[str, Any] = {
            "kind": "benchmark", "rows": rows,
            "matmul": {"flops_per_second": rate, "dtype": setup.dtype, "size": size}, "machine": about,
            "settings": {**{key: value for key, value in vars(settings).items() if key != "choices"}, **resolved},
            "command": command_line(), "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        }  # fmt: skip
        for part in settings.parts:
            late: list[Row] = [{"part": part, "not_run": "out of time"}]
            in_time = time.monotonic() <= deadline
            for row in run_part(part, setup, rate, settings.repeats, deadline, profiles) if in_time else late:
                log.info("%s", row_line(row))
                rows.append(row)
                if out is not None:  # a kill keeps the rows so far
                    write_json(out / "benchmark.json", result)
        result["minutes"] = (time.monotonic() - started) / 60
        result["matmul"]["at_the_end"] = matmul_rate(*matmul)  # whether the machine is still as fast
    if out is not None:
        write_json(out / "benchmark.json", result)
        write_text(out / "benchmark.md", report(result))
        draw(rows, out / "benchmark.png")
        log.info("written: %s", out / "benchmark.md")
    require(not any("failed" in row for row in rows), "parts failed: see the lines above")


# --- the report


def number(value: float | None, form: str) -> str:
    """Return a number as text, – for None."""
    return "–" if value is None else format(value, form)


def cells(row: Row) -> list[str]:
    """Return a measured row's cells under `HEADS`."""
    others = row["base"] != row["first"]
    return [
        row["case"], row["way"], number(1000 * row["seconds"], ".3g" if row["seconds"] < 1 else ".0f"),
        "1" if row["way"] == row["base"] else number(row["ratio"], ".2f"), number(row["bound"], ".2f"),
        number(row["ratio_to_first"], ".2f") if others else "", number(row["bound_to_first"], ".2f") if others else "",
        number(row["images_per_second"] or None, ".3g"), number(row["share_of_matmul"], ".0%"),
        number(row["peak_bytes"] / 2**20, ".0f"), number(row["error"], ".0e"),
    ]  # fmt: skip


def report(result: dict[str, Any]) -> str:
    """Return benchmark.md: origin, a table for each part, and what was not run and why."""
    about, matmul = result["machine"], result["matmul"]
    parts = [
        f"# Benchmark: {result['settings']['model']}, {result['settings']['dtype']}",
        f"`{result['command']}`, {result['date'][:10]}, {about['device']}, {about['threads']} threads, torch "
        f"{about['torch']}, Python {about['python']}.",
        f"A product of two square {matmul['dtype']} matrices of {matmul['size']} ran at "
        f"{matmul['flops_per_second'] / 1e12:.3g} TFLOP/s. FLOPs are counted (`ddt/model/cost.py`), not measured. "
        "Medians of runs in turns; × base: how many times as fast as the plain way of doing the same, whose own line "
        "says 1; × first: as the first line of the case, where that does more; bound: the ratio of the counts; error: "
        "relative difference from the plain way.",
    ]
    measured = [row for row in result["rows"] if "seconds" in row]
    for part in dict.fromkeys(row["part"] for row in measured):
        parts += [
            f"## {part}",
            markdown_table(HEADS, [cells(row) for row in measured if row["part"] == part], "ll" + "r" * 9),
        ]
    not_run = [f"- {row['part']}: {row['not_run']}" for row in result["rows"] if "not_run" in row]
    return "\n\n".join([*parts, *(["## Not run", "\n".join(not_run)] if not_run else [])]) + "\n"


def draw(rows: list[Row], path: Path) -> None:
    """Write a figure: how many times as fast each way is as its plain one, a panel per part.

    Each bar carries its number; one longer than `LONGEST` is cut there, with an arrow before it.
    """
    rows = [row for row in rows if "ratio" in row and row["way"] != row["base"]]
    if not rows:
        return
    parts = {part: [row for row in rows if row["part"] == part] for part in dict.fromkeys(row["part"] for row in rows)}
    heights = [len(group) + 1 for group in parts.values()]  # of the panels, in bars: the title takes one
    figure, panels = pyplot().subplots(
        len(parts), sharex=True, squeeze=False, height_ratios=heights, figsize=(WIDTH, 0.21 * sum(heights) + 1.1)
    )
    for axes, (part, group) in zip(panels[:, 0], parts.items(), strict=True):
        for label, color, chosen in (
            ("this repository", BLUE, [row for row in group if row["way"].startswith("ours")]),
            ("plain, done otherwise", GREY, [row for row in group if not row["way"].startswith("ours")]),
        ):
            if chosen:
                lengths = [min(row["ratio"], LONGEST) for row in chosen]
                bars = axes.barh(list(map(group.index, chosen)), lengths, color=color, label=label)
                label_bars(axes, bars, list(map(bar_text, chosen)), [min(row["bound"] or 0, LONGEST) for row in chosen])
        bounds = [(row["bound"], k) for k, row in enumerate(group) if row["bound"] is not None]
        if bounds:
            axes.plot(*zip(*bounds, strict=True), "|", color="black", markersize=11, label="counted ratio")
        axes.axvline(1, color="black", linewidth=0.8)
        axes.set_yticks(range(len(group)), [f"{row['case']}: {row['way']}" for row in group])
        axes.set_title({"ema": "EMA"}.get(part, part), loc="left")
        axes.set_ylim(len(group) - 0.4, -0.6)  # the first above
        axes.grid(axis="y", visible=False)
    axes.set(xlim=(0, 1.25 * min(LONGEST, max(row["ratio"] for row in rows))),
             xlabel="times as fast as the plain way of doing the same (the line at 1)")  # fmt: skip
    share_legend(figure)
    save_figure(figure, path)


def bar_text(row: Row) -> str:
    """Return the number at the end of a bar, and of which way where that is not the first."""
    arrow = "→ " if row["ratio"] > LONGEST else ""
    return f"{arrow}{row['ratio']:.2f}" + ("" if row["base"] == row["first"] else f" × “{row['base']}”")
