"""Cost of a recipe before it starts: parameters, FLOPs, memory, time, disk.

Counted on the meta device, without data and weights. FLOPs by `ddt.model.cost` and
`ddt.training.throughput`; memory of the training state and of what autograd saves; time by a
measured or assumed rate. Shapes: C H W latent, N tokens, D width; P parameters, n devices.
"""

import copy
import dataclasses
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ddt.autoencoder import Autoencoder, build_autoencoder
from ddt.config import Choice, locate
from ddt.data.images import Outline
from ddt.data.survey import infer_settings
from ddt.epochs import in_epochs, in_steps
from ddt.errors import UserError, require
from ddt.files import read_json
from ddt.metrics.ranking import is_number
from ddt.model.cost import network_macs
from ddt.model.layers import PRODUCTS, BlockStack, Checkpointing, token_grid
from ddt.objective import Objective, network_arguments
from ddt.objective.alignment import Alignment
from ddt.objective.alignment_target import Target
from ddt.precision import HALF_TYPES
from ddt.sampling.cost import sampling_macs
from ddt.sampling.settings import SamplerSettings
from ddt.training.ema import ema_rules
from ddt.training.run import with_timeshift
from ddt.training.settings import MEASURED, EstimateSettings, TrainerSettings
from ddt.training.throughput import PEAKS, counted_flops, peak_of, target_flops, training_flops

FLOAT, HALF = 4, 2  # bytes
# Bytes of the makers' data sheets, of the larger variant. In truth 80 GB are 80 GiB, which leaves
# room for the CUDA context
MEMORY = {
    "H200": 141e9, "H100 PCIe": 80e9, "H100 NVL": 94e9, "H100": 80e9, "A100": 80e9, "L40S": 48e9, "L4": 24e9,
    "A10": 24e9, "RTX 4090": 24e9, "B200": 180e9,
}  # fmt: skip
IMAGENET = ("in256", "in256_latents", "in256_rae", "in512", "in512_latents", "in512_rae")  # files of conf/data


@dataclasses.dataclass(frozen=True)
class Rate:
    """Speed of a device. training, sampling: FLOP/s; memory: bytes; None: unknown.

    source: of the FLOP/s, in words. measured: or assumed. activations: measured bytes an image that
    compiled blocks hold between forward and backward, None: counted as eager ones.
    """

    training: float | None
    sampling: float | None
    memory: float | None
    source: str
    measured: bool
    activations: float | None = None


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What a cost depends on. All networks are on the meta device.

    objective: with the projector of an alignment. shape: (C, H, W) of a latent. image_size: pixels
    per side. num_images: of an epoch, None: unknown. cached: latents are read, not encoded.
    align_until: first step without alignment. gpus: n processes, a device each. num_samples: to
    sample.
    """

    objective: Objective
    target: Target | None
    autoencoder: Autoencoder
    shape: tuple[int, int, int]
    image_size: int
    num_images: int | None
    cached: bool
    align_until: float
    trainer: TrainerSettings
    sampler: SamplerSettings
    gpus: int
    num_samples: int

    @property
    def half(self) -> bool:
        """Whether the network computes in 16 bits."""
        return self.trainer.mixed_precision in HALF_TYPES

    @property
    def checkpointing(self) -> Checkpointing:
        """The blocks' activation checkpointing."""
        return self.objective.denoiser.all_blocks[0].activation_checkpointing

    @property
    def num_emas(self) -> int:
        """Number of EMAs."""
        return len(ema_rules(self.trainer.ema_decay, self.trainer.ema_decays, self.trainer.ema_powers))


def data_outline(data: Choice, name: str, num_classes: int | None) -> Outline:
    """Return the sizes of a data set, conf/data/`name`, without opening it.

    Raises UserError where sizes or classes are missing, or the known number of classes is set.
    """
    outline: Outline = locate(data.target).outline(data.settings)
    if name in IMAGENET:
        outline = dataclasses.replace(outline, num_images=None if data.settings.get("holdout_every") else 1_281_167)
    require(
        outline.num_classes is None or num_classes is None,
        f"num_classes={num_classes}: data={name} has {outline.num_classes}; leave it out",
    )
    outline = dataclasses.replace(outline, num_classes=outline.num_classes or num_classes)
    for key, value in (("data.image_size", outline.image_size), ("num_classes", outline.num_classes)):
        require(value is not None, f"{key}: data={name} does not tell it without being opened; give {key}=")
    return outline


def build_recipe(settings: EstimateSettings) -> Recipe:
    """Return the recipe that train.py would run, without opening data or weights.

    Only an image folder is opened if its size is to be inferred. Raises UserError as train.py does.
    """
    sampler, alignment, model, data = settings.sampler, settings.alignment, settings.model, settings.data
    if data.settings.get("root") and None in (model.settings["patch_size"], data.settings.get("image_size")):
        model, data = infer_settings(model, data, settings.autoencoder)
    outline = data_outline(data, settings.choices["data"] or "", settings.num_classes)
    assert outline.image_size is not None
    trainer, num_images = settings.trainer, outline.num_images
    for name in in_epochs(trainer):
        length = f"trainer.{name}={getattr(trainer, name)}"
        require(num_images is not None, f"{length}: how many images an epoch has, data does not tell; give steps")
    trainer = in_steps(trainer, num_images or 0, trainer.global_batch_size, "trainer")
    autoencoder = build_autoencoder(settings.autoencoder.plain(), outline=True)
    objective, sampler = with_timeshift(settings.objective, sampler, autoencoder.timeshift)
    shape = autoencoder.latent_shape(outline.channels, outline.image_size)
    patch_size = model.settings["patch_size"]
    require(patch_size is not None, "model.patch_size: is inferred from the images; give it, or data.root=")
    with torch.device("meta"):
        asked = network_arguments(settings.objective, model, autoencoder.class_token)
        network = model.build(in_channels=shape[0], num_classes=outline.num_classes, **asked)
    grid = token_grid(patch_size, *shape[1:])
    try:
        sampling_macs(network, *shape[1:], sampler)  # UserError where the cost cannot be counted
    except UserError as error:
        raise UserError(f"sampler.{error}") from error
    aligned = Alignment()
    if alignment is not None:
        chosen = alignment.build()
        chosen.check_depth(network.num_alignable_blocks)
        aligned = chosen.build(network.hidden_size, grid, outline.image_size, outline=True)
    return Recipe(
        objective=objective.build(denoiser=network, alignment=aligned.loss), target=aligned.target,
        autoencoder=autoencoder, shape=shape, image_size=outline.image_size, num_images=outline.num_images,
        align_until=aligned.end_step,
        cached=locate(data.target).has_latents, trainer=trainer, sampler=sampler, gpus=settings.gpus,
        num_samples=settings.num_samples,
    )  # fmt: skip


def with_checkpointing(objective: Objective, kind: Checkpointing) -> Objective:
    """Return a copy of an objective with another activation checkpointing."""
    changed = copy.deepcopy(objective)
    for block in changed.denoiser.all_blocks:
        block.activation_checkpointing = kind
    return changed


def count(module: Any) -> int:
    """Return the number of parameters of a module, 0 of None."""
    return 0 if module is None else sum(parameter.numel() for parameter in module.parameters())


# --- rates


def choose_rate(settings: EstimateSettings, recipe: Recipe) -> Rate:
    """Return the measured rate, or else an assumed one; never a mixture."""
    memory, dtype = settings.memory_gb, recipe.trainer.mixed_precision if recipe.half else "fp32"
    if settings.measured is None:
        return assumed_rate(settings.device or "H100", 0.4 if settings.share is None else settings.share, memory, dtype)
    model, aligned = settings.choices["model"] or "", recipe.target is not None
    batch, _ = recipe.trainer.micro_batches(recipe.gpus)
    return measured_rate(settings.measured, memory, dtype, model, aligned, recipe.shape, batch)


def assumed_rate(device: str, share: float, memory_gb: float | None, dtype: str) -> Rate:
    """Return a share of the data-sheet rate in `throughput.PEAKS`, which is of bf16 and
    fp16.

    Raises UserError for another device or share.
    """
    require(device in PEAKS, f"device={device}: its rate is not known here; choose from {', '.join(PEAKS)}")
    require(0 < share <= 1, f"share={share:g}: must lie in 0..1, a share of the data sheet's rate such as 0.4")
    memory = MEMORY[device] if memory_gb is None else memory_gb * 1e9
    if dtype not in HALF_TYPES:
        text = f"not known: {device}'s data sheet tells of bf16 and fp16; give measured=FILE"
        return Rate(None, None, memory, text, False)
    text = f"ASSUMED: {share:.0%} of {device}'s data-sheet rate ({si(PEAKS[device], 'FLOP/s')}, {dtype}); not measured"
    return Rate(share * PEAKS[device], share * PEAKS[device], memory, text, False)


def timed_rows(content: dict[str, Any]) -> tuple[list[dict[str, Any]], str]:
    """Return what a benchmark.json or gpu_check.json timed, each row with its `model`, and the
    dtype.
    """
    if content["kind"] == "benchmark":
        model = content["settings"]["model"]
        return [{"model": model, **row} for row in content["rows"] if "seconds" in row], content["matmul"]["dtype"]
    rows = [row["row"] for call in content["calls"] for row in call["rows"] if row.get("row") is not None]
    return rows, "bf16"


def fastest(rows: list[dict[str, Any]], part: str, model: str, aligned: bool, batch: int) -> dict[str, Any] | None:
    """Return the row of the most FLOP/s in a part, plain ways left out, or None; NaN and infinite
    rates never win.

    Rows of the model are preferred, and of training those with, or without, an alignment's target
    (it has a higher rate than a small network) and those of the numbers of images nearest to
    `batch`, a device's: few images leave a GPU waiting for the host.
    """
    found = [
        row
        for row in rows
        if row["part"] == part and not row["way"].startswith("plain") and is_number(row["flops"] / row["seconds"])
    ]
    found = [row for row in found if row["model"] == model] or found
    if part == "training":
        found = [row for row in found if ("aligned" in row["case"]) == aligned] or found

    def preference(row: dict[str, Any]) -> tuple[float, float]:
        distance = abs(math.log(row["images"] / batch)) if part == "training" else 0.0
        return -distance, row["flops"] / row["seconds"]

    return max(found, key=preference, default=None)


def measured_activations(rows: list[dict[str, Any]], model: str, shape: tuple[int, int, int]) -> float | None:
    """Return the bytes an image by which the memory of compiled training steps grows with the
    batch, or None where fewer than two batches of this model and latent (C, H, W) were measured.
    """
    peaks = {
        row["images"]: row["peak_bytes"]
        for row in rows
        if (row["part"], row["way"], row["model"]) == ("training", "ours compiled", model)
        and row.get("latent") == [shape[0], shape[1]]
        and "peak_bytes" in row  # not of steps by CUDA graphs
    }
    if len(peaks) < 2:
        return None
    few, many = min(peaks), max(peaks)
    return float((peaks[many] - peaks[few]) / (many - few))


def measured_rate(
    path: str, memory_gb: float | None, dtype: str, model: str, aligned: bool, shape: tuple[int, int, int], batch: int
) -> Rate:
    """Return the rate in a `benchmark.json` of scripts/benchmark or a `gpu_check.json` of
    scripts/gpu_check.sh, for conf/model/`model` on latents of `shape` (C, H, W).

    aligned: whether an alignment's target runs. batch: images a device trains on at once. Raises
    UserError for another file or dtype.
    """
    try:
        content = read_json(Path(path))
        rows, used = timed_rows(content)
        origin = content if content["kind"] == "benchmark" else content["calls"][0]
        device, date = origin["machine"]["device"], origin["date"][:10]
        training, sampling = (fastest(rows, part, model, aligned, batch) for part in ("training", "sampling"))
        rates = [None if row is None else row["flops"] / row["seconds"] for row in (training, sampling)]
        cases = [f"{row['part']} {row['case']}, {row['way']}" for row in (training, sampling) if row is not None]
        activations = measured_activations(rows, model, shape)
        valid = content["kind"] in ("benchmark", "gpu_check") and all(rate is None or rate > 0 for rate in rates)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, ZeroDivisionError):
        valid = False
    require(valid, f"measured={path}: is no result of these; {MEASURED}")
    require(
        training is not None,
        f"measured={path}: measured no training; run python -m scripts.benchmark parts=[training,sampling]",
    )
    require(
        used == dtype,
        f"measured={path}: was measured in {used}, this recipe computes in {dtype}; measure with dtype={dtype}",
    )
    known = next((size for name, size in MEMORY.items() if peak_of(device) and re.search(rf"\b{name}\b", device)), None)
    memory = known if memory_gb is None else memory_gb * 1e9
    other = [
        f"{row['part']} of {row['model']}" for row in (training, sampling) if row is not None and row["model"] != model
    ]
    assumed = f"; {' and '.join(other)}, ASSUMED for {model} too" if other else ""
    source = f"measured: {device}, {date} ({'; '.join(cases)}){assumed}"
    return Rate(rates[0], rates[1], memory, source, True, activations)


# --- FLOPs


def flops(recipe: Recipe) -> dict[str, float]:
    """Return the FLOPs per image of a forward pass, a training step and sampling, and both totals.

    A training step is three forwards of the network (`throughput.training_flops`); with activation
    checkpointing a fourth, `recomputed`. Encoding and decoding are in no total.
    """
    denoiser, shape, trainer = recipe.objective.denoiser, recipe.shape, recipe.trainer
    network = recipe.autoencoder.network
    network_cost = network_macs(denoiser, *shape[1:])
    forward = 2 * network_cost.total
    aligned, target = training_flops(recipe.objective, shape), target_flops(recipe.target, recipe.image_size)
    recomputed = forward if recipe.checkpointing is True else 0  # selective recomputes no matrix product
    steps = min(trainer.max_steps, recipe.align_until)
    unaligned = 3 * (forward + 2 * network_cost.base)
    each = steps * (aligned + target + recomputed) + (trainer.max_steps - steps) * (unaligned + recomputed)
    encode = decode = 0
    if network is not None:
        pixels = torch.empty(1, network.config.in_channels, recipe.image_size, recipe.image_size, device="meta")
        encode = counted_flops(network.encode, pixels)
        decode = counted_flops(network.decode, torch.empty(1, *shape, device="meta"))
    sampled = 2 * sampling_macs(denoiser, *shape[1:], recipe.sampler)
    return {
        "forward": forward, "training": aligned, "target": target, "recomputed": recomputed,
        "all_training": trainer.global_batch_size * each, "encode": encode, "decode": decode, "sampling": sampled,
        "all_sampling": sampled * recipe.num_samples,
    }  # fmt: skip


# --- memory


BATCH = 10_007  # images of a counted batch: a prime, which divides the bytes of what grows with the batch alone


class Products(TorchDispatchMode):
    """Sums the bytes of operators' results that selective checkpointing keeps."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call an operator and count its result."""
        out = func(*args, **(kwargs or {}))
        if func in PRODUCTS:
            self.bytes += sum(tensor.nbytes for tensor in tree_leaves(out) if isinstance(tensor, Tensor))
        return out


def saved_bytes(module: nn.Module, half: bool, make_inputs: Callable[[], tuple[Tensor, ...]], **others: Any) -> int:
    """Return the bytes per image that autograd saves in a forward of a module on BATCH images;
    weights and their casts, whose number does not grow with the batch, are not counted.

    Nothing is computed: parameters and inputs are fake tensors. Operators are those of the CPU; a
    GPU's fused RMSNorm saves less.
    """
    saved: dict[int, tuple[int, Tensor]] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage._cdata] = storage.nbytes(), tensor  # a reference, so that its address is not reused
        return tensor

    with FakeTensorMode(allow_non_fake_inputs=True):
        parameters = {
            name: torch.empty(p.shape, requires_grad=p.requires_grad) for name, p in module.named_parameters()
        }
        with (
            torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
            torch.autocast("cpu", torch.bfloat16, enabled=half),
        ):
            torch.func.functional_call(module, parameters, make_inputs(), others)
    return sum(size for size, _ in saved.values() if size % BATCH == 0) // BATCH


def activation_bytes(objective: Objective, shape: tuple[int, int, int], half: bool) -> int:
    """Return the bytes per image held between forward and backward pass; shape: (C, H, W) latent.

    With activation checkpointing: the blocks' inputs, and what the one recomputed block saves; if
    selective, also the results of products.
    """
    kind = objective.denoiser.all_blocks[0].activation_checkpointing
    if kind == "selective":
        objective = with_checkpointing(objective, True)
    denoiser, alignment = objective.denoiser, objective.alignment
    height, width = token_grid(denoiser.patch_size, *shape[1:])
    # the cached tables of positions must not be made of fake tensors
    places = [stack.grid_positions(height, width, torch.device("cpu")) for stack in denoiser.stacks]
    tokens, channels = (alignment and alignment.features_shape) or (1, 1)

    def inputs() -> tuple[Tensor, ...]:
        latents, times = torch.empty(BATCH, *shape), torch.empty(BATCH)
        classes = torch.zeros(BATCH, dtype=torch.long)
        return latents, classes, latents, times, times, torch.empty(BATCH, tokens, channels)

    def of_block(stack: BlockStack, products: bool) -> int:
        last, size = copy.deepcopy(stack.blocks[-1]), stack.hidden_size
        at = places[denoiser.stacks.index(stack)]
        last.activation_checkpointing = False
        per_token = denoiser.shares_encoder and stack is denoiser.stacks[-1]
        c = (BATCH, height * width if per_token else 1, size)
        with Products() as returned:
            saved = saved_bytes(last, half, lambda: (torch.empty(BATCH, height * width, size), torch.empty(c)), at=at)
        return returned.bytes // BATCH if products else saved

    total = saved_bytes(objective, half, inputs)
    if kind:
        total += of_block(denoiser.stacks[-1], False)
    if kind == "selective":
        total += sum(len(stack.blocks) * of_block(stack, True) for stack in denoiser.stacks)
    return total


def memory(recipe: Recipe, measured: float | None = None) -> dict[str, float]:
    """Return the bytes on each device at the end of a forward pass, by kind. measured: bytes an
    image of activations without checkpointing (`Rate.activations`); None counts those of eager
    blocks.

    Weights, gradients, optimizer and EMA are float32. Not included: workspace of kernels and the
    allocator, the CUDA context, encoding and decoding (no activations are held then).
    """
    trained, sharded = count(recipe.objective), recipe.trainer.parallelism == "fsdp"
    parts = recipe.gpus if sharded else 1
    cast = [layer for layer in recipe.objective.modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
    micro, num_micro = recipe.trainer.micro_batches(recipe.gpus)
    accumulates = num_micro > 1  # micro-batches add up whole gradients, which the last one exchanges
    if measured is None or recipe.checkpointing:
        measured = activation_bytes(recipe.objective, recipe.shape, recipe.half)
    sizes = {
        "weights": FLOAT * trained / parts,
        "gradients": FLOAT * trained / (1 if accumulates else parts),
        "AdamW moments": 2 * FLOAT * trained / parts,
        "EMA weights": FLOAT * recipe.num_emas * count(recipe.objective.denoiser) / parts,
        # gradients lie in DDP's buckets, once they are exchanged
        "buckets of DDP": FLOAT * trained if recipe.gpus > 1 and not sharded and accumulates else 0,
        "gathered by FSDP": gathered(recipe) if sharded else 0,
        "16-bit copies of weights": HALF * sum(map(count, cast)) if recipe.half and not sharded else 0,
        "alignment target": FLOAT * count(recipe.target and recipe.target.network),
        "autoencoder": FLOAT * count(recipe.autoencoder.network),
        "activations": micro * measured,
    }
    rounded = {name: math.ceil(size) for name, size in sizes.items()}
    return {**rounded, "total": sum(rounded.values())}


def gathered(recipe: Recipe) -> float:
    """Return the bytes that FSDP2 holds gathered: what is in no block, and all blocks or, where
    they are freed, the next one beside the present one, and its gradients.
    """
    blocks = list(map(count, recipe.objective.denoiser.all_blocks))
    held = 2 * max(blocks) if recipe.trainer.reshard_after_forward else sum(blocks)
    size = HALF if recipe.half else FLOAT
    return FLOAT * (outside_blocks(recipe.objective) + max(blocks)) + size * held


def outside_blocks(objective: Objective) -> int:
    """Return the parameters that are in no block."""
    return count(objective) - sum(map(count, objective.denoiser.all_blocks))


def ways_to_fit(recipe: Recipe, needed: dict[str, float], limit: float) -> str:
    """Return settings by which a recipe that needs `needed` bytes fits into `limit`."""
    micro, _ = recipe.trainer.micro_batches(recipe.gpus)
    share = recipe.trainer.global_batch_size // recipe.gpus
    rest = needed["total"] - needed["activations"]

    def largest(each: float) -> int:
        return next((size for size in range(micro, 0, -1) if share % size == 0 and rest + size * each <= limit), 0)

    ways = []
    if smaller := largest(needed["activations"] / micro):
        ways.append(f"trainer.micro_batch_size={smaller}")
    kinds: dict[Checkpointing, tuple[Checkpointing, ...]] = {False: ("selective", True), "selective": (True,), True: ()}
    for kind in kinds[recipe.checkpointing]:
        size = largest(activation_bytes(with_checkpointing(recipe.objective, kind), recipe.shape, recipe.half))
        if size:
            with_it = "" if size == micro else f" trainer.micro_batch_size={size}"
            ways.append(f"model.activation_checkpointing={str(kind).lower()}{with_it}")
    if not ways:
        ways.append("more gpus= with trainer.parallelism=fsdp" if rest > limit else "more gpus=")
        ways.append("a device with more memory")
    return ", or ".join(ways)


# --- disk and communication


def saved_steps(trainer: TrainerSettings) -> list[int]:
    """Return the steps of a finished run's checkpoints, assuming an older one for `keep_best`."""
    every, last = trainer.save_every, trainer.max_steps
    steps = sorted({*(range(every, last + 1, every) if every else ()), last})
    if trainer.keep_last is None:
        return steps
    stay = set(steps[-trainer.keep_last :])
    stay |= {step for step in steps if trainer.keep_every and step % trainer.keep_every == 0}
    others = [step for step in steps if step not in stay]
    return sorted(stay | set(others[:1] if trainer.keep_best else ()))


def disk(recipe: Recipe) -> dict[str, float | None]:
    """Return the bytes of a checkpoint (as `TrainingState.bytes`), a run and its latent cache.

    `run`: checkpoints that stay, and snapshots; while one is saved there is one more. `cache`:
    float16 moments, None where nothing is cached or the number of images is unknown.
    """
    trainer, ema = recipe.trainer, FLOAT * count(recipe.objective.denoiser)
    checkpoint = 3 * FLOAT * count(recipe.objective) + recipe.num_emas * ema
    snapshots = -(-trainer.max_steps // trainer.snapshot_every) if trainer.snapshot_every else 0  # and the last step's
    record = HALF * (2 if recipe.autoencoder.stochastic else 1) * math.prod(recipe.shape)
    num_checkpoints = len(saved_steps(trainer))
    return {
        "checkpoint": checkpoint,
        "checkpoints": num_checkpoints,
        "run": num_checkpoints * checkpoint + snapshots * len(trainer.ema_powers) * ema,
        "record": record if recipe.cached else None,
        "cache": record * recipe.num_images if recipe.cached and recipe.num_images is not None else None,
    }


def exchanged_bytes(recipe: Recipe) -> float:
    """Return the bytes that each of n processes sends per step, in a ring.

    DDP: all-reduce of float32 gradients, 2(n−1)/n·4P. FSDP, (n−1)/n each: all-gather per
    micro-batch of blocks in the run's precision, twice where they are freed after the forward pass,
    and of the rest in float32, of the network twice and of a projector once; reduce-scatter of
    float32 gradients once.
    """
    n, trained = recipe.gpus, count(recipe.objective)
    _, num_micro = recipe.trainer.micro_batches(n)
    if recipe.trainer.parallelism == "ddp":
        return (n - 1) / n * FLOAT * 2 * trained
    outside, projector = outside_blocks(recipe.objective), count(recipe.objective.alignment)
    gathers, size = 2 if recipe.trainer.reshard_after_forward else 1, HALF if recipe.half else FLOAT
    each = gathers * size * (trained - outside) + FLOAT * (2 * outside - projector)
    return (n - 1) / n * (num_micro * each + FLOAT * trained)


# --- estimate


def estimate(recipe: Recipe, rate: Rate) -> dict[str, Any]:
    """Return the cost of a recipe as plain values: counts, FLOPs, bytes, hours."""
    denoiser, trainer, gpus = recipe.objective.denoiser, recipe.trainer, recipe.gpus
    encoder = count(denoiser.stacks[0]) if denoiser.shares_encoder else 0
    work, held = flops(recipe), memory(recipe, rate.activations)
    images = trainer.max_steps * trainer.global_batch_size
    fits = None if rate.memory is None else held["total"] <= rate.memory
    hours = {
        name: None if speed is None else work[f"all_{name}"] / (speed * gpus) / 3600
        for name, speed in (("training", rate.training), ("sampling", rate.sampling))
    }
    micro, num_micro = trainer.micro_batches(gpus)
    return {
        "parameters": {
            "denoiser": count(denoiser), "encoder": encoder, "decoder": count(denoiser) - encoder,
            "projector": count(recipe.objective.alignment), "target": count(recipe.target and recipe.target.network),
            "autoencoder": count(recipe.autoencoder.network),
        },
        "flops": work,
        "memory": {
            **held, "device": rate.memory, "fits": fits,
            "fix": ways_to_fit(recipe, held, rate.memory) if rate.memory is not None and not fits else None,
        },
        "time": {
            "rate": rate.source, "measured": rate.measured,
            "training_flops_per_second": rate.training, "sampling_flops_per_second": rate.sampling,
            "images_per_second": None if hours["training"] is None else images / (3600 * hours["training"]),
            **{f"{name}_hours": each for name, each in hours.items()},
            **{f"{name}_gpu_hours": None if each is None else gpus * each for name, each in hours.items()},
        },
        "disk": disk(recipe), "exchanged_bytes": exchanged_bytes(recipe), "gpus": gpus, "micro_batch_size": micro,
        "micro_batches": num_micro, "steps": trainer.max_steps, "global_batch_size": trainer.global_batch_size,
        "epochs": None if recipe.num_images is None else images / recipe.num_images,
        "num_samples": recipe.num_samples, "cached": recipe.cached,
    }  # fmt: skip


# --- report


def si(value: float, unit: str) -> str:
    """Return a number with three digits and an SI prefix, such as "789 GFLOP"."""
    prefixes = ("", "k", "M", "G", "T", "P", "E", "Z", "Y")
    power = 0
    while power < len(prefixes) - 1 and abs(value) >= 999.5 * 1000**power:
        power += 1
    return f"{value / 1000**power:.3g} {prefixes[power]}{unit}"


def number(value: float) -> str:
    """Return a number with at least three digits."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def duration(each: float | None, gpus: int) -> str:
    """Return wall-clock hours as hours, days and GPU hours."""
    if each is None:
        return "not known"
    days, all_hours = number(each / 24), number(each * gpus)
    return f"{number(each)} hours = {days} days on {gpus} GPU{'s' * (gpus > 1)}, {all_hours} GPU hours"


def report(cost: dict[str, Any]) -> str:
    """Return an estimate as an aligned table; a line without a name continues the one before."""
    p, work, held, time, disk = (cost[key] for key in ("parameters", "flops", "memory", "time", "disk"))
    halves = f" (encoder {p['encoder']:,}, decoder {p['decoder']:,})" if p["encoder"] else ""
    frozen = {"alignment target": p["target"], "autoencoder": p["autoencoder"]}
    step = {"per image": work["training"], "in the alignment's target": work["target"],
            "recomputed": work["recomputed"]}  # fmt: skip
    epochs = "" if cost["epochs"] is None else f", {cost['epochs']:.4g} epochs"
    gpus, micro, kept = cost["gpus"], cost["micro_batches"], disk["checkpoints"]
    batch = f"{cost['micro_batch_size']} images" + (f" {micro} times" if micro > 1 else "") + " per step"
    limit = "" if held["device"] is None else f" of {si(held['device'], 'B')}"
    fits = {None: "device unknown: give memory_gb=", True: "fits", False: f"DOES NOT FIT; give {held['fix']}"}
    speed = "" if time["images_per_second"] is None else f", {number(time['images_per_second'])} images/s"
    rows = [
        ("parameters", f"{p['denoiser']:,}{halves}" + (f", projector {p['projector']:,}" if p["projector"] else "")),
        ("frozen", ", ".join(f"{name} {value:,}" for name, value in frozen.items() if value)),
        ("forward", f"{si(work['forward'], 'FLOP')} per image"),
        ("training step", " + ".join(f"{si(value, 'FLOP')} {name}" for name, value in step.items() if value)),
        ("total training", f"{cost['steps']:,} steps of {cost['global_batch_size']}{epochs}: "
                           f"{si(work['all_training'], 'FLOP')}"),
        ("memory", f"{si(held['total'], 'B')}{limit} on each GPU, {batch}: {fits[held['fits']]}"),
        *(("", f"{name} {si(size, 'B')}") for name, size in held.items()
          if name not in ("total", "device", "fits", "fix") and size),
        ("rate", time["rate"]),
        ("training", duration(time["training_hours"], gpus) + speed),
        ("sampling", f"{cost['num_samples']:,} images of {si(work['sampling'], 'FLOP')}: "
                     f"{duration(time['sampling_hours'], gpus)}"),
        ("", f"assumed: {gpus} GPUs are {gpus} times as fast as one; "
             f"{si(cost['exchanged_bytes'], 'B')} sent per GPU per step are not counted" if gpus > 1 else ""),
        ("autoencoder", f"encodes an image in {si(work['encode'], 'FLOP')} "
                        f"({'once, for the cache' if cost['cached'] else 'in each step; a latent cache saves it'}), "
                        f"decodes it in {si(work['decode'], 'FLOP')}: in no time above" if work["encode"] else ""),
        ("disk", f"{si(disk['checkpoint'], 'B')} per checkpoint, {si(disk['run'], 'B')} in all with {kept} "
                 f"checkpoint{'s' * (kept > 1)}"),
    ]  # fmt: skip
    if cost["cached"]:
        whole = "how many images is not known" if disk["cache"] is None else f"{si(disk['cache'], 'B')} in all"
        rows.append(("latent cache", f"{si(disk['record'], 'B')} per image, {whole}"))
    return "\n".join(f"{name:<14}  {text}" for name, text in rows if text)
