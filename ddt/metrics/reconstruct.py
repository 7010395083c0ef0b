"""What an autoencoder loses: images of a data set, encoded and decoded, as a set that evaluate.py
scores (rFID), and their PSNR.

Shapes: n images, B batch, C H W.
"""

import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ddt.data.source import spread
from ddt.draws import noise_of
from ddt.errors import require
from ddt.files import atomic_folder, fsync, sha256, write_json
from ddt.generation.receipt import RECEIPT, SHA256
from ddt.logs import progress_bar
from ddt.metrics.images import SAMPLES, write_npz
from ddt.metrics.settings import ReconstructSettings
from ddt.pictures import image_grid, write_png
from ddt.receipts import circumstances

log = logging.getLogger(__name__)
SHOWN = 16  # images of the picture
PICTURE = "grid.png"


def psnr_of_each(originals: Tensor, reconstructions: Tensor) -> Tensor:
    """Return the PSNR in dB, float64 (B,), of uint8 images (B, C, H, W)."""
    error = (originals.double() - reconstructions.double()).square().mean(dim=(1, 2, 3)).clamp(min=1e-10)
    return 10 * torch.log10(255**2 / error)


def psnr(originals: Tensor, reconstructions: Tensor) -> float:
    """Return the mean PSNR in dB of uint8 images (B, C, H, W)."""
    return float(psnr_of_each(originals, reconstructions).mean())


def comparison(originals: Tensor, reconstructions: Tensor) -> np.ndarray:
    """Return a grid (H', W', 3) of up to 16 images in labelled rows of up to 8, originals above
    reconstructions.

    Both are uint8 (n, C, H, W); the choice of images is random, but always the same.
    """
    columns = min(len(originals), 8)
    count = min(len(originals) // columns, 2) * columns
    chosen = torch.randperm(len(originals), generator=torch.Generator().manual_seed(0))[:count]
    pairs = torch.stack([originals[chosen], reconstructions[chosen]]).unflatten(
        1, (-1, columns)
    )  # (2, rows, columns, …)
    return image_grid(
        pairs.transpose(0, 1).flatten(0, 2), columns, rows=["original", "reconstruction"] * pairs.shape[1]
    )


def write_reconstructions(settings: ReconstructSettings, command: str) -> None:
    """Encode and decode the images, and write `samples.npz`, `receipt.json` with their PSNR and
    `grid.png`, originals above. A posterior's noise is a function of the image's number.

    command: for the receipt. Raises UserError where there are no such images, or the autoencoder
    does not fit them.
    """
    out, name = Path(settings.out), settings.choices["data"]
    images = settings.data.build(split=settings.split)
    images.require_pixels()
    require(not images.skips_broken, "data.skip_broken=true: has no effect here; remove the files instead")
    total = len(images.labels)
    other = "train" if settings.split == "test" else "test"
    advice = f"give split={other}, or data.holdout_every="
    require(total > 0, f"split={settings.split}: data={name} holds no image of it; {advice}")
    autoencoder = settings.autoencoder.build()
    shape = autoencoder.latent_shape(images.channels, images.image_size)
    images.log_hints()
    images.check_contents(aligned=False, pixels=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    autoencoder = autoencoder.to(device)
    chosen = spread(total, settings.num_images or total)
    values: list[Tensor] = []
    shown: list[Tensor] = []  # of (2, C, H, W), original and reconstruction
    in_picture = set(spread(len(chosen), SHOWN).tolist())

    def batches(progress: tqdm) -> Iterator[np.ndarray]:
        for start in range(0, len(chosen), settings.batch_size):
            indices = chosen[start : start + settings.batch_size]
            originals = torch.from_numpy(images.load(indices))  # (B, C, H, W)
            noise = noise_of(indices.tolist(), shape).to(device) if autoencoder.stochastic else None
            moments = autoencoder.encode(originals.to(device))
            made = autoencoder.decode(autoencoder.sample(moments, noise)).cpu()
            values.append(psnr_of_each(originals, made))
            pairs = torch.stack([originals, made], dim=1)
            shown.extend(pairs[k].clone() for k in range(len(indices)) if start + k in in_picture)
            progress.update(len(indices))
            yield made.permute(0, 2, 3, 1).numpy()

    with atomic_folder(out) as folder, torch.no_grad():
        with progress_bar(total=len(chosen), unit="img", desc="reconstructing") as progress:
            size = (len(chosen), images.image_size, images.image_size, images.channels)
            labels = {"arr_1": images.labels[chosen].astype(np.int64)}
            write_npz(folder / SAMPLES, labels, batches(progress), size)
        mean = float(torch.cat(values).mean())
        write_png(folder / PICTURE, comparison(*torch.stack(shown).unbind(1)))
        receipt = {
            "kind": "reconstructions",
            "samples": len(chosen),
            SHA256: sha256(folder / SAMPLES),
            "psnr": mean,
            "data": {**settings.data.plain(), **images.inferred, "fingerprint": images.fingerprint},
            "split": settings.split,
            "autoencoder": settings.autoencoder.plain(),
            "autoencoder_sha256": autoencoder.fingerprint,
            "batch_size": settings.batch_size,
            "command": command,
            **circumstances(device),
        }
        write_json(folder / RECEIPT, receipt)
        for path in folder.iterdir():
            fsync(path)
    log.info(
        "%s: %d images, PSNR %.2f dB; for rFID: python evaluate.py samples=%s reference=…", out, len(chosen), mean, out
    )
