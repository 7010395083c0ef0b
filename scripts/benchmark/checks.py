"""The checks of gpu_check.py that compare numbers: functions from a `Place` to findings.

Errors of vectors are relative, ‖a − b‖ / ‖b‖. Shapes: B batch, C H W latents.
"""

import contextlib
import copy
import dataclasses
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import ddt
from ddt.config import group_values, locate
from ddt.distributed.compile import compile_blocks
from ddt.distributed.prepare import shard
from ddt.metrics.features import exact_arithmetic
from ddt.objective import FlowMatching
from scripts.benchmark import golden
from scripts.benchmark.parts import CHANNELS, CLASSES, random_batch, without_zeros
from scripts.benchmark.timing import Row

FLOAT32 = 1e-4  # rounding through a deep network; TF32 gives 1e-3
BF16 = (1e-3, 3e-2)  # below it nothing was rounded to bf16, above it more than operands
BF16_LATENTS = (1e-4, 3e-2)  # which are for the most part the noise
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
class EndToEnd:
    """How much the commands of `commands.end_to_end` do."""

    settings: tuple[str, ...]  # of train.py
    classes: int  # of one image each
    images: int  # of a training step
    steps: int
    samples: int
    sampling: tuple[str, ...]  # settings of sample.py
    evaluated: int  # images


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
    end_to_end: EndToEnd


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
        end_to_end=EndToEnd(
            settings=("model=xl_22en6de",), classes=1000, images=128, steps=24,
            samples=512, sampling=("num_steps=50", "compile=true"), evaluated=10_000,
        ),
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
        end_to_end=EndToEnd(
            settings=(*SMALL_RUN, "alignment.align_depth=1", "trainer.mixed_precision=fp32"),
            classes=6, images=4, steps=4, samples=8, sampling=("num_steps=5", "batch_size=4"), evaluated=12,
        ),
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


@contextlib.contextmanager
def one_process_group(device: torch.device) -> Iterator[None]:
    """Make this process the only one of a process group, by NCCL or, on a CPU, gloo."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


@exact_arithmetic()
def sharded(place: Place) -> Iterator[Finding]:
    """Compare a network sharded by FSDP2 over one process, gathers, casts and hooks as over many,
    with the whole one: gradients in float32, eager, and in bf16, compiled.
    """
    batch = random_batch(place.size.batch_size, place.size.latent_size, place.device)
    for dtype, compiled, bound in (("fp32", False, FLOAT32), ("bf16", True, BF16[1])):
        whole = random_network(place, place.size.models[0], place.device)
        parts = copy.deepcopy(whole)
        if compiled:
            for network in (whole, parts):
                compile_blocks(network, dynamic=False)
        expected = gradients(whole, batch, dtype)
        with one_process_group(place.device):
            shard(parts, dtype)
            grads = [full(grad) for grad in gradients(parts, batch, dtype)]
        yield Finding(f"{dtype}{', compiled' * compiled}: gradients", relative(grads, expected), high=bound)
    torch.compiler.reset()


def full(tensor: Tensor) -> Tensor:
    """Return all of a sharded tensor; any other is returned as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def randomize(network: nn.Module) -> nn.Module:
    """Fill a timm network with random values, for constants hide errors; return it."""
    for name, parameter in network.named_parameters():
        scales = parameter.ndim == 1 and not name.endswith("bias")
        parameter.copy_(scales + 0.04 * torch.randn_like(parameter))
    return network


def random_vae(place: Place) -> Path:
    """Return the folder of an SD-VAE with random weights; NotRun without diffusers."""
    try:
        import diffusers
    except ImportError as error:
        raise NotRun("diffusers is missing") from error
    from ddt.autoencoder.diffusers import SD_VAE

    folder = place.scratch / "vae"
    if not folder.exists():
        torch.manual_seed(0)
        diffusers.AutoencoderKL.from_config(SD_VAE | place.size.vae).save_pretrained(folder)
    return folder


def random_target(place: Place) -> Path:
    """Return the file of an alignment target with random weights."""
    import timm
    from safetensors.torch import save_file

    file = place.scratch / "target.safetensors"
    if not file.exists():
        torch.manual_seed(0)
        save_file(randomize(timm.create_model(place.size.target)).state_dict(), file)
    return file


@exact_arithmetic()
def frozen_networks(place: Place) -> list[Finding]:
    """Compare autoencoder and alignment target, with random weights, with those of the CPU."""
    from ddt.autoencoder import KLAutoencoder
    from ddt.objective.alignment_target import Target

    size, cpu, autoencoder = place.size, torch.device("cpu"), KLAutoencoder(str(random_vae(place)))
    outputs: list[list[Tensor]] = []
    for device in (place.device, cpu):
        generator = torch.Generator().manual_seed(2)
        images = torch.randint(256, (2, 3, size.image_size, size.image_size), generator=generator)
        pixels = images.to(torch.uint8).to(device)
        autoencoder = autoencoder.to(device)
        side = autoencoder.latent_shape(3, size.image_size)[1]
        latents = torch.randn(2, CHANNELS, side, side, generator=generator).to(device)
        target = Target(size.target, str(random_target(place)), size.image_size).to(device)
        outputs.append([autoencoder.encode(pixels), autoencoder.decode(latents), target(pixels)])
    (moments, decoded, features), (moments_cpu, decoded_cpu, features_cpu) = outputs
    levels = (decoded.cpu().int() - decoded_cpu.int()).abs().max().item()
    return [
        Finding("moments", relative([moments], [moments_cpu]), high=FLOAT32),
        Finding("decoded images: grey levels", levels, high=1),
        Finding("features of the target", relative([features], [features_cpu]), high=FLOAT32),
    ]


# --- words


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
