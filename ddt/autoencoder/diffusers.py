"""Autoencoders of the diffusers library: AutoencoderKL and AutoencoderTiny.

Shapes: B batch, C channels, H W pixels, h w latent.
"""

import abc
import contextlib
import functools
import logging
import math
import re
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from ddt.autoencoder.base import UnknownShape, from_uint8, to_uint8, weights_hash
from ddt.errors import UserError, brief, first_line, reason, require, require_count
from ddt.files import read_json
from ddt.hub import is_hub_id, local_path, pinned, resolve
from ddt.precision import Dtype, autocast, check_dtype
from ddt.tensor_files import read_state_dict

log = logging.getLogger(__name__)
WEIGHTS = [f"diffusion_pytorch_model{part}.{end}" for part in ("", ".fp16") for end in ("safetensors", "bin")]
OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # of attention, before 2023
MAX_SIZE = 65_536  # of any number in a config.json

SD_VAE = {
    "_class_name": "AutoencoderKL",
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}
# their config.json beside diffusers' defaults, so that their cost is counted without a hub
PUBLISHED: dict[str, dict[str, Any]] = {
    "stabilityai/sd-vae-ft-ema": SD_VAE,
    "stabilityai/sd-vae-ft-mse": SD_VAE,
    "madebyollin/taesd": {"_class_name": "AutoencoderTiny"},
}


def choose_files(names: Container[str]) -> list[str]:
    """Return config and weights among the files of an autoencoder, or of a pipeline's `vae/`: the
    published precision before fp16, safetensors before a pickle; UserError where there are none.
    """
    for folder in ("", "vae/"):
        weights = [f"{folder}{name}" for name in WEIGHTS if f"{folder}{name}" in names]
        if weights and f"{folder}config.json" in names:
            return [f"{folder}config.json", weights[0]]
    raise UserError(
        f"holds no diffusers autoencoder (config.json and {WEIGHTS[0]}), nor a pipeline with one in vae/; "
        "give the folder of one"
    )


def find_files(source: str, revision: str | None) -> tuple[Path, Path]:
    """Return config and weights of a local folder or a hub model, cached or downloaded.

    Raises UserError for a single file, and where there are none.
    """
    advice = "on a machine without a hub give a local folder"
    folder = resolve(pinned(source, revision), f"autoencoder.source={source}", choose_files, advice)
    if folder.is_file():
        beside = (folder.parent / "config.json").is_file()
        problem = f"give its folder, {folder.parent}" if beside else "give the folder of a diffusers autoencoder"
        raise UserError(f"is a single file, which does not say how its latents are scaled; {problem}")
    known = [f"{place}{name}" for place in ("", "vae/") for name in ("config.json", *WEIGHTS)]
    config, weights = choose_files([name for name in known if (folder / name).is_file()])
    return folder / config, folder / weights


def of_source(source: str, error: UserError) -> UserError:
    """Return an error with a message that names the setting."""
    label = f"autoencoder.source={source}: "
    return UserError(label + str(error).removeprefix(label))


def load_diffusers(kind: str, source: str, revision: str | None) -> Any:
    """Load a frozen diffusers autoencoder of class `kind`, float32, from the hub or a local folder.

    Raises UserError naming `source` where it cannot be loaded, is another class, or its weights are
    not exactly the network's.
    """
    try:
        config_file, weights_file = find_files(source, revision)
        state = {
            re.sub(r"(\.attentions\.\d+\.)(\w+)", lambda m: m[1] + OLD_NAMES.get(m[2], m[2]), name): value.float()
            for name, value in read_state_dict(weights_file).items()
        }
        network = build_outline(kind, read_json(config_file), max_layers=len(state))
    except UserError as error:
        raise of_source(source, error) from error
    try:
        missing, unexpected = network.load_state_dict(state, strict=False, assign=True)
    except RuntimeError as error:  # of shapes
        raise UserError(f"autoencoder.source={source}: {weights_file} does not fit ({reason(error)})") from error
    for problem, names in (("missing", missing), ("unexpected", unexpected)):
        require(not names, f"autoencoder.source={source}: {weights_file}: {problem} keys {names[:3]}")
    if ".fp16." in weights_file.name:
        log.warning("autoencoder.source=%s: holds weights rounded to fp16 alone; they run in float32", source)
    return network.requires_grad_(False)


def build_outline(kind: str, config: Mapping[str, Any], max_layers: int = 10_000) -> Any:
    """Build a diffusers autoencoder of class `kind` from its config on the meta device.

    Raises UserError where it is of another class or impossible.
    """
    import diffusers

    stored = brief(str(config.get("_class_name")), 60)
    require(stored == kind, f"is of class {stored}, expected {kind}")
    for key, value in config.items():
        numbers = [n for n in (value if isinstance(value, list | tuple) else [value]) if isinstance(n, int | float)]
        limit = max_layers if key.endswith(("_blocks", "layers_per_block")) else MAX_SIZE
        require(all(abs(n) <= limit for n in numbers), f"its config.json has {brief(f'{key}={value}', 60)}")
    try:
        with torch.device("meta"):
            return getattr(diffusers, kind).from_config(dict(config)).eval()
    except Exception as error:  # impossible settings raise whatever the layers stumble over
        raise UserError(f"its config.json makes no {kind} ({first_line(error)})") from error


def normalisation(config: Any) -> tuple[Tensor, Tensor]:
    """Return shift and scale, (C or 1, 1, 1), of a network's config."""
    mean, std = config.get("latents_mean"), config.get("latents_std")
    shift = torch.tensor(mean or [config.get("shift_factor") or 0.0]).reshape(-1, 1, 1)
    return shift, float(config.scaling_factor) / torch.tensor(std or [1.0]).reshape(-1, 1, 1)


class LatentDecoder:
    """Decodes latents by a loaded diffusers autoencoder, which stays where it is.

    chunk_size: latents decoded at once, which bounds the memory.
    """

    def __init__(self, network: Any, chunk_size: int) -> None:
        self.network, self.chunk_size = network, chunk_size
        self.shift, self.scale = normalisation(network.config)

    @property
    def latent_channels(self) -> int:
        return int(self.network.config.latent_channels)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Return uint8 images (B, 3, H, W), under the caller's autocast; in float32 where that is
        fp16, whose range a decoder may leave, and the images would be black.

        Raises UserError for latents of another number of channels.
        """
        require(
            latents.shape[1] == self.latent_channels,
            f"autoencoder: has {self.latent_channels} latent channels, the model {latents.shape[1]}; choose the "
            "model's own",
        )
        kind = latents.device.type
        in_fp16 = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.float16
        with autocast(latents.device, "fp32") if in_fp16 else contextlib.nullcontext():
            chunks = (latents / self.scale + self.shift).split(self.chunk_size)
            return torch.cat([to_uint8(self.network.decode(chunk).sample) for chunk in chunks])

    def to(self, device: torch.device) -> Self:
        """Move to a device and return itself."""
        self.network.to(device)
        self.shift, self.scale = self.shift.to(device), self.scale.to(device)
        return self


class DiffusersAutoencoder(LatentDecoder, abc.ABC):
    """A frozen diffusers autoencoder.

    Channels, downsampling and normalisation come from its config: latents are `(sample −
    shift)·scale`, with scalars or, as `latents_mean` and `latents_std`, one number per channel.
    Source: method.md 3.

    Args:
        source: hub name (owner/name) or local folder, of the autoencoder or of a pipeline with one.
        revision: commit on the hub, pinned so that the weights cannot change; unused for a folder.
        chunk_size: images encoded or decoded at once, which bounds the memory.
        encode_dtype: "fp32", or "bf16" or "fp16" autocast when encoding.
        latents_mean, latents_std: one number per channel, in place of the config's normalisation:
            latents are `(sample − mean)/std`.

    Raises UserError where the weights cannot be loaded, or the statistics are not of its channels.
    """

    pixel_space = False
    timeshift = 1.0
    class_token = 0
    sampling_dtype: Dtype | None = None
    latents_by: tuple[str, ...] = ("source", "revision", "latents_mean", "latents_std")
    parts: tuple[tuple[str, str], ...] = ()
    packages = ("diffusers",)
    kind: str
    stochastic: bool
    levels: str  # key of the config with one entry per level of the encoder

    def __init__(
        self,
        source: str,
        revision: str | None = None,
        chunk_size: int = 16,
        encode_dtype: Dtype = "fp32",
        latents_mean: tuple[float, ...] | None = None,
        latents_std: tuple[float, ...] | None = None,
    ) -> None:
        require_count("autoencoder.chunk_size", chunk_size)
        self._hold(load_diffusers(self.kind, source, revision), chunk_size, encode_dtype)
        self._renormalise(latents_mean, latents_std)

    def _hold(self, network: Any, chunk_size: int, encode_dtype: Dtype) -> None:
        super().__init__(network, chunk_size)
        self.encode_dtype, self.own_shift, self.own_scale = encode_dtype, self.shift, self.scale

    def _renormalise(self, mean: tuple[float, ...] | None, std: tuple[float, ...] | None) -> None:
        """Normalise by these statistics, where there are some; the network's config has them from
        now on, so that a copy of it is this autoencoder.
        """
        if mean is None and std is None:
            return
        for key, values in (("mean", mean), ("std", std)):
            shown = None if values is None else list(values)
            require(
                values is not None and len(values) == self.latent_channels and all(map(math.isfinite, values)),
                f"autoencoder.latents_{key}={shown}: give {self.latent_channels} numbers, one per channel, as "
                "latent_statistics.json of a cache has them; or leave latents_mean and latents_std out",
            )
        assert mean is not None
        assert std is not None
        limit = math.sqrt(torch.finfo(torch.float32).max)  # so that latents are finite in float32
        require(
            all(1 / limit < value < limit for value in std) and all(abs(value) < limit for value in mean),
            f"autoencoder.latents_std={list(std)}: each must be above 0, and neither they nor latents_mean extreme",
        )
        self.network.register_to_config(latents_mean=list(mean), latents_std=list(std), scaling_factor=1.0)
        self.shift, self.scale = normalisation(self.network.config)

    @classmethod
    def around(cls, network: Any, chunk_size: int) -> Self:
        """Wrap a loaded diffusers network."""
        autoencoder = cls.__new__(cls)
        autoencoder._hold(network, chunk_size, "fp32")
        return autoencoder

    @classmethod
    def outline(cls, settings: dict[str, Any]) -> Self:
        """See `Autoencoder`: the shapes of a local folder and of `PUBLISHED` are known."""
        source, label = settings["source"], f"autoencoder.source={settings['source']}"
        known = source in PUBLISHED and not Path(source).exists()
        if not known and local_path(source, label, "give a local folder") is None:
            raise UnknownShape(
                f"{label}: its shape is not known here; give a local folder, or one of {', '.join(PUBLISHED)}"
            )
        try:
            network = build_outline(cls.kind, PUBLISHED[source] if known else read_json(find_files(source, None)[0]))
        except UserError as error:
            raise of_source(source, error) from error
        autoencoder = cls.around(network.requires_grad_(False), 1)
        autoencoder._renormalise(settings.get("latents_mean"), settings.get("latents_std"))
        return autoencoder

    @classmethod
    def on_hub(cls, settings: dict[str, Any]) -> bool:
        """Return whether the source is a hub name."""
        return is_hub_id(settings["source"])

    @classmethod
    def moved(cls, settings: dict[str, Any], source: str) -> dict[str, Any]:
        """Return settings of another source."""
        return {**settings, "source": source, "revision": None}

    def save(self, folder: Path) -> None:
        """Write a diffusers folder."""
        self.network.save_pretrained(folder)

    def diffusers_network(self) -> Any:
        """Return the network."""
        return self.network

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the weights and of the normalisation."""
        return weights_hash(self.network, shift=self.shift, scale=self.scale)

    @functools.cached_property
    def encoder_fingerprint(self) -> str:
        """As `fingerprint`, of the normalisation that came with the weights."""
        same = torch.equal(self.shift.cpu(), self.own_shift) and torch.equal(self.scale.cpu(), self.own_scale)
        return self.fingerprint if same else weights_hash(self.network, shift=self.own_shift, scale=self.own_scale)

    @property
    def downsampling(self) -> int:
        """Pixels a side per latent position: one halving between two levels."""
        return 2 ** (len(self.network.config[self.levels]) - 1)

    def latent_shape(self, channels: int, image_size: int) -> tuple[int, int, int]:
        """Return (C, h, w); raise UserError where the size is no multiple of the downsampling."""
        config, factor = self.network.config, self.downsampling
        if channels != config.in_channels or image_size % factor:
            raise UserError(
                f"data: images of {channels} channels and {image_size} px do not fit this autoencoder, which takes "
                f"{config.in_channels} channels and multiples of {factor} px"
            )
        return config.latent_channels, image_size // factor, image_size // factor

    def image_size(self, latent_shape: tuple[int, int, int]) -> int:
        """Return the pixels per side of the images of latents (C, h, w); UserError for others."""
        channels, _, side = latent_shape
        require(
            channels == self.latent_channels,
            f"autoencoder: has {self.latent_channels} latent channels, the model {channels}",
        )
        return side * self.downsampling

    @abc.abstractmethod
    def _moments(self, pixels: Tensor) -> Tensor:
        """Return the moments (B, 2C or C, h, w) of pixels (B, 3, H, W) in [−1, 1]."""

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Return moments, float32 (B, 2C or C, h, w), of uint8 images (B, 3, H, W)."""
        with autocast(images.device, self.encode_dtype):
            return torch.cat([self._moments(from_uint8(c)).float() for c in images.split(self.chunk_size)])

    def sample(self, moments: Tensor, posterior_noise: Tensor | None = None) -> Tensor:
        """Return float32 latents (B, C, h, w) of moments (B, 2C or C, h, w).

        With a posterior: `mean + exp(logvar/2)·noise`, noise (B, C, h, w), logvar clamped to
        [−30, 20]. Source: method.md 3.
        """
        moments = moments.float()
        if self.stochastic:
            assert posterior_noise is not None, "the posterior needs noise"
            mean, logvar = moments.chunk(2, dim=1)
            moments = mean + torch.exp(0.5 * logvar.clamp(-30, 20)) * posterior_noise
        return (moments - self.shift) * self.scale

    def to(self, device: torch.device) -> Self:
        """As `LatentDecoder.to`; raises UserError where the device has no `encode_dtype`."""
        check_dtype("autoencoder.encode_dtype", self.encode_dtype, device)
        return super().to(device)


class KLAutoencoder(DiffusersAutoencoder):
    """A diffusers `AutoencoderKL`, such as SD-VAE, with 4, 16 or 32 channels."""

    kind, stochastic, levels = "AutoencoderKL", True, "block_out_channels"
    parts = (("encoder.conv_in.weight", "an AutoencoderKL (autoencoder.source, with its folder)"),)

    def _moments(self, pixels: Tensor) -> Tensor:
        return self.network.encode(pixels).latent_dist.parameters  # (B, 2C, h, w): mean, logvar


class TinyAutoencoder(DiffusersAutoencoder):
    """A diffusers `AutoencoderTiny`, such as TAESD: deterministic."""

    kind, stochastic, levels = "AutoencoderTiny", False, "encoder_block_out_channels"

    def _moments(self, pixels: Tensor) -> Tensor:
        return self.network.encode(pixels).latents  # (B, C, h, w)
