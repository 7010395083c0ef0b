"""The folder of a set: what it holds, the plan of an unfinished set, the files of a complete one.

`.parts/` holds the plan and the part files until `samples.npz` is renamed into place, last of all.
"""

import dataclasses
import hashlib
import itertools
import json
import logging
import shutil
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from ddt.class_names import readable
from ddt.errors import require
from ddt.files import find_record, read_json, read_record, sha256, write_json
from ddt.generation.generator import Generator
from ddt.generation.image_set import ImageSet, write_numbers
from ddt.generation.part_files import PARTS, remove_damaged, rows, sampled_numbers
from ddt.generation.receipt import RECEIPT, is_receipt_of
from ddt.pictures import image_grid, write_png
from ddt.precision import Dtype
from ddt.sampling.fitting import resolve_recompute
from ddt.sampling.settings import SamplerSettings

log = logging.getLogger(__name__)
GRID_ROWS = 10


@dataclasses.dataclass(frozen=True)
class Plan:
    """What an unfinished set is sampled with, and how much of it is there."""

    recompute_steps: list[int]  # of the sampler, resolved once for all processes and calls
    warnings: list[str]
    done: list[int]  # numbers of the images in part files


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
    plan, npz = out / ".parts" / "plan.json", out / "samples.npz"
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


def open_set(
    generator: Generator, request: dict[str, Any], out: Path, recompute_steps: list[int] | None = None
) -> Plan | None:
    """Return the plan of the requested set, written first for a new one; None if it is complete.

    `recompute_steps` are those of a schedule fitted to these settings before; None fits it here.
    """
    state, path = set_state(out, request), out / ".parts" / "plan.json"
    if state == "complete":
        return None
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
    plan = read_json(path)
    return Plan(plan["recompute_steps"], plan["warnings"], sampled_numbers(path.parent).tolist())


def finish_set(out: Path, receipt: dict[str, Any], images: ImageSet, class_names: list[str]) -> None:
    """Write receipt and grid, then rename the npz: after a kill before, the set resumes."""
    parts = out / ".parts"
    write_json(out / RECEIPT, receipt)
    columns = len(set(images.classes)) if len(set(images.classes)) <= 16 else 10
    shown = np.stack(list(itertools.islice(rows(parts / "samples.npz"), GRID_ROWS * columns)))
    names = readable(class_names)
    captions = [names[c] for c in images.classes[: len(shown)]]
    write_png(out / "grid.png", image_grid(torch.from_numpy(shown).permute(0, 3, 1, 2), columns, captions))
    (parts / "samples.npz").rename(out / "samples.npz")
    shutil.rmtree(parts)
