"""How the cost of a training step grows with tokens, batch, depth and processes."""

import dataclasses
import functools
import gc
import json
import os
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ddt.distributed.compile import compile_blocks
from ddt.distributed.launch import launch
from ddt.distributed.prepare import make_accelerator
from ddt.training.throughput import training_flops
from scripts.benchmark.parts import CHANNELS, OurTraining, Setup
from scripts.benchmark.timing import Row, seconds_of

ENCODER_SHARE = 2 / 3  # of the blocks, where the depth varies


def timed(setup: Setup, repeats: int) -> dict[str, float]:
    """Return the seconds of a training step, the median, and its FLOPs on this process."""
    ours, batch = OurTraining(setup, setup.network(), None), setup.batch(setup.batch_size)
    if setup.compile:
        compile_blocks(ours.objective.denoiser, dynamic=False)
    ours.step(batch)
    seconds = [seconds_of(functools.partial(ours.step, batch), setup.device) for _ in range(repeats)]
    shape = (CHANNELS, setup.latent_size, setup.latent_size)
    return {"seconds": statistics.median(seconds), "flops": setup.batch_size * training_flops(ours.objective, shape)}


def on_this_process(fields: dict[str, Any], repeats: int, file: str) -> None:
    """Time the step together with the other processes; the first one writes what it found."""
    accelerator = make_accelerator(fields["dtype"])
    found = timed(Setup(**fields, device=accelerator.device, accelerator=accelerator), repeats)
    if accelerator.is_main_process:
        Path(file).write_text(json.dumps(found))


def together(setup: Setup, processes: int, repeats: int) -> dict[str, float]:
    """Return `timed` of each of several processes that train together."""
    gc.collect()
    torch.cuda.empty_cache()  # for the other process on this GPU
    names = [field.name for field in dataclasses.fields(setup) if field.name not in ("device", "accelerator")]
    file = setup.folder / f"processes_{processes}.json"
    launch(on_this_process, processes, {name: getattr(setup, name) for name in names}, repeats, str(file))
    return json.loads(file.read_text())


def points(setup: Setup) -> Iterator[tuple[str, float, Setup]]:
    """Yield what grows, how far, and what is measured there."""
    n, depth = setup.batch_size, len(setup.network().encoder.blocks) + len(setup.network().decoder.blocks)
    change = functools.partial(dataclasses.replace, setup)
    for size in (setup.latent_size // 2, setup.latent_size, 2 * setup.latent_size):
        yield "tokens", (size // 2) ** 2, change(latent_size=size, batch_size=max(1, n // 4))
    for batch_size in sorted({max(1, n // 4), max(1, n // 2), n, 2 * n}):
        yield "batch", batch_size, change(batch_size=batch_size)
    for blocks in (max(2, depth // 2), depth, 2 * depth):
        sizes = {"depth": blocks, "encoder_depth": max(1, round(ENCODER_SHARE * blocks))}
        yield "depth", blocks, change(make_model=functools.partial(setup.make_model, **sizes))


def growth(setup: Setup, rate: float, repeats: int) -> Iterator[Row]:
    """Yield a row for each size: seconds, FLOPs and images/s of a step, and its share of a matrix
    product's rate.
    """

    def row(what: str, value: float, images: int, found: dict[str, float], processes: int = 1) -> Row:
        seconds, flops = found["seconds"], found["flops"]
        each = processes if setup.device.type == "cpu" else 1  # they share a CPU, whose rate this is
        return {
            "part": "growth", "case": what, "value": value, "images": images, "seconds": seconds, "flops": flops,
            "images_per_second": images / seconds, "share_of_matmul": each * flops / seconds / rate,
        }  # fmt: skip

    for what, value, there in points(setup):
        try:
            yield row(what, value, there.batch_size, timed(there, repeats))
        except torch.OutOfMemoryError:
            yield {"part": "growth", "case": what, "value": value, "not_run": "the memory is too small"}
    most = torch.cuda.device_count() if setup.device.type == "cuda" else os.cpu_count() or 1
    for processes in (count for count in (1, 2, 4, 8) if count <= most):
        found = together(setup, processes, repeats)
        yield row("processes", processes, processes * setup.batch_size, found, processes)
