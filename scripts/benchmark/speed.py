"""The timing checks of gpu_check.py: networks of random weights on random latents, bf16, compiled.

A time is the mean of calls in a row, after one that compiles and warms up. Each finding's row has
the keys of a row of `python -m scripts.benchmark`, and the model; scripts/estimate.py reads both.
"""

import functools
import gc
import math
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ddt.autoencoder import KLAutoencoder
from ddt.config import group_values, locate
from ddt.distributed.compile import compile_blocks, compiles
from ddt.distributed.graphs import block_work, uses_graphs
from ddt.distributed.prepare import make_accelerator
from ddt.generation.generator import cast_weights
from ddt.precision import torch_dtype
from ddt.sampling.cost import sampling_macs
from ddt.sampling.graphs import Function, Graphs, direct
from ddt.sampling.sample import sample_latents
from ddt.sampling.settings import SamplerSettings
from ddt.training.throughput import training_flops
from scripts.benchmark import parts, run
from scripts.benchmark.checks import Finding, Place, random_vae, speed
from scripts.benchmark.parts import INTERVALS, OurTraining, Setup
from scripts.benchmark.timing import Row, matmul_rate, measure, seconds_of

NUM_STEPS = 10  # of a timed sampling
FULL_STEPS, FULL_IMAGES = 50, 50_000  # of the evaluation of a paper
EVERY = 5  # steps that share an encoder's output: the ratio .80
GIB = 2**30


def setup_of(place: Place, model: str, latent: tuple[int, int], batch_size: int = 1) -> Setup:
    """Return the set-up of a network of conf/model. latent: its channels and side."""
    settings = group_values("model", model) | place.size.changes
    build = locate(settings.pop("_target_"))
    channels, latent_size = latent
    return Setup(
        make_model=lambda **changes: build(**{**settings, **changes, "in_channels": channels}),
        device=place.device, dtype="bf16", compile=compiles("compile", None, place.device.type == "cuda", place.device),
        latent_size=latent_size, batch_size=batch_size, sampling_batch_sizes=[batch_size], num_steps=NUM_STEPS,
        ratios=[0, 1 - 1 / EVERY], align_depth=1, records=1, folder=place.scratch, accelerator=make_accelerator(),
    )  # fmt: skip


@functools.cache  # all checks of a call are compared with one rate: a card that is warm is slower
def product_rate(device: torch.device) -> float:
    """Return the FLOP/s of a product of large bf16 matrices."""
    return matmul_rate(device, torch_dtype("bf16"), run.MATMUL_SIZE[device.type])


def row_of(setup: Setup, model: str, part: str, case: str, images: int, seconds: float, flops: float) -> Row:
    """Return a row as `scripts.benchmark` writes it, without what compares ways."""
    way = "ours compiled" if setup.compile else "ours"
    return {
        "model": model, "part": part, "case": case, "way": way, "images": images, "seconds": seconds,
        "images_per_second": images / seconds, "flops": flops, "base": way, "first": way,
    }  # fmt: skip


# --- the checks


def product(place: Place) -> Iterator[Finding]:
    """The yardsticks: products of bf16 matrices, some and many in a row, and a copy."""
    size, device = run.MATMUL_SIZE[place.device.type], place.device
    a, b = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    burst = product_rate(place.device)
    yield Finding("bf16 product, TFLOP/s", burst / 1e12)
    repeats = max(1, math.ceil(place.size.sustained / (2 * size**3 / burst)))
    yield Finding(
        f"{repeats} products in a row, TFLOP/s", 2 * size**3 / seconds_of(lambda: a @ b, device, repeats) / 1e12
    )
    source, target = (torch.empty(place.size.copied, dtype=torch.uint8, device=device) for _ in range(2))
    seconds = seconds_of(lambda: target.copy_(source), device, 10)
    yield Finding("copy, GB/s, read and written", 2 * place.size.copied / seconds / 1e9)


def trainer(setup: Setup, latent: tuple[int, int]) -> tuple[OurTraining, dict[str, Tensor]]:
    """Return training steps of FlowMatching without an alignment, and a batch."""
    ours = OurTraining(setup, setup.network(), None)
    if setup.compile:
        compile_blocks(ours.objective.denoiser, dynamic=False)
    return ours, parts.random_batch(setup.batch_size, latent[1], setup.device, latent[0])


def taken(device: torch.device) -> int:
    """Return the bytes of a device that are in use, by graphs too."""
    free, total = torch.cuda.mem_get_info(device)
    return total - free


def train(place: Place, model: str, latent: tuple[int, int], images: tuple[int, ...]) -> Iterator[Finding]:
    """Training steps of FlowMatching without an alignment, at each number of images."""
    rate, cuda = product_rate(place.device), place.device.type == "cuda"
    for n in images:
        setup = setup_of(place, model, latent, n)
        ours, batch = trainer(setup, latent)
        step, shape = functools.partial(ours.step, batch), (latent[0], latent[1], latent[1])
        flops = n * training_flops(ours.objective, shape)
        work = block_work(ours.objective.denoiser, shape, n)
        graphs = uses_graphs(None, setup.compile, False, work, place.device)
        name = f"{model}, {latent[1]}×{latent[1]} latents, {n} images"
        try:
            for _ in range(2):  # compiles; makes the optimizer's state
                step()
            if graphs:
                ours.capture(batch)
                step()
            if cuda:
                torch.cuda.reset_peak_memory_stats()
            seconds = seconds_of(step, place.device, place.size.repeats)
        except torch.OutOfMemoryError:
            yield Finding(f"{name}: out of memory", "–")
        else:
            row = row_of(setup, model, "training", f"batch {n}, no alignment", n, seconds, flops)
            row |= {"share_of_matmul": flops / seconds / rate, "latent": list(latent)}
            text = f"{1000 * seconds:.1f} ms, {speed(row)}"
            if graphs:  # torch does not count what they keep for themselves
                text += f", {taken(place.device) / GIB:.0f} GiB with graphs"
            elif cuda:
                row["peak_bytes"] = torch.cuda.max_memory_allocated()
                text += f", {row['peak_bytes'] / GIB:.0f} GiB"
            yield Finding(name, text, row=row)
        del ours, batch, step
        free(place.device)


def free(device: torch.device) -> None:
    """Give back the memory of what is no longer used; captured networks hold on to themselves."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def host_seconds(step: Callable[[], object]) -> float:
    """Return the seconds in which the host launches a step, the least of five."""
    times = []
    for _ in range(5):
        torch.cuda.synchronize()
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return min(times)


def training_graphs(place: Place) -> Iterator[Finding]:
    """Training of few images by CUDA graphs beside the same without: milliseconds, and bits."""
    cuda = place.device.type == "cuda"  # a CPU, which has none, tries the check itself
    for model, latent, batches in place.size.few_images:
        for n in batches:
            ours, batch = trainer(setup_of(place, model, latent, n), latent)
            for group in ours.state.optimizer.param_groups:
                group["lr"] = 0.0  # gradients of the same weights before and after
            step, name = functools.partial(ours.step, batch), f"{model}, {n} images"
            texts, gradients = [], []
            for captures in (False, True):
                if captures and cuda:
                    ours.capture(batch)
                for _ in range(2):
                    ours.forward_backward(batch)
                gradients.append(ours.gradients(batch))
                ours.objective.zero_grad(set_to_none=True)
                text = f"{1000 * seconds_of(step, place.device, place.size.repeats):.1f} ms"
                if cuda:
                    text += f" (host {1000 * host_seconds(step):.1f}), {taken(place.device) / GIB:.0f} GiB"
                texts.append(text)
            differ = int((gradients[0] != gradients[1]).sum())
            yield Finding(f"{name}: values of gradients that differ by graphs", differ, high=0)
            yield Finding(f"{name}: a step without, by graphs", " → ".join(texts))
            del ours, batch, step, gradients
            free(place.device)


def training(place: Place, chosen: str) -> Iterator[Finding]:
    """Training of the networks of `Size.trained[chosen]`."""
    for model, latent, images in place.size.trained[chosen]:
        yield from train(place, model, latent, images)


def at_steps(every: int) -> str:
    """Return in words at which steps the encoder runs."""
    return f"encoder at {'each' if every == 1 else f'every {every}th'} step"


class Sampling:
    """Guided sampling of a network by Euler's method, compiled; noise (B, C, H, W)."""

    def __init__(self, place: Place, model: str, latent: tuple[int, int]) -> None:
        self.setup, self.latent = setup_of(place, model, latent), latent
        self.network = self.setup.network()
        cast_weights(self.network, self.setup.dtype)
        if self.setup.compile:
            compile_blocks(self.network, dynamic=True)

    def settings(self, every: int, bounds: tuple[float, float] | None) -> SamplerSettings:
        """Return the settings whose encoder runs at every n-th step; bounds: of the guidance."""
        shared = None if every == 1 else f"uniform:{every}"
        return SamplerSettings(num_steps=NUM_STEPS, cfg_interval=bounds, recompute=shared)

    def call(self, n: int, settings: SamplerSettings, call: Function = direct) -> Tensor:
        """Return n latents (B, C, H, W)."""
        batch = parts.random_batch(n, self.latent[1], self.setup.device, self.latent[0])
        with self.setup.autocast():
            return sample_latents(self.network, batch["noise"], batch["y"], settings, call=call)


def sampling(place: Place, chosen: str) -> Iterator[Finding]:
    """Sampling of the networks of `Size.sampled[chosen]`, plain and shared."""
    for model, latent, n in place.size.sampled[chosen]:
        case = Sampling(place, model, latent)
        rate = product_rate(place.device)
        for interval, bounds in INTERVALS.items():
            for every in (1, EVERY):
                settings = case.settings(every, bounds)
                call = functools.partial(case.call, n, settings)
                call()
                seconds = seconds_of(call, place.device, 2)
                flops = 2 * n * sampling_macs(case.network, latent[1], latent[1], settings)
                name = f"batch {n}, {interval}, {at_steps(every)}"
                row = row_of(case.setup, model, "sampling", name, n, seconds, flops)
                row["share_of_matmul"] = flops / seconds / rate
                minutes = seconds / NUM_STEPS * FULL_STEPS * FULL_IMAGES / n / 60
                text = f"{1000 * seconds / NUM_STEPS:.2f} ms a step; 50,000 of {FULL_STEPS} steps: {minutes:.0f} min"
                yield Finding(f"{model}, {name}", text, row=row)


def against_plain(place: Place) -> Iterator[Finding]:
    """Training and sampling of the large model beside the plain reference, whose numbers agree."""
    model, latent, images, sampled = place.size.beside_plain
    setup = setup_of(place, model, latent, images)
    setup.sampling_batch_sizes = [sampled]
    for part in (functools.partial(parts.training, setup, [False]), functools.partial(parts.sampling, setup)):
        for case in part():
            for row in measure(case, place.device, product_rate(place.device), 3, place.deadline):
                milliseconds = 1000 * row["seconds"] / (NUM_STEPS if row["part"] == "sampling" else 1)
                yield Finding(
                    f"{row['part']}, {row['case']}: {row['way']}", f"{milliseconds:.1f} ms a step, {speed(row)}",
                    row={**row, "model": model},
                )  # fmt: skip
            torch.compiler.reset()


def ema(place: Place) -> Iterator[Finding]:
    """The EMA's update of the large model beside the plain one, whose numbers agree."""
    model, latent, *_ = place.size.beside_plain
    for case in parts.ema(setup_of(place, model, latent)):
        for row in measure(case, place.device, 1.0, 3, place.deadline):  # no products, so no share of their rate
            if row["way"] == "ours":
                yield Finding(f"{model}: relative error", row["error"], high=case.tolerance)
            yield Finding(f"{model}: {row['way']}", f"{1000 * row['seconds']:.2f} ms")


def small_batches(place: Place) -> Iterator[Finding]:
    """Sampling of few images by CUDA graphs beside the same without: milliseconds, and bits."""
    model, latent, batches = place.size.small_batches
    case = Sampling(place, model, latent)
    for every in (1, EVERY):
        for n in batches:
            settings, graphs = case.settings(every, (0.3, 1.0)), Graphs()
            plainly = functools.partial(case.call, n, settings)
            by_graphs = functools.partial(case.call, n, settings, graphs)
            for _ in range(2):  # captured at the second call of a shape
                latents = by_graphs()
            differ = int((latents != plainly()).sum())
            name = f"{n} image{'s' * (n > 1)}, {at_steps(every)}"
            yield Finding(f"{name}: values that differ by graphs", differ, high=0)
            seconds = [seconds_of(call, place.device, 2) / NUM_STEPS for call in (plainly, by_graphs)]
            yield Finding(
                f"{name}: without, by graphs", " → ".join(f"{1000 * value:.2f}" for value in seconds) + " ms a step"
            )


def autoencoder(place: Place) -> Iterator[Finding]:
    """Encoding and decoding by SD-VAE of random weights, as training and sampling do it."""
    vae, size = KLAutoencoder(str(random_vae(place))).to(place.device), place.size
    images = torch.randint(256, (size.vae_images, 3, size.image_size, size.image_size), dtype=torch.uint8)
    pixels = images.to(place.device)
    with torch.no_grad():
        latents = vae.encode(pixels)[:, : parts.CHANNELS]
        for name, call in (
            ("encoded", functools.partial(vae.encode, pixels)), ("decoded", functools.partial(vae.decode, latents)),
        ):  # fmt: skip
            call()
            seconds = seconds_of(call, place.device, 2)
            yield Finding(f"SD-VAE, {size.vae_images} images {name}", f"{size.vae_images / seconds:.0f} images/s")
