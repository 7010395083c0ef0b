"""What a recipe costs before anyone starts it: parameters, arithmetic, memory, time, disk.

Counted on the meta device, without data and without weights. Arithmetic by `ddt.model.cost` and
`ddt.training.throughput`; memory by what training keeps (`ddt.training.state`) and what autograd
saves; time by a rate that was measured or is assumed.
Shapes: C H W latent, N tokens, D width, P parameters, G images a step, n devices.
"""

import copy
import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ddt.autoencoder import Identity
from ddt.autoencoder.diffusers import DiffusersAutoencoder
from ddt.errors import UserError, require
from ddt.model.cost import network_macs
from ddt.model.layers import PRODUCTS, Block, BlockStack, Checkpointing, positions
from ddt.objective import FlowMatching
from ddt.objective.alignment import AlignmentLoss, Target
from ddt.sampling.cost import sampling_macs
from ddt.sampling.settings import SamplerSettings
from ddt.training.ema import ema_rules
from ddt.training.settings import TrainerSettings
from ddt.training.throughput import PEAKS, counted_flops, peak_of, target_flops, training_flops

FLOAT, HALF = 4, 2  # bytes
# Bytes from the makers' data sheets, of the larger kind where there are two. A sheet's 80 GB are 80
# GiB in truth, which leaves room for the CUDA context
MEMORY = {
    "H200": 141e9, "H100 PCIe": 80e9, "H100 NVL": 94e9, "H100": 80e9, "A100": 80e9, "L40S": 48e9, "L4": 24e9,
    "A10": 24e9, "RTX 4090": 24e9, "B200": 180e9,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Rate:
    """How fast a device is. training, sampling: FLOP/s, None where it is not known; memory: bytes,
    or None.

    source: where the FLOP/s come from, in words; `measured` tells whether from a measurement.
    """

    training: float | None
    sampling: float | None
    memory: float | None
    source: str
    measured: bool


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What a cost depends on. All networks lie on the meta device.

    objective: with the projector, where there is an alignment. shape: (C, H, W) of a latent;
    image_size: pixels a side;
    num_images: of an epoch, None where nobody knows. cached: whether latents are read rather than
    encoded. align_until: the first step without alignment. gpus: n, processes with a device each.
    num_samples: images to draw.

    Raises UserError where the processes cannot share the work.
    """

    objective: FlowMatching
    target: Target | None
    autoencoder: DiffusersAutoencoder | Identity
    shape: tuple[int, int, int]
    image_size: int
    num_images: int | None
    cached: bool
    align_until: float
    trainer: TrainerSettings
    sampler: SamplerSettings
    gpus: int
    num_samples: int

    def __post_init__(self) -> None:
        for key in ("gpus", "num_samples"):
            require(getattr(self, key) >= 1, f"{key}={getattr(self, key)}: must be at least 1")
        require(
            self.trainer.parallelism == "ddp" or self.gpus > 1,
            "trainer.parallelism=fsdp: needs several processes to shard among; give gpus=8, or leave it out",
        )
        self.trainer.micro_batches(self.gpus)

    @property
    def bf16(self) -> bool:
        """Whether the network computes in bf16."""
        return self.trainer.mixed_precision == "bf16"

    @property
    def checkpointing(self) -> Checkpointing:
        """What of the blocks is computed again in the backward pass."""
        return blocks(self.objective)[0].activation_checkpointing


def stacks(module: nn.Module) -> list[BlockStack]:
    """Return the encoder and the decoder, or the undivided baseline."""
    return [part for part in module.modules() if isinstance(part, BlockStack)]


def blocks(module: nn.Module) -> list[Block]:
    """Return the blocks of a denoiser, the encoder's first."""
    return [part for part in module.modules() if isinstance(part, Block)]


def with_checkpointing(objective: FlowMatching, kind: Checkpointing) -> FlowMatching:
    """Return a copy of an objective whose blocks keep this much for the backward pass."""
    changed = copy.deepcopy(objective)
    for block in blocks(changed):
        block.activation_checkpointing = kind
    return changed


def count(module: nn.Module | None) -> int:
    """Return the parameters of a module, 0 of None."""
    return 0 if module is None else sum(parameter.numel() for parameter in module.parameters())


# --- rates


def assumed_rate(device: str, share: float, memory_gb: float | None, dtype: str) -> Rate:
    """Return the rate of a device of `throughput.PEAKS` at a share of its data sheet's dense bf16
    rate.

    In fp32 no rate is known. Raises UserError for another device or share.
    """
    require(device in PEAKS, f"device={device}: its rate is not known here; choose from {', '.join(PEAKS)}")
    require(0 < share <= 1, f"share={share:g}: must lie in 0..1, a share of the data sheet's rate such as 0.4")
    memory = MEMORY[device] if memory_gb is None else memory_gb * 1e9
    if dtype != "bf16":
        return Rate(None, None, memory, f"not known: {device}'s data sheet tells of bf16; give measured=FILE", False)
    text = f"ASSUMED: {share:.0%} of {device}'s data-sheet rate ({si(PEAKS[device], 'FLOP/s')}, bf16); not measured"
    return Rate(share * PEAKS[device], share * PEAKS[device], memory, text, False)


def fastest(rows: list[dict[str, Any]], part: str, aligned: bool) -> dict[str, Any] | None:
    """Return the row of a part of a benchmark that did most arithmetic a second, plain ways left
    out; None: no row.

    aligned: of training, rather a case with the alignment's target than without, or the other way
    round; its products are larger than a small network's, and its rate higher.
    """
    found = [row for row in rows if row["part"] == part and "seconds" in row and not row["way"].startswith("plain")]
    alike = [row for row in found if ("aligned" in row["case"]) == aligned] if part == "training" else found
    return max(alike or found, key=lambda row: row["flops"] / row["seconds"], default=None)


def measured_rate(path: str, memory_gb: float | None, dtype: str, model: str, aligned: bool) -> Rate:
    """Return the rate that a `benchmark.json` of scripts/benchmark/__main__.py holds, for a recipe
    of conf/model/`model`.

    aligned: whether an alignment's target runs in the recipe.

    Raises UserError where the file is none, or was measured in another arithmetic than `dtype`.
    """
    require(
        Path(path).is_file(), f"measured={path}: no such file; give a benchmark.json of scripts/benchmark/__main__.py"
    )
    try:
        content = json.loads(Path(path).read_bytes())
        rows, device, date = content["rows"], content["machine"]["device"], content["date"][:10]
        training, sampling = fastest(rows, "training", aligned), fastest(rows, "sampling", aligned)
        used, whose = content["matmul"]["dtype"], content["settings"]["model"]
        rates = [None if row is None else row["flops"] / row["seconds"] for row in (training, sampling)]
        cases = [f"{row['part']} {row['case']}, {row['way']}" for row in (training, sampling) if row is not None]
        sound = content["kind"] == "benchmark" and all(rate is None or rate > 0 for rate in rates)
    except (ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError):
        sound = False
    require(sound, f"measured={path}: is no result of scripts/benchmark/__main__.py; give its benchmark.json")
    require(
        training is not None,
        f"measured={path}: measured no training; run scripts/benchmark/__main__.py with parts=[training,sampling]",
    )
    require(
        used == dtype,
        f"measured={path}: was measured in {used}, this recipe computes in {dtype}; measure with dtype={dtype}",
    )
    known = next((size for name, size in MEMORY.items() if peak_of(device) and re.search(rf"\b{name}\b", device)), None)
    memory = known if memory_gb is None else memory_gb * 1e9
    other = "" if whose == model else f"; of {whose}, ASSUMED for {model} too"
    return Rate(rates[0], rates[1], memory, f"measured: {device}, {date} ({'; '.join(cases)}){other}", True)


# --- arithmetic


def autoencoder_flops(recipe: Recipe) -> tuple[int, int]:
    """Return the FLOPs of encoding and of decoding an image."""
    if isinstance(recipe.autoencoder, Identity):
        return 0, 0
    network, size = recipe.autoencoder.network, recipe.image_size
    pixels = torch.empty(1, network.config.in_channels, size, size, device="meta")
    latents = torch.empty(1, *recipe.shape, device="meta")
    return counted_flops(network.encode, pixels), counted_flops(network.decode, latents)


def flops(recipe: Recipe) -> dict[str, float]:
    """Return the FLOPs of an image in a forward pass, a training step and sampling, and of the
    whole of both.

    A training step is three forwards of the network (`throughput.training_flops`); with activation
    checkpointing one more, `recomputed`, which takes time and is no progress. The autoencoder's are
    apart: they are in no total.
    """
    denoiser, size, trainer = recipe.objective.denoiser, recipe.shape[1:], recipe.trainer
    forward = 2 * network_macs(denoiser, *size).total
    plain, aligned = 3 * forward, training_flops(recipe.objective, recipe.shape)
    target = target_flops(recipe.target, recipe.image_size)
    recomputed = forward if recipe.checkpointing is True else 0  # selective: no matrix product
    steps = min(trainer.max_steps, recipe.align_until)
    rest = trainer.max_steps - steps
    encode, decode = autoencoder_flops(recipe)
    sampled = 2 * sampling_macs(denoiser, *size, recipe.sampler)
    return {
        "forward": forward,
        "training": aligned,
        "target": target,
        "recomputed": recomputed,
        "all_training": trainer.global_batch_size
        * (steps * (aligned + target + recomputed) + rest * (plain + recomputed)),
        "encode": encode,
        "decode": decode,
        "sampling": sampled,
        "all_sampling": sampled * recipe.num_samples,
    }


# --- memory


class Products(TorchDispatchMode):
    """Adds up, in `bytes`, what the operators return whose results selective checkpointing keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call an operator and look at what it returns."""
        out = func(*args, **(kwargs or {}))
        if func in PRODUCTS:
            self.bytes += sum(tensor.nbytes for tensor in tree_leaves(out) if isinstance(tensor, Tensor))
        return out


def saved_bytes(module: nn.Module, bf16: bool, *inputs: tuple[int, ...], **others: Any) -> int:
    """Return the bytes of all tensors that autograd saves in one forward of a module, weights and
    casts among them.

    Nothing is computed: parameters and float32 inputs of these shapes are fake tensors. The
    operators are those of the CPU; a GPU's fused RMSNorm saves less.
    """
    saved: dict[int, tuple[int, Tensor]] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage._cdata] = storage.nbytes(), tensor  # held, so that no other storage takes its place
        return tensor

    # the table of positions is real, and kept for others: it must not be made in here
    with FakeTensorMode(allow_non_fake_inputs=True):
        parameters = {name: torch.empty(p.shape, requires_grad=True) for name, p in module.named_parameters()}
        tensors = tuple(torch.empty(shape) for shape in inputs)
        with (
            torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
            torch.autocast("cpu", torch.bfloat16, enabled=bf16),
        ):
            torch.func.functional_call(module, parameters, tensors, others)
    return sum(size for size, _ in saved.values())


class LossOf(nn.Module):
    """An objective that is called with latents, noise, times and features alone."""

    def __init__(self, objective: FlowMatching) -> None:
        super().__init__()
        self.objective = objective

    def forward(self, latents: Tensor, times: Tensor, features: Tensor) -> dict[str, Tensor]:
        """Return the losses, of class 0."""
        return self.objective(latents, torch.zeros(len(latents), dtype=torch.long), latents, times, times, features)


def activation_bytes(objective: FlowMatching, shape: tuple[int, int, int], bf16: bool) -> int:
    """Return what a training step holds between forward and backward pass, bytes an image, for
    latents (C, H, W).

    It is the difference of two batches, so what does not grow with the batch is not in it. Of a
    stack's blocks, which all save the same, one and two are run and the others added. With
    activation checkpointing it is the blocks' inputs, and what the one block saves that is computed
    again; with selective checkpointing also what its products return.
    """
    kind = blocks(objective)[0].activation_checkpointing
    if kind == "selective":
        objective = with_checkpointing(objective, True)
    first, alignment = stacks(objective)[0], objective.alignment
    height, width = shape[1] // first.patch_size, shape[2] // first.patch_size
    at = positions(first.head_dim, height, width, torch.device("cpu"))
    grid, channels = (1, 1), 1
    if isinstance(alignment, AlignmentLoss):
        grid, channels = alignment.grid, list(alignment.projector.parameters())[-1].numel()

    def loss(*depths: int) -> int:
        shallow = LossOf(copy.deepcopy(objective))
        for stack, depth in zip(stacks(shallow), depths, strict=True):
            stack.blocks = stack.blocks[:depth]
        small, large = (
            saved_bytes(shallow, bf16, (batch, *shape), (batch,), (batch, grid[0] * grid[1], channels))
            for batch in (2, 4)
        )
        return (large - small) // 2

    def block(batch: int, stack: BlockStack, products: bool) -> int:
        tokens, last = (batch, height * width, objective.denoiser.hidden_size), copy.deepcopy(blocks(stack)[-1])
        last.activation_checkpointing = False
        per_token = objective.denoiser.shares_encoder and stack is stacks(objective)[-1]
        with Products() as returned:
            saved = saved_bytes(last, bf16, tokens, tokens if per_token else (batch, 1, tokens[2]), at=at)
        return returned.bytes if products else saved

    def each(stack: BlockStack, products: bool) -> int:
        return (block(4, stack, products) - block(2, stack, products)) // 2

    depths = [len(stack.blocks) for stack in stacks(objective)]
    ones = [1] * len(depths)
    base = found = loss(*ones)
    for place, depth in enumerate(depths):
        if depth > 1:
            found += (depth - 1) * (loss(*(number + (k == place) for k, number in enumerate(ones))) - base)
    if kind:
        found += each(stacks(objective)[-1], products=False)
    if kind == "selective":
        found += sum(len(stack.blocks) * each(stack, products=True) for stack in stacks(objective))
    return found


def memory(recipe: Recipe) -> dict[str, float]:
    """Return the bytes that each device holds at the end of a forward pass, by what they are.

    Weights, gradients, optimizer and averages are float32. Not in it: what kernels and the
    allocator need beside, the CUDA context, and encoding and decoding, which come when no
    activations are held.
    """
    trainer, sharded = recipe.trainer, recipe.trainer.parallelism == "fsdp"
    trained, averaged = count(recipe.objective), count(recipe.objective.denoiser)
    averages = len(ema_rules(trainer.ema_decay, trainer.ema_decays, trainer.ema_powers))
    parts = recipe.gpus if sharded else 1
    cast = [layer for layer in recipe.objective.modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
    block = max(map(count, blocks(recipe.objective)))
    micro, _ = trainer.micro_batches(recipe.gpus)
    found = {
        "weights": FLOAT * trained / parts,
        "gradients": FLOAT * trained / parts,
        "AdamW moments": 2 * FLOAT * trained / parts,
        "averages": FLOAT * averages * averaged / parts,
        # DDP exchanges gradients in buckets of its own; a sharded network gathers the next block
        # beside the present one
        "buckets of DDP": FLOAT * trained if recipe.gpus > 1 and not sharded else 0,
        "gathered by FSDP": FLOAT * (outside_blocks(recipe.objective) + 3 * block) if sharded else 0,
        "bf16 copies of weights": HALF * sum(map(count, cast)) if recipe.bf16 else 0,
        "alignment target": FLOAT * count(None if recipe.target is None else recipe.target.network),
        "autoencoder": FLOAT * count(getattr(recipe.autoencoder, "network", None)),
        "activations": micro * activation_bytes(recipe.objective, recipe.shape, recipe.bf16),
    }
    return {**{name: math.ceil(size) for name, size in found.items()}, "total": sum(map(math.ceil, found.values()))}


def outside_blocks(objective: FlowMatching) -> int:
    """Return the parameters that are in no block."""
    return count(objective) - sum(map(count, blocks(objective)))


def ways_to_fit(recipe: Recipe, found: dict[str, float], limit: float) -> str:
    """Return the settings that make a recipe fit which holds `found` bytes where `limit` are there."""
    micro, _ = recipe.trainer.micro_batches(recipe.gpus)
    share = recipe.trainer.global_batch_size // recipe.gpus
    rest = found["total"] - found["activations"]

    def largest(each: float) -> int:
        return next((size for size in range(micro, 0, -1) if share % size == 0 and rest + size * each <= limit), 0)

    ways = []
    smaller = largest(found["activations"] / micro)
    if smaller:
        ways.append(f"trainer.micro_batch_size={smaller}")
    kinds: dict[Checkpointing, tuple[Checkpointing, ...]] = {False: ("selective", True), "selective": (True,), True: ()}
    for kind in kinds[recipe.checkpointing]:
        size = largest(activation_bytes(with_checkpointing(recipe.objective, kind), recipe.shape, recipe.bf16))
        if size:
            with_it = "" if size == micro else f" trainer.micro_batch_size={size}"
            ways.append(f"model.activation_checkpointing={str(kind).lower()}{with_it}")
    if not ways:
        ways.append("more gpus= with trainer.parallelism=fsdp" if rest > limit else "more gpus=")
        ways.append("a device with more memory")
    return ", or ".join(ways)


# --- disk and wires


def saved_steps(trainer: TrainerSettings) -> list[int]:
    """Return the steps whose checkpoints a finished run holds; the best one of `keep_best` is an
    older one at most.
    """
    every, last = trainer.save_every, trainer.max_steps
    steps = sorted({*(range(every, last + 1, every) if every else ()), last})
    if trainer.keep_last is None:
        return steps
    kept = set(steps[-trainer.keep_last :])
    kept |= {step for step in steps if trainer.keep_every and step % trainer.keep_every == 0}
    others = [step for step in steps if step not in kept]
    return sorted(kept | set(others[:1] if trainer.keep_best else ()))


def disk(recipe: Recipe) -> dict[str, float | None]:
    """Return the bytes of a checkpoint (`TrainingState.bytes`), of a finished run, and of the
    latent cache it reads.

    `run` has the checkpoints that stay and the snapshots; while one is saved there is one more.
    `cache`: moments in float16, None where nothing is cached or nobody knows how many images there
    are.
    """
    trainer = recipe.trainer
    trained, averaged = count(recipe.objective), count(recipe.objective.denoiser)
    averages = len(ema_rules(trainer.ema_decay, trainer.ema_decays, trainer.ema_powers))
    checkpoint = FLOAT * (3 * trained + averages * averaged)
    every = trainer.snapshot_every
    snapshots = -(-trainer.max_steps // every) if every else 0  # the last step's among them
    channels = (2 if recipe.autoencoder.stochastic else 1) * recipe.shape[0]
    record = HALF * channels * recipe.shape[1] * recipe.shape[2]
    kept = len(saved_steps(trainer))
    return {
        "checkpoint": checkpoint,
        "checkpoints": kept,
        "run": kept * checkpoint + snapshots * len(trainer.ema_powers) * FLOAT * averaged,
        "record": record if recipe.cached else None,
        "cache": record * recipe.num_images if recipe.cached and recipe.num_images is not None else None,
    }


def exchanged_bytes(recipe: Recipe) -> float:
    """Return the bytes that each of n processes sends in a step, around a ring.

    DDP: all gradients, 2(n−1)/n·4P. FSDP: each micro-batch gathers the blocks forward and backward
    and the rest once, (n−1)/n·4 bytes a parameter each time, and the last one hands out the
    gradients, as much again.
    """
    n, trained = recipe.gpus, count(recipe.objective)
    _, num_micro = recipe.trainer.micro_batches(n)
    if recipe.trainer.parallelism == "ddp":
        times: float = 2 * trained
    else:
        times = num_micro * (2 * trained - outside_blocks(recipe.objective)) + trained
    return (n - 1) / n * FLOAT * times


# --- the whole


def hours(work: float, rate: float | None, gpus: int) -> float | None:
    """Return the hours that `work` FLOPs take on devices of `rate` FLOP/s, None where that is not
    known.
    """
    return None if rate is None else work / (rate * gpus) / 3600


def estimate(recipe: Recipe, rate: Rate) -> dict[str, Any]:
    """Return all that is told of a recipe, as plain values: counts, FLOPs, bytes, hours."""
    denoiser, trainer = recipe.objective.denoiser, recipe.trainer
    encoder = count(denoiser.get_submodule("encoder")) if denoiser.shares_encoder else 0
    work, held = flops(recipe), memory(recipe)
    images = trainer.max_steps * trainer.global_batch_size
    fits = None if rate.memory is None else held["total"] <= rate.memory
    training, sampling = (
        hours(work[key], speed, recipe.gpus)
        for key, speed in (("all_training", rate.training), ("all_sampling", rate.sampling))
    )
    micro, num_micro = trainer.micro_batches(recipe.gpus)
    return {
        "parameters": {
            "denoiser": count(denoiser),
            "encoder": encoder,
            "decoder": count(denoiser) - encoder,
            "projector": count(recipe.objective.alignment),
            "target": count(None if recipe.target is None else recipe.target.network),
            "autoencoder": count(getattr(recipe.autoencoder, "network", None)),
        },
        "flops": work,
        "memory": {
            **held,
            "device": rate.memory,
            "fits": fits,
            "fix": ways_to_fit(recipe, held, rate.memory) if rate.memory is not None and not fits else None,
        },
        "time": {
            "rate": rate.source,
            "measured": rate.measured,
            "training_flops_per_second": rate.training,
            "sampling_flops_per_second": rate.sampling,
            "images_per_second": None if training is None else images / (3600 * training),
            "training_hours": training,
            "training_gpu_hours": None if training is None else recipe.gpus * training,
            "sampling_hours": sampling,
            "sampling_gpu_hours": None if sampling is None else recipe.gpus * sampling,
        },
        "disk": disk(recipe),
        "exchanged_bytes": exchanged_bytes(recipe),
        "gpus": recipe.gpus,
        "micro_batch_size": micro,
        "micro_batches": num_micro,
        "steps": trainer.max_steps,
        "global_batch_size": trainer.global_batch_size,
        "epochs": None if recipe.num_images is None else images / recipe.num_images,
        "num_samples": recipe.num_samples,
        "cached": recipe.cached,
    }


# --- words


def si(value: float, unit: str) -> str:
    """Return a number with three digits and the prefix of a thousand, such as "789 GFLOP"."""
    prefixes = ("", "k", "M", "G", "T", "P", "E", "Z", "Y")
    power = 0
    while power < len(prefixes) - 1 and abs(value) >= 999.5 * 1000**power:
        power += 1
    return f"{value / 1000**power:.3g} {prefixes[power]}{unit}"


def plain(value: float) -> str:
    """Return a number with three digits, or with all before the point."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def duration(each: float | None, gpus: int) -> str:
    """Return hours on all devices as hours, days and GPU hours."""
    if each is None:
        return "not known"
    days, all_hours = plain(each / 24), plain(each * gpus)
    return f"{plain(each)} hours = {days} days on {gpus} GPU{'s' * (gpus > 1)}, {all_hours} GPU hours"


def rows_of(found: dict[str, Any]) -> list[tuple[str, str]]:
    """Return an estimate as rows of a name and what is said of it; a name of "" goes on with the
    row before.
    """
    p, work, held, time, disk = (found[key] for key in ("parameters", "flops", "memory", "time", "disk"))
    halves = f" (encoder {p['encoder']:,}, decoder {p['decoder']:,})" if p["encoder"] else ""
    frozen = [f"{name} {p[key]:,}" for name, key in (("alignment target", "target"), ("autoencoder", "autoencoder"))
              if p[key]]  # fmt: skip
    step = [f"{si(work['training'], 'FLOP')} an image"]
    step += [f"{si(work['target'], 'FLOP')} in the alignment's target"] if work["target"] else []
    step += [f"{si(work['recomputed'], 'FLOP')} computed again"] if work["recomputed"] else []
    epochs = "" if found["epochs"] is None else f", {found['epochs']:.4g} epochs"
    gpus, micro = found["gpus"], found["micro_batches"]
    batch = f"{found['micro_batch_size']} images" + (f" {micro} times" if micro > 1 else "") + " a step"
    parts = {name: size for name, size in held.items() if name not in ("total", "device", "fits", "fix") and size}
    limit = "" if held["device"] is None else f" of {si(held['device'], 'B')}"
    fits = {None: "device unknown: give memory_gb=", True: "fits", False: f"DOES NOT FIT; give {held['fix']}"}
    speed = time["images_per_second"]
    rows = [
        ("parameters", f"{p['denoiser']:,}{halves}" + (f", projector {p['projector']:,}" if p["projector"] else "")),
        *([("frozen", ", ".join(frozen))] if frozen else []),
        ("forward", f"{si(work['forward'], 'FLOP')} an image"),
        ("training step", " + ".join(step)),
        ("whole training", f"{found['steps']:,} steps of {found['global_batch_size']}{epochs}: "
                           f"{si(work['all_training'], 'FLOP')}"),
        ("memory", f"{si(held['total'], 'B')}{limit} on each GPU, {batch}: {fits[held['fits']]}"),
        *(("", f"{name} {si(size, 'B')}") for name, size in parts.items()),
        ("rate", time["rate"]),
        ("training", duration(time["training_hours"], gpus)
                     + ("" if speed is None else f", {plain(speed)} images/s")),
        ("sampling", f"{found['num_samples']:,} images of {si(work['sampling'], 'FLOP')}: "
                     f"{duration(time['sampling_hours'], gpus)}"),
    ]  # fmt: skip
    if gpus > 1:
        sent = f"each GPU sends {si(found['exchanged_bytes'], 'B')} a step"
        rows.append(("", f"assumed: {gpus} GPUs are {gpus} times as fast as one; {sent}, which is not counted"))
    if work["encode"]:
        where = "once, for the cache" if found["cached"] else "in each step; a latent cache saves it"
        rows.append(("autoencoder", f"encodes an image in {si(work['encode'], 'FLOP')} ({where}), decodes it in "
                                    f"{si(work['decode'], 'FLOP')}: in no time above"))  # fmt: skip
    number = disk["checkpoints"]
    rows.append(("disk", f"{si(disk['checkpoint'], 'B')} a checkpoint, {si(disk['run'], 'B')} in all with {number} "
                         f"checkpoint{'s' * (number > 1)}"))  # fmt: skip
    if found["cached"]:
        whole = "how many images is not known" if disk["cache"] is None else f"{si(disk['cache'], 'B')} in all"
        rows.append(("latent cache", f"{si(disk['record'], 'B')} an image, {whole}"))
    return rows


def report(found: dict[str, Any]) -> str:
    """Return an estimate as an aligned table."""
    rows = rows_of(found)
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {text}" for name, text in rows)


def require_known(value: Any, key: str, data: str) -> None:
    """Raise UserError where a data set does not tell a value without being opened."""
    if value is None:
        raise UserError(f"{key}: data={data} does not tell it without being opened; give {key}=")
