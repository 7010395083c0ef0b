"""Settings of the training of a small KL autoencoder, parsed before torch is imported."""

import dataclasses
import logging
import math
from pathlib import Path

from ddt.config import Choice
from ddt.errors import MANY, MAX_BATCH, require, require_count

log = logging.getLogger(__name__)
MAX_CHANNELS, MAX_LEVELS = 4096, 10


@dataclasses.dataclass(frozen=True)
class AutoencoderSettings:
    """Size and training of an autoencoder; see conf/train_autoencoder.yaml.

    steps: optimizer steps. batch_size: images per step. lr: AdamW's peak learning rate, after
    linear warm-up over the first twentieth of the steps; a cosine to 0 follows. block_out_channels:
    channels at each level; between two levels the image is halved. latent_channels: c. kl_weight:
    of the KL divergence (mean over the latent) beside the squared error (mean over pixels in
    [−1, 1]). layers_per_block: residual blocks a level, and one more in the decoder. seed: weights,
    order and posterior noise.

    Raises UserError for values out of range.
    """

    steps: int
    batch_size: int
    lr: float
    block_out_channels: list[int]
    latent_channels: int
    kl_weight: float
    layers_per_block: int
    seed: int

    def __post_init__(self) -> None:
        for key, most in (
            ("steps", MANY), ("batch_size", MAX_BATCH), ("latent_channels", MAX_CHANNELS),
            ("layers_per_block", MAX_CHANNELS),
        ):  # fmt: skip
            require_count(key, getattr(self, key), 1, most)
        require(self.lr > 0, f"lr={self.lr}: must be above 0")
        require_count("kl_weight", self.kl_weight, 0)
        require_count("seed", self.seed, 0, 2**63 - 1)
        channels = self.block_out_channels
        require(
            1 <= len(channels) <= MAX_LEVELS and min(channels) >= 1 and max(channels) <= MAX_CHANNELS,
            f"block_out_channels={channels}: give channels of 1 to {MAX_CHANNELS} for 1 to {MAX_LEVELS} levels",
        )

    @property
    def downsampling(self) -> int:
        """Pixels a side per latent position."""
        return 2 ** (len(self.block_out_channels) - 1)

    def lr_at(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0."""
        warmup = max(1, self.steps // 20)
        return self.lr * min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * step / self.steps)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class CommandSettings(AutoencoderSettings):
    """The settings of scripts/train_autoencoder.py for a small KL autoencoder. data: train.py's
    group. out: the folder.
    """

    data: Choice
    out: str
    choices: dict[str, str | None]

    @property
    def own(self) -> AutoencoderSettings:
        """The settings without the command's."""
        return AutoencoderSettings(**{f.name: getattr(self, f.name) for f in dataclasses.fields(AutoencoderSettings)})

    def train(self) -> None:
        """Open the data, train, write, and log what came of it."""
        from ddt.training.autoencoder import train_autoencoder

        out, name = self.out, self.choices["data"]
        images, held_out = (self.data.build(split=split) for split in ("train", "test"))
        data = {"name": name, **self.data.settings, **images.inferred}
        report = train_autoencoder(images, held_out, self.own, Path(out), data)
        log.info("%s: PSNR %.2f dB on held-out images, %.0f s", out, report["psnr"], report["seconds"])
        log.info("train in its latents with: python train.py data=%s autoencoder=kl autoencoder.source=%s …", name, out)
