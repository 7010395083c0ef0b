"""Samples a set on all processes, resumes it after a kill, writes npz, grid and receipt.

Image k depends on (seed k, class k) alone, not on batch size or number of processes.
Shapes: n images, B batch, m images of a batch yet to be sampled, C H W.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
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
from ddt.files import find_record, lock_folder, read_record, sha256, write_json
from ddt.generation.generator import Generator, check_finite
from ddt.generation.image_set import ImageSet, write_numbers
from ddt.generation.parts import PARTS, merge_parts, remove_damaged, rows, sampled_numbers, write_part
from ddt.generation.receipt import RECEIPT, SHA256, is_receipt_of
from ddt.pictures import image_grid, readable, write_png, write_pngs
from ddt.precision import Dtype
from ddt.receipts import circumstances
from ddt.sampling.fitting import resolve_recompute
from ddt.sampling.settings import SamplerSettings

log = logging.getLogger(__name__)
GRID_ROWS = 10


def remaining_batches(total: int, batch_size: int, done: np.ndarray) -> list[np.ndarray]:
    """Return the batches yet to be sampled, each the numbers of its images.

    Batches are slices of the whole set, so that any number of processes, and a resumed set, pass
    the same batches through the network.
    """
    left = np.setdiff1d(np.arange(total), done)
    slices = np.split(left, np.searchsorted(left, np.arange(batch_size, total, batch_size)))
    return [numbers for numbers in slices if len(numbers)]


def generate(
    generator: Generator, images: ImageSet, batches: list[np.ndarray], parts: Path, progress: tqdm, share: int = 1
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


def set_request(
    settings: SamplerSettings,
    images: ImageSet,
    checkpoint: dict[str, Any],
    dtype: Dtype,
    compiled: bool = False,
    guide: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Return all that the images of a set depend on, as its receipt holds it."""
    request = {
        "checkpoint": checkpoint,
        "guide": guide,
        "sampler": settings.as_receipt(),
        "dtype": dtype,
        "compile": compiled,
        "classes": write_numbers(images.classes),
        "seeds": write_numbers(images.seeds),
    }
    return json.loads(json.dumps(request))  # tuples become lists, as in the files


def set_state(out: Path, request: dict[str, Any]) -> Literal["new", "unfinished", "complete"]:
    """Return how much of the requested set `out` holds; UserError where it holds anything else.

    A set without a sampled image is new: its request may still change.
    """
    plan, npz = out / ".parts" / "plan.json", out / "samples.npz"  # the npz is the last file to be written
    record = find_record(out, [RECEIPT], "out", own=[plan.parent.name])
    unfinished = plan.exists() and not npz.exists()
    if record is None and not (unfinished and len(sampled_numbers(plan.parent))):
        return "new"
    record = plan if unfinished or record is None else record
    content = read_record(record)
    require(
        content.get("request") == request and (record != plan or content.get("checksum") == plan_checksum(content)),
        f"out={out}: holds another set ({record.name} is of other settings, or damaged), which is not written over; "
        "choose another out=",
    )
    if npz.exists():
        return "complete"  # if its bytes are the receipt's: `check_complete`
    return "unfinished" if unfinished else "new"  # new: this set, of which the npz was removed


def plan_checksum(plan: dict[str, Any]) -> str:
    """Return a hash of what a plan says: a fitted schedule in it is found nowhere else."""
    content = {key: value for key, value in plan.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def check_complete(out: Path) -> None:
    """Raise UserError unless the receipt in `out` is that of samples.npz, which is read once."""
    npz = out / "samples.npz"
    require(
        is_receipt_of(read_record(out / RECEIPT), sha256(npz)),
        f"{npz}: damaged or replaced, it is not the file of {RECEIPT}; remove it, and the same command samples the "
        "set again",
    )


def open_set(generator: Generator, request: dict[str, Any], out: Path, recompute_steps: list[int] | None) -> list[Any]:
    """Return a set's plan, `recompute_steps` and `warnings` in it, and the numbers of its sampled
    images; None for both if it is complete.
    """
    state, path = set_state(out, request), out / ".parts" / "plan.json"
    if state == "complete":
        return [None, None]
    if state == "new":
        for left in (path, *path.parent.glob(PARTS)):  # a plan without images, or images without a plan
            left.unlink(missing_ok=True)
        warnings: list[str] = []
        if recompute_steps is not None:
            settings = dataclasses.replace(generator.settings, recompute=recompute_steps)
        else:
            with generator.autocast():
                settings, warnings = resolve_recompute(
                    generator.model, generator.shape, generator.settings, generator.device,
                    request["checkpoint"].get("ema_sha256"),
                )  # fmt: skip
        for warning in warnings:
            log.warning("%s", warning)
        content = {"request": request, "recompute_steps": settings.recompute, "warnings": warnings}
        write_json(path, {**content, "checksum": plan_checksum(content)})
    remove_damaged(path.parent)
    return [json.loads(path.read_text()), sampled_numbers(path.parent)]


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
    rank, num_processes = accelerator.process_index, accelerator.num_processes
    settings = generator.settings
    request = set_request(settings, images, checkpoint, generator.dtype, generator.compiled, guide)
    total, parts = len(images.seeds), out / ".parts"
    num_pngs = total if png == "all" else min(png, total)
    if rank == 0:
        set_state(out, request)  # raises before anything is written
    message = f"out={out}: another command is sampling this set; wait for it, or choose another out="
    with lock_folder(parts, message) if rank == 0 else contextlib.nullcontext():
        # decided under the lock: another command may have sampled the set before
        plan, done = broadcast_object_list(
            open_set(generator, request, out, recompute_steps) if rank == 0 else [None, None]
        )
        if plan is None:
            if rank == 0:
                shutil.rmtree(parts)
                check_complete(out)
                log.info("%s: complete, nothing to do", out / "samples.npz")
                write_pngs(out / "png", rows(out / "samples.npz"), num_pngs)
            return
        resolved = dataclasses.replace(settings, recompute=plan["recompute_steps"])
        generator = dataclasses.replace(generator, settings=resolved)
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
            SHA256: sha256(parts / "samples.npz"),
            "time_grid": settings.grid(),
            "recompute": settings.recompute,
            "recompute_steps": plan["recompute_steps"],
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
    """Write receipt and grid, then rename the npz: after a kill before, the set resumes."""
    write_json(out / RECEIPT, receipt)
    columns = len(set(images.classes)) if len(set(images.classes)) <= 16 else 10
    shown = np.stack(list(itertools.islice(rows(parts / "samples.npz"), GRID_ROWS * columns)))
    names = readable(class_names)
    captions = [names[c] for c in images.classes[: len(shown)]]
    write_png(out / "grid.png", image_grid(torch.from_numpy(shown).permute(0, 3, 1, 2), columns, captions))
    (parts / "samples.npz").rename(out / "samples.npz")
    shutil.rmtree(parts)
