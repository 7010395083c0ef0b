"""One network on many processes: whole on each (DDP), or sharded among them (FSDP2).

A sharded parameter is torch's DTensor, cut along its first dimension; `local` is the part of this process.
"""

import contextlib
import copy
from collections.abc import Iterator
from typing import Any, Literal, TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from ddt.errors import require
from ddt.layers import Block

Network = TypeVar("Network", bound=nn.Module)
FORWARD_METHODS = ("encode", "decode", "forward_with_hidden")


def local(tensor: Tensor) -> Tensor:
    """Return this process's part of a tensor, which is the tensor itself unless it is sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def shard(network: nn.Module) -> None:
    """Shard a denoiser among all processes: each block is gathered when it runs, the rest with the whole."""
    for block in [module for module in network.modules() if isinstance(module, Block)]:
        fully_shard(block)
    fully_shard(network)
    for name in FORWARD_METHODS:
        register_fsdp_forward_method(network, name)


def prepare(objective: Any, accelerator: Accelerator, parallelism: Literal["ddp", "fsdp"]) -> nn.Module:
    """Return what the loop calls to get losses: the objective for many processes, under the run's autocast.

    Raises UserError where there is nothing to shard among.
    """
    if parallelism == "ddp":
        return accelerator.prepare(objective)  # all processes leave this with the weights of process 0
    require(
        accelerator.num_processes > 1,
        "trainer.parallelism=fsdp: needs several processes to shard among; set trainer.num_processes, or leave it out",
    )
    objective.to(accelerator.device)
    shard(objective.denoiser)
    fully_shard(objective)
    return Autocast(objective, accelerator)


class Autocast(nn.Module):
    """Calls a sharded module under the run's autocast, as Accelerate does for a module that it prepares."""

    def __init__(self, module: Any, accelerator: Accelerator) -> None:
        super().__init__()
        self.module, self.accelerator = module, accelerator

    def forward(self, **batch: Any) -> dict[str, Tensor]:
        """Return the losses of a batch."""
        with self.accelerator.autocast():
            return self.module(**batch)


@contextlib.contextmanager
def micro_batch(model: nn.Module, accelerator: Accelerator, last: bool) -> Iterator[None]:
    """Run a micro-batch forward and backward; gradients are exchanged after the last of a step alone."""
    if isinstance(model, Autocast):
        model.module.set_requires_gradient_sync(last)
        yield
    else:
        with contextlib.nullcontext() if last else accelerator.no_sync(model):
            yield


def whole(network: nn.Module, outline: Network) -> Network:
    """Return a copy of a sharded network with all its weights, on every process; all call it together.

    outline: the same network on the meta device.
    """
    full = copy.deepcopy(outline)
    state = {key: value.full_tensor() for key, value in network.state_dict().items()}
    full.load_state_dict(state, strict=True, assign=True)
    return full.requires_grad_(False).eval()


@torch.no_grad()
def load(module: nn.Module, state: dict[str, Tensor]) -> None:
    """Fill a module, sharded or not, with whole tensors; names and shapes must be equal."""
    own = dict(module.named_parameters())
    assert own.keys() == state.keys(), "a checkpoint's names are those of the module"
    for name, parameter in own.items():
        assert parameter.shape == state[name].shape, f"{name}: {tuple(state[name].shape)}"
        local(parameter).copy_(local(like(state[name], parameter)))


def like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """Return a whole tensor sharded as a parameter is, without talking to the other processes."""
    if not isinstance(parameter, DTensor):
        return tensor
    moved = tensor.to(parameter.device)
    return distribute_tensor(moved, parameter.device_mesh, parameter.placements, src_data_rank=None)


@torch.no_grad()
def gradient_norm(parameters: list[nn.Parameter]) -> Tensor:
    """Return the norm of all gradients, a float32 scalar on the device, the same on all processes."""
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None], foreach=True)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


@torch.no_grad()
def clip(parameters: list[nn.Parameter], norm: Tensor, largest: float) -> None:
    """Scale gradients of norm `norm` down to `largest` where it is larger; nobody waits for the device."""
    gradients = [local(p.grad) for p in parameters if p.grad is not None]
    torch._foreach_mul_(gradients, (largest / (norm + 1e-6)).clamp(max=1.0))
