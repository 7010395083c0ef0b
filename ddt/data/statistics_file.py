"""Statistics of an RAE's latents, of each channel and position: the file `autoencoder.statistics`.

Mean and population variance over the training images, and over mirror images where the data set has
them, are exact: sums are float64, of batches and processes merged by Chan's update. (Those that RAE
published are running averages of its last batches.)

Shapes: B images, C channels, h w latent.
"""

import functools
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import gather_object
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import Dataset

from ddt.data.images import Images
from ddt.data.latent_statistics import OF_POSITIONS, Moments, block_moments
from ddt.data.settings import StatisticsSettings
from ddt.data.stream import check_shared_memory, load_batches
from ddt.distributed.prepare import decide_on_main, make_accelerator
from ddt.errors import require
from ddt.files import atomic_file
from ddt.logs import progress_bar
from ddt.receipts import circumstances

log = logging.getLogger(__name__)


class Views(Dataset):
    """Batches of a data set, each with its mirror images where it has them: uint8 images
    (B, flips, C, S, S), or moments (B, flips, M, h, w) of a latent cache.
    """

    def __init__(self, images: Images) -> None:
        self.images = images

    def __getitem__(self, rows: range) -> np.ndarray:
        indices = np.array(rows)
        sides = [np.full(len(indices), bool(side)) for side in range(self.images.flips)]
        views = [self.images.load_inputs(indices, flipped, aligned=False) for flipped in sides]
        return np.stack([view["moments" if self.images.has_latents else "images"] for view in views], axis=1)


def write_latent_statistics(settings: StatisticsSettings, command: str) -> None:
    """Encode the training images on all processes, and write the file. command: for its receipt."""
    accelerator = make_accelerator()
    device, rank, num_processes = accelerator.device, accelerator.process_index, accelerator.num_processes
    images, autoencoder = settings.data.build(split="train"), settings.build_autoencoder()
    autoencoder.latent_shape(images.channels, images.image_size)
    images.check_autoencoder(autoencoder)
    require(not images.skips_broken, "data.skip_broken=true: has no effect here; remove the files instead")
    if accelerator.is_main_process:
        images.log_hints()
    decide_on_main(accelerator, lambda: images.check_contents(aligned=False, pixels=not images.has_latents))
    total = len(images.labels)
    require(total >= 2, f"data: holds {total} training images; statistics need at least 2")
    # --- this process's batches
    parts = [range(k, min(k + settings.batch_size, total)) for k in range(0, total, settings.batch_size)]
    mine = parts[rank::num_processes]
    wanted = min(os.cpu_count() or 1, 8) if settings.num_workers is None else settings.num_workers
    num_workers = wanted if images.reads_files and mine else 0
    views = Views(images)
    if mine:
        check_shared_memory(views, mine[0], num_workers, "num_workers")
    # --- encode
    autoencoder = autoencoder.to(device)
    progress = progress_bar(total=sum(map(len, mine)), unit="img", desc="encoding", disable=rank != 0)

    def each_batch() -> Iterator[Moments]:
        for batch in load_batches(views, mine, num_workers):
            moved = batch.to(device)  # (B, flips, …)
            if not images.has_latents:
                moved = torch.stack([autoencoder.encode(view) for view in moved.unbind(1)], dim=1)
            yield block_moments(moved, autoencoder.stochastic, OF_POSITIONS)
            progress.update(len(batch))

    with progress:
        found = merged(each_batch())
    own = None if found is None else Moments(found.num_values, found.mean.cpu(), found.squares.cpu())
    moments = merged(each for each in gather_object([own]) if each is not None)
    if rank != 0:
        return
    # --- write
    assert moments is not None
    require(bool(moments.squares.isfinite().all()), "autoencoder: its latents are not finite; look at the encoder")
    receipt = {
        "data": {**settings.data.plain(), **images.inferred, "fingerprint": images.fingerprint},
        "autoencoder": {**settings.autoencoder.plain(), "statistics": None},
        "encoder_sha256": autoencoder.encoder_fingerprint,
        "images": total,
        "count": moments.num_values,  # with mirror images
        "command": command,
        **circumstances(device, ("torch", "timm")),
    }
    values: dict[str, Tensor] = {"mean": moments.mean.float(), "var": moments.variance.float()}
    out = Path(settings.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(out) as temporary:
        save_file(values, temporary, metadata={"receipt": json.dumps(receipt)})
    log.info(
        "%s: mean and variance of %d latents %s; use it by autoencoder.statistics=%s", out, moments.num_values,
        "×".join(map(str, moments.mean.shape)), out,
    )  # fmt: skip


def merged(parts: Iterator[Moments]) -> Moments | None:
    """Return the moments of all parts, None where there are none."""
    first = next(parts, None)
    return None if first is None else functools.reduce(Moments.merge, parts, first)
