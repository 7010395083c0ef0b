"""From seeds to files: which images make a set, how each is drawn, and what lies in the folder afterwards.

Image k is a function of (seed k, class k): the batch size and the number of processes do not change it.
Shapes: n images, B batch, C H W.
"""

import dataclasses
import datetime
import json
import logging
import math
import platform
import time
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor, nn
from torchvision.utils import make_grid
from tqdm import tqdm

from ddt.autoencoder import Autoencoder
from ddt.errors import require
from ddt.files import write_json
from ddt.model import Denoiser
from ddt.sampling import SamplerSettings, sample
from ddt.version import __version__

log = logging.getLogger(__name__)
SEED_STRIDE = 1_000_000
MAX_SEED = 2**32  # torch's CPU generator uses no more bits than that
DEFAULT_SEEDS = range(8)


@dataclasses.dataclass(frozen=True)
class ImageSet:
    """Which images to draw: class and seed of each, in the order of the file. Classes are interleaved, never
    grouped.
    """

    classes: list[int]  # (n,)
    seeds: list[int]  # (n,)


def image_set(
    num_classes: int,
    num_samples: int | None = None,
    classes: list[int] | int | None = None,
    seeds: list[int] | int | None = None,
    seed: int = 0,
) -> ImageSet:
    """Return the set that the arguments describe (docs: contract of sample.py).

    With `seeds`, every seed with every class, seed by seed. With `num_samples` alone, image k has class `classes[k %
    K]` and seed `seed·1,000,000 + k`. With neither, seeds 0..7. `classes` defaults to all.

    Raises UserError for an unknown class, a seed out of 0..2³²−1, and counts that disagree.
    """
    classes = [classes] if isinstance(classes, int) else list(range(num_classes)) if classes is None else classes
    seeds = [seeds] if isinstance(seeds, int) else seeds
    require(len(classes) > 0, "classes=[]: name at least one class, or leave it out for all")
    wrong = [c for c in classes if not 0 <= c < num_classes]
    require(not wrong, f"classes={wrong[:3]}: the model has classes 0..{num_classes - 1}")
    if seeds is None and num_samples is not None:
        require(1 <= num_samples <= SEED_STRIDE, f"num_samples={num_samples}: must lie in 1..{SEED_STRIDE}")
        require(0 <= seed < MAX_SEED // SEED_STRIDE, f"seed={seed}: must lie in 0..{MAX_SEED // SEED_STRIDE - 1}")
        chosen = [classes[k % len(classes)] for k in range(num_samples)]
        return ImageSet(chosen, [seed * SEED_STRIDE + k for k in range(num_samples)])
    seeds = list(DEFAULT_SEEDS) if seeds is None else seeds
    require(len(seeds) > 0, "seeds=[]: name at least one seed, or give num_samples=")
    wrong = [s for s in seeds if not 0 <= s < MAX_SEED]
    require(not wrong, f"seeds={wrong[:3]}: a seed must lie in 0..{MAX_SEED - 1}")
    total = len(seeds) * len(classes)
    require(
        num_samples in (None, total),
        f"num_samples={num_samples} disagrees with {len(seeds)} seeds × {len(classes)} classes = {total}: leave it out",
    )
    return ImageSet([c for _ in seeds for c in classes], [s for s in seeds for _ in classes])


def noise_of(seeds: list[int], shape: tuple[int, int, int]) -> Tensor:
    """Return the starting noise (B, *shape), float32 on the CPU, one generator an image. Source: method.md 4."""
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(s)) for s in seeds])


def image_grid(images: Tensor, columns: int, min_cell: int = 48) -> np.ndarray:
    """Lay uint8 images (n, C, H, W) out as one picture (H', W', 3), for the eye.

    Images smaller than `min_cell` px are enlarged by a whole factor, bicubically: 8 px are easier to read smooth
    than as squares.
    """
    factor = math.ceil(min_cell / images.shape[-1])
    if factor > 1:
        images = (
            nn.functional.interpolate(images.float(), scale_factor=factor, mode="bicubic").round().clamp(0, 255).byte()
        )
    grid = make_grid(images, nrow=columns, padding=2, pad_value=255)
    return grid.permute(1, 2, 0).numpy()


def write_png(path: Path, picture: np.ndarray) -> None:
    """Write a uint8 picture (H, W, 3), making its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(path)


@torch.no_grad()
def generate(
    model: Denoiser,
    autoencoder: Autoencoder,
    shape: tuple[int, int, int],
    images: ImageSet,
    settings: SamplerSettings,
    dtype: Literal["bf16", "fp32"],
    batch_size: int,
    device: torch.device,
    rank: int = 0,
    num_processes: int = 1,
    calls: dict[str, int] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Draw this process's share of a set: images rank, rank + num_processes, …

    Returns their indices (m,) and the images, uint8 (m, H, W, C). `shape` is that of a latent; `dtype` "bf16" runs
    network and autoencoder under autocast; `calls` receives the network calls an image.
    """
    mine = np.arange(rank, len(images.seeds), num_processes)
    parts: list[np.ndarray] = []
    progress = tqdm(total=len(mine), unit="img", desc="sampling", disable=rank != 0, mininterval=1.0)
    for start in range(0, len(mine), batch_size):
        chosen = mine[start : start + batch_size]
        noise = noise_of([images.seeds[k] for k in chosen], shape).to(device)
        y = torch.tensor([images.classes[k] for k in chosen], device=device)
        counts: dict[str, int] = {}
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == "bf16"):
            latents = sample(model, noise, y, **settings.arguments(), counts=counts)
            pixels = autoencoder.decode(latents)
        parts.append(pixels.permute(0, 2, 3, 1).cpu().numpy())  # (B, H, W, C)
        progress.update(len(chosen))
        if calls is not None:
            calls.update(counts)
    progress.close()
    return mine, np.concatenate(parts) if parts else np.empty((0,), dtype=np.uint8)


def settled(out: Path, request: dict[str, Any]) -> bool:
    """Tell whether `out` holds exactly the requested set; raise UserError where it holds anything else."""
    require(not out.exists() or out.is_dir(), f"out={out}: is a file; give a folder")
    if not out.exists() or not any(p for p in out.iterdir() if not p.name.startswith(".")):
        return False
    try:
        same = json.loads((out / "receipt.json").read_text())["request"] == request
    except (OSError, ValueError, KeyError, TypeError):
        same = False
    require(same, f"out={out}: holds another set and is not written over; choose another out=")
    return (out / "samples.npz").is_file()  # written last: without it the set was interrupted and is drawn again


def sample_set(
    model: Denoiser,
    autoencoder: Autoencoder,
    shape: tuple[int, int, int],
    images: ImageSet,
    settings: SamplerSettings,
    dtype: Literal["bf16", "fp32"] | None,
    batch_size: int,
    out: Path,
    checkpoint: dict[str, Any],
    accelerator: Accelerator,
) -> None:
    """Draw a set on all processes and write `samples.npz`, `grid.png` and `receipt.json` into `out`.

    `arr_0` is uint8 (n, H, W, C) and `arr_1` int64 (n,), the class of each image, both in the set's order. A folder
    that holds the very same set is left as it is; any other one is refused (UserError). dtype None means bf16 on
    CUDA, fp32 elsewhere. `checkpoint` goes into the receipt.
    """
    require(batch_size >= 1, f"batch_size={batch_size}: must be at least 1")
    device, rank, num_processes = accelerator.device, accelerator.process_index, accelerator.num_processes
    dtype = dtype or ("bf16" if device.type == "cuda" else "fp32")
    request = {
        "checkpoint": checkpoint,
        "sampler": dataclasses.asdict(settings),
        "dtype": dtype,
        "classes": images.classes,
        "seeds": images.seeds,
    }
    request = json.loads(json.dumps(request))  # as it will be read back
    if settled(out, request):
        log.info("%s: complete, nothing to do", out / "samples.npz")
        return
    accelerator.wait_for_everyone()
    started = time.perf_counter()
    calls: dict[str, int] = {}
    indices, drawn = generate(
        model,
        autoencoder.to(device),
        shape,
        images,
        settings,
        dtype,
        batch_size,
        device,
        rank,
        num_processes,
        calls,
    )
    parts = out / ".parts"
    parts.mkdir(parents=True, exist_ok=True)
    if len(indices):
        np.savez(parts / f"{rank}.npz", indices=indices, images=drawn)
    accelerator.wait_for_everyone()
    if rank != 0:
        return
    seconds = time.perf_counter() - started
    merged = merge_parts(parts, len(images.seeds), num_processes)
    temporary = out / ".samples.npz"
    np.savez(temporary, arr_0=merged, arr_1=np.array(images.classes, dtype=np.int64))
    receipt = {
        "request": request,
        "samples": len(merged),
        "time_grid": settings.grid(),
        "recompute_steps": settings.schedule(),
        "network_calls_an_image": calls,
        "images_per_second": len(merged) / seconds,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "num_processes": num_processes,
        "batch_size": batch_size,
        "versions": {"ddt": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    write_json(out / "receipt.json", receipt)
    columns = len(set(images.classes)) if len(set(images.classes)) <= 16 else 10
    shown = torch.from_numpy(merged[: 10 * columns]).permute(0, 3, 1, 2)
    write_png(out / "grid.png", image_grid(shown, columns))
    temporary.rename(out / "samples.npz")
    log.info("%d images: %s, %s", len(merged), out / "samples.npz", out / "grid.png")


def merge_parts(parts: Path, total: int, num_processes: int) -> np.ndarray:
    """Join the processes' part files into one array (total, H, W, C) in the set's order, and remove them."""
    merged: np.ndarray | None = None
    seen = np.zeros(total, dtype=bool)
    for rank in range(min(num_processes, total)):
        with np.load(parts / f"{rank}.npz", allow_pickle=False) as part:
            indices, drawn = part["indices"], part["images"]
        if merged is None:
            merged = np.empty((total, *drawn.shape[1:]), dtype=np.uint8)
        merged[indices] = drawn
        seen[indices] = True
    assert merged is not None, "a set holds at least one image"
    assert seen.all(), "every image of the set is drawn"
    for path in parts.iterdir():
        path.unlink()
    parts.rmdir()
    return merged
