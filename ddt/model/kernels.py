"""Triton kernels of the compiled blocks on GPUs: less traffic to memory, the same numbers.

Left to itself, torch's compiler reads and writes the tokens several times where a block normalises
them: for the heads of queries and keys, whose channel pairs turn, and in the backward pass of norm
and modulation; and it would read both halves of a SwiGLU once for the gradient of each. Each
function here is one pass. Sums are taken in a fixed order, so equal inputs give equal bits. Shapes:
B batch, N tokens, D width, M 1 or N, d width of a head, I inner width of a SwiGLU.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

# of a program: how many tokens a backward pass sums over, how many loads are under way, its warps;
# the fastest of a few on an H100 at XL's sizes
TURN = {"num_warps": 2}
TURN_BACKWARD = {"TOKENS": 16, "STAGES": 3, "num_warps": 4}
NORM = {"num_warps": 4}
NORM_BACKWARD = {"TOKENS": 64, "STAGES": 3, "num_warps": 8}
SWIGLU = {"CHANNELS": 1024, "num_warps": 4}


# --- norm and rotation of queries and keys


@triton.jit
def _turn_kernel(
    qkv, weight_q, weight_k, cos, sin, q, k, v, num_positions, eps,
    H: tl.constexpr, D: tl.constexpr, HP: tl.constexpr, DP: tl.constexpr, COPY_V: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    j, half = tl.arange(0, DP), tl.arange(0, DP // 2)
    at = tl.arange(0, HP)[:, None] * D + j[None, :]  # in a token's H·D values
    inside = (tl.arange(0, HP)[:, None] < H) & (j[None, :] < D)
    row = (token % num_positions) * (D // 2) + half
    c = tl.load(cos + row, half < D // 2, 0.0)[None, :]
    s = tl.load(sin + row, half < D // 2, 0.0)[None, :]
    for which in tl.static_range(2):
        x = tl.load(qkv + (3 * token + which) * H * D + at, inside, 0.0).to(tl.float32)
        weight = tl.load((weight_k if which else weight_q) + j, j < D, 0.0).to(tl.float32)
        y = x * tl.rsqrt(tl.sum(x * x, 1) / D + tl.cast(eps, tl.float32))[:, None] * weight[None, :]
        even, odd = tl.split(tl.reshape(y, (HP, DP // 2, 2)))
        turned = tl.reshape(tl.join(even * c - odd * s, even * s + odd * c), (HP, DP))
        tl.store((k if which else q) + token * H * D + at, turned, inside)
    if COPY_V:
        tl.store(v + token * H * D + at, tl.load(qkv + (3 * token + 2) * H * D + at, inside, 0.0), inside)


@triton.jit
def _turn_backward_kernel(
    qkv, weight_q, weight_k, cos, sin, grad_q, grad_k, grad_v, grad_qkv, grad_weights, num_tokens, num_positions, eps,
    H: tl.constexpr, D: tl.constexpr, HP: tl.constexpr, DP: tl.constexpr, TOKENS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    j, half = tl.arange(0, DP), tl.arange(0, DP // 2)
    at = tl.arange(0, HP)[:, None] * D + j[None, :]
    inside = (tl.arange(0, HP)[:, None] < H) & (j[None, :] < D)
    for which in tl.static_range(2):
        weight = tl.load((weight_k if which else weight_q) + j, j < D, 0.0).to(tl.float32)[None, :]
        total = tl.zeros((HP, DP), tl.float32)
        for i in tl.range(TOKENS, num_stages=STAGES):
            token = program * TOKENS + i
            here = inside & (token < num_tokens)
            row = (token % num_positions) * (D // 2) + half
            c = tl.load(cos + row, half < D // 2, 0.0)[None, :]
            s = tl.load(sin + row, half < D // 2, 0.0)[None, :]
            x = tl.load(qkv + (3 * token + which) * H * D + at, here, 0.0).to(tl.float32)
            grad = tl.load((grad_k if which else grad_q) + token * H * D + at, here, 0.0).to(tl.float32)
            even, odd = tl.split(tl.reshape(grad, (HP, DP // 2, 2)))
            grad = tl.reshape(tl.join(even * c + odd * s, odd * c - even * s), (HP, DP))  # turned back
            scale = tl.rsqrt(tl.sum(x * x, 1) / D + tl.cast(eps, tl.float32))[:, None]
            x *= scale
            total += grad * x
            grad *= weight
            grad = scale * (grad - x * (tl.sum(grad * x, 1) / D)[:, None])
            tl.store(grad_qkv + (3 * token + which) * H * D + at, grad, here)
        tl.store(grad_weights + (2 * program + which) * D + j, tl.sum(total, 0), j < D)
    for i in tl.range(TOKENS, num_stages=STAGES):
        token = program * TOKENS + i
        here = inside & (token < num_tokens)
        grad = tl.load(grad_v + token * H * D + at, here, 0.0)
        tl.store(grad_qkv + (3 * token + 2) * H * D + at, grad, here)


@triton_op("ddt::turn", mutates_args={})
def turn(
    qkv: Tensor, weight_q: Tensor, weight_k: Tensor, cos: Tensor, sin: Tensor, eps: float, copy_v: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return RMS-normalised, rotated queries and keys, and the values, each (B, N, heads, d).

    qkv: (B, N, 3, heads, d). weights: (d,) of the norms. cos, sin: (N, d/2) of the rotation.
    copy_v: without it the values are left out, (0,): a view of qkv does where no gradient is
    wanted, whose gradients would be gathered in one more pass.
    """
    b, n, _, h, d = qkv.shape
    qkv = qkv.contiguous()
    q, k = (qkv.new_empty(b, n, h, d) for _ in range(2))
    v = qkv.new_empty((b, n, h, d) if copy_v else (0,))
    wrap_triton(_turn_kernel)[(b * n,)](
        qkv, weight_q, weight_k, cos, sin, q, k, v, n, eps,
        H=h, D=d, HP=triton.next_power_of_2(h), DP=triton.next_power_of_2(d), COPY_V=copy_v, **TURN,
    )  # fmt: skip
    return q, k, v


@triton_op("ddt::turn_backward", mutates_args={})
def turn_backward(
    qkv: Tensor, weight_q: Tensor, weight_k: Tensor, cos: Tensor, sin: Tensor, eps: float, grad_q: Tensor,
    grad_k: Tensor, grad_v: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the gradients of `turn` by qkv, and by the two weights, (2, d) in float32."""
    b, n, _, h, d = qkv.shape
    programs = triton.cdiv(b * n, TURN_BACKWARD["TOKENS"])
    grad_qkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    grad_weights = qkv.new_empty(programs, 2, d, dtype=torch.float32)
    wrap_triton(_turn_backward_kernel)[(programs,)](
        qkv.contiguous(), weight_q, weight_k, cos, sin, grad_q.contiguous(), grad_k.contiguous(), grad_v.contiguous(),
        grad_qkv, grad_weights, b * n, n, eps, H=h, D=d, HP=triton.next_power_of_2(h),
        DP=triton.next_power_of_2(d), **TURN_BACKWARD,
    )  # fmt: skip
    return grad_qkv, grad_weights.sum(0)


def _turn_setup(ctx, inputs, output):
    qkv, weight_q, weight_k, cos, sin, ctx.eps, _ = inputs
    ctx.save_for_backward(qkv, weight_q, weight_k, cos, sin)


def _turn_gradient(ctx, grad_q, grad_k, grad_v):
    qkv, weight_q, weight_k, cos, sin = ctx.saved_tensors
    grad_qkv, grads = turn_backward(qkv, weight_q, weight_k, cos, sin, ctx.eps, grad_q, grad_k, grad_v)
    return grad_qkv, grads[0].to(weight_q.dtype), grads[1].to(weight_k.dtype), None, None, None, None


turn.register_autograd(_turn_gradient, setup_context=_turn_setup)


# --- residual, norm and modulation


@triton.jit
def _norm_kernel(
    x, branch, gate, weight, shift, scale, y, h, num_positions, gate_stride, shift_stride, scale_stride, eps,
    D: tl.constexpr, DP: tl.constexpr, BRANCH: tl.constexpr, PER_TOKEN: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    j = tl.arange(0, DP)
    inside = j < D
    row = token if PER_TOKEN else token // num_positions
    tokens = tl.load(x + token * D + j, inside, 0.0)
    if BRANCH:
        amount = tl.load(gate + row * gate_stride + j, inside, 0.0).to(tl.float32)
        added = amount * tl.load(branch + token * D + j, inside, 0.0).to(tl.float32)
        tokens = (tokens.to(tl.float32) + added).to(y.dtype.element_ty)
        tl.store(y + token * D + j, tokens, inside)
    tokens = tokens.to(tl.float32)
    normal = tokens * tl.rsqrt(tl.sum(tokens * tokens, 0) / D + tl.cast(eps, tl.float32))
    normal *= tl.load(weight + j, inside, 0.0).to(tl.float32)
    add = tl.load(shift + row * shift_stride + j, inside, 0.0).to(tl.float32)
    factor = 1 + tl.load(scale + row * scale_stride + j, inside, 0.0).to(tl.float32)
    tl.store(h + token * D + j, normal * factor + add, inside)


@triton.jit
def _norm_backward_kernel(
    y, branch, gate, weight, scale, grad_y, grad_h, grad_x, grad_branch, grad_gate, grad_weight, grad_shift, grad_scale,
    num_positions, gate_stride, scale_stride, eps,
    D: tl.constexpr, DP: tl.constexpr, BRANCH: tl.constexpr, PER_TOKEN: tl.constexpr, TOKENS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    sample, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    program = sample * tl.num_programs(1) + part
    j = tl.arange(0, DP)
    inside = j < D
    w = tl.load(weight + j, inside, 0.0).to(tl.float32)
    sum_weight = tl.zeros((DP,), tl.float32)
    sum_shift = tl.zeros((DP,), tl.float32)
    sum_scale = tl.zeros((DP,), tl.float32)
    sum_gate = tl.zeros((DP,), tl.float32)
    factor = sum_shift
    amount = sum_shift
    if not PER_TOKEN:
        factor = 1 + tl.load(scale + sample * scale_stride + j, inside, 0.0).to(tl.float32)
        if BRANCH:
            amount = tl.load(gate + sample * gate_stride + j, inside, 0.0).to(tl.float32)
    for i in tl.range(TOKENS, num_stages=STAGES):
        position = part * TOKENS + i
        here = inside & (position < num_positions)
        token = sample * num_positions + position
        tokens = tl.load(y + token * D + j, here, 0.0).to(tl.float32)
        grad = tl.load(grad_h + token * D + j, here, 0.0).to(tl.float32)
        if PER_TOKEN:
            factor = 1 + tl.load(scale + token * scale_stride + j, here, 0.0).to(tl.float32)
        inverse = tl.rsqrt(tl.sum(tokens * tokens, 0) / D + tl.cast(eps, tl.float32))
        normal = tokens * inverse
        by_scale = grad * normal * w
        if PER_TOKEN:
            tl.store(grad_shift + token * D + j, grad, here)
            tl.store(grad_scale + token * D + j, by_scale, here)
        else:
            sum_shift += grad
            sum_scale += by_scale
        grad *= factor
        sum_weight += grad * normal
        grad *= w
        grad = inverse * (grad - normal * (tl.sum(grad * normal, 0) / D))
        grad += tl.load(grad_y + token * D + j, here, 0.0).to(tl.float32)
        if BRANCH:
            if PER_TOKEN:
                amount = tl.load(gate + token * gate_stride + j, here, 0.0).to(tl.float32)
            by_gate = grad * tl.load(branch + token * D + j, here, 0.0).to(tl.float32)
            tl.store(grad_branch + token * D + j, grad * amount, here)
            if PER_TOKEN:
                tl.store(grad_gate + token * D + j, by_gate, here)
            else:
                sum_gate += by_gate
        tl.store(grad_x + token * D + j, grad, here)
    tl.store(grad_weight + program * D + j, sum_weight, inside)
    if not PER_TOKEN:
        tl.store(grad_shift + program * D + j, sum_shift, inside)
        tl.store(grad_scale + program * D + j, sum_scale, inside)
        if BRANCH:
            tl.store(grad_gate + program * D + j, sum_gate, inside)


def rows(modulation: Tensor) -> Tensor:
    """Return a modulation (B, M, D), a part of a wider one, with adjacent channels."""
    return modulation if modulation.stride(-1) == 1 else modulation.contiguous()


def row_stride(modulation: Tensor) -> int:
    """Return the distance of the rows (b, m) of a modulation (B, M, D), counted on over b."""
    return modulation.stride(0) if modulation.shape[1] == 1 else modulation.stride(1)


def launch_norm(
    x: Tensor, branch: Tensor, gate: Tensor, weight: Tensor, shift: Tensor, scale: Tensor, y: Tensor, eps: float,
    with_branch: bool,
) -> Tensor:  # fmt: skip
    """Run the forward kernel; return h."""
    b, n, d = x.shape
    h = torch.empty_like(x, memory_format=torch.contiguous_format)
    wrap_triton(_norm_kernel)[(b * n,)](
        x, branch, gate, weight, shift, scale, y, h, n, row_stride(gate), row_stride(shift), row_stride(scale), eps,
        D=d, DP=triton.next_power_of_2(d), BRANCH=with_branch, PER_TOKEN=shift.shape[1] != 1, **NORM,
    )  # fmt: skip
    return h


def launch_norm_backward(
    y: Tensor, branch: Tensor, gate: Tensor, weight: Tensor, scale: Tensor, grad_y: Tensor, grad_h: Tensor, eps: float,
    with_branch: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Run the backward kernel; return the gradients by x, branch, gate, weight, shift, scale."""
    b, n, d = y.shape
    per_token, parts = scale.shape[1] != 1, triton.cdiv(n, NORM_BACKWARD["TOKENS"])
    grad_x = torch.empty_like(y, memory_format=torch.contiguous_format)
    grad_branch = torch.empty_like(branch, memory_format=torch.contiguous_format) if with_branch else grad_x
    grad_weight = y.new_empty(b * parts, d, dtype=torch.float32)
    rows, dtype = (n, scale.dtype) if per_token else (parts, torch.float32)
    grad_gate, grad_shift, grad_scale = (y.new_empty(b, rows, d, dtype=dtype) for _ in range(3))
    wrap_triton(_norm_backward_kernel)[(b, parts)](
        y, branch, gate, weight, scale, grad_y, grad_h, grad_x, grad_branch, grad_gate, grad_weight, grad_shift,
        grad_scale, n, row_stride(gate), row_stride(scale), eps,
        D=d, DP=triton.next_power_of_2(d), BRANCH=with_branch, PER_TOKEN=per_token, **NORM_BACKWARD,
    )  # fmt: skip
    modulations = [grad_gate, grad_shift, grad_scale]
    if not per_token:
        modulations = [grad.sum(1, keepdim=True).to(scale.dtype) for grad in modulations]
    return grad_x, grad_branch, modulations[0], grad_weight.sum(0).to(weight.dtype), modulations[1], modulations[2]


@triton_op("ddt::norm", mutates_args={})
def norm(x: Tensor, weight: Tensor, shift: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return `rms_norm(x)·weight·(1 + scale) + shift`, (B, N, D), and a stand-in for x: a tensor of
    its shape whose values are never read, through which `add_norm` sends the gradient by x back to
    here, so that one kernel adds up x's gradients.

    x: (B, N, D). weight: (D,). shift, scale: (B, M, D).
    """
    x, shift, scale = x.contiguous(), rows(shift), rows(scale)
    return launch_norm(x, x, shift, weight, shift, scale, x, eps, False), x.new_empty(()).expand(x.shape)


@triton_op("ddt::norm_backward", mutates_args={})
def norm_backward(
    x: Tensor, weight: Tensor, scale: Tensor, eps: float, grad_h: Tensor, grad_x: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of `norm` by x, weight, shift, scale; grad_x: of the stand-in for x."""
    x, grad_h, grad_x, scale = x.contiguous(), grad_h.contiguous(), grad_x.contiguous(), rows(scale)
    grad_x, _, _, grad_weight, grad_shift, grad_scale = launch_norm_backward(
        x, x, scale, weight, scale, grad_x, grad_h, eps, False
    )
    return grad_x, grad_weight, grad_shift, grad_scale


@triton_op("ddt::add_norm", mutates_args={})
def add_norm(
    x: Tensor, stand_in: Tensor, branch: Tensor, gate: Tensor, weight: Tensor, shift: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Return y = x + gate·branch and the norm of y, both (B, N, D); arguments as of `norm`.

    stand_in: from `norm(x)`; it receives x's gradient, and x itself gets none. branch: (B, N, D).
    gate: (B, M, D).
    """
    x, branch, gate, shift, scale = x.contiguous(), branch.contiguous(), rows(gate), rows(shift), rows(scale)
    y = torch.empty_like(x)
    return y, launch_norm(x, branch, gate, weight, shift, scale, y, eps, True)


@triton_op("ddt::add_norm_backward", mutates_args={})
def add_norm_backward(
    y: Tensor, branch: Tensor, gate: Tensor, weight: Tensor, scale: Tensor, eps: float, grad_y: Tensor, grad_h: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of `add_norm` by x, branch, gate, weight, shift, scale."""
    return launch_norm_backward(
        y.contiguous(), branch.contiguous(), rows(gate), weight, rows(scale), grad_y.contiguous(), grad_h.contiguous(),
        eps, True,
    )  # fmt: skip


def _norm_setup(ctx, inputs, output):
    x, weight, _, scale, ctx.eps = inputs
    ctx.save_for_backward(x, weight, scale)


def _norm_gradient(ctx, grad_h, grad_x):
    x, weight, scale = ctx.saved_tensors
    return *norm_backward(x, weight, scale, ctx.eps, grad_h, grad_x), None


def _add_norm_setup(ctx, inputs, output):
    _, _, branch, gate, weight, _, scale, ctx.eps = inputs
    ctx.save_for_backward(output[0], branch, gate, weight, scale)


def _add_norm_gradient(ctx, grad_y, grad_h):
    y, branch, gate, weight, scale = ctx.saved_tensors
    return None, *add_norm_backward(y, branch, gate, weight, scale, ctx.eps, grad_y, grad_h), None


norm.register_autograd(_norm_gradient, setup_context=_norm_setup)
add_norm.register_autograd(_add_norm_gradient, setup_context=_add_norm_setup)


# --- SwiGLU


@triton.jit
def _swiglu_kernel(ab, h, INNER: tl.constexpr, CHANNELS: tl.constexpr):
    row, j = tl.program_id(0).to(tl.int64), tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    a = tl.load(ab + 2 * row * INNER + j, j < INNER, 0.0).to(tl.float32)
    b = tl.load(ab + (2 * row + 1) * INNER + j, j < INNER, 0.0).to(tl.float32)
    tl.store(h + row * INNER + j, a * tl.sigmoid(a) * b, j < INNER)


@triton.jit
def _swiglu_backward_kernel(ab, grad, grad_ab, INNER: tl.constexpr, CHANNELS: tl.constexpr):
    row, j = tl.program_id(0).to(tl.int64), tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    a = tl.load(ab + 2 * row * INNER + j, j < INNER, 0.0).to(tl.float32)
    b = tl.load(ab + (2 * row + 1) * INNER + j, j < INNER, 0.0).to(tl.float32)
    by_h = tl.load(grad + row * INNER + j, j < INNER, 0.0).to(tl.float32)
    gate = tl.sigmoid(a)
    tl.store(grad_ab + 2 * row * INNER + j, by_h * b * gate * (1 + a * (1 - gate)), j < INNER)
    tl.store(grad_ab + (2 * row + 1) * INNER + j, by_h * a * gate, j < INNER)


@triton_op("ddt::swiglu", mutates_args={})
def swiglu(ab: Tensor) -> Tensor:
    """Return `SiLU(a)·b`, (…, I), of (a, b), the halves of ab (…, 2I)."""
    ab, inner = ab.contiguous(), ab.shape[-1] // 2
    h = ab.new_empty(*ab.shape[:-1], inner)
    grid = (h.numel() // inner, triton.cdiv(inner, SWIGLU["CHANNELS"]))
    wrap_triton(_swiglu_kernel)[grid](ab, h, INNER=inner, **SWIGLU)
    return h


@triton_op("ddt::swiglu_backward", mutates_args={})
def swiglu_backward(ab: Tensor, grad: Tensor) -> Tensor:
    """Return the gradient (…, 2I) of `swiglu` by ab; grad: (…, I), that of its result."""
    ab, grad, inner = ab.contiguous(), grad.contiguous(), ab.shape[-1] // 2
    grad_ab = torch.empty_like(ab)
    grid = (grad.numel() // inner, triton.cdiv(inner, SWIGLU["CHANNELS"]))
    wrap_triton(_swiglu_backward_kernel)[grid](ab, grad, grad_ab, INNER=inner, **SWIGLU)
    return grad_ab


def _swiglu_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _swiglu_gradient(ctx, grad):
    return swiglu_backward(*ctx.saved_tensors, grad)


swiglu.register_autograd(_swiglu_gradient, setup_context=_swiglu_setup)
