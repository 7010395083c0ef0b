"""What is measured: each part of the project beside the plain reference.

Shapes: B batch, C H W latent, S = 8·H pixels a side. Weights and inputs are random, and nothing is
read from a hub.
"""

import contextlib
import copy
import dataclasses
import functools
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from torch import Tensor

from ddt.autoencoder import KLAutoencoder
from ddt.autoencoder.diffusers import SD_VAE
from ddt.checkpoint import folder as ckpt
from ddt.distributed.compile import compile_blocks
from ddt.distributed.prepare import prepare
from ddt.errors import require
from ddt.files import fsync, sha256
from ddt.generation.generator import cast_weights
from ddt.model import DDT
from ddt.model.cost import network_macs
from ddt.model.layers import Attention
from ddt.objective import FlowMatching
from ddt.objective.alignment import REPA, Target
from ddt.sampling.cost import sampling_macs
from ddt.sampling.sample import sample_latents
from ddt.sampling.settings import SamplerSettings
from ddt.training.ema import EMA, ConstantDecay
from ddt.training.optimizer import adamw
from ddt.training.state import TrainingState
from ddt.training.throughput import counted_flops, target_flops, training_flops
from scripts.benchmark.plain import PlainDDT, PlainTraining, plain_features, plain_sample
from scripts.benchmark.timing import Case, Way, eager

CHANNELS, CLASSES, CELL = 4, 1000, 8  # SD-VAE's latents and pixels a cell, ImageNet
TARGET = "vit_base_patch14_dinov2.lvd142m"
RECIPE: dict[str, Any] = {"lr": 1e-4, "betas": (0.9, 0.95), "weight_decay": 0.0}
INTERVALS = {"guided on (0.3, 1)": (0.3, 1.0), "guided always": None}


def check_model(model: Any, align_depth: int) -> None:
    """Raise UserError for a network that the plain reference is none of, or whose encoder is too
    short.
    """
    require(
        isinstance(model, DDT) and isinstance(model.decoder.blocks[0].mixer, Attention),
        "model: the plain reference is a DDT whose decoder has attention; choose one, as b_8en4de",
    )
    depth = len(model.encoder.blocks)
    require(align_depth <= depth, f"align_depth={align_depth}: the encoder has {depth} blocks, choose 1..{depth}")


@torch.no_grad()
def without_zeros(model: Any) -> Any:
    """Fill the weights that a new network starts at zero, and return it: zero velocities all agree."""
    for parameter in model.parameters():
        if not parameter.any():
            parameter.normal_(std=0.02)
    return model


@dataclasses.dataclass
class Setup:
    """What is measured, and how large.

    make_model: (in_channels, num_classes, …) → network. align_depth: of the alignment in training.
    ratios: of steps without encoder. folder: where stores and checkpoints are written for a while.
    """

    make_model: Callable[..., Any]
    device: torch.device
    dtype: Literal["bf16", "fp32"]
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
        """S, pixels a side."""
        return CELL * self.latent_size

    def autocast(self) -> torch.autocast:
        """Return the context of the networks."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == "bf16")

    def tolerance(self, fp32: float) -> float:
        """Return the relative difference that rounding may make."""
        return max(fp32, 3e-2) if self.dtype == "bf16" else fp32

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

    def noise(self, batch_size: int) -> Tensor:
        """Return noise (B, C, H, W)."""
        generator = torch.Generator().manual_seed(1)
        size = self.latent_size
        return torch.randn(batch_size, CHANNELS, size, size, generator=generator).to(self.device)

    def batch(self, batch_size: int) -> dict[str, Tensor]:
        """Return a training batch, the arguments of `FlowMatching.forward`, with uint8 `images` (B,
        3, S, S).
        """
        generator = torch.Generator().manual_seed(2)
        size, n = self.latent_size, batch_size
        drawn = {
            "latents": torch.randn(n, CHANNELS, size, size, generator=generator),
            "y": torch.arange(n) % CLASSES,
            "noise": torch.randn(n, CHANNELS, size, size, generator=generator),
            "time_normal": torch.randn(n, generator=generator),
            "dropout_uniform": torch.rand(n, generator=generator),
            "images": torch.randint(256, (n, 3, self.image_size, self.image_size), generator=generator).byte(),
        }
        return {key: value.to(self.device) for key, value in drawn.items()}


def gradients(objective: torch.nn.Module) -> Tensor:
    """Return the norms of all gradients, and their products with fixed directions, in the order of
    the names; they are dropped.
    """
    found, device = [], next(objective.parameters()).device
    for _, parameter in sorted(objective.named_parameters(), key=lambda item: item[0].rpartition("denoiser.")[2]):
        gradient = parameter.grad.flatten()
        direction = torch.randn(len(gradient), generator=torch.Generator(device).manual_seed(0), device=device)
        found += [gradient.norm(), gradient @ direction / len(gradient) ** 0.5]
        parameter.grad = None
    return torch.stack(found)


def forward(setup: Setup) -> Iterator[Case]:
    """One velocity, encoder and decoder, without gradients."""
    model = setup.network()
    plain = setup.plain(model)
    if setup.dtype == "bf16":  # as sample.py does
        cast_weights(model)
    if setup.compile:
        compile_blocks(model, dynamic=False)
        compiled = torch.compile(plain, dynamic=False)
    for n in dict.fromkeys([*setup.sampling_batch_sizes, setup.batch_size]):
        x, t, y = setup.noise(n), torch.rand(n, device=setup.device), torch.arange(n, device=setup.device) % CLASSES

        def call(network: Any, x: Tensor = x, t: Tensor = t, y: Tensor = y) -> Tensor:
            with torch.no_grad(), setup.autocast():
                out = network(x, t, y)
            return out if isinstance(out, Tensor) else out[0]

        flops = 2 * n * network_macs(model, setup.latent_size, setup.latent_size).total
        ways = {
            "plain": Way(functools.partial(call, plain), flops),
            "ours": Way(functools.partial(call, model), flops, context=eager),
        }
        if setup.compile:
            ways["plain compiled"] = Way(functools.partial(call, compiled), flops)
            ways["ours compiled"] = Way(functools.partial(call, model), flops)
        yield Case("forward", f"batch {n}", ways, n, setup.tolerance(1e-4))


class OurTraining:
    """One training step after the other, as the loop takes them."""

    def __init__(self, setup: Setup, model: DDT, target: Target | None) -> None:
        setup.accelerator.free_memory()  # it holds on to all that it has prepared
        loss = None
        if target is not None:
            torch.manual_seed(3)
            grid = (model.encoder.positions(setup.noise(1)).height,) * 2
            loss = REPA(TARGET, align_depth=setup.align_depth).build_loss(
                model.hidden_size, target.num_features, target.grid, grid
            )
        self.objective = FlowMatching(model, alignment=loss).to(setup.device)
        self.target, self.accelerator = target, setup.accelerator
        average = EMA(model, ConstantDecay(0.9999))
        average.place(setup.device, sharded=False)
        self.model = prepare(self.objective, self.accelerator, "ddp")
        optimizer = adamw(self.objective.named_parameters(), **RECIPE)
        self.state = TrainingState(self.objective, optimizer, {"ema": average}, self.accelerator)

    def backward(self, batch: dict[str, Tensor]) -> None:
        """Leave the gradients of a batch."""
        arguments = {key: value for key, value in batch.items() if key != "images"}
        if self.target is not None:
            with self.accelerator.autocast():
                arguments["features"] = self.target(batch["images"])
        losses = self.model(**arguments)
        self.accelerator.backward(losses["loss"])
        self.state.meter.add(losses, 1.0)

    def step(self, batch: dict[str, Tensor]) -> None:
        """Take a training step."""
        self.backward(batch)
        self.state.update(clip_norm=None)

    def there_and_back(self, batch: dict[str, Tensor]) -> None:
        """Make the gradients of a batch and drop them."""
        self.backward(batch)
        self.objective.zero_grad(set_to_none=True)

    def gradients(self, batch: dict[str, Tensor]) -> Tensor:
        """Return what tells the gradients of a batch."""
        self.backward(batch)
        return gradients(self.objective)


class PlainSteps:
    """The plain training steps of the same weights, the target's features among them."""

    def __init__(self, setup: Setup, ours: OurTraining, compiled: bool) -> None:
        self.setup, self.target = setup, ours.target
        loss = ours.objective.alignment
        projector, weight = (None, 0.0) if loss is None else (copy.deepcopy(loss.projector), loss.weight)
        model = setup.plain(ours.objective.denoiser)
        self.training = PlainTraining(model, projector, setup.align_depth if projector else 0, weight, setup.dtype)
        self.eager, self.compiled = model, torch.compile(model, dynamic=False) if compiled else None

    def features(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return a batch with the target's features."""
        if self.target is None:
            return batch
        with torch.no_grad(), self.setup.autocast():
            found = plain_features(self.target.network, batch["images"], self.target.mean, self.target.std)
        return {**batch, "features": found}

    def step(self, batch: dict[str, Tensor], network: Any) -> None:
        """Take a training step, through the network or its compiled twin."""
        self.training.model = network
        self.training.step(self.features(batch))

    def gradients(self, batch: dict[str, Tensor], network: Any) -> Tensor:
        """Return what tells the gradients of a batch."""
        self.training.model = network
        self.training.loss(self.features(batch)).backward()
        both = torch.nn.ModuleDict({"denoiser": self.eager})
        if self.training.projector is not None:
            both["alignment"] = torch.nn.ModuleDict({"projector": self.training.projector})
        return gradients(both)


def random_target(setup: Setup, compiled: bool = False) -> Target:
    """Return DINOv2-B of the true architecture with random weights, through the real loader."""
    import timm
    from safetensors.torch import save_file

    file = setup.folder / "target.safetensors"
    if not file.exists():
        torch.manual_seed(4)
        save_file(timm.create_model(TARGET, num_classes=0).state_dict(), file)
    return Target(TARGET, str(file), setup.image_size, compiled).to(setup.device)


def training(setup: Setup) -> Iterator[Case]:
    """A training step: losses, gradients, optimizer, average; with the alignment's target and
    without.
    """
    for aligned in (True, False):
        target = random_target(setup) if aligned else None
        ours = OurTraining(setup, setup.network(), target)
        plain = PlainSteps(setup, ours, setup.compile)
        shape = (CHANNELS, setup.latent_size, setup.latent_size)
        flops = training_flops(ours.objective, shape) + target_flops(target, setup.image_size)
        n, batch = setup.batch_size, setup.batch(setup.batch_size)
        if setup.compile:
            compile_blocks(ours.objective.denoiser, dynamic=False)
        ways = {}
        for name, network in {"plain": plain.eager, "plain compiled": plain.compiled}.items():
            if network is not None:
                check = functools.partial(plain.gradients, batch, network)
                ways[name] = Way(functools.partial(plain.step, batch, network), n * flops, check=check)
        step, check = functools.partial(ours.step, batch), functools.partial(ours.gradients, batch)
        ways["ours"] = Way(step, n * flops, context=eager, check=check)
        if setup.compile:
            ways["ours compiled"] = Way(step, n * flops, check=check)
        name = f"batch {n}, {'aligned to DINOv2-B' if aligned else 'no alignment'}"
        yield Case("training", name, ways, n, setup.tolerance(1e-3))


def activations(setup: Setup) -> Iterator[Case]:
    """Forward and backward, with what they keep between them."""
    n, batch = setup.batch_size, setup.batch(setup.batch_size)
    ways = {}
    for name, kept in {"all kept": False, "selective": "selective", "blocks computed again": True}.items():
        ours = OurTraining(setup, setup.network(activation_checkpointing=kept), None)
        call, check = (functools.partial(way, batch) for way in (ours.there_and_back, ours.gradients))
        ways[name] = Way(call, context=eager, check=check)
        if setup.compile:
            compile_blocks(ours.objective.denoiser, dynamic=False)
            ways[f"{name}, compiled"] = Way(call, check=check)
    yield Case("activations", f"batch {n}", ways, n, setup.tolerance(1e-3))


def sampling(setup: Setup) -> Iterator[Case]:
    """A set of latents by Euler's method, with and without the encoder's sharing and the guidance
    interval.
    """
    model = setup.network()
    plain = setup.plain(model)
    if setup.dtype == "bf16":
        cast_weights(model)
    macs = functools.partial(sampling_macs, model, setup.latent_size, setup.latent_size)
    if setup.compile:
        compile_blocks(model, dynamic=True)
    for n in setup.sampling_batch_sizes:
        noise, y = setup.noise(n), torch.arange(n, device=setup.device) % CLASSES
        for interval, bounds in INTERVALS.items():
            ways: dict[str, Way] = {}
            for ratio in setup.ratios:
                every = round(1 / (1 - ratio))
                recompute = None if every == 1 else f"uniform:{every}"
                settings = SamplerSettings(num_steps=setup.num_steps, cfg_interval=bounds, recompute=recompute)
                own = f"plain {ratio:.2f}"

                def plainly(settings: SamplerSettings = settings, noise: Tensor = noise, y: Tensor = y) -> Tensor:
                    with setup.autocast():
                        return plain_sample(plain, noise, y, settings)

                def shared(settings: SamplerSettings = settings, noise: Tensor = noise, y: Tensor = y) -> Tensor:
                    with setup.autocast():
                        return sample_latents(model, noise, y, settings)

                plain_flops = 2 * n * macs(settings, cached=False, skip_unconditional=False)
                flops = 2 * n * macs(settings)
                calls = {own: (plainly, plain_flops), f"ours {ratio:.2f}": (shared, flops)}
                if setup.compile:
                    calls[f"ours compiled {ratio:.2f}"] = shared, flops
                for name, (call, cost) in calls.items():
                    context = eager if name.startswith("ours 0") else contextlib.nullcontext
                    ways[name] = Way(call, cost, own, context, functools.partial(moved, call, noise))
            yield Case("sampling", f"batch {n}, {interval}", ways, n, setup.tolerance(1e-3))


def moved(call: Callable[[], Tensor], noise: Tensor) -> Tensor:
    """Return how far sampling went from the noise, which is most of the latents and the same
    whatever it does.
    """
    return call() - noise


def target(setup: Setup) -> Iterator[Case]:
    """The features of the alignment's target."""
    ours, n = random_target(setup), setup.batch_size
    images = setup.batch(n)["images"]
    flops = n * target_flops(ours, setup.image_size)

    def plainly() -> Tensor:
        with torch.no_grad(), setup.autocast():
            return plain_features(ours.network, images, ours.mean, ours.std).float()

    def call(network: Target) -> Tensor:
        with setup.autocast():
            return network(images)

    ways = {"plain": Way(plainly, flops), "ours": Way(functools.partial(call, ours), flops)}
    if setup.compile:
        ways["ours compiled"] = Way(functools.partial(call, random_target(setup, compiled=True)), flops)
    yield Case("target", f"batch {n}", ways, n, setup.tolerance(1e-4))


def autoencoder(setup: Setup) -> Iterator[Case]:
    """Encoding and decoding with SD-VAE's architecture."""
    ours, n = random_autoencoder(setup), min(setup.batch_size, 16)
    images, latents = setup.batch(n)["images"], setup.noise(n)

    def plain_encode() -> Tensor:
        with torch.no_grad(), setup.autocast():
            return ours.network.encode(images.float() / 127.5 - 1).latent_dist.parameters.float()

    def plain_decode() -> Tensor:
        with torch.no_grad(), setup.autocast():
            return ours.network.decode(latents / ours.network.config.scaling_factor).sample.float()

    def decode() -> Tensor:
        with setup.autocast():
            return ours.decode(latents)

    def decoded() -> Tensor:  # before rounding to uint8, which is a step and no rounding error
        return (plain_decode().clamp(-1, 1) + 1) * 127.5

    encoding, decoding = counted_flops(plain_encode), counted_flops(plain_decode)
    ways = {"plain": Way(plain_encode, encoding), "ours": Way(lambda: ours.encode(images), encoding)}
    yield Case("autoencoder", f"encode, batch {n}", ways, n, setup.tolerance(1e-4))
    ways = {"plain": Way(plain_decode, decoding, check=decoded), "ours": Way(decode, decoding)}
    yield Case("autoencoder", f"decode, batch {n}", ways, n, 2e-2)


def random_autoencoder(setup: Setup) -> KLAutoencoder:
    """Return an autoencoder of SD-VAE's architecture with random weights, through the real loader."""
    from diffusers import AutoencoderKL

    folder = setup.folder / "autoencoder"
    if not folder.exists():
        torch.manual_seed(5)
        AutoencoderKL.from_config(SD_VAE).save_pretrained(folder)
    return KLAutoencoder(str(folder), encode_dtype=setup.dtype).to(setup.device)


def loader(setup: Setup) -> Iterator[Case]:
    """Random batches of 256 from a latent cache, beside one .pt file an image."""
    import numpy as np

    from ddt.data.latent_cache import LatentCache
    from scripts.benchmark.stores import write_stores

    root = setup.folder / "stores"
    root.mkdir()
    write_stores(root, setup.records, setup.latent_size)
    cache, rng = LatentCache(str(root / "cache")), np.random.default_rng(1)
    n = min(256, setup.records)
    straight, order = np.zeros(n, dtype=bool), [rng.choice(setup.records, n, replace=False) for _ in range(8)]
    turns = {"plain": 0, "ours": 0}

    def indices(name: str) -> Any:  # each way reads the same batches, one after the other
        turns[name] += 1
        return order[turns[name] % len(order)]

    def from_files() -> Tensor:
        loaded = [torch.load(root / "files" / f"{i}.pt", weights_only=True) for i in indices("plain")]
        return torch.stack([torch.cat([entry["mean"], entry["logvar"]]) for entry in loaded])

    def from_cache() -> Tensor:
        return torch.from_numpy(cache.load_moments(indices("ours"), straight))

    yield Case("loader", f"batch {n}", {"plain": Way(from_files), "ours": Way(from_cache)}, n, 0.0)


def probe(parameters: Any) -> Tensor:
    """Return some values of each parameter."""
    return torch.cat([p.detach().flatten()[:1000] for p in parameters])


def average(setup: Setup) -> Iterator[Case]:
    """A step of the averaged weights."""
    model = setup.network()
    plain = PlainTraining(setup.plain(model), None, 0, 0.0, "fp32")
    ours = EMA(model, ConstantDecay(0.9999))
    with torch.no_grad():  # the averages are not the weights
        for module in (plain.average, ours.model):
            for parameter in module.parameters():
                parameter.mul_(1.5)
    ours.place(setup.device, sharded=False)
    none = torch.zeros((), device=setup.device)  # no skipped step, told on the device as the loop does

    def plainly() -> Tensor:
        plain.update_average()
        return probe(p for _, p in sorted(plain.average.named_parameters()))

    def our_way() -> Tensor:
        ours.update(model, 1, none)
        return probe(p for _, p in sorted(ours.model.named_parameters()))

    ways = {
        "plain": Way(plain.update_average, check=plainly),
        "ours": Way(functools.partial(ours.update, model, 1, none), check=our_way),
    }
    yield Case("average", "a step", ways, 0, 1e-6)


def with_gradients(setup: Setup) -> list[tuple[str, torch.nn.Parameter]]:
    """Return the network's parameters, by name, with random gradients."""
    parameters = list(setup.network().named_parameters())
    torch.manual_seed(6)
    for _, parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    return parameters


def step_and_probe(optimizer: torch.optim.Optimizer) -> Tensor:
    """Take a step and return some of the weights."""
    optimizer.step()
    return probe(optimizer.param_groups[0]["params"])


def optimizer(setup: Setup) -> Iterator[Case]:
    """AdamW's step: torch's default, and its fused one."""
    ways = {}
    for name, make in {"plain": torch.optim.AdamW, "ours": adamw}.items():
        made = make(with_gradients(setup), **RECIPE)
        ways[name] = Way(made.step, check=functools.partial(step_and_probe, made))
    yield Case("optimizer", "a step", ways, 0, 1e-5)


def checkpoint(setup: Setup) -> Iterator[Case]:
    """Writing weights, an average and the optimizer's state."""
    model = setup.network()
    plain_optimizer = adamw(with_gradients(setup), **RECIPE)
    plain_optimizer.step()
    folder, weights = setup.folder / "checkpoints", model.state_dict()
    folder.mkdir()
    averages = {name: value.clone() for name, value in weights.items()}  # torch.save writes what is shared once
    state = {"model": weights, "ema": averages, "optimizer": plain_optimizer.state_dict()}

    def plainly(safe: bool) -> Path:
        path = folder / "plain.pt"
        torch.save(state, path)
        if safe:
            fsync(path)
            sha256(path)
        return path

    def our_way() -> Path:
        path = folder / "ours"
        shutil.rmtree(path, ignore_errors=True)
        ckpt.write_checkpoint(path, {}, {"optimizer": state["optimizer"]}, ema=averages, model=weights)
        return path

    def read_plain(safe: bool) -> Tensor:
        return probe(torch.load(plainly(safe), weights_only=True)["ema"].values())

    def read_ours() -> Tensor:
        kept = ckpt.read_weights(our_way(), "ema")
        return probe(kept[name] for name in weights).to(setup.device)

    ways = {
        "plain": Way(functools.partial(plainly, False), check=functools.partial(read_plain, False)),
        "plain, on disk and hashed": Way(functools.partial(plainly, True), check=functools.partial(read_plain, True)),
        "ours": Way(our_way, base="plain, on disk and hashed", check=read_ours),
    }
    yield Case("checkpoint", "written", ways, 0, 0.0)
