"""Samples a set on all processes, resumes it after a kill, writes npz, grid and receipt.

Image k depends on (seed k, class k) alone, not on batch size or number of processes.
Shapes: n images, B batch, m images of a batch yet to be sampled, C H W.
"""

import contextlib
import dataclasses
import logging
import shlex
import shutil
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor
from tqdm import tqdm

from ddt.errors import require
from ddt.files import lock_folder, sha256
from ddt.generation.generator import Generator, check_finite
from ddt.generation.image_set import ImageSet
from ddt.generation.part_files import merge_parts, rows, write_part
from ddt.generation.receipt import SHA256
from ddt.generation.set_folder import check_complete, finish_set, open_set, set_request, set_state
from ddt.logs import progress_bar
from ddt.pictures import write_pngs
from ddt.receipts import circumstances

log = logging.getLogger(__name__)


def remaining_batches(total: int, batch_size: int, done: list[int]) -> list[np.ndarray]:
    """Return the batches yet to be sampled, each the numbers of its images.

    Batches are slices of the whole set, so that any number of processes, and a resumed set, pass
    the same batches through the network.
    """
    left = np.setdiff1d(np.arange(total), np.array(done, dtype=np.int64))
    slices = np.split(left, np.searchsorted(left, np.arange(batch_size, total, batch_size)))
    return [numbers for numbers in slices if len(numbers)]


def sample_batches(
    generator: Generator, images: ImageSet, batches: list[np.ndarray], parts: Path, progress: tqdm, share: int
) -> None:
    """Sample batches and write each to `parts`; while one is decoded, the next is sampled.

    progress grows by `share` images for each image of this process.
    """
    stream = torch.cuda.Stream(generator.device) if generator.device.type == "cuda" else None

    def finish(latents: Tensor, ready: torch.cuda.Event | None, numbers: np.ndarray, counts: dict[str, int]) -> None:
        pixels = generator.pixels(latents, ready, stream)
        check_finite(latents, int(numbers[0]))  # the device sync blocks this thread alone
        for run in np.split(np.arange(len(numbers)), np.flatnonzero(np.diff(numbers) != 1) + 1):  # consecutive images
            write_part(parts, int(numbers[run[0]]), pixels[run], counts)
        progress.update(min(share * len(numbers), int(progress.total or 0) - progress.n))

    with ThreadPoolExecutor(max_workers=1) as worker:
        pending: Future[None] | None = None
        for numbers in batches:
            latents, counts = generator.latents(
                [images.classes[k] for k in numbers], [images.seeds[k] for k in numbers]
            )
            ready = torch.cuda.current_stream(generator.device).record_event() if stream else None
            if pending is not None:
                pending.result()
            pending = worker.submit(finish, latents, ready, numbers, counts)
        if pending is not None:
            pending.result()


def sample_rest(
    generator: Generator, images: ImageSet, batch_size: int, done: list[int], parts: Path, accelerator: Accelerator
) -> float:
    """Sample what is not `done` on all processes, with a progress bar; return the seconds of it."""
    first, total, processes = accelerator.is_main_process, len(images.seeds), accelerator.num_processes
    batches, started = remaining_batches(total, batch_size, done), time.perf_counter()
    bar = progress_bar(total=total, initial=len(done), unit="img", desc="sampling", disable=not first)
    with generator.exact(), bar as progress:
        sample_batches(generator, images, batches[accelerator.process_index :: processes], parts, progress, processes)
    accelerator.wait_for_everyone()
    return time.perf_counter() - started


def sample_set(
    generator: Generator,
    images: ImageSet,
    batch_size: int,
    out: Path,
    checkpoint: dict[str, Any],
    accelerator: Accelerator,
    guide: dict[str, Any] | None = None,
    png: int | Literal["all"] = 0,
    command: str | None = None,
    recompute_steps: list[int] | None = None,
) -> None:
    """Sample a set on all processes; write `samples.npz`, `grid.png` and `receipt.json` into `out`.

    `arr_0` is uint8 (n, H, W, C), `arr_1` the classes, int64 (n,). An unfinished set resumes from
    its last complete batch, a complete one is kept, other content of `out` is a UserError. The
    receipt holds the SHA-256 of samples.npz.

    Args:
        checkpoint, guide: for the receipt; `checkpoint["class_names"]` also for the grid.
        png: how many images, or "all", to write to `out/png` too.
        command: for the receipt; None is the running one.
        recompute_steps: of a schedule fitted to these settings before; None fits it here.
    """
    require(batch_size >= 1, f"batch_size={batch_size}: must be at least 1")
    first, total, parts = accelerator.is_main_process, len(images.seeds), out / ".parts"
    request = set_request(generator.settings, images, checkpoint, generator.dtype, generator.compiled, guide)
    if first:
        set_state(out, request)  # raises before anything is written
    message = f"out={out}: another command is sampling this set; wait for it, or choose another out="
    with lock_folder(parts, message) if first else contextlib.nullcontext():
        # decided under the lock: another command may have sampled the set before
        opened = [open_set(generator, request, out, recompute_steps)] if first else [None]
        (plan,) = broadcast_object_list(opened)
        if plan is not None:
            resolved = dataclasses.replace(generator.settings, recompute=plan.recompute_steps)
            planned = dataclasses.replace(generator, settings=resolved)
            seconds = sample_rest(planned, images, batch_size, plan.done, parts, accelerator)
        if first and plan is None:
            shutil.rmtree(parts)
            check_complete(out)
        elif first and plan is not None:
            counts = merge_parts(parts, parts / "samples.npz", images.classes)
            receipt = {
                "request": request,
                "samples": total,
                SHA256: sha256(parts / "samples.npz"),
                "time_grid": generator.settings.grid(),
                "recompute": generator.settings.recompute,
                "recompute_steps": plan.recompute_steps,
                "warnings": plan.warnings,
                "cached_modulations_bytes": int(counts.pop("cached_bytes")),
                "network_calls_an_image": counts,
                "images_per_second": (total - len(plan.done)) / seconds if len(plan.done) < total else None,
                "images_of_an_earlier_call": len(plan.done),
                "num_processes": accelerator.num_processes,
                "batch_size": batch_size,
                "command": command or shlex.join(sys.argv),
                **circumstances(generator.device),
            }
            finish_set(out, receipt, images, checkpoint["class_names"])
    if first:
        write_pngs(out / "png", rows(out / "samples.npz"), total if png == "all" else min(png, total))
        report = "complete, nothing to do" if plan is None else f"{total} images, {out / 'grid.png'}"
        log.info("%s: %s", out / "samples.npz", report)
