"""Speed-ups that the code does without: each beside what the code does, so that the choice can be seen and made again.

The first way of a case is the code's; a candidate with a ratio below 1 does not pay.
"""

import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.parts import RECIPE, OurTraining, Setup, probe, random_autoencoder, step_and_probe, with_gradients
from benchmarks.timing import Case, Way
from ddt.compiling import compile_blocks
from ddt.ema import EMA, ConstantDecay
from ddt.layers import Block, positions, rotate
from ddt.optimizer import adamw

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION, "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "memory-efficient": SDPBackend.EFFICIENT_ATTENTION, "two products": SDPBackend.MATH,
}  # fmt: skip
HEADS = {"64": (768, 12), "72": (1152, 16)}  # width of a head: (D, heads), of B and of XL


def inferred(setup: Setup, call: Callable[..., Tensor], *args: Any) -> Callable[[], Tensor]:
    """Return the call without gradients, under the run's autocast."""

    def run() -> Tensor:
        with torch.no_grad(), setup.autocast():
            return call(*args)

    return run


def compared(name: str, setup: Setup, calls: dict[str, Callable[[], Any]], n: int = 0, tolerance: float = 1e-4) -> Case:
    """Return a case of ways that count no FLOPs."""
    return Case("candidates", name, {key: Way(call) for key, call in calls.items()}, n, setup.tolerance(tolerance))


def linears(setup: Setup) -> Iterator[Case]:
    """Matrix products that could be one: w1 and w3 of SwiGLU, the encoder's modulations of all blocks."""
    model, n = setup.network(), setup.batch_size
    mlp, tokens = model.encoder.blocks[0].mlp, (setup.latent_size // model.encoder.patch_size) ** 2
    x = torch.randn(n, tokens, model.hidden_size, device=setup.device)
    both = torch.cat([mlp.w1.weight, mlp.w3.weight])

    def joined(x: Tensor) -> Tensor:
        gate, value = F.linear(x, both).chunk(2, dim=-1)
        return mlp.w2(F.silu(gate) * value)

    calls = {"two products": inferred(setup, mlp, x), "w1|w3 in one": inferred(setup, joined, x)}
    yield compared(f"SwiGLU, batch {n}", setup, calls, n)

    layers = [block.adaln for block in model.encoder.blocks]
    c = torch.randn(n, 1, model.hidden_size, device=setup.device)
    weight, bias = torch.cat([a.weight for a in layers]), torch.cat([a.bias for a in layers])
    apart = inferred(setup, lambda c: torch.cat([layer(c) for layer in layers], dim=-1), c)
    calls = {"one a block": apart, "all in one": inferred(setup, F.linear, c, weight, bias)}
    yield compared(f"encoder modulations, batch {n}", setup, calls, n)


def attention(setup: Setup) -> Iterator[Case]:
    """Layouts of q, k, v, kernels of attention at both head widths, and ways to rotate."""
    n, tokens = setup.batch_size, (setup.latent_size // 2) ** 2
    dtype = torch.bfloat16 if setup.dtype == "bf16" else torch.float32
    for width, (dim, heads) in HEADS.items():
        qkv = torch.randn(n, tokens, 3 * dim, device=setup.device, dtype=dtype).unflatten(-1, (3, heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        calls: dict[str, Callable[[], Tensor]] = {
            "torch's choice": functools.partial(F.scaled_dot_product_attention, q, k, v)
        }

        def copied(q: Tensor = q, k: Tensor = k, v: Tensor = v) -> Tensor:
            return F.scaled_dot_product_attention(q.contiguous(), k.contiguous(), v.contiguous())

        calls["q, k, v copied"] = copied
        for name, backend in BACKENDS.items():

            def chosen(backend: SDPBackend = backend, q: Tensor = q, k: Tensor = k, v: Tensor = v) -> Tensor:
                with sdpa_kernel(backend):
                    return F.scaled_dot_product_attention(q, k, v)

            if runs(chosen):
                calls[name] = chosen
        yield compared(f"attention, heads of {width}, batch {n}", setup, calls, n, 1e-3)
        side = setup.latent_size // 2
        at = positions(int(width), side, side, setup.device)
        calls = {
            "complex": functools.partial(rotate, q, at.cos, at.sin),
            "sines and cosines": functools.partial(turned, q, at.cos, at.sin),
        }
        yield compared(f"rotation, heads of {width}, batch {n}", setup, calls, n)


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Do what `ddt.layers.rotate` does, without complex numbers."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).type_as(x)


def runs(call: Callable[[], Any]) -> bool:
    """Tell whether this machine has a kernel for a call."""
    try:
        call()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:  # "No available kernel"
        return False
    return True


def updates(setup: Setup) -> Iterator[Case]:
    """Ways to move the averages and to take AdamW's step."""
    model = setup.network()
    weights = [p.detach() for p in model.parameters()]
    rate, none = torch.tensor(1e-4, device=setup.device), torch.zeros((), device=setup.device)

    def average() -> EMA[Any]:
        made = EMA(model, ConstantDecay(0.9999))
        with torch.no_grad():
            torch._foreach_mul_(list(made.model.parameters()), 1.5)
        made.place(setup.device, sharded=False)
        return made

    ours = average()
    foreach, three = (list(average().model.parameters()) for _ in range(2))

    @torch.no_grad()
    def lerp() -> Tensor:
        ours.update(model, 1, none)
        return probe(ours.model.parameters())

    @torch.no_grad()
    def lerp_foreach() -> Tensor:  # its rate must be a number of the host, which a skipped step is not
        torch._foreach_lerp_(foreach, weights, 1e-4)
        return probe(foreach)

    @torch.no_grad()
    def three_passes() -> Tensor:
        apart = torch._foreach_sub(weights, three)
        torch._foreach_mul_(apart, rate)
        torch._foreach_add_(three, apart)
        return probe(three)

    yield compared(
        "average", setup, {"lerp": lerp, "foreach lerp": lerp_foreach, "foreach, three passes": three_passes}
    )
    ways = {}
    foreach_adamw = functools.partial(torch.optim.AdamW, foreach=True)
    for name, make in {"fused": adamw, "foreach": foreach_adamw}.items():
        ways[name] = functools.partial(step_and_probe, make(with_gradients(setup), **RECIPE))
    yield compared("AdamW", setup, ways)


def channels_last(setup: Setup) -> Iterator[Case]:
    """The autoencoder with its channels last."""
    network, n = random_autoencoder(setup).network, min(setup.batch_size, 16)
    other = copy.deepcopy(network).to(memory_format=torch.channels_last)
    images, latents = setup.batch(n)["images"].float() / 127.5 - 1, setup.noise(n)
    for name, call, x in (("encode", "encode", images), ("decode", "decode", latents)):

        def run(network: Any, x: Tensor, call: str = call) -> Tensor:
            found = getattr(network, call)(x)
            return found.sample if call == "decode" else found.latent_dist.parameters

        calls = {
            "channels first": inferred(setup, run, network, x),
            "channels last": inferred(setup, run, other, x.to(memory_format=torch.channels_last)),
        }
        yield compared(f"autoencoder, {name}, batch {n}", setup, calls, n, 1e-3)


def accumulation(setup: Setup) -> Iterator[Case]:
    """Two micro-batches whose bf16 weights are cast once, or for each of them."""
    if setup.dtype != "bf16":
        return
    ours, batch = OurTraining(setup, setup.network(), None), setup.batch(setup.batch_size)

    def each() -> Tensor:
        ours.backward(batch)
        return ours.gradients(batch)

    def once() -> Tensor:
        with setup.autocast():
            return each()

    name = f"two micro-batches of {setup.batch_size}"
    yield compared(name, setup, {"cast for each": each, "cast once": once}, 2 * setup.batch_size)


def graphs(setup: Setup) -> Iterator[Case]:
    """A forward at small batches through CUDA graphs."""
    if setup.device.type != "cuda" or not setup.compile:
        return
    model = setup.network()
    default, graphed = torch.compile(model), torch.compile(model, mode="reduce-overhead")
    for n in setup.sampling_batch_sizes:
        x, t, y = setup.noise(n), torch.rand(n, device=setup.device), torch.arange(n, device=setup.device)
        calls = {"compiled": inferred(setup, default, x, t, y), "CUDA graphs": inferred(setup, graphed, x, t, y)}
        yield compared(f"forward, batch {n}", setup, calls, n)


def kernels(setup: Setup) -> Iterator[Case]:
    """Blocks whose kernels are chosen by timing them, and as the code has them: the same in each process."""
    if setup.device.type != "cuda" or not setup.compile:
        return
    fixed, timed = (OurTraining(setup, setup.network(), None) for _ in range(2))
    compile_blocks(fixed.objective.denoiser, dynamic=False)
    for block in [part for part in timed.objective.modules() if isinstance(part, Block)]:
        block.compile(fullgraph=True, dynamic=False)
    batch = setup.batch(setup.batch_size)
    calls = {"fixed": functools.partial(fixed.gradients, batch), "timed": functools.partial(timed.gradients, batch)}
    yield compared(f"kernels, batch {setup.batch_size}", setup, calls, setup.batch_size, 1e-3)


def candidates(setup: Setup) -> Iterator[Case]:
    """Every candidate beside what the code does."""
    for group in (linears, attention, updates, channels_last, accumulation, graphs, kernels):
        yield from group(setup)
