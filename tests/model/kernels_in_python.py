"""Compare the kernels with plain float64, on a CPU. test_triton_kernels.py runs this in a process
in which Triton interprets them. Prints the largest relative error of outputs and gradients by case.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported

import dataclasses
from collections.abc import Sequence

import torch
import torch.library
from torch import Tensor

torch.library.wrap_triton = lambda kernel: kernel  # no graph is traced; some torch versions refuse an interpreted one

from ddt.model import kernels, layers  # noqa: E402
from ddt.model.layers import rope_table, rotate  # noqa: E402
from ddt.training import ema_kernel  # noqa: E402

EPS = 1e-6
B, HEADS, D = 2, 2, 12
WIDTH = HEADS * D


def relative(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    return max(((x.double() - y).norm() / y.norm()).item() for x, y in zip(a, b, strict=True))


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * weight


def compare(name: str, ours, plain, inputs: list[Tensor]) -> None:
    """Print the errors of outputs, and of their gradients by the inputs, of a function, and whether
    gradients have the inputs' dtypes.
    """
    a = [value.clone().requires_grad_() for value in inputs]
    b = [value.double().requires_grad_() for value in inputs]
    out, expected = ours(*a), plain(*b)
    seeds = [torch.randn(value.shape).to(value.dtype) for value in out]
    grads = torch.autograd.grad(out, a, seeds)
    expected_grads = torch.autograd.grad(expected, b, [seed.double() for seed in seeds])
    dtypes = [grad.dtype == value.dtype for grad, value in zip(grads, inputs, strict=True)]
    print(name, relative(out, expected), relative(grads, expected_grads), all(dtypes))


def plain_turn(qkv: Tensor, weight_q: Tensor, weight_k: Tensor, cos: Tensor, sin: Tensor) -> list[Tensor]:
    q, k, v = qkv.unbind(2)
    tables = cos.double(), sin.double()
    turned = []
    for x, weight in ((q, weight_q), (k, weight_k)):
        pairs = rms(x, weight).transpose(1, 2).unflatten(-1, (-1, 2))
        even, odd = pairs.unbind(-1)
        c, s = tables
        turned.append(torch.stack([even * c - odd * s, even * s + odd * c], dim=-1).flatten(-2).transpose(1, 2))
    return [*turned, v]


def add_norm(x: Tensor, *others: Tensor) -> tuple[Tensor, Tensor]:
    return kernels.add_norm(x, x, *others, EPS)  # x takes its gradient itself


def plain_add_norm(x, branch, gate, weight, shift, scale):
    y = x + gate * branch
    return y, rms(y, weight) * (1 + scale) + shift


def main() -> None:
    torch.manual_seed(0)
    kernels.TURN_BACKWARD["TOKENS"] = kernels.NORM_BACKWARD["TOKENS"] = 4  # fewer than there are
    kernels.SWIGLU["CHANNELS"], ema_kernel.CHUNK = 16, 64
    cos, sin = rope_table(D, 3, 2)
    x = torch.randn(1, HEADS, 6, D)
    expected = rotate(x, cos, sin).transpose(1, 2).double()
    qkv = torch.stack([x.transpose(1, 2)] * 3, dim=2)
    ones = torch.ones(D)
    scale = torch.rsqrt(qkv[:, :, 0].square().mean(-1, keepdim=True) + EPS)
    print("rotate", relative([kernels.turn(qkv, ones, ones, cos, sin, EPS, False)[0]], [expected * scale]), 0.0, True)
    for dtype in (torch.float32, torch.bfloat16):
        qkv, weights = torch.randn(B, 6, 3, HEADS, D).to(dtype), [torch.rand(D) + 0.5 for _ in range(2)]
        compare(
            f"turn_{dtype}",
            lambda *a: kernels.turn(*a, cos, sin, EPS, True),
            lambda *a: plain_turn(*a, cos, sin),
            [qkv, *weights],
        )
    for n, m, dtype in ((6, 1, torch.float32), (5, 5, torch.float32), (5, 1, torch.bfloat16)):
        x, branch = (torch.randn(B, n, WIDTH).to(dtype) for _ in range(2))
        gate, shift, scale = torch.randn(B, m, 3 * WIDTH).to(dtype).chunk(3, dim=-1)
        weight = torch.rand(WIDTH) + 0.5
        compare(
            f"norm_{dtype}_{n}_{m}",
            lambda *a: kernels.norm(*a, EPS)[:1],
            lambda x, weight, shift, scale: (rms(x, weight) * (1 + scale) + shift,),
            [x, weight, shift, scale],
        )
        compare(
            f"add_norm_{dtype}_{n}_{m}",
            add_norm,
            plain_add_norm,
            [x, branch, gate, weight, shift, scale],
        )
    x, branch = torch.randn(B, 6, WIDTH), torch.randn(B, 6, WIDTH).bfloat16()  # a float32 residual under autocast
    modulations = [torch.randn(B, 1, WIDTH).bfloat16() for _ in range(3)]
    inputs = [x, branch, modulations[0], torch.rand(WIDTH), *modulations[1:]]
    compare("mixed_torch.bfloat16", add_norm, plain_add_norm, inputs)
    for dtype in (torch.float32, torch.bfloat16):
        ab = torch.randn(2, 3, 2 * 20).to(dtype)
        compare(
            f"swiglu_{dtype}",
            lambda ab: (kernels.swiglu(ab),),
            lambda ab: (torch.nn.functional.silu(ab[..., :20]) * ab[..., 20:],),
            [ab],
        )
    for rate in (0.0, 1e-4, 0.7, 1.0):  # tensors of less than a chunk, a whole one, none, and more
        emas, weights = ([torch.randn(n) for n in (1, 64, 0, 200)] for _ in range(2))
        expected = [(a.double() + rate * (b.double() - a.double())) for a, b in zip(emas, weights, strict=True)]
        ema_kernel.lerp_(emas, weights, torch.tensor(rate))
        equal = [torch.equal(a, b) for a, b in zip(emas, weights, strict=True)]
        del emas[2], expected[2]  # has no norm
        print(f"lerp_torch.float32_{rate}", relative(emas, expected), 0.0, all(equal) == (rate == 1))
    ema_kernel.lerp_([torch.zeros(0)], [torch.zeros(0)], torch.tensor(0.5))  # launches nothing
    published = dataclasses.replace(layers.DDT_STYLE, bias=True)  # DiT^DH's SwiGLU
    for m, style in ((1, layers.DDT_STYLE), (6, layers.DDT_STYLE), (6, published)):
        block = layers.Block(WIDTH, HEADS, style=style)
        for parameter in block.parameters():
            torch.nn.init.normal_(parameter, std=0.5)
        at = layers.positions(D, 3, 2, torch.device("cpu"))
        x, c = torch.randn(B, 6, WIDTH), torch.randn(B, m, WIDTH)
        results = []
        for use in (True, False):
            layers.runs_kernels = lambda x, use=use: use
            a, b = x.clone().requires_grad_(), c.clone().requires_grad_()
            out = block(a, b, at)
            grads = torch.autograd.grad(out.square().sum(), [a, b, *block.parameters()])
            with torch.no_grad():
                results.append([out, block(x, c, at), *grads])
        error = relative(results[0], [value.double() for value in results[1]])
        print(f"block_torch.float32_{m}_{style.bias}", error, 0.0, True)
    mlp, x = layers.SwiGLU(WIDTH), torch.randn(B, 6, WIDTH).bfloat16().requires_grad_()
    results = []
    for use in (True, False):
        layers.runs_kernels = lambda x, use=use: use
        with torch.autocast("cpu", torch.bfloat16):  # weights are cast: w1 and w3 in one product
            out = mlp(x)
        results.append([out, *torch.autograd.grad(out.float().square().sum(), [x, *mlp.parameters()])])
    print("mlp_torch.bfloat16", relative(results[0], [value.double() for value in results[1]]), 0.0, True)


if __name__ == "__main__":
    main()
