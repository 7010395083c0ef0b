"""Throughput of a run: images per second, data wait, model FLOPs utilization (MFU).

FLOPs are analytic (`ddt.model.cost`): a training step costs three forwards of the network and one
of the frozen target. Recomputation, the autoencoder and element-wise operations are not counted.
"""

import contextlib
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from ddt.model.cost import network_macs, num_tokens, weight_macs
from ddt.objective import Objective
from ddt.objective.alignment_target import Target
from ddt.precision import HALF_TYPES

# Dense bf16 and fp16 FLOP/s of the makers' data sheets; in float32 no MFU is logged
PEAKS = {
    "H200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12,
    "L4": 121e12, "A10": 125e12, "RTX 4090": 165e12, "B200": 2250e12,
}  # fmt: skip


def peak_of(device_name: str) -> float | None:
    """Return a GPU's dense bf16 and fp16 FLOP/s, or None where it is unknown."""
    return next((peak for name, peak in PEAKS.items() if re.search(rf"\b{name}\b", device_name)), None)


def training_flops(objective: Objective, shape: tuple[int, int, int]) -> int:
    """Return the FLOPs of an image in training, forward and backward; shape: latent (C, H, W)."""
    size = objective.denoiser, shape[1], shape[2]
    network = network_macs(*size)
    macs = network.total + network.base
    if objective.alignment is not None:
        macs += num_tokens(*size) * weight_macs([objective.alignment])
    return 6 * macs  # two operations a MAC; the backward pass is twice the forward


@torch.no_grad()
def counted_flops(function: Callable[..., Any], *inputs: torch.Tensor) -> int:
    """Return the FLOPs of a call, counted by torch while it runs uncompiled."""
    with torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False) as counter:
        function(*inputs)
    return counter.get_total_flops()


def target_flops(target: Target | None, image_size: int) -> int:
    """Return the FLOPs of an image in the alignment's target, forward only, counted on one."""
    if target is None:
        return 0
    image = torch.zeros(1, 3, image_size, image_size, dtype=torch.uint8, device=target.mean.device)
    return counted_flops(target, image)


PERF_NAMES = (
    "images_per_second", "data_wait", "tflops_per_process", "mfu", "mfu_with_target", "gpu_memory_gib",
)  # fmt: skip  # of a log row, in the order of `Clock.row`


class Clock:
    """Measures images per second, the share of time spent waiting for data, and MFU.

    images_per_step: of all processes. flops, target_flops: per image; 0 where they are not
    counted. dtype: the run's mixed precision. `with_target`: the target runs in these steps.
    """

    def __init__(
        self, device: torch.device, num_processes: int, images_per_step: int, flops: int, target_flops: int, dtype: str
    ) -> None:
        self.device, self.num_processes, self.images = device, num_processes, images_per_step
        self.flops, self.target_flops = flops, target_flops
        known = device.type == "cuda" and dtype in HALF_TYPES
        self.peak = peak_of(torch.cuda.get_device_name(device)) if known else None
        self.longest_pause, self.with_target = 0.0, False
        self.start()

    def start(self) -> None:
        """Start a new interval."""
        self.start_time, self.waited, self.paused, self.steps = time.perf_counter(), 0.0, 0.0, 0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time inside as spent waiting for data."""
        start = time.perf_counter()
        yield
        self.waited += time.perf_counter() - start

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Leave out the time inside: the rate is of training alone. `longest_pause`: seconds."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # the step before is training
        start = time.perf_counter()
        yield
        seconds = time.perf_counter() - start
        self.paused += seconds
        self.longest_pause = max(self.longest_pause, seconds)

    def row(self) -> dict[str, float]:
        """Return the values of a log row. Needs a finished device."""
        seconds = time.perf_counter() - self.start_time - self.paused
        rate = self.steps * self.images / seconds
        each = rate / self.num_processes
        row = {"images_per_second": rate, "data_wait": self.waited / seconds}
        if self.flops:
            row["tflops_per_process"] = each * self.flops / 1e12
        if self.flops and self.peak is not None:
            row["mfu"] = each * self.flops / self.peak
            if self.target_flops and self.with_target:
                row["mfu_with_target"] = each * (self.flops + self.target_flops) / self.peak
        if self.device.type == "cuda":
            row["gpu_memory_gib"] = torch.cuda.max_memory_allocated(self.device) / 2**30
        return row
