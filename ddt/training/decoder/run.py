"""The settings of a decoder's training, checked before anything is loaded, and what is built of
them.
"""

import dataclasses
import hashlib
import logging
from typing import Any

import torch
from torch import nn

from ddt.autoencoder.base import weights_hash
from ddt.autoencoder.rae import EXECUTION, RepresentationAutoencoder, find_encoder
from ddt.autoencoder.rae_encoder import FrozenEncoder
from ddt.autoencoder.vit_decoder import ViTDecoder
from ddt.config import locate
from ddt.distributed.launch import default_processes
from ddt.errors import UserError, require
from ddt.objective.discriminator import Discriminator, load_dino
from ddt.objective.lpips import LPIPS
from ddt.objective.reconstruction import Discrimination, Reconstruction
from ddt.training.decoder.settings import DecoderSettings
from ddt.training.run import BaseRun, check_memory

log = logging.getLogger(__name__)


def check(settings: DecoderSettings) -> None:
    """Build what costs nothing; raise one UserError with a line for each impossible setting."""
    problems: list[str] = []

    def attempt(function: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except (UserError, TypeError) as error:  # TypeError: a file that lacks what its target needs
            problems.append(str(error))

    if settings.trainer.num_processes is None:
        attempt(settings.trainer.micro_batches, default_processes())
    with torch.device("meta"):
        network = attempt(build_decoder, settings, channels=1, grid=1)
    if network is not None:
        attempt(check_memory, sum(parameter.numel() for parameter in network.parameters()))
    attempt(settings.optimizer.build, named_parameters=[("weight", nn.Parameter(torch.zeros(1)))])
    attempt(settings.reconstruction.check_files)
    attempt(locate(settings.tracker.target).check, **settings.tracker.settings)
    require(not problems, "\n".join(problems))


def build_decoder(settings: DecoderSettings, channels: int, grid: int) -> ViTDecoder:
    """Return an untrained decoder of `grid`×`grid` tokens of `channels` features."""
    heads = settings.autoencoder.settings.get("decoder_heads", 16)
    return ViTDecoder(channels, **dataclasses.asdict(settings.decoder), num_heads=heads, grid=grid)


@dataclasses.dataclass(frozen=True)
class DecoderRun(BaseRun):
    """What a process trains, and with what.

    config: `decoder`, its sizes, too. objective: the decoder with its loss, initialised alike on
    all processes. autoencoder: the encoder, with that decoder. discrimination: None without a GAN.
    """

    settings: DecoderSettings
    objective: Reconstruction
    autoencoder: RepresentationAutoencoder
    discrimination: Discrimination | None

    @property
    def what_next(self) -> str:
        return (
            f"use it as autoencoder={self.settings.choices['autoencoder']} "
            f"autoencoder.decoder={self.settings.run_dir}/export/ema.safetensors, first in "
            "scripts/latent_statistics.py with autoencoder.statistics=null"
        )

    @property
    def trained(self) -> dict[str, nn.Module]:
        parts: dict[str, nn.Module] = {"decoder": self.objective.network}
        return parts if self.discrimination is None else {**parts, "discriminator": self.discrimination}


def build_run(settings: DecoderSettings) -> DecoderRun:
    """Build data, encoder, decoder and losses; raise UserError where they do not fit."""
    torch.manual_seed(settings.seed)  # the initial weights; nothing later uses the global state
    images, held_out = (settings.data.build(split=split) for split in ("train", "test"))
    images.require_pixels()
    patch_size, chosen = settings.decoder.patch_size, settings.autoencoder.settings
    require(
        images.image_size % patch_size == 0,
        f"data.image_size={images.image_size}: is no multiple of decoder.patch_size={patch_size}; choose another",
    )
    grid = images.image_size // patch_size
    weights = find_encoder(chosen["encoder"], chosen.get("encoder_weights"), chosen.get("source"))
    encoder = FrozenEncoder(chosen["encoder"], grid, weights)
    decoder = build_decoder(settings, encoder.num_features, grid)
    execution = {key: chosen[key] for key in EXECUTION if key in chosen}
    autoencoder = RepresentationAutoencoder(encoder, decoder, **execution)
    shape = autoencoder.latent_shape(images.channels, images.image_size)
    given = settings.reconstruction
    lpips = LPIPS(given.vgg_weights, given.lpips_weights) if given.lpips_weight else None
    discrimination = Discrimination(Discriminator(load_dino(given.dino_weights))) if given.gan_weight else None
    frozen = [] if lpips is None else [lpips.stages, lpips.linear]
    frozen += [] if discrimination is None else [discrimination.network.features.network]
    plain = settings.plain()
    plain["data"] |= {**images.inferred, "fingerprint": images.fingerprint}
    plain["autoencoder"]["fingerprint"] = autoencoder.encoder_fingerprint
    hashes = "".join(weights_hash(network) for network in frozen)
    plain["reconstruction"]["fingerprint"] = hashlib.sha256(hashes.encode()).hexdigest() if frozen else None
    config = {
        "latent_shape": list(shape),
        "autoencoder": settings.autoencoder.plain(),
        "decoder": dataclasses.asdict(settings.decoder) | {"channels": shape[0], "grid": grid},
        "run": plain,
    }
    objective = Reconstruction(
        decoder, encoder.mean, encoder.std, lpips, given.noise, given.lpips_weight, given.gan_weight
    )
    return DecoderRun(settings, config, images, held_out, objective, autoencoder, discrimination)
