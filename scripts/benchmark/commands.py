"""The checks of gpu_check.py that run the entry points, each in a process of its own.

Functions from a `Place` to findings, as those of `checks`.
"""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ddt.checkpoint import format as ckpt
from ddt.data.images import FASHION_ROOTS
from ddt.data.photos import PHOTOS, photo
from ddt.errors import UserError
from ddt.files import read_json
from ddt.training.stopping import read_status
from ddt.training.tracking import read_rows
from scripts.benchmark.checks import Finding, Place, largest, random_target, random_vae, rate
from scripts.benchmark.parts import write_random_inception

ROOT = Path(__file__).resolve().parents[2]
BF16_LOSS = 1e-2  # two halves of a batch round to bf16 in other places
FP16_LOSS = 5e-2  # the first steps may be skipped


def call(place: Place, entry: str, *arguments: str, name: str, launcher: Sequence[str] = ()) -> None:
    """Run an entry point (a file) in `Place.out`, its output in runs/logs/NAME.txt. launcher:
    arguments of Python before it.

    Raises RuntimeError where it fails.
    """
    log = place.out / "runs" / "logs" / f"{name}.txt"
    log.parent.mkdir(parents=True, exist_ok=True)
    packages = os.environ.get("PYTHONPATH")  # may lie in a folder of their own
    path = str(ROOT) if packages is None else f"{ROOT}{os.pathsep}{packages}"
    with log.open("w") as file:
        done = subprocess.run(
            [sys.executable, *launcher, str(ROOT / entry), *arguments], cwd=place.out, stdin=subprocess.DEVNULL,
            stdout=file, stderr=subprocess.STDOUT, check=False, env={**os.environ, "PYTHONPATH": path},
        )  # fmt: skip
    if done.returncode:
        lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
        raise RuntimeError(f"{entry}: status {done.returncode}: {lines[-1] if lines else 'no output'}")


def train(place: Place, name: str, *overrides: str, launcher: Sequence[str] = ()) -> Path:
    """Train or resume runs/NAME and return its folder."""
    quiet = ("trainer.validate_every=0", "trainer.preview_every=0", "trainer.num_workers=0", "trainer.save_every=0")
    call(place, "train.py", *quiet, *overrides, f"name={name}", name=name, launcher=launcher)
    return place.out / "runs" / name


def images(place: Place) -> tuple[str, tuple[str, ...]]:
    """Return name and settings of the images to train on: Fashion-MNIST, photos or digits."""
    if place.size.digits_alone:
        return "digits", ("data=digits",)
    for root in FASHION_ROOTS:
        if any(root.glob("train-images-idx3-ubyte*")):
            return "fashion_mnist", ("experiment=fashion_mnist", f"data.root={root.absolute()}")
    try:
        for name in PHOTOS:
            photo(name)
    except UserError:  # scikit-image is missing
        return "digits", ("data=digits",)
    return "photos", ("data=photos", "model.patch_size=4")  # 256 tokens


def briefly(place: Place, name: str, steps: int, *overrides: str, launcher: Sequence[str] = ()) -> Path:
    """Train some steps in bf16, at a constant rate, so that a run's end can be moved."""
    constant = ("trainer.lr_schedule=constant", "trainer.warmup_steps=0", "trainer.log_every=1")
    batch = f"trainer.global_batch_size={place.size.run_images}"
    settings = ("trainer.mixed_precision=bf16", f"trainer.max_steps={steps}", batch, *constant)
    return train(place, name, *images(place)[1], *settings, *place.size.run, *overrides, launcher=launcher)


def uninterrupted(place: Place) -> Path:
    """Return the run without interruption, which several checks compare with."""
    folder = place.out / "runs" / "uninterrupted"
    if read_status(folder).get("state") != "done":
        briefly(place, "uninterrupted", 2 * place.size.steps, "trainer.num_processes=1")
    return folder


def tensors(run: Path, step: int) -> dict[str, Tensor]:
    """Return weights, EMA weights and optimizer state of a checkpoint, by file and name."""
    folder, result = ckpt.checkpoint_folder(run, step), dict[str, Tensor]()
    for name in ckpt.weights_names(folder):
        result |= {f"{name} {key}": value for key, value in ckpt.read_weights(folder, name).items()}
    for index, values in ckpt.read_train_state(folder)["optimizer"]["state"].items():
        result |= {f"optimizer {index} {key}": value for key, value in values.items()}
    return result


def resume(place: Place) -> list[Finding]:
    """Compare k steps, a stop and k more with 2k steps: weights, EMA, optimizer, bit for bit."""
    steps = place.size.steps
    for end in (steps, 2 * steps):
        run = briefly(place, "resumed", end, "trainer.num_processes=1")
    resumed, expected = tensors(run, 2 * steps), tensors(uninterrupted(place), 2 * steps)
    assert resumed.keys() == expected.keys(), "the same tensors"
    differ = sum(not torch.equal(resumed[key], value) for key, value in expected.items())
    return [Finding(f"tensors of {len(expected)} that differ", differ, high=0)]


def losses(run: Path) -> list[float]:
    """Return the losses of a run's steps."""
    return [row["loss"] for row in read_rows(run / "metrics.jsonl") if "loss" in row]


def losses_beside(run: Path, expected: Path, what: str) -> Finding:
    """Compare the losses of a run with those of another."""
    pairs = list(zip(losses(run), losses(expected), strict=True))
    errors = [abs(a - b) / b for a, b in pairs]
    return Finding(f"{len(pairs)} {what}: relative error", largest(errors), high=BF16_LOSS)


def many_processes(place: Place) -> list[Finding]:
    """Compare the losses under DDP, of two processes or on one GPU of one, with those without."""
    n = 1 if place.device.type == "cuda" and torch.cuda.device_count() < 2 else 2
    launcher = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n}")
    run = briefly(place, "many_processes", 2 * place.size.steps, launcher=launcher)
    return [losses_beside(run, uninterrupted(place), f"losses of DDP's {n}")]


def deterministic(place: Place) -> list[Finding]:
    """Compare the losses by deterministic algorithms alone with those by the fastest."""
    changes = ("trainer.deterministic=true", "trainer.num_processes=1")
    run = briefly(place, "deterministic", 2 * place.size.steps, *changes)
    return [losses_beside(run, uninterrupted(place), "losses by deterministic algorithms")]


def fp16(place: Place) -> list[Finding]:
    """Compare the last loss in fp16, in two micro-batches, with that in bf16 in one."""
    half = f"trainer.micro_batch_size={place.size.run_images // 2}"
    changes = ("trainer.mixed_precision=fp16", half, "trainer.num_processes=1")
    run = briefly(place, "fp16", 2 * place.size.steps, *changes)
    ours, other = losses(run)[-1], losses(uninterrupted(place))[-1]
    skipped = read_rows(run / "metrics.jsonl")[-1]["skipped_steps"]
    return [
        Finding(f"last loss ({ours:.3f} for {other:.3f}): relative error", abs(ours - other) / other, high=FP16_LOSS),
        Finding("steps skipped until the loss scale fits", skipped),
    ]


def sampling(place: Place) -> list[Finding]:
    """Compare sets that must be equal (batch size, caching, compiling); check the default dtype."""
    images, receipts = {}, {}
    shared = ("dtype=fp32", "recompute=uniform:5")
    for name, settings in {
        "batches_of_4": (*shared, "batch_size=4"),
        "batches_of_8": (*shared, "batch_size=8"),
        "uncached": (*shared, "batch_size=8", "cache_gib=0"),
        "compiled": (*shared, "batch_size=8", "compile=true"),
        "default": (),
    }.items():
        out = place.out / "runs" / "samples" / name
        common = (f"ckpt={uninterrupted(place)}", f"out={out}", "num_samples=16", "num_steps=10", "num_processes=1")
        call(place, "sample.py", *common, *settings, name=f"samples_{name}")
        images[name] = np.load(out / "samples.npz")["arr_0"].astype(int)
        receipts[name] = read_json(out / "receipt.json")
    assert receipts["batches_of_8"]["cached_modulations_bytes"] > 0, "modulations are cached"
    expected, dtype = "bf16" if place.device.type == "cuda" else "fp32", receipts["default"]["request"]["dtype"]
    pairs = {
        "batches of 4 and 8": "batches_of_4", "modulations cached and not": "uncached", "compiled and not": "compiled",
    }  # fmt: skip
    levels = {what: int(np.abs(images["batches_of_8"] - images[name]).max()) for what, name in pairs.items()}
    return [
        *(Finding(f"{what}: grey levels", value, high=1) for what, value in levels.items()),
        Finding(f"dtype by default is {expected}, by the receipt {dtype}", float(dtype == expected), low=1),
    ]


def short_training(place: Place) -> list[Finding]:
    """Train on real images in bf16 and sample a grid, OUT/grid.png."""
    name, settings = images(place)
    common = ("trainer.mixed_precision=bf16", "trainer.num_processes=1", "trainer.log_every=10", *place.size.short)
    run = train(place, "training", *settings, *common)
    rows = read_rows(run / "metrics.jsonl")
    losses = [row["loss"] for row in rows]
    part = max(1, len(losses) // 10)  # a tenth of the rows: one is the mean of ten steps
    first, last = sum(losses[:part]) / part, sum(losses[-part:]) / part
    samples = run / "samples"
    call(place, "sample.py", f"ckpt={run}", f"out={samples}", "num_processes=1", name="samples_training")
    shutil.copyfile(samples / "grid.png", place.out / "grid.png")
    return [
        Finding(f"{name}: last loss over first ({last:.3f} over {first:.3f})", last / first, high=0.9),
        Finding(f"{name}: steps skipped", rows[-1]["skipped_steps"], high=0),
        Finding(f"{name}: training", rate(rows[-1])),
    ]


# --- from image files to metrics


def write_images(root: Path, classes: int) -> None:
    """Write a smooth random picture, 500 × 375 px JPEG, into each of so many class folders."""
    rng = np.random.default_rng(0)
    for number in range(classes):
        folder = root / f"n{number:08d}"
        folder.mkdir(parents=True)
        coarse = Image.fromarray(rng.integers(256, size=(12, 16, 3), dtype=np.uint8))
        coarse.resize((500, 375), Image.Resampling.BICUBIC).save(folder / f"{folder.name}_1.JPEG")


def timed_call(place: Place, entry: str, *arguments: str, name: str) -> float:
    """Run an entry point as `call` does; return its seconds, start and all."""
    start = time.monotonic()
    call(place, entry, *arguments, name=name)
    return time.monotonic() - start


def shifted_copies(source: Path, target: Path, n: int) -> None:
    """Write n images: a set's again and again, each time eight pixels further to the side."""
    images = np.load(source)["arr_0"]
    rounds = range(-(-n // len(images)))
    np.savez(target, arr_0=np.concatenate([np.roll(images, 8 * k, axis=2) for k in rounds])[:n])


def end_to_end(place: Place) -> Iterator[Finding]:
    """The published recipe's commands on files laid out as ImageNet's, with networks of the true
    architecture and random weights: from image files, from a cache, to samples and their metrics.
    """
    size = place.size.end_to_end
    files, cache = place.scratch / "imagenet", place.scratch / "cache"
    reference, inception = place.scratch / "reference.npz", place.scratch / "inception.pth"
    write_images(files, size.classes)
    write_random_inception(inception)
    networks = (
        f"autoencoder.source={random_vae(place)}", f"alignment.target={place.size.target}",
        f"alignment.weights={random_target(place)}",
    )  # fmt: skip
    from_files = ("data=in256", f"data.root={files}", f"data.num_classes={size.classes}")
    from_cache = ("data=in256_latents", f"data.root={cache}", f"data.num_classes={size.classes}")
    steps = (
        "trainer.num_processes=1", "trainer.validate_every=0", "trainer.preview_every=0", "trainer.save_every=0",
        "trainer.log_every=2", f"trainer.max_steps={size.steps}", f"trainer.global_batch_size={size.images}",
    )  # fmt: skip

    def trained(name: str, *data: str) -> Path:
        call(place, "train.py", *data, *networks, *size.settings, *steps, f"name={name}", name=name)
        return place.out / "runs" / name

    def usual(run: Path) -> str:
        rows = [row for row in read_rows(run / "metrics.jsonl") if "loss" in row]
        late = rows[len(rows) // 2 :]
        return rate({"images_per_second": median(row["images_per_second"] for row in late)})

    run = trained("from_files", *from_files)
    yield Finding("train.py from JPEG files: SD-VAE, DINOv2-B and the step", usual(run))
    seconds = timed_call(
        place, "scripts/cache_latents.py", *from_files, *networks, f"out={cache}", name="cache_latents"
    )
    yield Finding(f"cache_latents.py, {size.classes} images", f"{seconds:.0f} s, start and all")
    cached = trained("from_cache", *from_cache)
    yield Finding("train.py from the cache, DINOv2-B's pixels from JPEG files", usual(cached))
    yield losses_beside(cached, run, "losses from the cache and without")
    shutil.rmtree(cached)  # ten gigabytes

    sets = place.out / "runs" / "samples"
    for name, settings in {"each_step": (), "every_5th_step": ("recompute=uniform:5",)}.items():
        common = (f"ckpt={run}", f"out={sets / name}", f"num_samples={size.samples}", "num_processes=1", *size.sampling)
        seconds = timed_call(place, "sample.py", *common, *settings, name=f"samples_{name}")
        text = f"{rate(read_json(sets / name / 'receipt.json'))} decoded and written, {seconds:.0f} s, start and all"
        yield Finding(f"sample.py, {size.samples} images, encoder at {name.replace('_', ' ')}", text)

    measured = (f"inception_weights={inception}", "num_processes=1")
    out = (f"out={reference}", f"num_kept={size.classes}")
    seconds = timed_call(
        place, "scripts/reference_statistics.py", *from_files, *measured, *out, name="reference_statistics"
    )
    yield Finding(f"reference_statistics.py, {size.classes} images", f"{seconds:.0f} s, start and all")
    copies = place.scratch / "copies.npz"
    shifted_copies(sets / "each_step" / "samples.npz", copies, size.evaluated)
    out = (f"samples={copies}", f"reference={reference}", f"out={place.out / 'runs' / 'metrics'}")
    seconds = timed_call(place, "evaluate.py", *out, *measured, name="evaluate")
    metrics = read_json(place.out / "runs" / "metrics" / "metrics.json")
    missing = sum(metrics[name] is None or not np.isfinite(metrics[name]) for name in metrics["labels"])
    yield Finding(f"evaluate.py: metrics of {len(metrics['labels'])} that are missing", missing, high=0)
    yield Finding(f"evaluate.py, {size.evaluated} images", f"{seconds:.0f} s, start and all")
