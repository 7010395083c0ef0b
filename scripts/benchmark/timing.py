"""Time ways of doing the same thing in turns: medians, ratios, peak memory, share of a matrix
product's rate. A ratio is the median over the rounds of the ratio within a round, so that what
slows the machine for a while slows both ways.
"""

import contextlib
import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

from ddt.errors import require
from ddt.files import write_text

Row = dict[str, Any]


@dataclasses.dataclass
class Way:
    """One way of doing a thing.

    call: does it once. flops: counted, of a call; 0 where none are. base: the way it is compared
    with; None is the case's first. context: entered around each call, eager or compiled.
    check: returns, untimed, what must agree with the base; None takes what `call` returns.
    """

    call: Callable[[], Any]
    flops: float = 0
    base: str | None = None
    context: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
    check: Callable[[], Tensor] | None = None


@dataclasses.dataclass
class Case:
    """Ways of doing the same thing, the plain one first.

    images: of a call. tolerance: of ‖a − b‖/‖b‖ between a way and its base.
    """

    part: str
    name: str
    ways: dict[str, Way]
    images: int
    tolerance: float


def synchronize(device: torch.device) -> None:
    """Wait for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(call: Callable[[], Any], device: torch.device, repeats: int = 1) -> float:
    """Return the seconds a call takes, the mean of some in a row, to their end on the device."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    synchronize(device)
    return (time.perf_counter() - start) / repeats


def matmul_rate(device: torch.device, dtype: torch.dtype, size: int, repeats: int = 15) -> float:
    """Return the FLOP/s of the product of two random square matrices of `size`."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    seconds = [seconds_of(lambda: a @ b, device) for _ in range(repeats)]
    return 2 * size**3 / statistics.median(seconds[1:])


def profiled(way: Way, device: torch.device) -> Any:
    """Return torch's profile of a call, with its memory."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with way.context(), profile(activities=activities, profile_memory=True, acc_events=True) as result:
        way.call()
        synchronize(device)
    return result


def peak_bytes(way: Way, device: torch.device) -> int:
    """Return how far a call's memory rises above what is allocated before it."""
    if device.type == "cuda":
        synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        with way.context():
            way.call()
        synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    held = peak = 0
    events = [e for e in profiled(way, device).profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def relative_error(a: Tensor, b: Tensor) -> float:
    """Return ‖a − b‖/‖b‖, in float64; NaN where a value is NaN."""
    a, b = a.double(), b.double()
    return ((a - b).norm() / b.norm()).item()


def first_results(case: Case, device: torch.device) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Return each way's result and the seconds of this first call, which may compile."""
    results, seconds = {}, {}
    for name, way in case.ways.items():
        with way.context():
            start = time.perf_counter()
            results[name] = (way.check or way.call)()
            synchronize(device)
            seconds[name] = time.perf_counter() - start
    return results, seconds


def errors_of(case: Case, results: dict[str, Tensor]) -> dict[str, float]:
    """Return by how much each way's result differs from its base's.

    Raises UserError above the tolerance, and where the base is no nearer than the first way.
    """
    first = next(iter(case.ways))
    errors = {name: relative_error(results[name], results[way.base or first]) for name, way in case.ways.items()}
    for name, error in errors.items():
        base = case.ways[name].base or first
        require(
            error <= case.tolerance,  # False for NaN
            f"{case.part}, {case.name}: {name} differs from {base} by {error:.1e}, more than rounding "
            f"({case.tolerance:.0e})",
        )
        require(
            error == 0 or base == first or error < relative_error(results[name], results[first]),
            f"{case.part}, {case.name}: {name} is no nearer to {base} than to {first}",
        )
    return errors


def rounds(case: Case, device: torch.device, repeats: int, deadline: float) -> dict[str, list[float]]:
    """Return the seconds of each way in each round; after the deadline no further round starts.

    Every second round is reversed, so that no way always follows the same other one.
    """
    seconds: dict[str, list[float]] = {name: [] for name in case.ways}
    for repeat in tqdm(range(repeats), desc=f"{case.part}: {case.name}", unit="round", leave=False):
        if repeat and time.monotonic() > deadline:
            break
        for name in list(case.ways) if repeat % 2 == 0 else reversed(case.ways):
            with case.ways[name].context():
                seconds[name].append(seconds_of(case.ways[name].call, device))
    return seconds


def ratio(times: dict[str, list[float]], base: str, name: str) -> float:
    """Return how many times faster than `base` a way is."""
    return statistics.median(b / own for b, own in zip(times[base], times[name], strict=True))


def measure(
    case: Case, device: torch.device, rate: float, repeats: int, deadline: float, profiles: Path | None = None
) -> list[Row]:
    """Check that the ways of a case agree (UserError), time them in turns, return a row for each.

    rate: FLOP/s of a matrix product. profiles: folder for a table of each way's longest operations.
    """
    results, first_calls = first_results(case, device)
    errors = errors_of(case, results)
    del results
    peaks = {}
    for name, way in case.ways.items():
        if way.check is not None:  # what a first call allocates to keep, as the optimizer's state, is no peak
            with way.context():
                way.call()
        peaks[name] = peak_bytes(way, device)
    times = rounds(case, device, repeats, deadline)
    first, rows = next(iter(case.ways)), []
    for name, way in case.ways.items():
        seconds, base = statistics.median(times[name]), way.base or first
        bound = {key: case.ways[key].flops / way.flops if way.flops else None for key in (base, first)}
        rows.append(
            {
                "part": case.part, "case": case.name, "way": name, "images": case.images, "seconds": seconds,
                "images_per_second": case.images / seconds, "base": base, "ratio": ratio(times, base, name),
                "bound": bound[base], "first": first, "ratio_to_first": ratio(times, first, name),
                "bound_to_first": bound[first], "error": errors[name], "flops": way.flops,
                "share_of_matmul": way.flops / seconds / rate if way.flops else None, "peak_bytes": peaks[name],
                "first_call_seconds": first_calls[name], "times": times[name],
            }
        )  # fmt: skip
        if profiles is not None:
            table = profiled(way, device).key_averages().table(
                sort_by=f"self_{device.type}_time_total", row_limit=20, max_name_column_width=60
            )  # fmt: skip
            text = f"{case.part}, {case.name}, {name}".replace(" ", "_").replace(",", "")
            write_text(profiles / f"{text}.txt", table)
    return rows


@contextlib.contextmanager
def eager() -> Iterator[None]:
    """Run compiled modules eagerly, so that both ways share their weights."""
    with torch.compiler.set_stance("force_eager"):
        yield
