"""What must hold on a device: functions from the place of a check to its findings, which
scripts/benchmark/gpu_check.py runs.

Errors of vectors are relative, ‖a − b‖ / ‖b‖, over all their values. Shapes: B batch, C channels, H
W size.
"""

import contextlib
import copy
import dataclasses
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import hydra
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

import ddt
from ddt.cli import CONF, composing
from ddt.config import build
from ddt.distributed.compile import compile_blocks
from ddt.objective import FlowMatching
from scripts.benchmark import golden
from scripts.benchmark.parts import CHANNELS, CLASSES, without_zeros

FLOAT32 = 1e-4  # of rounding through a deep network; TF32 gives 1e-3
BF16 = (1e-3, 3e-2)  # below it nothing was rounded to bf16, above it more than operands
BF16_LATENTS = (1e-4, 3e-2)  # which are for the most part the noise
Dtype = Literal["fp32", "bf16"]


class NotRun(Exception):
    """A check that this machine cannot make, with the reason."""


@dataclasses.dataclass(frozen=True)
class Finding:
    """A value with its bounds; None: no bound."""

    what: str
    value: float | str
    low: float | None = None
    high: float | None = None

    @property
    def sound(self) -> bool:
        """Whether the value lies within its bounds; what is no number lies in none."""
        if self.low is None and self.high is None:
            return True
        value = float(self.value)
        return (self.low is None or value >= self.low) and (self.high is None or value <= self.high)


@dataclasses.dataclass(frozen=True)
class Size:
    """How large the networks of the checks are.

    models: the small and the large one, of conf/model. changes: to both. latent_size, batch_size:
    of their inputs.
    image_size: of the autoencoder's and the target's images. vae_channels: of its levels, in
    vae_groups. target: a name of timm's. run: settings of the runs of train.py on digits, which end
    at twice `steps`. benchmarks: what scripts/benchmark/__main__.py gets, by name, after its share
    of the time. short: settings of the short training.
    digits_alone: whether that looks for no larger pictures.
    """

    models: tuple[str, str]
    changes: tuple[str, ...]
    latent_size: int
    batch_size: int
    image_size: int
    vae_channels: tuple[int, int, int, int]
    vae_groups: int
    target: str
    run: tuple[str, ...]
    steps: int
    benchmarks: dict[str, tuple[float, tuple[str, ...]]]
    short: tuple[str, ...]
    digits_alone: bool


FAST = ("dtype=bf16", "compile=true", "batch_size=max")
FEW = ("parts=[sampling,training]", "sampling_batch_sizes=[32]", "num_steps=20", "ratios=[0,0.8]", "repeats=3")
MOST = "[training,forward,sampling,target,autoencoder,average,optimizer,activations,candidates]"
TINY = ("parts=[forward,optimizer]", "align_depth=1", "repeats=1")
SMALL = ("model.hidden_size=32", "model.num_heads=2", "model.depth=2", "model.encoder_depth=1")
SIZES = {
    "full": Size(
        models=("b_8en4de", "xl_22en6de"),
        changes=(),
        latent_size=32,
        batch_size=4,
        image_size=256,
        vae_channels=(128, 256, 512, 512),
        vae_groups=32,
        target="vit_base_patch14_dinov2.lvd142m",
        run=("trainer.global_batch_size=64",),
        steps=10,
        benchmarks={
            "xl": (0.5, ("model=xl_22en6de", *FAST, *FEW)),
            "b": (0.3, ("model=b_8en4de", *FAST, "sampling_batch_sizes=[1,32]", f"parts={MOST}")),
            "l": (0.2, ("model=l_20en4de", *FAST, *FEW)),
        },
        short=("trainer.max_steps=1000", "trainer.warmup_steps=100"),
        digits_alone=False,
    ),
    "tiny": Size(
        models=("nano", "nano"),
        changes=SMALL,
        latent_size=8,
        batch_size=2,
        image_size=32,
        vae_channels=(8, 8, 8, 8),
        vae_groups=4,
        target="vit_tiny_patch16_224.augreg_in21k",
        run=("trainer.global_batch_size=8", "model.patch_size=4", *SMALL),
        steps=2,
        benchmarks={"b": (1, ("model=nano", "latent_size=8", "batch_size=2", "dtype=fp32", "compile=false", *TINY))},
        short=("trainer.max_steps=40", "trainer.warmup_steps=0", "model.patch_size=4", *SMALL),
        digits_alone=True,
    ),
}


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a check runs. out: the folder of all results. scratch: a folder that is removed in the
    end. minutes: of the stage. deadline: its end, by `time.monotonic`.
    """

    out: Path
    scratch: Path
    device: torch.device
    size: Size
    minutes: float
    deadline: float

    def left(self) -> float:
        """Return the seconds that the stage has left."""
        return self.deadline - time.monotonic()


def relative(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """Return ‖a − b‖ / ‖b‖ over all values of two lists of tensors of equal shapes."""
    error = total = 0.0
    for x, y in zip(a, b, strict=True):
        wanted = y.double()
        error += (x.to(y.device).double() - wanted).square().sum().item()
        total += wanted.square().sum().item()
    return math.sqrt(error / total) if total else math.nan


def of_tolerance(a: Tensor, b: Tensor, rtol: float, atol: float) -> float:
    """Return the largest difference as a share of `atol + rtol·|b|`, as torch.testing.assert_close
    would allow it.
    """
    difference = (a.detach().cpu().double() - b.double()).abs()
    return (difference / (atol + rtol * b.double().abs())).max().item()


def network_of(place: Place, name: str, device: torch.device) -> ddt.DDT:
    """Return a network of conf/model with random weights, also where a new one starts at zero."""
    with composing(CONF):
        overrides = [f"model={name}", *place.size.changes]
        settings: Any = OmegaConf.to_container(hydra.compose("train", overrides).model, resolve=True)
    torch.manual_seed(0)
    with device:
        return without_zeros(build(settings)(in_channels=CHANNELS, num_classes=CLASSES))


def batch_of(place: Place, device: torch.device) -> dict[str, Tensor]:
    """Return a training batch: latents, noise (B, C, H, W), y, time_normal, dropout_uniform (B,)."""
    generator = torch.Generator().manual_seed(1)
    batch, side = place.size.batch_size, place.size.latent_size
    drawn = {
        "latents": torch.randn(batch, CHANNELS, side, side, generator=generator),
        "noise": torch.randn(batch, CHANNELS, side, side, generator=generator),
        "y": torch.randint(CLASSES, (batch,), generator=generator),
        "time_normal": torch.randn(batch, generator=generator),
        "dropout_uniform": torch.rand(batch, generator=generator),
    }
    return {key: value.to(device) for key, value in drawn.items()}


def autocast(device: torch.device, dtype: Dtype) -> torch.autocast:
    """Return the context of a network's arithmetic."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == "bf16")


@torch.no_grad()
def velocity(network: ddt.DDT, batch: dict[str, Tensor], dtype: Dtype = "fp32") -> Tensor:
    """Return the velocities (B, C, H, W) of noise at half time."""
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
    found = [parameter.grad for parameter in network.parameters()]
    network.zero_grad(set_to_none=True)
    return [loss.detach(), *(gradient for gradient in found if gradient is not None)]


@contextlib.contextmanager
def exact() -> Iterator[None]:
    """Let float32 mean float32 for a while: no TF32, in products or in convolutions."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def golden_case(device: torch.device, name: str, number: int) -> tuple[float, float]:
    """Return what a network's outputs and its gradient norms differ by, as shares of the tolerance."""
    network = golden.network(name).to(device)
    io = golden.case(name, number)
    x, t, y, shared, target = (io[key].to(device) for key in ("x", "t", "y", "x_shared", "target"))
    z, v = network.encode(x, t, y), network(x, t, y)
    loss = (v - target).square().mean()
    loss.backward()
    found = {"z": z, "v": v, "v_shared": network.decode(shared, z), "loss": loss}
    outputs = max(of_tolerance(value, io[key], **golden.TOLERANCE) for key, value in found.items())
    settings = {"encoder_depth": len(network.encoder.blocks)}
    weights = {network.release.published_name(name, settings): p for name, p in network.named_parameters()}
    norms = {key.removeprefix("gradnorm."): norm for key, norm in io.items() if key.startswith("gradnorm.")}
    assert len(norms) == len(weights), "a norm for each weight"
    slopes = {key: weights[key].grad for key in norms}
    return outputs, max(
        math.nan if slope is None else of_tolerance(slope.norm(), norms[key], **golden.GRADIENT_TOLERANCE)
        for key, slope in slopes.items()
    )


def golden_numbers(place: Place) -> list[Finding]:
    """Compare the device's float32 numbers with those of the release."""
    cases = [golden_case(place.device, *case) for case in golden.CASES]
    runs, samplers = golden.trajectories()
    network = golden.network("tiny").to(place.device)
    noise, y = samplers["noise"].to(place.device), samplers["cond"].to(place.device)
    errors = []
    for name, run in runs.items():
        latents = ddt.sample(network, noise, y, **golden.sampler_settings(name, run, samplers))
        errors.append(of_tolerance(latents, samplers[name], rtol=1e-4, atol=golden.CLOSE.get(name, 1e-5)))
    io = golden.case("tiny", 0)
    with torch.no_grad(), autocast(place.device, "bf16"):
        v = network(*(io[key].to(place.device) for key in ("x", "t", "y")))
    return [
        Finding("velocity, z, loss: share of the tolerance", max(outputs for outputs, _ in cases), high=1),
        Finding("gradient norms: share of the tolerance", max(norms for _, norms in cases), high=1),
        Finding(f"{len(runs)} trajectories: share of the tolerance", max(errors), high=1),
        Finding("bf16 velocity: relative error", relative([v], [io["v"]]), BF16[0], golden.BF16_ERROR),
    ]


def against_cpu(place: Place) -> list[Finding]:
    """Compare the small model's velocity, gradients and samples with those of the CPU, in float32."""
    cpu = torch.device("cpu")
    wanted = network_of(place, place.size.models[0], cpu)
    network = copy.deepcopy(wanted).to(place.device)
    here, there = batch_of(place, place.device), batch_of(place, cpu)
    return [
        Finding("velocity", relative([velocity(network, here)], [velocity(wanted, there)]), high=FLOAT32),
        Finding("gradients", relative(gradients(network, here), gradients(wanted, there)), high=FLOAT32),
        Finding("latents of 4 steps", relative([sampled(network, here)], [sampled(wanted, there)]), high=FLOAT32),
    ]


def bf16_against_fp32(place: Place) -> list[Finding]:
    """Compare bf16 autocast with float32: velocity, gradients and samples, of the small and the
    large model.
    """
    findings = []
    batch = batch_of(place, place.device)
    for name in dict.fromkeys(place.size.models):
        network = network_of(place, name, place.device)
        v, latents = (
            relative([function(network, batch, "bf16")], [function(network, batch)]) for function in (velocity, sampled)
        )
        slopes = relative(gradients(network, batch, "bf16"), gradients(network, batch))
        findings += [
            Finding(f"{name}: velocity", v, *BF16),
            Finding(f"{name}: latents of 4 steps", latents, *BF16_LATENTS),
            Finding(f"{name}: gradients", slopes, *BF16),
        ]
        del network  # before the next one is made
    return findings


def graphs() -> int:
    """Return how many graphs have been compiled since the last reset."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def compiled_against_eager(place: Place) -> list[Finding]:
    """Compare compiled blocks with eager ones: velocity and gradients, in both precisions; compile
    seconds.
    """
    findings = []
    batch = batch_of(place, place.device)
    for dtype, bound in (("fp32", FLOAT32), ("bf16", BF16[1])):
        torch.compiler.reset()
        torch._dynamo.utils.counters.clear()
        eager = network_of(place, place.size.models[0], place.device)
        network = copy.deepcopy(eager)
        compile_blocks(network, dynamic=False)
        began = time.perf_counter()
        v, slopes = velocity(network, batch, dtype), gradients(network, batch, dtype)
        first = time.perf_counter() - began
        findings += [
            Finding(f"{dtype} velocity", relative([v], [velocity(eager, batch, dtype)]), high=bound),
            Finding(f"{dtype} gradients", relative(slopes, gradients(eager, batch, dtype)), high=bound),
            Finding(f"{dtype} graphs compiled", graphs(), low=1),
            Finding(f"{dtype} seconds to compile forward and backward", first),
        ]
    torch.compiler.reset()
    return findings


def frozen_networks(place: Place) -> list[Finding]:
    """Compare autoencoder and alignment target, of the true architectures with random weights, with
    the CPU's.
    """
    try:
        import diffusers
    except ImportError as error:
        raise NotRun("diffusers is missing") from error
    import timm
    from safetensors.torch import save_file

    from ddt.autoencoder import KLAutoencoder
    from ddt.autoencoder.diffusers import SD_VAE
    from ddt.objective.alignment import Target

    torch.manual_seed(0)
    size, cpu = place.size, torch.device("cpu")
    widths = {"block_out_channels": size.vae_channels, "norm_num_groups": size.vae_groups}
    diffusers.AutoencoderKL.from_config(SD_VAE | widths).save_pretrained(place.scratch / "vae")
    extractor = timm.create_model(size.target)
    save_file(random_values(extractor).state_dict(), place.scratch / "target.safetensors")
    found: list[list[Tensor]] = []
    for device in (place.device, cpu):
        generator = torch.Generator().manual_seed(2)
        images = torch.randint(256, (2, 3, size.image_size, size.image_size), generator=generator)
        pixels = images.to(torch.uint8).to(device)
        autoencoder = KLAutoencoder(str(place.scratch / "vae")).to(device)
        side = autoencoder.latent_shape(3, size.image_size)[1]
        latents = torch.randn(2, CHANNELS, side, side, generator=generator).to(device)
        target = Target(size.target, str(place.scratch / "target.safetensors"), size.image_size).to(device)
        found.append([autoencoder.encode(pixels), autoencoder.decode(latents), target(pixels)])
    (moments, decoded, features), (moments_cpu, decoded_cpu, features_cpu) = found
    levels = (decoded.cpu().int() - decoded_cpu.int()).abs().max().item()
    return [
        Finding("moments", relative([moments], [moments_cpu]), high=FLOAT32),
        Finding("decoded images: grey levels", levels, high=1),
        Finding("features of the target", relative([features], [features_cpu]), high=FLOAT32),
    ]


@torch.no_grad()
def random_values(network: nn.Module) -> nn.Module:
    """Fill a network of timm with values none of which is a constant that hides an error, and
    return it.
    """
    for name, parameter in network.named_parameters():
        scales = parameter.ndim == 1 and not name.endswith("bias")
        parameter.copy_(scales + 0.04 * torch.randn_like(parameter))
    return network
