"""Time shared sampling of a random network against plain sampling, in one run: ratios, medians, runs in turns.

python scripts/benchmark_sharing.py [model=b_8en4de] [every=4] [out=FOLDER]
"""

import dataclasses
import datetime
import functools
import itertools
import logging
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from omegaconf import DictConfig
from torch import Tensor
from tqdm import tqdm

from benchmarks.plain import plain_sample
from ddt.config import build
from ddt.cost import network_macs, sampling_macs
from ddt.errors import require
from ddt.files import write_json
from ddt.model import DDT
from ddt.sampling import SamplerSettings, sample
from scripts.entry import arguments_for, checked, entry_point

log = logging.getLogger(__name__)
CHANNELS, CLASSES = 4, 1000  # SD-VAE's latents, ImageNet
TOLERANCE = 1e-3  # of latents of about unit size, in float32
# beside the clock on the wall the time on the processor, which other programs disturb less
CLOCKS: dict[str, Callable[[], float]] = {"seconds": time.perf_counter, "cpu_seconds": time.process_time}
Times = dict[str, list[float]]  # of each way, a value a round

WAYS = {
    "plain": "plain: both halves and the encoder at every step",
    "plain_shared": "plain with the same sharing",
    "plain_shared_cached": "the same, modulations kept",
    "sample": "ddt.sample: kept, and no unconditional half where unguided",
}


def random_network(make_model: Callable[..., Any]) -> DDT:
    """Build the network with random weights, also where a new one starts at zero: zero velocities all agree."""
    torch.manual_seed(0)
    model = make_model(in_channels=CHANNELS, num_classes=CLASSES)
    require(isinstance(model, DDT), "model: the undivided baseline has no encoder to share; choose a DDT, as b_8en4de")
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.02)
    return model.eval()


def runs_of(
    model: DDT, noise: Tensor, y: Tensor, settings: SamplerSettings, counts: dict[str, int]
) -> dict[str, Callable[[], Tensor]]:
    """Return how each of WAYS draws the latents (B, C, H, W)."""
    unshared = dataclasses.replace(settings, recompute=None)
    return {
        "plain": functools.partial(plain_sample, model, noise, y, unshared),
        "plain_shared": functools.partial(plain_sample, model, noise, y, settings),
        "plain_shared_cached": functools.partial(plain_sample, model, noise, y, settings, cache_modulations=True),
        "sample": functools.partial(sample, model, noise, y, **settings.arguments(), counts=counts),
    }


def bounds_of(model: DDT, latent_size: int, settings: SamplerSettings) -> dict[str, int]:
    """Return the MACs an image of each of WAYS."""
    count = functools.partial(sampling_macs, model, latent_size, latent_size)
    unshared = dataclasses.replace(settings, recompute=None)
    return {
        "plain": count(unshared, skip_unconditional=False),
        "plain_shared": count(settings, cached=False, skip_unconditional=False),
        "plain_shared_cached": count(settings, skip_unconditional=False),
        "sample": count(settings),
    }


def time_in_turns(runs: dict[str, Callable[[], Tensor]], repeats: int) -> tuple[dict[str, Times], dict[str, Tensor]]:
    """Return the times of every run and the last latents of each way.

    Every second round goes backwards, so that no way always follows the same other one.
    """
    times: dict[str, Times] = {clock: {name: [] for name in runs} for clock in CLOCKS}
    latents: dict[str, Tensor] = {}
    with tqdm(total=repeats * len(runs), unit="run", desc="sampling") as progress:
        for repeat in range(repeats):
            for name in list(runs) if repeat % 2 == 0 else reversed(runs):
                starts = {clock: now() for clock, now in CLOCKS.items()}
                latents[name] = runs[name]()
                for clock, now in CLOCKS.items():
                    times[clock][name].append(now() - starts[clock])
                progress.update()
    return times, latents


def speeds(times: Times, base: str) -> dict[str, float]:
    """Return how many times faster than `base` each way is: the median over the rounds of the ratio in a round."""
    return {
        name: statistics.median(b / own for b, own in zip(times[base], values, strict=True))
        for name, values in times.items()
    }


def summary(times: dict[str, Times], macs: dict[str, int]) -> dict[str, Any]:
    """Return the medians, and each way's speed against the plain ways beside its bound, the ratio of the MACs."""
    bases = ("plain", "plain_shared")
    found = {clock: {name: statistics.median(own) for name, own in values.items()} for clock, values in times.items()}
    return {
        **found,
        **{f"speed_by_{clock}": {base: speeds(values, base) for base in bases} for clock, values in times.items()},
        "bound": {base: {name: macs[base] / own for name, own in macs.items()} for base in bases},
        "macs_an_image": macs,
    }


def agreement(latents: dict[str, Tensor]) -> dict[str, Any]:
    """Compare the latents of the shared ways, which may differ in rounding only; raise UserError where they do not.

    What sharing itself changes in them shows that the network does something.
    """
    shared = [name for name in latents if name != "plain"]
    difference = {
        f"{a}, {b}": (latents[a] - latents[b]).abs().max().item() for a, b in itertools.combinations(shared, 2)
    }
    require(max(difference.values()) <= TOLERANCE, f"the ways of sharing disagree by more than rounding: {difference}")
    return {
        "max_abs_difference": difference,
        "largest_latent": latents["sample"].abs().max().item(),
        "changed_by_sharing": (latents["plain"] - latents["plain_shared"]).abs().max().item(),
    }


def machine() -> dict[str, Any]:
    """Return what the seconds depend on beside the settings."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.machine(), "cores": os.cpu_count(),
        "threads": torch.get_num_threads(), "torch": torch.__version__, "dtype": "float32",
        "load_before": os.getloadavg()[0],
    }  # fmt: skip


def report(found: dict[str, Any]) -> str:
    """Return the result as a Markdown table."""
    lines = [
        "| way | seconds | against plain | MAC bound | against plain, shared | MAC bound |",
        "|---|---|---|---|---|---|",
    ]
    for name, text in WAYS.items():
        kinds = ("speed_by_seconds", "bound")
        ratios = [found[kind][base][name] for base in ("plain", "plain_shared") for kind in kinds]
        lines.append(f"| {text} | {found['seconds'][name]:.2f} | " + " | ".join(f"{r:.2f}" for r in ratios) + " |")
    return "\n".join(lines)


def measure(model: DDT, latent_size: int, batch_size: int, settings: SamplerSettings, repeats: int) -> dict[str, Any]:
    """Sample in all ways in turns and compare what they took and what they drew."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(batch_size, CHANNELS, latent_size, latent_size, generator=generator)
    y = torch.arange(batch_size) % CLASSES
    macs = bounds_of(model, latent_size, settings)
    about = machine()
    short = SamplerSettings(num_steps=2, recompute="uniform:2")
    for run in runs_of(model, noise, y, short, {}).values():
        run()  # the first calls allocate and choose their kernels
    counts: dict[str, int] = {}
    times, latents = time_in_turns(runs_of(model, noise, y, settings, counts), repeats)
    return {
        **summary(times, macs),
        "macs_a_forward": dataclasses.asdict(network_macs(model, latent_size, latent_size)),
        "agreement": agreement(latents),
        "cached_bytes": counts["cached_bytes"],
        "all_runs": times,
        "machine": {**about, "load_after": os.getloadavg()[0]},
    }


def benchmark(
    make_model: Callable[..., Any], latent_size: int, num_steps: int, every: int, batch_size: int, repeats: int,
    threads: int, out: str | None,
) -> None:  # fmt: skip
    """Check, measure, print, and write sharing_cpu.json where asked to."""
    for key, value in {
        "latent_size": latent_size,
        "batch_size": batch_size,
        "repeats": repeats,
        "threads": threads,
    }.items():
        require(value >= 1, f"{key}={value}: must be at least 1")
    require(every >= 1, f"every={every}: must be at least 1 (1 means no sharing)")
    require(out is None or not Path(out).is_file(), f"out={out}: is a file; give a folder")
    settings = SamplerSettings(num_steps=num_steps, recompute=f"uniform:{every}")
    torch.set_num_threads(threads)
    found = measure(random_network(make_model), latent_size, batch_size, settings, repeats)
    log.info("%s", report(found))
    log.info("latents differ by at most %.1e", max(found["agreement"]["max_abs_difference"].values()))
    if out is not None:
        used = {"latent_size": latent_size, "every": every, "batch_size": batch_size, "repeats": repeats}
        origin = {
            "settings": {**used, "sampler": dataclasses.asdict(settings)},
            "command": shlex.join(["python", *sys.argv]),
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        }
        Path(out).mkdir(parents=True, exist_ok=True)
        write_json(Path(out) / "sharing_cpu.json", {**found, **origin})


@entry_point("benchmark_sharing")
def main(cfg: DictConfig) -> None:
    """Check, measure."""
    config = checked(cfg)
    values = arguments_for(benchmark, config, besides=("make_model",))
    benchmark(build(config["model"]), **values)


if __name__ == "__main__":
    main()
