"""The checks of gpu_check.py: functions from a `Place` to findings.

The first ones compare numbers in this process; the others run the entry points, each in a process
with a time limit. Errors of vectors are relative, ‖a − b‖ / ‖b‖. Shapes: B batch, C H W latents.
"""

import copy
import dataclasses
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

import ddt
from ddt.checkpoint import format as ckpt
from ddt.config import group_values, locate
from ddt.data.images import FASHION_ROOTS
from ddt.data.photos import PHOTOS, photo
from ddt.distributed.compile import compile_blocks
from ddt.errors import UserError
from ddt.files import read_json
from ddt.metrics.features import exact_arithmetic
from ddt.objective import FlowMatching
from ddt.training.stopping import read_status
from ddt.training.tracking import read_rows
from scripts.benchmark import golden
from scripts.benchmark.parts import CHANNELS, CLASSES, random_batch, without_zeros
from scripts.benchmark.timing import Row

ROOT = Path(__file__).resolve().parents[2]
FLOAT32 = 1e-4  # rounding through a deep network; TF32 gives 1e-3
BF16 = (1e-3, 3e-2)  # below it nothing was rounded to bf16, above it more than operands
BF16_LATENTS = (1e-4, 3e-2)  # which are for the most part the noise
BF16_LOSS = 1e-2  # two halves of a batch round to bf16 in other places
FP16_LOSS = 5e-2  # the first steps may be skipped
Dtype = Literal["fp32", "bf16"]
Latent = tuple[int, int]  # channels, side


class NotRun(Exception):
    """A check that this machine cannot make, with the reason."""


@dataclasses.dataclass(frozen=True)
class Finding:
    """A value with its bounds; None: no bound. row: what was timed, as scripts.benchmark has it."""

    what: str
    value: float | str
    low: float | None = None
    high: float | None = None
    row: Row | None = None

    @property
    def result(self) -> Literal["measured", "passed", "failed"]:
        """Whether the value lies within its bounds; NaN lies in none."""
        if self.low is None and self.high is None:
            return "measured"
        value = float(self.value)
        inside = (self.low is None or value >= self.low) and (self.high is None or value <= self.high)
        return "passed" if inside else "failed"


@dataclasses.dataclass(frozen=True)
class Size:
    """How large the networks and runs of the checks are."""

    models: tuple[str, str]  # the small and the large one, of conf/model
    changes: dict[str, int]  # to both
    latent_size: int
    batch_size: int
    image_size: int  # of the autoencoder's and the target's images
    vae: dict[str, Any]  # changes to SD-VAE's configuration
    target: str  # a timm model
    run: tuple[str, ...]  # settings of the runs of train.py, of 2 · `steps` steps
    run_images: int  # of a step of theirs
    steps: int
    short: tuple[str, ...]  # settings of the short training
    digits_alone: bool  # training looks for no larger images
    sustained: float  # seconds of products in a row
    copied: int  # bytes of a copy
    repeats: int  # timed training steps
    trained: dict[str, tuple[tuple[str, Latent, tuple[int, ...]], ...]]  # check → model, latent, numbers of images
    sampled: dict[str, tuple[tuple[str, Latent, int], ...]]  # check → model, latent, images
    beside_plain: tuple[str, Latent, int, int]  # model, latent, images trained, images sampled
    small_batches: tuple[str, Latent, tuple[int, ...]]  # model, latent, numbers of images
    few_images: tuple[tuple[str, Latent, tuple[int, ...]], ...]  # trained: model, latent, numbers of images
    vae_images: int  # encoded and decoded for the time


SMALL = {"hidden_size": 32, "num_heads": 2, "depth": 2, "encoder_depth": 1}
SMALL_RUN = ("model.patch_size=4", *(f"model.{key}={value}" for key, value in SMALL.items()))
KL, KL_512, RAE, TINY = (CHANNELS, 32), (CHANNELS, 64), (768, 16), (CHANNELS, 8)
SIZES = {
    "full": Size(
        models=("b_8en4de", "xl_22en6de"), changes={}, latent_size=32, batch_size=4, image_size=256, vae={},
        target="vit_base_patch14_dinov2.lvd142m", run=(), run_images=64, steps=10,
        short=("trainer.max_steps=1000", "trainer.warmup_steps=100"), digits_alone=False,
        sustained=2, copied=2**32, repeats=8,
        trained={
            "XL": (("xl_22en6de", KL, (160, 128, 64, 32, 16)),),
            "others": (("l_20en4de", KL, (128,)), ("xl_ditdh", RAE, (64,)), ("b_8en4de", KL, (256,)),
                       ("xl_22en6de", KL_512, (16,))),
        },
        sampled={"XL": (("xl_22en6de", KL, 32),), "others": (("xl_ditdh", RAE, 32),)},
        beside_plain=("xl_22en6de", KL, 64, 32), small_batches=("xl_22en6de", KL, (1, 4, 16)), vae_images=32,
        few_images=(("xl_22en6de", KL, (16, 32)), ("b_8en4de", KL, (32,))),
    ),
    "tiny": Size(
        models=("nano", "nano"), changes=SMALL, latent_size=8, batch_size=2, image_size=32,
        vae={"block_out_channels": [8] * 4, "norm_num_groups": 4}, target="vit_tiny_patch16_224.augreg_in21k",
        run=SMALL_RUN, run_images=8, steps=2,
        short=("trainer.max_steps=40", "trainer.warmup_steps=0", *SMALL_RUN), digits_alone=True,
        sustained=0, copied=2**16, repeats=1,
        trained={"XL": (("nano", TINY, (2, 1)),), "others": (("nano", TINY, (3,)),)},
        sampled={"XL": (("nano", TINY, 2),), "others": (("nano", TINY, 1),)},
        beside_plain=("nano", TINY, 2, 2), small_batches=("nano", TINY, (1,)), vae_images=2,
        few_images=(("nano", TINY, (1,)),),
    ),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a check runs. out: folder of all results. scratch: folder removed at the end. deadline:
    the end of the call, by `time.monotonic`.
    """

    out: Path
    scratch: Path
    device: torch.device
    size: Size
    deadline: float

    def seconds_left(self) -> float:
        """Return the seconds that are left."""
        return self.deadline - time.monotonic()


# --- numbers


def relative(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """Return ‖a − b‖ / ‖b‖ over all values of two lists of tensors of equal shapes."""
    error = total = 0.0
    for x, y in zip(a, b, strict=True):
        expected = y.double()
        error += (x.to(y.device).double() - expected).square().sum().item()
        total += expected.square().sum().item()
    return math.sqrt(error / total) if total else math.nan


def share_of_tolerance(a: Tensor, b: Tensor, rtol: float, atol: float) -> float:
    """Return the largest |a − b| / (atol + rtol·|b|); `torch.testing.assert_close` allows 1."""
    difference = (a.detach().cpu().double() - b.double()).abs()
    return (difference / (atol + rtol * b.double().abs())).max().item()


def largest(errors: Iterable[float]) -> float:
    """Return the largest error, NaN where one is NaN, which Python's max may pass over."""
    return float(np.max(list(errors)))


def random_network(place: Place, name: str, device: torch.device) -> ddt.DDT:
    """Return a network of conf/model with random weights, also where a new one starts at zero."""
    settings = group_values("model", name) | place.size.changes
    torch.manual_seed(0)
    with device:
        build = locate(settings.pop("_target_"))
        return without_zeros(build(**settings, in_channels=CHANNELS, num_classes=CLASSES))


def autocast(device: torch.device, dtype: Dtype) -> torch.autocast:
    """Return the autocast context of a dtype."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == "bf16")


@torch.no_grad()
def velocity(network: ddt.DDT, batch: dict[str, Tensor], dtype: Dtype = "fp32") -> Tensor:
    """Return the velocities (B, C, H, W) of noise at t = 0.5."""
    t = torch.full_like(batch["time_normal"], 0.5)
    with autocast(t.device, dtype):
        return network(batch["noise"], t, batch["y"]).float()


def sampled(network: ddt.DDT, batch: dict[str, Tensor], dtype: Dtype = "fp32") -> Tensor:
    """Return the latents (B, C, H, W) of four guided steps."""
    with autocast(batch["y"].device, dtype):
        return ddt.sample(network, batch["noise"], batch["y"], num_steps=4, cfg_interval=None)


def gradients(network: ddt.DDT, batch: dict[str, Tensor], dtype: Dtype = "fp32") -> list[Tensor]:
    """Return the loss and its gradients, in the order of the weights."""
    network.zero_grad(set_to_none=True)
    with autocast(batch["y"].device, dtype):
        loss = FlowMatching(network)(**batch)["loss"]
    loss.backward()
    grads = [parameter.grad for parameter in network.parameters() if parameter.grad is not None]
    network.zero_grad(set_to_none=True)
    return [loss.detach(), *grads]


def golden_case(device: torch.device, name: str, number: int) -> tuple[float, float]:
    """Return the errors of outputs and of gradient norms, as shares of the tolerance."""
    network, io = golden.network(name).to(device), golden.case(name, number)
    x, t, y, shared, target = (io[key].to(device) for key in ("x", "t", "y", "x_shared", "target"))
    z, v = network.encode(x, t, y), network(x, t, y)
    loss = (v - target).square().mean()
    loss.backward()
    outputs = {"z": z, "v": v, "v_shared": network.decode(shared, z), "loss": loss}
    output_error = largest(share_of_tolerance(value, io[key], **golden.TOLERANCE) for key, value in outputs.items())
    settings = {"encoder_depth": len(network.encoder.blocks)}
    weights = {network.release.published_name(name, settings): p for name, p in network.named_parameters()}
    norms = {key.removeprefix("gradnorm."): norm for key, norm in io.items() if key.startswith("gradnorm.")}
    assert len(norms) == len(weights), "a norm for each weight"
    grads = {key: weights[key].grad for key in norms}
    return output_error, largest(
        math.nan if grad is None else share_of_tolerance(grad.norm(), norms[key], **golden.GRADIENT_TOLERANCE)
        for key, grad in grads.items()
    )


@exact_arithmetic()
def golden_numbers(place: Place) -> list[Finding]:
    """Compare the device's float32 numbers with those of the release."""
    cases = [golden_case(place.device, *case) for case in golden.CASES]
    runs, samplers = golden.trajectories()
    network = golden.network("tiny").to(place.device)
    noise, y = samplers["noise"].to(place.device), samplers["cond"].to(place.device)
    errors = []
    for name, run in runs.items():
        latents = ddt.sample(network, noise, y, **golden.sampler_settings(name, run, samplers))
        atol = golden.CLOSE.get(name, 1e-5)
        errors.append(share_of_tolerance(latents, samplers[name], rtol=1e-4, atol=atol))
    io = golden.case("tiny", 0)
    with torch.no_grad(), autocast(place.device, "bf16"):
        v = network(*(io[key].to(place.device) for key in ("x", "t", "y")))
    return [
        Finding("velocity, z, loss: share of the tolerance", largest(outputs for outputs, _ in cases), high=1),
        Finding("gradient norms: share of the tolerance", largest(norms for _, norms in cases), high=1),
        Finding(f"{len(runs)} trajectories: share of the tolerance", largest(errors), high=1),
        Finding("bf16 velocity: relative error", relative([v], [io["v"]]), BF16[0], golden.BF16_ERROR),
    ]


@exact_arithmetic()
def device_against_cpu(place: Place) -> list[Finding]:
    """Compare the small model's float32 velocity, gradients and samples with those of the CPU."""
    cpu = torch.device("cpu")
    reference = random_network(place, place.size.models[0], cpu)
    network = copy.deepcopy(reference).to(place.device)
    sizes = place.size.batch_size, place.size.latent_size
    here, there = random_batch(*sizes, place.device), random_batch(*sizes, cpu)
    return [
        Finding("velocity", relative([velocity(network, here)], [velocity(reference, there)]), high=FLOAT32),
        Finding("gradients", relative(gradients(network, here), gradients(reference, there)), high=FLOAT32),
        Finding("latents of 4 steps", relative([sampled(network, here)], [sampled(reference, there)]), high=FLOAT32),
    ]


@exact_arithmetic()
def bf16_against_fp32(place: Place) -> list[Finding]:
    """Compare bf16 autocast with float32: velocity, latents and gradients of both models."""
    findings, batch = [], random_batch(place.size.batch_size, place.size.latent_size, place.device)
    for name in dict.fromkeys(place.size.models):
        network = random_network(place, name, place.device)
        v, latents = (relative([f(network, batch, "bf16")], [f(network, batch)]) for f in (velocity, sampled))
        grads = relative(gradients(network, batch, "bf16"), gradients(network, batch))
        findings += [
            Finding(f"{name}: velocity", v, *BF16),
            Finding(f"{name}: latents of 4 steps", latents, *BF16_LATENTS),
            Finding(f"{name}: gradients", grads, *BF16),
        ]
        del network  # before the next one is built
    return findings


@exact_arithmetic()
def compiled_against_eager(place: Place) -> list[Finding]:
    """Compare compiled blocks with eager ones in both dtypes; report the seconds to compile."""
    findings, batch = [], random_batch(place.size.batch_size, place.size.latent_size, place.device)
    counters = torch._dynamo.utils.counters
    for dtype, bound in (("fp32", FLOAT32), ("bf16", BF16[1])):
        torch.compiler.reset()
        counters.clear()
        eager = random_network(place, place.size.models[0], place.device)
        network = copy.deepcopy(eager)
        compile_blocks(network, dynamic=False)
        start = time.perf_counter()
        v, grads = velocity(network, batch, dtype), gradients(network, batch, dtype)
        seconds = time.perf_counter() - start
        findings += [
            Finding(f"{dtype} velocity", relative([v], [velocity(eager, batch, dtype)]), high=bound),
            Finding(f"{dtype} gradients", relative(grads, gradients(eager, batch, dtype)), high=bound),
            Finding(f"{dtype} graphs compiled", counters["stats"]["unique_graphs"], low=1),
            Finding(f"{dtype} seconds to compile forward and backward", seconds),
        ]
    torch.compiler.reset()
    return findings


@torch.no_grad()
def randomize(network: nn.Module) -> nn.Module:
    """Fill a timm network with random values, for constants hide errors; return it."""
    for name, parameter in network.named_parameters():
        scales = parameter.ndim == 1 and not name.endswith("bias")
        parameter.copy_(scales + 0.04 * torch.randn_like(parameter))
    return network


def random_vae(place: Place) -> Any:
    """Return SD-VAE with random weights, loaded as training loads it; NotRun without diffusers."""
    try:
        import diffusers
    except ImportError as error:
        raise NotRun("diffusers is missing") from error
    from ddt.autoencoder import KLAutoencoder
    from ddt.autoencoder.diffusers import SD_VAE

    torch.manual_seed(0)
    folder = place.scratch / "vae"
    if not folder.exists():
        diffusers.AutoencoderKL.from_config(SD_VAE | place.size.vae).save_pretrained(folder)
    return KLAutoencoder(str(folder))


@exact_arithmetic()
def frozen_networks(place: Place) -> list[Finding]:
    """Compare autoencoder and alignment target, with random weights, with those of the CPU."""
    import timm
    from safetensors.torch import save_file

    from ddt.objective.alignment_target import Target

    size, cpu, autoencoder = place.size, torch.device("cpu"), random_vae(place)
    save_file(randomize(timm.create_model(size.target)).state_dict(), place.scratch / "target.safetensors")
    outputs: list[list[Tensor]] = []
    for device in (place.device, cpu):
        generator = torch.Generator().manual_seed(2)
        images = torch.randint(256, (2, 3, size.image_size, size.image_size), generator=generator)
        pixels = images.to(torch.uint8).to(device)
        autoencoder = autoencoder.to(device)
        side = autoencoder.latent_shape(3, size.image_size)[1]
        latents = torch.randn(2, CHANNELS, side, side, generator=generator).to(device)
        target = Target(size.target, str(place.scratch / "target.safetensors"), size.image_size).to(device)
        outputs.append([autoencoder.encode(pixels), autoencoder.decode(latents), target(pixels)])
    (moments, decoded, features), (moments_cpu, decoded_cpu, features_cpu) = outputs
    levels = (decoded.cpu().int() - decoded_cpu.int()).abs().max().item()
    return [
        Finding("moments", relative([moments], [moments_cpu]), high=FLOAT32),
        Finding("decoded images: grey levels", levels, high=1),
        Finding("features of the target", relative([features], [features_cpu]), high=FLOAT32),
    ]


# --- entry points


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


def losses_beside(place: Place, run: Path, what: str) -> Finding:
    """Compare the losses of a run with those of the uninterrupted one."""
    pairs = list(zip(losses(run), losses(uninterrupted(place)), strict=True))
    errors = [abs(a - b) / b for a, b in pairs]
    return Finding(f"{len(pairs)} {what}: relative error", largest(errors), high=BF16_LOSS)


def many_processes(place: Place) -> list[Finding]:
    """Compare the losses under DDP, of two processes or on one GPU of one, with those without."""
    n = 1 if place.device.type == "cuda" and torch.cuda.device_count() < 2 else 2
    launcher = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n}")
    run = briefly(place, "many_processes", 2 * place.size.steps, launcher=launcher)
    return [losses_beside(place, run, f"losses of DDP's {n}")]


def deterministic(place: Place) -> list[Finding]:
    """Compare the losses by deterministic algorithms alone with those by the fastest."""
    changes = ("trainer.deterministic=true", "trainer.num_processes=1")
    run = briefly(place, "deterministic", 2 * place.size.steps, *changes)
    return [losses_beside(place, run, "losses by deterministic algorithms")]


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


def rate(row: dict[str, Any]) -> str:
    """Return a row's images per second as text."""
    images = row["images_per_second"]
    return f"{images:,.0f} images/s" if images >= 100 else f"{images:.3g} images/s"


def speed(row: dict[str, Any]) -> str:
    """Return a benchmark row's rate, share of a product's rate and speed against the plain ways."""
    parts = [rate(row)]
    if row.get("share_of_matmul") is not None:
        parts.append(f"{row['share_of_matmul']:.0%} of a product's rate")
    if row["way"] != row["base"]:
        parts.append(f"× {row['ratio']:.2f} of {row['base']}")
    if row["first"] not in (row["base"], row["way"]):
        parts.append(f"× {row['ratio_to_first']:.2f} of {row['first']}")
    return ", ".join(parts)


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
