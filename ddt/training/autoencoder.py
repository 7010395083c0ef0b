"""Trains a small diffusers `AutoencoderKL` on one data set, in minutes on a CPU: no match for
SD-VAE, but training, caching and sampling in latents run for real without a published one.

Shapes: B batch, C H W images, c h w latents.
"""

import dataclasses
import datetime
import logging
import math
import platform
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ddt.autoencoder import KLAutoencoder
from ddt.autoencoder.base import from_uint8
from ddt.data.images import Images
from ddt.data.source import spread
from ddt.data.stream import TrainingStream
from ddt.errors import require
from ddt.files import atomic_folder, check_new, fsync, reset_permissions, write_json
from ddt.logs import progress_bar
from ddt.metrics.reconstruct import comparison, psnr
from ddt.pictures import write_png
from ddt.training.autoencoder_settings import AutoencoderSettings
from ddt.version import __version__

log = logging.getLogger(__name__)
MAX_IMAGES = 2048  # for the latents' statistics and the held-out PSNR
MAX_GRADIENT_NORM = 1.0
INITIAL_LOGVAR = -4.0  # of the posterior: at 0 its noise drowns the mean, and the first steps learn nothing


def build_network(settings: AutoencoderSettings, channels: int, image_size: int) -> Any:
    """Return an untrained `AutoencoderKL` of the seed, without mid-block attention, which is costly
    and of little use at this size. The global random state is left alone.
    """
    from diffusers import AutoencoderKL

    levels = len(settings.block_out_channels)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        network = AutoencoderKL(
            in_channels=channels,
            out_channels=channels,
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            block_out_channels=tuple(settings.block_out_channels),
            layers_per_block=settings.layers_per_block,
            latent_channels=settings.latent_channels,
            norm_num_groups=math.gcd(*settings.block_out_channels, 8),
            sample_size=image_size,
            mid_block_add_attention=False,
        )
    with torch.no_grad():
        network.quant_conv.bias[settings.latent_channels :] = INITIAL_LOGVAR
    return network


def autoencoder_loss(network: Any, pixels: Tensor, noise: Tensor, kl_weight: float) -> tuple[Tensor, Tensor]:
    """Return the loss and its squared error, both scalars.

    pixels: (B, C, H, W) in [−1, 1]; noise: (B, c, h, w), standard normal, samples the posterior.
    """
    posterior = network.encode(pixels).latent_dist
    reconstruction = network.decode(posterior.mean + posterior.std * noise).sample
    error = (reconstruction - pixels).square().mean()
    divergence = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
    return error + kl_weight * divergence, error


def fit(network: Any, images: Images, settings: AutoencoderSettings, device: torch.device) -> list[float]:
    """Train a network; return the squared error of each step. Images and noise of a step depend on
    (seed, position) alone. Raises FloatingPointError for a non-finite loss.
    """
    network.to(device).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=settings.lr, betas=(0.9, 0.99))
    side = images.image_size // settings.downsampling
    stream = TrainingStream(images, settings.seed, (settings.latent_channels, side, side), posterior=True)
    errors, size = [], settings.batch_size
    progress = progress_bar(total=settings.steps * size, unit="img", unit_scale=True, desc="autoencoder")
    for step in range(settings.steps):
        batch = stream[list(range(step * size, (step + 1) * size))]
        pixels, noise = from_uint8(batch["images"]).to(device), batch["posterior_noise"].to(device)
        loss, error = autoencoder_loss(network, pixels, noise, settings.kl_weight)
        if not math.isfinite(loss.item()):
            progress.close()
            raise FloatingPointError(f"the loss is NaN or infinite at step {step}; nothing was written; lower lr")
        optimizer.param_groups[0]["lr"] = settings.lr_at(step)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), MAX_GRADIENT_NORM)
        optimizer.step()
        errors.append(error.item())
        progress.update(size)
        progress.set_postfix(error=f"{np.mean(errors[-50:]):.4f}", refresh=False)
    progress.close()
    network.cpu().eval().requires_grad_(False)
    return errors


def normalise(network: Any, images: Images) -> None:
    """Set shift and scale for latents of `images` of mean 0 and variance 1, over all channels."""
    chosen = spread(len(images.labels), MAX_IMAGES)
    total, squares, count = 0.0, 0.0, 0
    for indices in np.array_split(chosen, math.ceil(len(chosen) / 64)):
        with torch.no_grad():
            posterior = network.encode(from_uint8(torch.from_numpy(images.load(indices)))).latent_dist
        mean, variance = posterior.mean.double(), posterior.var.double()
        total += mean.sum().item()
        squares += (mean.square() + variance).sum().item()  # of a sample, in expectation over the noise
        count += mean.numel()
    shift = total / count
    network.register_to_config(shift_factor=shift, scaling_factor=1 / math.sqrt(squares / count - shift**2))


def train_autoencoder(
    images: Images, held_out: Images, settings: AutoencoderSettings, out: Path, data: dict[str, Any]
) -> dict[str, Any]:
    """Train an autoencoder and write it atomically to `out`; return the content of training.json.

    `out` is a diffusers folder that `KLAutoencoder` reads, with reconstructions.png (held-out
    originals above their reconstructions) and training.json: settings, `data` (the data set's),
    PSNR in dB on at most 2,048 held-out images, encoded with posterior noise, seconds, versions.

    Raises UserError for an `out` that exists, images that do not fit, and no held-out images.
    """
    check_new(out)
    require(not images.has_latents, "data: is a latent cache already; give the images")
    require(len(held_out.labels) > 0, "data: there are no held-out images to measure on; give data.holdout_every=20")
    require(
        images.image_size % settings.downsampling == 0,
        f"data: images of {images.image_size} px cannot be halved {len(settings.block_out_channels) - 1} times; "
        "choose another data.image_size, or fewer levels in block_out_channels",
    )
    images.log_hints()
    images.check_contents(aligned=False, pixels=False)
    with atomic_folder(out) as folder:  # a read-only place is refused before the training
        start = time.monotonic()
        network = build_network(settings, images.channels, images.image_size)
        errors = fit(network, images, settings, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        normalise(network, images)
        network.save_pretrained(folder)
        for path in folder.glob("*.safetensors"):
            reset_permissions(path)
        autoencoder = KLAutoencoder(str(folder))  # measure what was written
        originals = torch.from_numpy(held_out.load(spread(len(held_out.labels), MAX_IMAGES)))
        shape = (len(originals), *autoencoder.latent_shape(images.channels, images.image_size))
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        reconstructions = autoencoder.decode(autoencoder.sample(autoencoder.encode(originals), noise))
        write_png(folder / "reconstructions.png", comparison(originals, reconstructions))
        report = {
            "psnr": psnr(originals, reconstructions),
            "held_out_images": len(originals),
            "training_images": len(images.labels),
            "squared_error": {"first": errors[0], "last": float(np.mean(errors[-50:]))},
            "seconds": round(time.monotonic() - start, 1),
            "settings": dataclasses.asdict(settings),
            "data": data,
            "versions": {"ddt": __version__, "torch": torch.__version__, "python": platform.python_version()},
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        }
        write_json(folder / "training.json", report)
        for path in folder.iterdir():
            fsync(path)
    return report
