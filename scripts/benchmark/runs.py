"""Checks that go through the entry points, each in a process with a time limit; they write under
`Place.out`.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ddt.checkpoint import folder as ckpt
from ddt.data.images import FASHION_ROOTS
from ddt.data.photos import PHOTOS, photo
from ddt.errors import UserError
from ddt.training.stopping import read_status
from ddt.training.tracking import read_rows
from scripts.benchmark.checks import Finding, NotRun, Place

ROOT = Path(__file__).resolve().parent.parent
BENCHMARK = ROOT / "scripts" / "benchmark.py"
TRAINING_MINUTES = 2  # of the second stage, for the short training
GRACE = 30  # seconds that a process which began in time may still take
BF16_LOSS = 1e-2  # relative: two halves of a batch round to bf16 in other places


def call(place: Place, script: Path, *arguments: str, name: str, seconds: float = 300) -> None:
    """Run an entry point in `Place.out`, its output in runs/logs/NAME.txt; raise RuntimeError with
    its last line where it fails or takes more than `seconds`, or than the stage has.
    """
    log = place.out / "runs" / "logs" / f"{name}.txt"
    log.parent.mkdir(parents=True, exist_ok=True)
    if place.left() <= 0:
        raise NotRun("out of time")
    seconds = min(seconds, place.left() + GRACE)
    with log.open("w") as file:
        try:
            done = subprocess.run(
                [sys.executable, str(script), *arguments],
                cwd=place.out,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                timeout=seconds,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise RuntimeError(f"{script.name} took more than {seconds:.0f} s: {log.relative_to(place.out)}") from error
    if done.returncode:
        lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
        raise RuntimeError(f"{script.name}: status {done.returncode}: {lines[-1] if lines else 'no output'}")


def train(place: Place, name: str, *overrides: str) -> Path:
    """Train or go on with runs/NAME and return its folder."""
    quiet = (
        "trainer.validate_every=0",
        "trainer.preview_every=0",
        "trainer.num_workers=0",
        "trainer.save_every=0",
    )
    call(place, ROOT / "train.py", *quiet, *overrides, f"name={name}", name=name)
    return place.out / "runs" / name


def on_digits(place: Place, name: str, steps: int, *overrides: str) -> Path:
    """Train on digits in bf16, at a constant rate, so that a run may be told of its end twice."""
    constant = ("trainer.lr_schedule=constant", "trainer.warmup_steps=0", "trainer.log_every=1")
    settings = ("data=digits", "trainer.mixed_precision=bf16", f"trainer.max_steps={steps}", *constant)
    return train(place, name, *settings, *place.size.run, *overrides)


def straight(place: Place) -> Path:
    """Return the run that nothing interrupts, which several checks compare with."""
    folder = place.out / "runs" / "straight"
    if read_status(folder).get("state") != "done":
        on_digits(place, "straight", 2 * place.size.steps, "trainer.num_processes=1")
    return folder


def tensors(run: Path, step: int) -> dict[str, torch.Tensor]:
    """Return weights, averages and the optimizer's state of a checkpoint, by file and name."""
    folder, found = ckpt.checkpoint_folder(run, step), {}
    for name in ckpt.weights_names(folder):
        found |= {f"{name} {key}": value for key, value in ckpt.read_weights(folder, name).items()}
    for index, values in ckpt.read_train_state(folder)["optimizer"]["state"].items():
        found |= {f"optimizer {index} {key}": value for key, value in values.items()}
    return found


def resumed(place: Place) -> list[Finding]:
    """Compare k steps, a stop and k more with 2k steps: weights, averages, optimizer, bit for bit."""
    steps = place.size.steps
    for end in (steps, 2 * steps):
        run = on_digits(place, "resumed", end, "trainer.num_processes=1")
    found, wanted = tensors(run, 2 * steps), tensors(straight(place), 2 * steps)
    assert found.keys() == wanted.keys(), "the same tensors"
    differ = sum(not torch.equal(found[key], value) for key, value in wanted.items())
    return [Finding(f"tensors of {len(wanted)} that differ", differ, high=0)]


def two_processes(place: Place) -> list[Finding]:
    """Compare the losses of two processes with those of one."""
    if place.device.type == "cuda" and torch.cuda.device_count() < 2:
        raise NotRun("one GPU")
    steps = 2 * place.size.steps
    run = on_digits(place, "two_processes", steps, "trainer.num_processes=2")
    pairs = [[row["loss"] for row in read_rows(folder / "metrics.jsonl")] for folder in (run, straight(place))]
    assert len(pairs[1]) == steps, "a row a step"
    errors = [abs(a - b) / b for a, b in zip(*pairs, strict=True)]
    return [Finding(f"losses of {steps} steps: relative error", max(errors), high=BF16_LOSS)]


def draw(place: Place, name: str, *overrides: str) -> tuple[np.ndarray, dict[str, Any]]:
    """Return the images (n, H, W, C) that sample.py draws from the run on digits, and their
    receipt.
    """
    out = place.out / "runs" / "samples" / name
    settings = (f"ckpt={straight(place)}", f"out={out}", "num_samples=16", "num_steps=10", "num_processes=1")
    call(place, ROOT / "sample.py", *settings, *overrides, name=f"samples_{name}")
    return np.load(out / "samples.npz")["arr_0"], json.loads((out / "receipt.json").read_text())


def grey_levels(a: np.ndarray, b: np.ndarray) -> int:
    """Return the largest difference of two sets of uint8 images."""
    return int(np.abs(a.astype(int) - b.astype(int)).max())


def sampling(place: Place) -> list[Finding]:
    """Compare sets of images that must be equal: other batch sizes, modulations kept or not; and
    what dtype is by default.
    """
    shared = ("dtype=fp32", "recompute=uniform:5")
    fours, _ = draw(place, "batches_of_4", *shared, "batch_size=4")
    eights, kept = draw(place, "batches_of_8", *shared, "batch_size=8")
    uncached, _ = draw(place, "uncached", *shared, "batch_size=8", "cache_gib=0")
    compiled, _ = draw(place, "compiled", *shared, "batch_size=8", "compile=true")
    _, default = draw(place, "default")
    assert kept["cached_modulations_bytes"] > 0, "modulations are kept"
    wanted, dtype = "bf16" if place.device.type == "cuda" else "fp32", default["request"]["dtype"]
    return [
        Finding("batches of 4 and 8: grey levels", grey_levels(fours, eights), high=1),
        Finding("modulations kept and not: grey levels", grey_levels(eights, uncached), high=1),
        Finding("compiled and not: grey levels", grey_levels(eights, compiled), high=1),
        Finding(f"dtype by default is {wanted}, by the receipt {dtype}", float(dtype == wanted), low=1),
    ]


def rate(row: dict[str, Any]) -> str:
    """Return a row's images a second as they stand in the table."""
    images = row["images_per_second"]
    return f"{images:,.0f} images/s" if images >= 100 else f"{images:.3g} images/s"


def benchmark(place: Place, name: str) -> list[Finding]:
    """Run scripts/benchmark/__main__.py and return the fastest way of each part."""
    out = place.out / f"benchmark_{name}"
    share, chosen = place.size.benchmarks[name]
    minutes = share * max(place.minutes - TRAINING_MINUTES, 1)
    settings = (*chosen, f"minutes={minutes:g}", f"out={out}")
    file, problem = out / "benchmark.json", ""
    try:
        call(place, BENCHMARK, *settings, name=f"benchmark_{name}", seconds=60 * minutes + GRACE)
    except RuntimeError as error:  # what was measured before is told
        if not file.is_file():
            raise
        problem = str(error)
    rows = json.loads(file.read_text())["rows"]
    findings = [Finding(f"{row['part']}, {row['case']}, {row['way']}", told(row)) for row in best(rows)]
    findings += [Finding(f"{row['part']}: not run: {row['not_run']}", "–") for row in rows if "not_run" in row]
    return findings + ([Finding(problem, 1, high=0)] if problem else [])


def best(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return, of each case of training and sampling, the rows of the fastest way that is not plain,
    and of sampling at each ratio; of each other part the fastest row of all.
    """
    found: dict[tuple[str, ...], dict[str, Any]] = {}
    for row in rows:
        if not row.get("images_per_second"):  # not run, or of no images, as the optimizer's step
            continue
        key: tuple[str, ...] = (row["part"],)
        if row["part"] in ("training", "sampling"):
            if row["way"].startswith("plain"):
                continue
            key += (row["case"], row["base"])
        if key not in found or row["images_per_second"] > found[key]["images_per_second"]:
            found[key] = row
    return list(found.values())


def told(row: dict[str, Any]) -> str:
    """Return images a second, share and speed against the plain ways as they stand in the table."""
    parts = [rate(row)]
    if row["share_of_matmul"] is not None:
        parts.append(f"{row['share_of_matmul']:.0%} of a product's rate")
    if row["way"] != row["base"]:
        parts.append(f"× {row['ratio']:.2f} of {row['base']}")
    if row["first"] not in (row["base"], row["way"]):
        parts.append(f"× {row['ratio_to_first']:.2f} of {row['first']}")
    return ", ".join(parts)


def pictures(place: Place) -> tuple[str, tuple[str, ...]]:
    """Return the name and the settings of what the short training trains on: Fashion-MNIST where
    its files are, else nine photos where scikit-image is, as pixels, else digits.
    """
    if place.size.digits_alone:
        return "digits", ("data=digits",)
    for root in FASHION_ROOTS:
        if any(root.glob("train-images-idx3-ubyte*")):
            return "fashion_mnist", ("experiment=fashion_mnist", f"data.root={root.absolute()}")
    try:
        for name in PHOTOS:
            photo(name)
    except UserError:
        return "digits", ("data=digits",)
    return "photos", ("data=photos", "model.patch_size=8")


def short_training(place: Place) -> list[Finding]:
    """Train on real pictures in bf16 and draw a grid of them, OUT/grid.png."""
    name, settings = pictures(place)
    rules = ("trainer.mixed_precision=bf16", "trainer.num_processes=1", "trainer.log_every=10", *place.size.short)
    run = train(place, "training", *settings, *rules)
    rows = read_rows(run / "metrics.jsonl")
    losses = [row["loss"] for row in rows]
    part = max(1, len(losses) // 10)  # a tenth of the rows: one is the mean of ten steps
    first, last = sum(losses[:part]) / part, sum(losses[-part:]) / part
    samples = run / "samples"
    call(place, ROOT / "sample.py", f"ckpt={run}", f"out={samples}", "num_processes=1", name="samples_training")
    shutil.copyfile(samples / "grid.png", place.out / "grid.png")
    return [
        Finding(f"{name}: last loss over first ({last:.3f} over {first:.3f})", last / first, high=0.9),
        Finding(f"{name}: steps skipped", rows[-1]["skipped_steps"], high=0),
        Finding(f"{name}: training", rate(rows[-1])),
    ]
