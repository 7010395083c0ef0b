"""The parts of the benchmark, each beside its plain reference, of random weights and inputs.

Shapes: B batch, C H W latent, S = 8·H pixels per side.
"""

import contextlib
import dataclasses
import functools
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from ddt.checkpoint import format as ckpt
from ddt.data.cache_writer import file_record
from ddt.data.latent_cache import CACHE_FORMAT_VERSION, LatentCache, content_fingerprint, shard_path
from ddt.distributed.compile import compile_blocks
from ddt.distributed.graphs import graph_blocks
from ddt.distributed.prepare import prepare
from ddt.errors import require
from ddt.files import fsync, sha256, write_json
from ddt.generation.generator import cast_weights
from ddt.metrics.features import extract, to_device
from ddt.metrics.images import NpzImages
from ddt.metrics.inception import InceptionFeatures
from ddt.model import DDT
from ddt.model.cost import network_macs
from ddt.model.layers import Attention
from ddt.objective import FlowMatching
from ddt.objective.alignment import REPA
from ddt.objective.alignment_target import Target
from ddt.precision import HALF_TYPES, Dtype, autocast
from ddt.sampling.cost import sampling_macs
from ddt.sampling.sample import sample_latents
from ddt.sampling.settings import SamplerSettings
from ddt.tensor_files import write_array
from ddt.training.ema import EMA, ConstantDecay
from ddt.training.loop import optimizer_step
from ddt.training.optimizer import adamw
from ddt.training.state import TrainingState
from ddt.training.throughput import target_flops, training_flops
from scripts.benchmark.plain import PlainDDT, PlainTraining, plain_sample
from scripts.benchmark.timing import Case, Way, eager

CHANNELS, CLASSES, CELL = 4, 1000, 8  # SD-VAE's latents and pixels a cell, ImageNet
TARGET = "vit_base_patch14_dinov2.lvd142m"
RECIPE: dict[str, Any] = {"lr": 1e-4, "betas": (0.9, 0.95), "weight_decay": 0.0}
NUM_IMAGES = 256  # of Inception's features
INTERVALS = {"guided on (0.3, 1)": (0.3, 1.0), "guided always": None}


def check_model(model: Any, align_depth: int) -> None:
    """Raise UserError for a network without a plain reference, or with a too short encoder."""
    require(
        isinstance(model, DDT)
        and isinstance(model.decoder.blocks[0].mixer, Attention)
        and (model.decoder.hidden_size, model.decoder.head_dim) == (model.hidden_size, model.encoder.head_dim),
        "model: the plain reference is a DDT whose decoder has attention and the encoder's width; choose one, as "
        "b_8en4de",
    )
    depth = len(model.encoder.blocks)
    require(align_depth <= depth, f"align_depth={align_depth}: the encoder has {depth} blocks, choose 1..{depth}")


@torch.no_grad()
def without_zeros(model: Any) -> Any:
    """Fill the weights that start at zero, where all velocities would agree; return the network."""
    for parameter in model.parameters():
        if not parameter.any():
            parameter.normal_(std=0.02)
    return model


def random_batch(
    batch_size: int, latent_size: int, device: torch.device, channels: int = CHANNELS
) -> dict[str, Tensor]:
    """Return the arguments of `FlowMatching.forward`: latents, noise (B, C, H, W), others (B,)."""
    generator, shape = torch.Generator().manual_seed(1), (batch_size, channels, latent_size, latent_size)
    values = {
        "latents": torch.randn(shape, generator=generator),
        "noise": torch.randn(shape, generator=generator),
        "y": torch.randint(CLASSES, (batch_size,), generator=generator),
        "time_normal": torch.randn(batch_size, generator=generator),
        "dropout_uniform": torch.rand(batch_size, generator=generator),
    }
    return {key: value.to(device) for key, value in values.items()}


@dataclasses.dataclass
class Setup:
    """Network, device and sizes (see conf/benchmark.yaml).

    make_model: (in_channels, num_classes, …) → network. folder: for temporary files.
    """

    make_model: Callable[..., Any]
    device: torch.device
    dtype: Dtype
    compile: bool
    latent_size: int
    batch_size: int
    sampling_batch_sizes: list[int]
    num_steps: int
    ratios: list[float]
    align_depth: int
    records: int
    folder: Path
    accelerator: Accelerator

    @property
    def image_size(self) -> int:
        """S, pixels per side."""
        return CELL * self.latent_size

    def autocast(self) -> torch.autocast:
        """Return the context of the networks."""
        return autocast(self.device, self.dtype)

    def tolerance(self, fp32: float) -> float:
        """Return the relative difference that rounding may make."""
        return max(fp32, 3e-2) if self.dtype in HALF_TYPES else fp32

    def network(self, **changes: Any) -> DDT:
        """Build the network with random weights."""
        torch.manual_seed(0)
        with self.device:
            model = self.make_model(in_channels=CHANNELS, num_classes=CLASSES, **changes)
        return without_zeros(model).eval()

    def plain(self, model: DDT) -> PlainDDT:
        """Return the plain network of the same weights."""
        with self.device:
            return PlainDDT(model).eval()

    def batch(self, batch_size: int) -> dict[str, Tensor]:
        """Return `random_batch` with uint8 `images` (B, 3, S, S)."""
        shape, generator = (batch_size, 3, self.image_size, self.image_size), torch.Generator().manual_seed(2)
        images = torch.randint(256, shape, generator=generator).byte().to(self.device)
        return {**random_batch(batch_size, self.latent_size, self.device), "images": images}


# --- the network


def forward(setup: Setup) -> Iterator[Case]:
    """One velocity, encoder and decoder, without gradients."""
    model = setup.network()
    plain = setup.plain(model)
    cast_weights(model, setup.dtype)  # as sample.py does
    networks: dict[str, Any] = {"plain": plain, "ours": model}
    if setup.compile:
        compile_blocks(model, dynamic=False)
        networks |= {"plain compiled": torch.compile(plain, dynamic=False), "ours compiled": model}
    for n in dict.fromkeys([*setup.sampling_batch_sizes, setup.batch_size]):
        batch = random_batch(n, setup.latent_size, setup.device)
        x_t, t, y = batch["noise"], batch["dropout_uniform"], batch["y"]

        def call(network: Any, x_t: Tensor = x_t, t: Tensor = t, y: Tensor = y) -> Tensor:
            with torch.no_grad(), setup.autocast():
                out = network(x_t, t, y)
            return out if isinstance(out, Tensor) else out[0]

        flops = 2 * n * network_macs(model, setup.latent_size, setup.latent_size).total
        ways = {
            name: Way(
                functools.partial(call, network), flops, context=eager if name == "ours" else contextlib.nullcontext
            )
            for name, network in networks.items()
        }
        yield Case("forward", f"batch {n}", ways, n, setup.tolerance(1e-4))


def sampling(setup: Setup) -> Iterator[Case]:
    """Latents by Euler's method, with and without encoder sharing and guidance interval."""
    model = setup.network()
    plain = setup.plain(model)
    cast_weights(model, setup.dtype)
    macs = functools.partial(sampling_macs, model, setup.latent_size, setup.latent_size)
    if setup.compile:
        compile_blocks(model, dynamic=True)
    for n in setup.sampling_batch_sizes:
        batch = random_batch(n, setup.latent_size, setup.device)
        noise, y = batch["noise"], batch["y"]

        def plainly(settings: SamplerSettings, noise: Tensor = noise, y: Tensor = y) -> Tensor:
            with setup.autocast():
                return plain_sample(plain, noise, y, settings)

        def ours(settings: SamplerSettings, noise: Tensor = noise, y: Tensor = y) -> Tensor:
            with setup.autocast():
                return sample_latents(model, noise, y, settings)

        def moved(call: Callable[[], Tensor], noise: Tensor = noise) -> Tensor:
            return call() - noise  # the noise is most of the latents, whatever sampling does

        for interval, bounds in INTERVALS.items():
            ways: dict[str, Way] = {}
            for ratio in setup.ratios:
                every = round(1 / (1 - ratio))
                recompute = None if every == 1 else f"uniform:{every}"
                settings = SamplerSettings(num_steps=setup.num_steps, cfg_interval=bounds, recompute=recompute)
                base = f"plain {ratio:.2f}"
                calls = {base: plainly, f"ours {ratio:.2f}": ours}
                if setup.compile:
                    calls[f"ours compiled {ratio:.2f}"] = ours
                for name, function in calls.items():
                    call = functools.partial(function, settings)
                    plain_macs = {"cached": False, "skip_unconditional": False} if function is plainly else {}
                    context = eager if name.startswith("ours 0") else contextlib.nullcontext
                    ways[name] = Way(call, 2 * n * macs(settings, **plain_macs), base, context,
                                     functools.partial(moved, call))  # fmt: skip
            yield Case("sampling", f"batch {n}, {interval}", ways, n, setup.tolerance(1e-3))


# --- training


def gradients(objective: torch.nn.Module) -> Tensor:
    """Return each gradient's norm and product with a fixed direction; clear the gradients."""
    numbers, device = [], next(objective.parameters()).device
    for _, parameter in sorted(objective.named_parameters(), key=lambda item: item[0].rpartition("denoiser.")[2]):
        gradient = parameter.grad.flatten()
        direction = torch.randn(len(gradient), generator=torch.Generator(device).manual_seed(0), device=device)
        numbers += [gradient.norm(), gradient @ direction / len(gradient) ** 0.5]
        parameter.grad = None
    return torch.stack(numbers)


class OurTraining:
    """The training steps of `ddt.training.loop`."""

    def __init__(self, setup: Setup, model: DDT, target: Target | None) -> None:
        setup.accelerator.free_memory()  # it holds on to all that it has prepared
        loss = None
        if target is not None:
            torch.manual_seed(3)
            grid = (setup.latent_size // model.encoder.patch_size,) * 2
            loss = REPA(TARGET, align_depth=setup.align_depth).build_loss(
                model.hidden_size, target.num_features, target.grid, grid
            )
        self.objective = FlowMatching(model, alignment=loss).to(setup.device)
        self.target, self.autocast = target, setup.autocast
        ema = EMA(model, ConstantDecay(0.9999))
        ema.place(setup.device, sharded=False, compiled=setup.compile)
        self.model = prepare(self.objective, setup.accelerator, "ddp")
        optimizer = adamw(self.objective.named_parameters(), **RECIPE)
        self.state = TrainingState(self.objective, optimizer, {"ema": ema}, setup.accelerator, setup.dtype)

    def capture(self, batch: dict[str, Tensor]) -> None:
        """Capture the compiled blocks in CUDA graphs, as `ddt.training.start` does."""
        with self.autocast():
            graph_blocks(self.objective.denoiser, lambda: self.objective(**batch), accumulates=False)

    def backward(self, batch: dict[str, Tensor]) -> None:
        """Compute the gradients of a batch."""
        arguments = {key: value for key, value in batch.items() if key != "images"}
        with self.autocast():
            if self.target is not None:
                arguments["features"] = self.target(batch["images"])
            losses = self.model(**arguments)
        self.state.scaler.scale(losses["loss"]).backward()
        self.state.meter.add(losses, 1.0)

    def step(self, batch: dict[str, Tensor]) -> None:
        """Take a training step."""
        self.backward(batch)
        optimizer_step(self.state, clip_norm=None)

    def forward_backward(self, batch: dict[str, Tensor]) -> None:
        """Compute the gradients of a batch and clear them."""
        self.backward(batch)
        self.objective.zero_grad(set_to_none=True)

    def gradients(self, batch: dict[str, Tensor]) -> Tensor:
        """Return `gradients` of a batch."""
        self.backward(batch)
        return gradients(self.objective)


def plain_training(setup: Setup, ours: OurTraining) -> PlainTraining:
    """Return the plain training of the same weights, alignment and target."""
    loss, depth = ours.objective.alignment, 0 if ours.target is None else setup.align_depth
    return PlainTraining(setup.plain(ours.objective.denoiser), setup.dtype, loss, ours.target, depth)


def plain_gradients(plain: PlainTraining, batch: dict[str, Tensor]) -> Tensor:
    """Return `gradients` of a batch."""
    plain.loss(batch).backward()
    modules = torch.nn.ModuleDict({"denoiser": plain.model})
    if plain.projector is not None:
        modules["alignment"] = torch.nn.ModuleDict({"projector": plain.projector})
    return gradients(modules)


def random_target(setup: Setup) -> Target:
    """Return DINOv2-B with random weights, loaded as training loads it."""
    import timm
    from safetensors.torch import save_file

    file = setup.folder / "target.safetensors"
    if not file.exists():
        torch.manual_seed(4)
        save_file(timm.create_model(TARGET, num_classes=0).state_dict(), file)
    return Target(TARGET, str(file), setup.image_size).to(setup.device)


def training(setup: Setup, alignments: Sequence[bool] = (True, False)) -> Iterator[Case]:
    """A training step: losses, gradients, optimizer, EMA; aligned and not."""
    n, batch = setup.batch_size, setup.batch(setup.batch_size)
    for aligned in alignments:
        target = random_target(setup) if aligned else None
        ours = OurTraining(setup, setup.network(), target)
        plain = plain_training(setup, ours)
        shape = (CHANNELS, setup.latent_size, setup.latent_size)
        flops = n * (training_flops(ours.objective, shape) + target_flops(target, setup.image_size))
        step, check = functools.partial(plain.step, batch), functools.partial(plain_gradients, plain, batch)
        ways = {"plain": Way(step, flops, context=eager, check=check)}
        if setup.compile:
            compile_blocks(ours.objective.denoiser, dynamic=False)
            plain.model.compile_blocks()
            ways["plain compiled"] = Way(step, flops, check=check)
        step, check = (functools.partial(f, batch) for f in (ours.step, ours.gradients))
        ways["ours"] = Way(step, flops, context=eager, check=check)
        if setup.compile:
            ways["ours compiled"] = Way(step, flops, check=check)
        name = f"batch {n}, {'aligned to DINOv2-B' if aligned else 'no alignment'}"
        yield Case("training", name, ways, n, setup.tolerance(1e-3))


def activations(setup: Setup) -> Iterator[Case]:
    """Forward and backward, by what `model.activation_checkpointing` keeps between them."""
    n, batch = setup.batch_size, setup.batch(setup.batch_size)
    ways = {}
    for name, mode in {"all kept": False, "selective": "selective", "blocks computed again": True}.items():
        ours = OurTraining(setup, setup.network(activation_checkpointing=mode), None)
        call, check = (functools.partial(way, batch) for way in (ours.forward_backward, ours.gradients))
        ways[name] = Way(call, context=eager, check=check)
        if setup.compile:
            compile_blocks(ours.objective.denoiser, dynamic=False)
            ways[f"{name}, compiled"] = Way(call, check=check)
    yield Case("activations", f"batch {n}", ways, n, setup.tolerance(1e-3))


def values_of(parameters: Any) -> Tensor:
    """Return the first 1000 values of each parameter."""
    return torch.cat([p.detach().flatten()[:1000] for p in parameters])


def ema(setup: Setup) -> Iterator[Case]:
    """A step of the EMA weights."""
    model = setup.network()
    plain, ours = PlainTraining(setup.plain(model), "fp32"), EMA(model, ConstantDecay(0.9999))
    with torch.no_grad():  # EMA weights that differ from the weights
        for parameter in (*plain.ema.parameters(), *ours.model.parameters()):
            parameter.mul_(1.5)
    ours.place(setup.device, sharded=False, compiled=setup.compile)
    step = functools.partial(ours.update, list(model.parameters()), 1, torch.zeros((), device=setup.device))

    def after(update: Callable[[], None], network: torch.nn.Module) -> Tensor:
        update()
        return values_of(p for _, p in sorted(network.named_parameters()))

    ways = {
        "plain": Way(plain.update_ema, check=functools.partial(after, plain.update_ema, plain.ema)),
        "ours": Way(step, check=functools.partial(after, step, ours.model)),
    }
    yield Case("ema", "a step", ways, 0, 1e-6)


def with_gradients(setup: Setup) -> list[tuple[str, torch.nn.Parameter]]:
    """Return the network's parameters, by name, with random gradients."""
    parameters = list(setup.network().named_parameters())
    torch.manual_seed(6)
    for _, parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    return parameters


def optimizer(setup: Setup) -> Iterator[Case]:
    """AdamW's step: torch's default, and its fused one."""

    def after_step(optimizer: torch.optim.Optimizer) -> Tensor:
        optimizer.step()
        return values_of(optimizer.param_groups[0]["params"])

    ways = {}
    for name, make in {"plain": torch.optim.AdamW, "ours": adamw}.items():
        built = make(with_gradients(setup), **RECIPE)
        ways[name] = Way(built.step, check=functools.partial(after_step, built))
    yield Case("optimizer", "a step", ways, 0, 1e-5)


# --- files


def write_stores(root: Path, records: int, latent_size: int) -> None:
    """Write random moments (8, H, W) as a latent cache, root/cache, and .pt files, root/files."""
    shape, shard_size, shards = (8, latent_size, latent_size), 8192, []
    rng = np.random.default_rng(0)
    (root / "files").mkdir(parents=True)
    for shard, start in enumerate(range(0, records, shard_size)):
        count = min(shard_size, records - start)
        with write_array(shard_path(root / "cache", "moments", shard), "float16", (count, 1, *shape)) as writer:
            for row in range(count):
                values = rng.standard_normal((1, 1, *shape), dtype=np.float32).astype(np.float16)
                writer.append(values)
                mean, logvar = torch.from_numpy(values[0, 0]).chunk(2)
                torch.save({"mean": mean.clone(), "logvar": logvar.clone()}, root / "files" / f"{start + row}.pt")
        shards.append({f"moments/{shard:05d}.npy": writer.record()})
    np.save(root / "cache" / "labels.npy", np.zeros(records, dtype=np.int64))
    (root / "cache" / "manifest.csv").touch()
    index: dict[str, Any] = {
        "format_version": CACHE_FORMAT_VERSION, "complete": True, "count": records, "splits": {"train": records},
        "shard_size": shard_size, "arrays": {"moments": {"dtype": "float16", "shape": [1, *shape]}}, "flips": 1,
        "channels": 3, "image_size": CELL * latent_size, "class_names": ["0"], "transform": None,
        "features": None, "source": {}, "source_root": None, "shards": shards, "autoencoder": {"fingerprint": None},
        "files": {name: file_record(root / "cache" / name) for name in ("labels.npy", "manifest.csv")},
    }  # fmt: skip
    write_json(root / "cache" / "index.json", {**index, "fingerprint": content_fingerprint(index)})


def loader(setup: Setup) -> Iterator[Case]:
    """Random batches of 256 from a latent cache, beside one .pt file per image."""
    root = setup.folder / "stores"
    write_stores(root, setup.records, setup.latent_size)
    cache, rng = LatentCache(str(root / "cache")), np.random.default_rng(1)
    n = min(256, setup.records)
    unflipped, batches = np.zeros(n, dtype=bool), [rng.choice(setup.records, n, replace=False) for _ in range(8)]
    calls = {"plain": 0, "ours": 0}

    def indices(name: str) -> Any:  # each way reads the same batches, one after the other
        calls[name] += 1
        return batches[calls[name] % len(batches)]

    def from_files() -> Tensor:
        loaded = [torch.load(root / "files" / f"{i}.pt", weights_only=True) for i in indices("plain")]
        return torch.stack([torch.cat([entry["mean"], entry["logvar"]]) for entry in loaded])

    def from_cache() -> Tensor:
        return torch.from_numpy(cache.load_moments(indices("ours"), unflipped))

    yield Case("loader", f"batch {n}", {"plain": Way(from_files), "ours": Way(from_cache)}, n, 0.0)


def checkpoint(setup: Setup) -> Iterator[Case]:
    """Writing weights, EMA weights and optimizer state."""
    weights, optimizer = setup.network().state_dict(), adamw(with_gradients(setup), **RECIPE)
    optimizer.step()
    folder = setup.folder / "checkpoints"
    folder.mkdir()
    ema_weights = {name: value.clone() for name, value in weights.items()}  # torch.save writes what is shared once
    state = {"model": weights, "ema": ema_weights, "optimizer": optimizer.state_dict()}

    def plainly(safe: bool) -> Path:
        path = folder / "plain.pt"
        torch.save(state, path)
        if safe:
            fsync(path)
            sha256(path)
        return path

    def ours() -> Path:
        path = folder / "ours"
        shutil.rmtree(path, ignore_errors=True)
        ckpt.write_checkpoint(path, {}, {"optimizer": state["optimizer"]}, ema=ema_weights, model=weights)
        return path

    def read_plain(safe: bool) -> Tensor:
        return values_of(torch.load(plainly(safe), weights_only=True)["ema"].values())

    def read_ours() -> Tensor:
        stored = ckpt.read_weights(ours(), "ema")
        return values_of(stored[name] for name in weights).to(setup.device)

    ways = {
        "plain": Way(functools.partial(plainly, False), check=functools.partial(read_plain, False)),
        "plain, on disk and hashed": Way(functools.partial(plainly, True), check=functools.partial(read_plain, True)),
        "ours": Way(ours, base="plain, on disk and hashed", check=read_ours),
    }
    yield Case("checkpoint", "written", ways, 0, 0.0)


def write_random_inception(weights: Path) -> None:
    """Write a file as torch-fidelity's of the Inception network, of random weights."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class RandomInception(FeatureExtractorInceptionV3):
        def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
            """Leave the random weights."""

    torch.manual_seed(7)
    torch.save({}, weights)  # of the constructor
    torch.save(RandomInception("inception-v3-compat", ["2048"], str(weights)).state_dict(), weights)


def features(setup: Setup) -> Iterator[Case]:
    """Inception features of an npz of 256×256 px images, beside batches in memory."""
    n, batch_size, weights = NUM_IMAGES, 64, setup.folder / "inception.pth"
    write_random_inception(weights)
    extractor = InceptionFeatures(weights, batch_size, setup.device)
    pixels = np.random.default_rng(0).integers(0, 256, (n, 256, 256, 3), dtype=np.uint8)
    np.savez(setup.folder / "samples.npz", arr_0=pixels)
    source = NpzImages(setup.folder / "samples.npz", "samples")
    batches = [to_device(part, setup.device) for part in np.split(pixels, range(batch_size, n, batch_size))]

    def in_memory() -> Tensor:
        return torch.cat([extractor(batch)["pool"] for batch in batches])

    def from_file() -> Tensor:
        result = extract(source, extractor, setup.accelerator, "features")
        assert result is not None
        return result.rows["pool"]

    yield Case("features", f"{n} images", {"plain": Way(in_memory), "ours": Way(from_file)}, n, 1e-5)


PARTS: dict[str, Callable[[Setup], Iterator[Case]]] = {
    part.__name__: part
    for part in (forward, sampling, training, activations, loader, ema, optimizer, checkpoint, features)
}
