"""Settings of the training of a decoder, parsed before torch is imported."""

import dataclasses

from ddt.epochs import Steps, are_steps
from ddt.errors import MANY, require, require_count
from ddt.training.settings import RunSettings

MAX_SIZE = 65_536


@dataclasses.dataclass(frozen=True)
class DecoderSizes:
    """Size of a decoder; see conf/decoder. Its attention heads are `autoencoder.decoder_heads`.

    patch_size: pixels per side that a token becomes, so that it sees `image_size/patch_size` tokens
    per side. Raises UserError for sizes that cannot be.
    """

    width: int
    depth: int
    mlp_width: int
    patch_size: int

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            require_count(f"decoder.{field.name}", getattr(self, field.name), 1, MAX_SIZE)
        require(self.width % 4 == 0, f"decoder.width={self.width}: must be a multiple of 4, for the table of positions")


@dataclasses.dataclass(frozen=True)
class ReconstructionSettings:
    """What a decoder minimises; see conf/reconstruction.

    noise: largest deviation of the noise on tokens in training; each image has its own, uniform
    from 0. lpips_weight: of LPIPS beside L1; 0: none. vgg_weights, lpips_weights: its files.
    gan_weight: of the GAN's loss, times the adaptive weight; 0: none. dino_weights: file of the
    discriminator's frozen network. discriminator_start, gan_start: steps from which on the
    discriminator learns and the decoder minimises the GAN's loss; epochs, until
    `ddt.epochs.in_steps`.

    Raises UserError for values out of range, or without effect.
    """

    noise: float
    lpips_weight: float
    gan_weight: float
    discriminator_start: Steps
    gan_start: Steps
    vgg_weights: str | None = None
    lpips_weights: str | None = None
    dino_weights: str | None = None

    def __post_init__(self) -> None:
        for key in ("noise", "lpips_weight", "gan_weight"):
            require(getattr(self, key) >= 0, f"reconstruction.{key}={getattr(self, key)}: must be at least 0")
        for key in ("discriminator_start", "gan_start"):
            if are_steps(getattr(self, key)):
                require_count(f"reconstruction.{key}", getattr(self, key), 0, MANY)
        for weight, keys in (
            ("lpips_weight", ("vgg_weights", "lpips_weights")),
            ("gan_weight", ("dino_weights", "discriminator_start", "gan_start")),
        ):
            for key in keys:
                value = getattr(self, key)
                require(
                    getattr(self, weight) > 0 or not value,
                    f"reconstruction.{key}={value}: has no effect with reconstruction.{weight}=0; leave it out, or "
                    "choose reconstruction=l1",
                )
        require(
            not are_steps(self.discriminator_start, self.gan_start) or self.discriminator_start <= self.gan_start,
            f"reconstruction.gan_start={self.gan_start}: is before reconstruction.discriminator_start="
            f"{self.discriminator_start}; an untrained discriminator teaches nothing",
        )

    def check_files(self) -> None:
        """Raise UserError for the first file that is needed and missing."""
        from ddt.objective.discriminator import DINO_FILE
        from ddt.objective.lpips import LINEAR_FILE, VGG_FILE, check_file

        if self.lpips_weight:
            check_file("reconstruction.vgg_weights", self.vgg_weights, VGG_FILE)
            check_file("reconstruction.lpips_weights", self.lpips_weights, LINEAR_FILE)
        if self.gan_weight:
            check_file("reconstruction.dino_weights", self.dino_weights, DINO_FILE)


@dataclasses.dataclass(frozen=True)
class DecoderSettings(RunSettings):
    """The settings of scripts/train_autoencoder.py for a decoder; see conf/train_autoencoder.yaml.

    autoencoder: of which the encoder, its precision and the decoder's heads are read, not the files
    of a decoder and of statistics, which come of this training. Raises UserError for what a
    decoder's training has not.
    """

    decoder: DecoderSizes
    reconstruction: ReconstructionSettings

    def __post_init__(self) -> None:
        super().__post_init__()
        trainer = self.trainer
        for key, known in (
            ("mixed_precision", ("fp32", "no", "tf32", "bf16")), ("parallelism", ("ddp",)), ("compile", (None, False)),
            ("cuda_graphs", (None, False)), ("eval_every", (0,)), ("ema_powers", ((),)),
        ):  # fmt: skip
            value = getattr(trainer, key)
            shown = str(list(value) if isinstance(value, tuple) else value).lower()
            require(value in known, f"trainer.{key}={shown}: not for an autoencoder's decoder; leave it out")
        reconstruction, start = self.reconstruction, self.reconstruction.gan_start
        require(
            not (reconstruction.gan_weight and are_steps(start, trainer.max_steps)) or start < trainer.max_steps,
            f"reconstruction.gan_start={start}: is never reached with trainer.max_steps="
            f"{trainer.max_steps}; lower it, or give reconstruction=l1",
        )

    def train(self) -> None:
        """Check what can be checked without weights, then train on all processes."""
        from ddt.distributed.launch import launch
        from ddt.training.decoder.loop import train
        from ddt.training.decoder.run import check
        from ddt.training.run import count_steps, inspect_data

        check(self)
        settings = count_steps(self)
        inspect_data(settings.data, aligned=False, pixels=True)
        launch(train, settings.trainer.num_processes, settings)
