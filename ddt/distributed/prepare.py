"""A network on several processes: replicated (DDP), or sharded among them (FSDP2).

A sharded parameter is a DTensor, split along its first dimension; each process has a local part.
"""

import contextlib
import copy
import datetime
import os
from collections.abc import Callable, Iterator
from typing import Any, Literal, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    broadcast_object_list,
)
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from ddt.errors import UserError, require
from ddt.model import Denoiser
from ddt.precision import HALF_TYPES, torch_dtype

Network = TypeVar("Network", bound=nn.Module)
Value = TypeVar("Value")
FORWARD_METHODS = ("encode", "encode_with_base", "decode", "forward_with_hidden", "forward_with_base")


def make_accelerator(timeout: datetime.timedelta | None = None) -> Accelerator:
    """Return the Accelerator of this process: its GPU, or the CPU (gloo between processes).

    Precision is left to `ddt.precision`, which knows fp16 on a CPU too. timeout: of processes that
    wait for each other; None: torch's default.
    """
    for name in ("USE_FSDP", "USE_DEEPSPEED", "USE_MEGATRON_LM", "DYNAMO_BACKEND"):
        require(
            os.environ.get(f"ACCELERATE_{name}", "no").lower() in ("no", "false"),
            f"ACCELERATE_{name}: is not supported; take it out of Accelerate's configuration (to shard: "
            "trainer.parallelism=fsdp)",
        )
    # gradients lie in DDP's buckets, not beside them
    handlers: list[Any] = [DistributedDataParallelKwargs(gradient_as_bucket_view=True)]
    if timeout is not None:
        handlers.append(InitProcessGroupKwargs(timeout=timeout))
    return Accelerator(
        mixed_precision="no",
        cpu=not torch.cuda.is_available(),
        kwargs_handlers=handlers,
        # the loop divides losses itself; as a plugin, the environment of accelerate launch does not
        # change it
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
    )


def decide_on_main(accelerator: Accelerator, decide: Callable[[], Value]) -> Value:
    """Call `decide` on the main process; return its result, or raise its UserError, on all."""
    outcome: list[Any] = [None, None]  # value, error
    if accelerator.is_main_process:
        try:
            outcome[0] = decide()
        except UserError as error:
            outcome[1] = str(error)
    value, error_text = broadcast_object_list(outcome)
    if error_text is not None:
        raise UserError(error_text)
    return value


def local_part(tensor: Tensor) -> Tensor:
    """Return this process's part of a sharded tensor; any other is returned as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def shard(network: Denoiser, dtype: str = "fp32", reshard_after_forward: bool = True) -> None:
    """Shard a denoiser among all processes, block by block; a block is gathered when it runs.

    dtype: a precision. In a 16-bit one a block is gathered in it, half the bytes, and its gradients
    are added up in float32; what is in no block is gathered in float32. reshard_after_forward: a
    block is freed after its forward pass and gathered again for the backward one.
    """
    gathered = torch_dtype(dtype) if dtype in HALF_TYPES else None
    policy = MixedPrecisionPolicy(gathered, reduce_dtype=torch.float32, cast_forward_inputs=False)  # autocast casts
    for block in network.all_blocks:
        fully_shard(block, mp_policy=policy, reshard_after_forward=reshard_after_forward)
    fully_shard(network)
    for name in FORWARD_METHODS:
        register_fsdp_forward_method(network, name)


@torch.no_grad()
def broadcast_weights(module: nn.Module, accelerator: Accelerator) -> None:
    """Give all processes the main one's weights, before sharding and before EMAs are made.

    On another kind of CPU the initial weights may differ in their last bits.
    """
    if accelerator.num_processes > 1:
        for parameter in module.parameters():
            weights = parameter.to(accelerator.device)
            torch.distributed.broadcast(weights, src=0)
            parameter.copy_(weights)


def prepare(
    objective: Any,
    accelerator: Accelerator,
    parallelism: Literal["ddp", "fsdp"],
    dtype: str = "fp32",
    reshard_after_forward: bool = True,
) -> nn.Module:
    """Return the objective under DDP or FSDP2; dtype and reshard_after_forward as of `shard`.

    Raises UserError where one process is to shard.
    """
    if parallelism == "ddp":
        return accelerator.prepare(objective)
    require(
        accelerator.num_processes > 1,
        "trainer.parallelism=fsdp: needs several processes to shard among; set trainer.num_processes, or leave it out",
    )
    shard(objective.denoiser, dtype, reshard_after_forward)  # from the CPU: one GPU may not hold the whole
    return fully_shard(objective)


@contextlib.contextmanager
def micro_batch(model: nn.Module, accelerator: Accelerator, last: bool) -> Iterator[None]:
    """Context of a micro-batch's forward and backward; only a step's last exchanges gradients."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
        yield
    else:
        with contextlib.nullcontext() if last else accelerator.no_sync(model):
            yield


def gather_network(network: nn.Module, outline: Network) -> Network:
    """Return a full copy of a sharded network on every process; all call it together.

    outline: the same network on the meta device.
    """
    full = copy.deepcopy(outline)
    state = {key: value.full_tensor() for key, value in network.state_dict().items()}
    full.load_state_dict(state, strict=True, assign=True)
    return full.requires_grad_(False).eval()


@torch.no_grad()
def load_weights(module: nn.Module, state: dict[str, Tensor]) -> None:
    """Load full tensors into a module, sharded or not, buffers too; names and shapes must match."""
    own = module.state_dict(keep_vars=True)
    assert own.keys() == state.keys(), "a checkpoint's names are those of the module"
    for name, parameter in own.items():
        assert parameter.shape == state[name].shape, f"{name}: {tuple(state[name].shape)}"
        local_part(parameter).copy_(local_part(shard_like(state[name], parameter)))


def shard_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """Return a full tensor sharded as a parameter is, without communication."""
    if not isinstance(parameter, DTensor):
        return tensor
    moved = tensor.to(parameter.device)
    return distribute_tensor(moved, parameter.device_mesh, parameter.placements, src_data_rank=None)


@torch.no_grad()
def gradient_norm(parameters: list[nn.Parameter]) -> Tensor:
    """Return the norm of all gradients: a float32 scalar on the device, equal on all processes."""
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None], foreach=True)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


@torch.no_grad()
def clip_gradients(parameters: list[nn.Parameter], norm: Tensor, clip_norm: float) -> None:
    """Scale gradients of norm `norm` down to `clip_norm` where it is larger. No device sync."""
    gradients = [local_part(p.grad) for p in parameters if p.grad is not None]
    torch._foreach_mul_(gradients, (clip_norm / (norm + 1e-6)).clamp(max=1.0))
