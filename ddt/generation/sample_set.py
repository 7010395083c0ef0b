"""From classes and seeds to files: a set is sampled on all processes, resumes after a kill, and
ends as samples.npz, grid.png and receipt.json.

Image k is a function of (seed k, class k): batch size and number of processes do not change it.
Shapes: n images, B batch, m images of a batch that are still to be sampled, C H W.
"""

import contextlib
import dataclasses
import itertools
import json
import logging
import shlex
import shutil
import sys
import time
import zipfile
from collections.abc import Iterator
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
from ddt.files import lock_folder, write_json
from ddt.generation.generator import Generator
from ddt.generation.image_set import ImageSet, write_numbers
from ddt.generation.parts import merge_parts, remove_damaged, rows, sampled_numbers, write_part
from ddt.pictures import image_grid, readable, write_png, write_pngs
from ddt.receipts import circumstances
from ddt.sampling.fitting import resolve_recompute

log = logging.getLogger(__name__)
GRID_ROWS = 10


def remaining_batches(total: int, batch_size: int, done: np.ndarray) -> list[np.ndarray]:
    """Return the batches of a set that are still to be sampled, each the numbers of its images.

    Batches are slices of the whole set, whatever the number of processes, so that a set sampled in
    one go, by several processes, or after a kill passes through the network in the same batches.
    """
    left = np.setdiff1d(np.arange(total), done)
    slices = np.split(left, np.searchsorted(left, np.arange(batch_size, total, batch_size)))
    return [numbers for numbers in slices if len(numbers)]


def consecutive(numbers: np.ndarray) -> Iterator[slice]:
    """Yield the slices of sorted numbers (m,) within which each follows the one before."""
    cuts = [0, *(np.flatnonzero(np.diff(numbers) != 1) + 1).tolist(), len(numbers)]
    yield from (slice(a, b) for a, b in itertools.pairwise(cuts))


def generate(
    generator: Generator, images: ImageSet, batches: list[np.ndarray], parts: Path, progress: tqdm, share: int = 1
) -> None:
    """Sample batches of a set and write each to `parts` as soon as it is done.

    While one batch is decoded and written, the next is sampled. progress grows by `share` images
    for each of this process.
    """
    stream = torch.cuda.Stream(generator.device) if generator.device.type == "cuda" else None

    def finish(latents: Tensor, ready: torch.cuda.Event | None, numbers: np.ndarray, counts: dict[str, int]) -> None:
        pixels = generator.pixels(latents, ready, stream)
        if not bool(latents.isfinite().all()):  # a device sync, which in this thread holds nothing up
            raise FloatingPointError(
                f"image {numbers[0]} or one of the {len(numbers) - 1} after it is not finite: try dtype=fp32, "
                "forecast_order=0 or a smaller cfg_scale"
            )
        for run in consecutive(numbers):
            write_part(parts, int(numbers[run.start]), pixels[run], counts)
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


def set_state(out: Path, request: dict[str, Any]) -> Literal["new", "unfinished", "complete"]:
    """Return how much of the requested set `out` holds; raise UserError where it holds anything
    else.

    A set without a sampled image is new: what was asked for may still be changed.
    """
    require(not out.exists() or out.is_dir(), f"out={out}: is a file; give a folder")
    parts = out / ".parts"
    empty = not out.exists() or not any(path != parts for path in out.iterdir())
    if empty and (len(sampled_numbers(parts)) == 0 or not (parts / "plan.json").exists()):
        return "new"

    def same(path: Path) -> bool:
        try:
            return json.loads(path.read_text())["request"] == request
        except (OSError, ValueError, KeyError, TypeError):
            return False

    npz = out / "samples.npz"
    finished = npz.exists()  # the last file to be written
    ours = same(out / "receipt.json" if finished or not (parts / "plan.json").exists() else parts / "plan.json")
    require(ours, f"out={out}: holds another set or other files and is not written over; choose another out=")
    require(
        not finished or zipfile.is_zipfile(npz),
        f"{npz}: damaged; remove it, and the same command samples the set again",
    )
    if not finished and not (parts / "plan.json").exists():
        return "new"  # this very set, of which only the npz was taken away
    return "complete" if finished else "unfinished"


def make_plan(
    generator: Generator, request: dict[str, Any], parts: Path, unfinished: bool, fitted: list[int] | None
) -> dict[str, Any]:
    """Return the plan of a set, `recompute_steps` and `warnings` in it: that of an
    unfinished set, or a new one.
    """
    path = parts / "plan.json"
    if unfinished:
        return json.loads(path.read_text())
    for left in (path, *parts.glob("[0-9]*-[0-9]*.npz")):  # of a plan without an image, or of none
        left.unlink(missing_ok=True)
    warnings: list[str] = []
    if fitted is not None:
        settings = dataclasses.replace(generator.settings, recompute=fitted)
    else:
        with generator.autocast():
            settings, warnings = resolve_recompute(
                generator.model,
                generator.shape,
                generator.settings,
                generator.device,
                request["checkpoint"].get("ema_sha256"),
            )
    for warning in warnings:
        log.warning("%s", warning)
    content = {"request": request, "recompute_steps": settings.recompute, "warnings": warnings}
    write_json(path, content)
    return content


def open_set(
    generator: Generator, request: dict[str, Any], out: Path, parts: Path, fitted: list[int] | None
) -> list[Any]:
    """Return the plan of a set and the numbers of the images that are sampled already; None for
    both if it is complete.
    """
    state = set_state(out, request)
    if state == "complete":
        return [None, None]
    plan = make_plan(generator, request, parts, state == "unfinished", fitted)
    remove_damaged(parts)
    return [plan, sampled_numbers(parts)]


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
    fitted: list[int] | None = None,
) -> None:
    """Sample a set on all processes and write `samples.npz`, `grid.png` and `receipt.json` into
    `out`.

    `arr_0` is uint8 (n, H, W, C) and `arr_1` int64 (n,), the class of each image, both in the set's
    order. The first `png` images, or all, are written to `out/png` too. An unfinished set resumes
    from its last complete batch, one that is complete is left as it is, any other content of the
    folder is refused (UserError). `checkpoint` and `guide` say which weights, for the receipt;
    `checkpoint["class_names"]` names the images of the grid. `command`: for the receipt, None for
    the running one. `fitted`: the steps of a schedule that was fitted to these settings before;
    None fits it here.
    """
    require(batch_size >= 1, f"batch_size={batch_size}: must be at least 1")
    rank, num_processes = accelerator.process_index, accelerator.num_processes
    settings = generator.settings
    request = {
        "checkpoint": checkpoint,
        "guide": guide,
        "sampler": settings.as_receipt(),
        "dtype": generator.dtype,
        "compile": generator.compiled,
        "classes": write_numbers(images.classes),
        "seeds": write_numbers(images.seeds),
    }
    request = json.loads(json.dumps(request))  # as it will be read back
    total, parts = len(images.seeds), out / ".parts"
    num_pngs = total if png == "all" else min(png, total)
    if rank == 0:
        set_state(out, request)  # refused before anything is written
    message = f"out={out}: another command is sampling this set; wait for it, or choose another out="
    with lock_folder(parts, message) if rank == 0 else contextlib.nullcontext():
        # one process decides, and only now: until here another command may have sampled it
        opened = open_set(generator, request, out, parts, fitted) if rank == 0 else [None, None]
        plan, done = broadcast_object_list(opened)
        if plan is None:
            if rank == 0:
                log.info("%s: complete, nothing to do", out / "samples.npz")
                shutil.rmtree(parts)
                write_pngs(out / "png", rows(out / "samples.npz"), num_pngs)
            return
        steps = plan["recompute_steps"]
        generator = dataclasses.replace(generator, settings=dataclasses.replace(settings, recompute=steps))
        batches = remaining_batches(total, batch_size, np.array(done, dtype=np.int64))
        started, left = time.perf_counter(), total - len(done)
        bar = tqdm(total=total, initial=len(done), unit="img", desc="sampling", disable=rank != 0, mininterval=1.0)
        with generator.exact(), bar as progress:
            generate(generator, images, batches[rank::num_processes], parts, progress, num_processes)
        accelerator.wait_for_everyone()
        if rank != 0:
            return
        seconds = time.perf_counter() - started
        counts = merge_parts(parts, parts / "samples.npz", images.classes)
        receipt = {
            "request": request,
            "samples": total,
            "time_grid": settings.grid(),
            "recompute": settings.recompute,
            "recompute_steps": steps,
            "warnings": plan["warnings"],
            "cached_modulations_bytes": int(counts.pop("cached_bytes")),
            "network_calls_an_image": counts,
            "images_per_second": left / seconds if left else None,
            "images_of_an_earlier_call": len(done),
            "num_processes": num_processes,
            "batch_size": batch_size,
            "command": command or shlex.join(sys.argv),
            **circumstances(generator.device),
        }
        finish_set(parts, out, receipt, images, checkpoint["class_names"])
    write_pngs(out / "png", rows(out / "samples.npz"), num_pngs)
    log.info("%d images: %s, %s", total, out / "samples.npz", out / "grid.png")


def finish_set(parts: Path, out: Path, receipt: dict[str, Any], images: ImageSet, class_names: list[str]) -> None:
    """Write receipt and grid, then move the npz to its place and remove the parts: a kill before
    that leaves a set that resumes.
    """
    write_json(out / "receipt.json", receipt)
    columns = len(set(images.classes)) if len(set(images.classes)) <= 16 else 10
    shown = np.stack(list(itertools.islice(rows(parts / "samples.npz"), GRID_ROWS * columns)))
    names = readable(class_names)
    captions = [names[c] for c in images.classes[: len(shown)]]
    write_png(out / "grid.png", image_grid(torch.from_numpy(shown).permute(0, 3, 1, 2), columns, captions))
    (parts / "samples.npz").rename(out / "samples.npz")
    shutil.rmtree(parts)
