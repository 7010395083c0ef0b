"""What a machine is and has: system, memory, GPUs, disk, hub, logins.

It must run where packages are missing or broken, so its head imports nothing but the standard
library.
"""

import http.client
import netrc
import os
import platform
import re
import resource
import shutil
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from ddt.errors import first_line
from ddt.version import __version__

ROOT = Path(__file__).resolve().parent.parent
GIB, MIB = 2**30, 2**20
BLOCK, MOST_BLOCKS, SECONDS = 2**24, 8, 3.0  # of the disk's test: bytes; at most 128 MiB; none begins after 3 seconds


def output_of(*command: str) -> str | None:
    """Return what a command says, without its last line's end; None where it is not there or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def proc_value(path: str, key: str) -> str | None:
    """Return the first value of a key in a file of /proc such as cpuinfo; None where the system has
    no such file.
    """
    try:
        text = Path(path).read_text()
    except OSError:
        return None
    match = re.search(rf"^{key}\s*:\s*(.+)$", text, re.M)
    return match[1].strip() if match else None


def memory() -> str:
    """Return the machine's memory in words, and the limit of a container or job where it is lower."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    words = f"{total / GIB:.1f} GiB"
    available = proc_value("/proc/meminfo", "MemAvailable")
    if available is not None:
        words += f", {int(available.split()[0]) / MIB:.1f} available"
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
    except OSError:
        return words
    return f"{words}, limit {int(limit) / GIB:.1f}" if limit.isdecimal() and int(limit) < total else words


def machine() -> dict[str, str]:
    """Return what is known of system and code, each in words."""
    cores = os.cpu_count() or 1
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cores
    processor = proc_value("/proc/cpuinfo", "model name") or platform.processor() or platform.machine()
    revision = output_of("git", "-C", str(ROOT), "rev-parse", "--short", "HEAD")
    changes = output_of("git", "-C", str(ROOT), "status", "--porcelain")
    code = __version__ if revision is None else f"{__version__}, revision {revision}"
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    shared = Path("/dev/shm")
    return {
        "ddt": f"{code}, {len(changes.splitlines())} files changed" if changes else code,
        "python": platform.python_version(),
        "system": platform.platform(),
        "processor": f"{processor}, {cores} cores, {usable} usable",
        "memory": memory(),
        "shared memory": f"{shutil.disk_usage(shared).total / GIB:.1f} GiB" if shared.is_dir() else "no /dev/shm",
        "open files": f"{soft} (ulimit -n), at most {hard}",
    }


def graphics() -> dict[str, Any]:
    """Return `devices`, what is known of each GPU, driver and libraries; `problem`, in words, where
    there is one.
    """
    driver = output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    found: dict[str, Any] = {"devices": [], "driver": driver.splitlines()[0] if driver else None}
    try:
        import torch

        found["cuda"] = torch.version.cuda
        if torch.cuda.is_available():
            found["devices"] = [device(index) for index in range(torch.cuda.device_count())]
            found["cudnn"] = torch.backends.cudnn.version()
            if torch.distributed.is_available() and torch.distributed.is_nccl_available():
                found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    except Exception as error:  # a broken torch or driver raises anything
        return {**found, "problem": f"torch does not tell ({type(error).__name__}: {first_line(error)})"}
    if driver and not found["devices"]:
        found["problem"] = (
            "there is a driver, but torch finds no GPU: look at CUDA_VISIBLE_DEVICES and at the driver's age"
            if found["cuda"]
            else "there is a driver, but this torch is built for CPUs; install one that is built for CUDA"
        )
    return found


def device(index: int) -> dict[str, Any]:
    """Return what torch knows of a GPU."""
    import torch

    about = torch.cuda.get_device_properties(index)
    with torch.cuda.device(index):
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    capability = f"{about.major}.{about.minor}"
    return {"name": about.name, "memory_gib": about.total_memory / GIB, "capability": capability, "bf16": bf16}


def drop_cache(descriptor: int) -> bool:
    """Ask the system to drop a file's pages from memory; tell whether it can be asked."""
    if not hasattr(os, "posix_fadvise"):
        return False
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    return True


def disk(folder: Path) -> dict[str, Any]:
    """Measure writing and reading of a file of at most 128 MiB in a folder; the file has no name
    and does not stay.

    Returns `folder`, `free_gib`, `mib`, `write_mib_per_second` (each block forced to disk),
    `read_mib_per_second`, `cache_dropped` (whether the system was asked to read from the disk and
    not from its page cache). Where it cannot be measured, `problem` is one line that says why.
    """
    found: dict[str, Any] = {"folder": str(folder)}
    try:
        free = shutil.disk_usage(folder).free
        found["free_gib"] = free / GIB
        if free < 2 * BLOCK * MOST_BLOCKS:
            return {**found, "problem": f"{folder}: too full to be measured; give another --folder"}
        block, blocks = os.urandom(BLOCK), 0  # random, so that no file system compresses it
        with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
            began = time.perf_counter()
            while blocks == 0 or (blocks < MOST_BLOCKS and time.perf_counter() - began < SECONDS):
                file.write(block)
                os.fsync(file.fileno())
                blocks += 1
            writing = time.perf_counter() - began
            dropped = drop_cache(file.fileno())
            file.seek(0)
            began = time.perf_counter()
            while file.read(BLOCK):
                pass
            reading = time.perf_counter() - began
    except OSError as error:
        return {**found, "problem": f"{folder}: cannot be written ({error.strerror or error}); give another --folder"}
    mib = blocks * BLOCK / MIB
    rates = {"write_mib_per_second": mib / writing, "read_mib_per_second": mib / reading}
    return {**found, "mib": mib, **rates, "cache_dropped": dropped}


def hub(ask: bool) -> str:
    """Return in words whether the Hugging Face hub can be reached; it is asked only on request, for
    five seconds.
    """
    if os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "ON", "YES", "TRUE"):
        return "off: HF_HUB_OFFLINE is set"
    if not ask:
        return "not asked; --hub asks it"
    address = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        with urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=5):
            return f"reachable: {address}"
    except urllib.error.HTTPError as error:
        return f"{address} answers with an error ({error})"
    except (OSError, ValueError, http.client.HTTPException) as error:
        return f"not reachable: {address} ({first_line(error)})"


def logged_in() -> bool:
    """Tell whether W&B finds a key in the environment or in ~/.netrc; the key itself is not looked
    at.
    """
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return host in netrc.netrc(os.environ.get("NETRC")).hosts
    except (OSError, netrc.NetrcParseError):
        return False
