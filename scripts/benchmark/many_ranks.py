"""A training step on many GPUs, simulated: one process plays rank 0 of torch's fake process group,
whose collectives do nothing, with tensors that have shapes and no values.

Counted are the collectives that FSDP2 and DDP make of our network, and their bytes; times are
assumed, from a rate of products and of links. P: parameters; n: ranks.
"""

import contextlib
import dataclasses
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from ddt.distributed.prepare import local_part, shard
from ddt.files import write_json
from ddt.objective import FlowMatching, Objective
from ddt.precision import autocast
from ddt.receipts import command_line
from ddt.tables import markdown_table
from ddt.training.throughput import training_flops
from scripts.benchmark.fake_gpu import fake_tensors
from scripts.benchmark.parts import random_batch
from scripts.benchmark.settings import RanksSettings

log = logging.getLogger(__name__)
FLOAT, HALF, GIGA = 4, 2, 1e9
STATES = 5  # of a parameter: weight, gradient, two moments, EMA
BUCKETS = [2**20, 25 * 2**20]  # bytes of DDP's first bucket and of the others: torch's defaults
GATHER, SCATTER = "_allgather_base_", "_reduce_scatter_base_"


@contextlib.contextmanager
def fake_ranks(number: int, rank: int = 0) -> Iterator[None]:
    """Make this process a rank of many, none of which answers."""
    dist.init_process_group("fake", rank=rank, world_size=number, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


class Collectives(TorchDispatchMode):
    """Notes the collectives of the block: their names, and the bytes of the full tensor of each."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, int]] = []

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operator.namespace == "c10d":
            sizes = [value.numel() * value.element_size() for value in args if isinstance(value, Tensor)]
            self.calls.append((operator.overloadpacket.__name__, max(sizes, default=0)))
        return operator(*args, **(kwargs or {}))


def objective_of(settings: RanksSettings) -> Objective:
    """Return the objective of the network, without memory."""
    with torch.device("meta"):
        return FlowMatching(settings.model.build(in_channels=settings.channels, num_classes=1000))


def rows_of(dimension: int, ranks: int) -> Any:
    """Return how many of a parameter's rows each rank has, (n,): as torch.chunk gives them out."""
    each = -(-dimension // ranks)
    return np.clip(dimension - each * np.arange(ranks), 0, each)


def shares(module: nn.Module, ranks: int) -> Any:
    """Return the parameters of a module that each rank holds under FSDP2, (n,)."""
    parts = [rows_of(len(p), ranks) * (p.numel() // len(p)) for p in module.parameters()]
    return np.sum(parts, axis=0)


# --- what is sent


def fsdp_calls(settings: RanksSettings, ranks: int) -> tuple[list[tuple[str, int]], int]:
    """Return the collectives of a step under FSDP2, and the parameters that rank 0 holds."""
    objective = objective_of(settings)
    with fake_ranks(ranks):
        shard(objective.denoiser, "bf16", reshard_after_forward=True)
        fully_shard(objective)
        with fake_tensors():
            objective.to_empty(device="cpu")
            batch = random_batch(1, settings.latent_size, torch.device("cpu"), settings.channels)
            with Collectives() as seen, autocast(torch.device("cpu"), "bf16"):
                objective(**batch)["loss"].backward()
            return seen.calls, sum(local_part(p).numel() for p in objective.parameters())


def ddp_buckets(objective: Objective) -> list[int]:
    """Return the bytes of DDP's buckets, in the order of the backward pass."""
    parameters = [p for p in objective.parameters() if p.requires_grad][::-1]
    buckets, _ = dist._compute_bucket_assignment_by_size(parameters, BUCKETS, [False] * len(parameters))
    return [FLOAT * sum(parameters[i].numel() for i in bucket) for bucket in buckets]


# --- when


def fsdp_seconds(calls: Iterable[tuple[str, int]], blocks: list[int], compute: float, rate: float) -> float:
    """Return the seconds of a step: a block's weights are gathered while the one before computes.

    blocks: bytes of what is gathered of each, 16 bits a weight, which is their share of the work;
    gradients have 32; other calls are of what is in no block. compute: seconds of the work, a third
    forward. rate: bytes of a full tensor a second. Gathers and scatters take turns on one link.
    """
    link = began = 0.0  # when the link is free, and the last block's work begins
    ends: list[float] = []  # when the work of each block ends, forward and backward
    scattered = len(blocks)
    for name, size in calls:
        gathers, seconds = name == GATHER, size / rate
        is_block = (size if gathers else size * HALF // FLOAT) in blocks
        if not gathers and is_block and scattered < len(ends):  # those of the rest come last
            link = max(link, ends[scattered]) + seconds
            scattered += 1
        else:
            link = max(link, began) + seconds
        if gathers and is_block:
            began = max(link, ends[-1] if ends else 0.0)
            ends.append(began + (1 if len(ends) < len(blocks) else 2) * compute / 3 * size / sum(blocks))
    return max(link, ends[-1])


def ddp_seconds(buckets: list[int], compute: float, rate: float) -> float:
    """Return the seconds of a step: a bucket is sent once its gradients are there, which come at an
    even rate over the backward pass, two thirds of the work.
    """
    link, ready = 0.0, compute / 3
    for size in buckets:
        ready += 2 / 3 * compute * size / sum(buckets)
        link = max(link, ready) + size / rate
    return link


@dataclasses.dataclass(frozen=True)
class Simulated:
    """A step on n ranks. most, least: bytes of a rank's weights, gradients, moments and EMA, of all
    ranks. sent: bytes a rank sends a step. hidden: share of the sending's seconds that pass while
    the rank computes.
    """

    ranks: int
    parallelism: str
    most: int
    least: int
    calls: int
    sent: float
    seconds: float
    compute: float
    hidden: float


def simulate(settings: RanksSettings, ranks: int) -> Iterator[Simulated]:
    """Yield a step under DDP, and one under FSDP2."""
    objective = objective_of(settings)
    total = sum(p.numel() for p in objective.parameters())
    # each rank's part is filled up to the largest, rank 0's
    blocks = [HALF * ranks * int(shares(block, ranks)[0]) for block in objective.denoiser.all_blocks]
    shape = settings.channels, settings.latent_size, settings.latent_size
    compute = settings.images * training_flops(objective, shape) / (settings.tflops * 1e12)
    beyond = settings.node * settings.network_gbs  # rings go through all links of a node at once
    link = GIGA * (settings.node_gbs if ranks <= settings.node else min(settings.node_gbs, beyond))
    part = (ranks - 1) / ranks  # of a full tensor that a rank sends in a ring

    def result(name: str, held: Any, calls: int, sent: float, seconds: float) -> Simulated:
        states = FLOAT * STATES
        sizes = states * int(np.max(held)), states * int(np.min(held))
        hidden = 1 - (seconds - compute) / (sent / link)
        return Simulated(ranks, name, *sizes, calls, sent, seconds, compute, hidden)

    buckets = ddp_buckets(objective)
    seconds = ddp_seconds(buckets, compute, link / (2 * part))
    yield result("ddp", total, len(buckets), 2 * part * sum(buckets), seconds)
    calls, mine = fsdp_calls(settings, ranks)
    held = shares(objective, ranks)
    assert mine == held[0], "rank 0 holds what the rule says"
    seconds = fsdp_seconds(calls, blocks, compute, link / part)
    yield result("fsdp", held, len(calls), part * sum(size for _, size in calls), seconds)


def report(settings: RanksSettings) -> None:
    """Simulate each number of ranks; print a table and write all numbers."""
    found = [each for ranks in settings.ranks for each in simulate(settings, ranks)]
    rows = [
        [
            f"{each.ranks:,}", each.parallelism, f"{each.most / GIGA:.3g}", f"{each.least / GIGA:.3g}",
            f"{each.calls}", f"{each.sent / GIGA:.3g}",
            f"{1000 * each.compute:.0f}", f"{1000 * each.seconds:.0f}", f"{each.hidden:.0%}",
        ]
        for each in found
    ]  # fmt: skip
    titles = [
        "ranks", "", "GB of state, most", "least", "collectives", "GB sent", "ms of work, assumed", "ms of a step",
        "sending hidden",
    ]  # fmt: skip
    log.info("SIMULATED\n%s", markdown_table(titles, rows, "rl" + "r" * 7))
    if settings.out is not None:
        content = {
            "kind": "ranks", "command": command_line(), "settings": dataclasses.asdict(settings),
            "steps": [dataclasses.asdict(each) for each in found],
        }  # fmt: skip
        Path(settings.out).parent.mkdir(parents=True, exist_ok=True)
        write_json(Path(settings.out), content)
        log.info("wrote %s", settings.out)
