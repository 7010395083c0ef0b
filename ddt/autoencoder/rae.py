"""Representation autoencoders: a frozen vision encoder's tokens as latents, and a ViT that decodes
them.

Shapes: B batch, C features, H W pixels, h w tokens.
Source: Zheng et al., arXiv 2510.11690, as its published weights were trained.
"""

import functools
import hashlib
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ddt.autoencoder.base import UnknownShape, weights_hash
from ddt.autoencoder.rae_encoder import FrozenEncoder
from ddt.autoencoder.token_decoder import VARIANCE_EPS, TokenDecoder, decode_tokens
from ddt.autoencoder.vit_decoder import ViTDecoder, decoder_sizes, load_decoder
from ddt.errors import UserError, reason, require, require_count
from ddt.flow import dimension_timeshift
from ddt.hub import fetch, is_hub_id, local_path, pinned
from ddt.model.class_token import join_token, split_token, token_rows
from ddt.precision import Dtype, autocast, check_dtype
from ddt.tensor_files import read_state_dict
from ddt.timm_networks import pretrained_file

WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # of an encoder on the hub, in transformers' layout
ENCODER_ADVICE = "on a machine without a hub give autoencoder.encoder_weights=FILE"
PUBLISHED = "nyu-visionx/RAE-collections"
# sizes of its decoders, by a part of their file's name
PUBLISHED_SIZES = {
    "ViTXL": {"width": 1152, "depth": 28, "mlp_width": 4096},
    "ViTL": {"width": 1024, "depth": 24, "mlp_width": 4096},
    "ViTB": {"width": 768, "depth": 12, "mlp_width": 3072},
}


EXECUTION = ("chunk_size", "encode_dtype", "decode_dtype")  # settings of how it runs, not of what it is
BUNDLE = {  # setting → its file in a folder that `save` writes
    "encoder_weights": "encoder.safetensors",
    "decoder": "decoder.safetensors",
    "statistics": "statistics.safetensors",
}


def local_file(name: str, source: str | None, revision: str | None, key: str) -> Path | None:
    """Return the path of a file in `source`, where that is a folder with it, or here; None where
    the hub's model `source` is left. Raises UserError naming `autoencoder.<key>` where it is
    nowhere.
    """
    local = [Path(source or ".") / name, Path(name)]
    if found := [path for path in local if path.is_file()]:
        return found[0]
    label, advice = f"autoencoder.{key}={name}", "give a local file"
    require(source is not None and not name.startswith(("/", ".")), f"{label}: no such file; {advice}")
    assert source is not None
    folder = local_path(pinned(source, revision), f"autoencoder.source={source}", f"{advice}: autoencoder.{key}=FILE")
    require(folder is None, f"{label}: no such file here, nor in autoencoder.source={source}; {advice}")
    return None


def find_file(name: str, source: str | None, revision: str | None, key: str) -> Path:
    """Return the path of a file as `local_file`, or of the hub's model `source`; UserError where
    it is nowhere.
    """
    local = local_file(name, source, revision, key)
    if local is not None:
        return local
    assert source is not None
    label, advice = f"autoencoder.source={source}", "give a local file"

    def choose(names: list[str]) -> list[str]:
        require(name in names, f"autoencoder.{key}={name}: {label} holds no such file; {advice}")
        return [name]

    return fetch(pinned(source, revision), label, choose, f"{advice}: autoencoder.{key}=FILE") / name


def local_encoder(weights: str | None, source: str | None) -> Path | None:
    """Return the local file of an encoder's weights, in a local folder `source` or here; None where
    it is the hub's, or (`weights` is None) timm's own. Raises UserError where there is none.
    """
    if weights is None:
        return None
    if source is not None and (Path(source) / weights).is_file():
        return Path(source) / weights
    path = local_path(weights, f"autoencoder.encoder_weights={weights}", ENCODER_ADVICE)
    if path is None or path.is_file():
        return path
    return path / choose_weights(weights, [each.name for each in path.iterdir()])[0]


def choose_weights(weights: str, names: list[str]) -> list[str]:
    """Return the file of `names` with an encoder's weights; UserError where there is none."""
    known = [each for each in WEIGHTS if each in names]
    require(bool(known), f"autoencoder.encoder_weights={weights}: holds no {WEIGHTS[0]}; give the file itself")
    return known[:1]


def find_encoder(name: str, weights: str | None, source: str | None) -> Path:
    """Return the file of an encoder's weights as `local_encoder`, downloaded where it is of the
    hub. Raises UserError where there is none.
    """
    local = local_encoder(weights, source)
    if local is not None:
        return local
    if weights is None:
        label = f"autoencoder.encoder={name}"
        found = pretrained_file(name, label, ENCODER_ADVICE)
        require(found is not None, f"{label}: timm has no weights of it on the hub; give autoencoder.encoder_weights")
        assert found is not None
        return found
    choose = functools.partial(choose_weights, weights)
    folder = fetch(weights, f"autoencoder.encoder_weights={weights}", choose, ENCODER_ADVICE)
    return folder / choose([each.name for each in folder.iterdir()])[0]


def read_statistics(path: Path) -> dict[str, Tensor]:
    """Return `mean` and `var`, float32 (C, H, W), of a file of statistics; either may be absent.

    Raises UserError for a file with anything else in it.
    """
    label = f"autoencoder.statistics={path}"
    advice = "give a file of mean and var, such as scripts/latent_statistics.py writes"
    found = {name: value.float() for name, value in read_state_dict(path, label, advice).items()}
    surplus = [name for name in found if name not in ("mean", "var")]
    require(not surplus, f"{label}: holds {surplus[0] if surplus else ''}; {advice}")
    for name, value in found.items():
        require(value.ndim == 3, f"{label}: {name} is {tuple(value.shape)}, not (C, H, W); {advice}")
        require(bool(value.isfinite().all()), f"{label}: {name} is not finite; {advice}")
    require(len({value.shape for value in found.values()}) == 1, f"{label}: mean and var differ in shape; {advice}")
    require("var" not in found or bool((found["var"] >= 0).all()), f"{label}: var is below 0; {advice}")
    return found


def by(shape: tuple[int, ...]) -> str:
    """Return a shape as text, such as 768×16×16."""
    return "×".join(map(str, shape))


def grid_of(statistics: dict[str, Tensor]) -> int | None:
    """Return the tokens per side of statistics, None of none."""
    return next((value.shape[1] for value in statistics.values()), None)


def read_decoder(path: Path, num_heads: int, grid: int | None) -> ViTDecoder:
    """Return the decoder of a file (`load_decoder`); UserError names it."""
    label = f"autoencoder.decoder={path}"
    try:
        return load_decoder(read_state_dict(path, label), num_heads, grid)
    except (UserError, RuntimeError) as error:  # RuntimeError: of names and shapes
        raise UserError(f"{label}: {reason(error).removeprefix(f'{label}: ')}") from error


class RAENetwork(nn.Module):
    """Encoder and decoder, from pixels to raw tokens and back, both in [0, 1]."""

    def __init__(self, encoder: FrozenEncoder, decoder: ViTDecoder) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder, decoder
        self.config = SimpleNamespace(in_channels=3)  # of the images

    def encode(self, pixels: Tensor) -> Tensor:
        """Return tokens (B, C, h, w) of pixels (B, 3, H, W)."""
        return self.encoder(pixels)

    def decode(self, tokens: Tensor) -> Tensor:
        """Return pixels (B, 3, H, W), not clamped, of tokens (B, C, h, w)."""
        return decode_tokens(self.decoder, tokens, self.encoder.mean, self.encoder.std)


class RepresentationAutoencoder(TokenDecoder):
    """A representation autoencoder of its parts.

    Latents are `(tokens − mean)/sqrt(var + 1e-5)`, one number per channel and position. The size of
    images follows from the decoder: it makes patches of `p` pixels of a fixed grid of tokens, which
    is the latents' too.

    Args:
        statistics: `mean` and `var`, (C, h, w), either or none. Others: see `RAE`.

    Raises UserError where the parts do not fit one another.
    """

    pixel_space = False
    stochastic = False
    sampling_dtype: Dtype | None = "fp32"  # in bf16 the published FID is 0.1 worse
    latents_by: tuple[str, ...] = ("encoder", "encoder_weights", "statistics", "source", "revision", "class_token")
    parts: tuple[tuple[str, str], ...] = (
        ("decoder_embed.weight", "the decoder of an RAE (autoencoder.decoder)"),
        ("decoder.decoder_embed.weight", "the decoder of an RAE (autoencoder.decoder)"),
        ("mean", "statistics of latents (autoencoder.statistics)"),
        ("var", "statistics of latents (autoencoder.statistics)"),
    )
    packages = ("timm",)

    def __init__(
        self,
        encoder: FrozenEncoder,
        decoder: ViTDecoder,
        statistics: dict[str, Tensor] | None = None,
        class_token: bool = False,
        chunk_size: int = 16,
        encode_dtype: Dtype = "fp32",
        decode_dtype: Dtype = "fp32",
    ) -> None:
        require_count("autoencoder.chunk_size", chunk_size)
        channels, found = encoder.num_features, statistics or {}
        require(
            decoder.channels == channels,
            f"autoencoder.decoder: is for tokens of {decoder.channels} features, but {encoder.name} has {channels}; "
            "choose the one of this encoder",
        )
        require(
            not class_token or encoder.has_class_token,
            f"autoencoder.class_token=true: {encoder.name} has no class token; give false",
        )
        self.encode_dtype = encode_dtype
        shape = next((tuple(value.shape) for value in found.values()), None)
        one = shape or (1, 1, 1)  # one number for all
        mean, var = found.get("mean", torch.zeros(one)), found.get("var", torch.ones(one))
        super().__init__(
            RAENetwork(encoder, decoder), mean, var, channels if class_token else 0, chunk_size, decode_dtype
        )
        require(
            shape in (None, self._shape),
            f"autoencoder.statistics: is of latents {by(shape or ())}, not of this autoencoder's {by(self._shape)}; "
            "choose the one of its encoder and size",
        )

    @classmethod
    def outline(cls, settings: dict[str, Any]) -> "RepresentationAutoencoder":
        """See `Autoencoder`: the shapes of local files and of the published decoders are known."""
        decoder, heads = settings["decoder"], settings.get("decoder_heads", 16)
        source, revision = settings.get("source"), settings.get("revision")
        local = {
            key: None if settings.get(key) is None else local_file(settings[key], source, revision, key)
            for key in ("decoder", "statistics")
        }
        weights = local_encoder(settings.get("encoder_weights"), source)
        found = {} if local["statistics"] is None else read_statistics(local["statistics"])
        published = next((size for name, size in PUBLISHED_SIZES.items() if f"/{name}_" in decoder), None)
        if local["decoder"] is not None:
            stored = read_decoder(local["decoder"], heads, grid_of(found))
            encoder = FrozenEncoder(settings["encoder"], stored.grid, weights)
        elif published is not None and source == PUBLISHED:
            grid = int(match[1]) // 16 if (match := re.search(r"_i(\d+)/", decoder)) else 16
            encoder = FrozenEncoder(settings["encoder"], grid, weights)
            with torch.device("meta"):
                stored = ViTDecoder(encoder.num_features, **published, num_heads=heads, grid=grid, patch_size=16)
        else:
            raise UnknownShape(f"autoencoder.decoder={decoder}: its shape is not known here; give a local file")
        others = {key: settings[key] for key in ("class_token", *EXECUTION) if key in settings}
        return RepresentationAutoencoder(encoder.to("meta"), stored.to("meta"), found, **others)

    @classmethod
    def on_hub(cls, settings: dict[str, Any]) -> bool:
        """Return whether the hub holds encoder, decoder and statistics."""
        names = [settings["decoder"], settings.get("statistics")]
        encoder, source = settings.get("encoder_weights"), settings.get("source")
        local = [name for name in names if name is not None and Path(name).is_file()]
        return not local and source is not None and is_hub_id(source) and (encoder is None or is_hub_id(encoder))

    @classmethod
    def moved(cls, settings: dict[str, Any], source: str) -> dict[str, Any]:
        """Return settings of another source, with the files of `save`, or those of the last names,
        where it has them.
        """
        result = {**settings, "source": source, "revision": None}
        for key, saved in BUNDLE.items():
            own = settings.get(key)
            names = [saved, *([] if own is None else [Path(own).name])]
            there = [name for name in names if (Path(source) / name).is_file()]
            if there and (own is not None or key == "encoder_weights"):  # no statistics stay none
                result[key] = there[0]
        return result

    def save(self, folder: Path) -> None:
        """Write encoder, decoder and statistics."""
        folder.mkdir(parents=True, exist_ok=True)
        weights = {
            "encoder_weights": self.network.encoder.weights(),
            "decoder": self.network.decoder.state_dict(),
            "statistics": {"mean": self.mean, "var": self.var} if self.mean.numel() > 1 else {},
        }
        for key, tensors in weights.items():
            if tensors:
                save_file({name: value.contiguous() for name, value in tensors.items()}, folder / BUNDLE[key])

    def diffusers_network(self) -> Any:
        """Return decoder and statistics as a diffusers model; the decoder is not copied."""
        from ddt.autoencoder.rae_component import DDTRAEDecoder  # diffusers takes a while to import

        encoder, decoder = self.network.encoder, self.network.decoder
        sizes = decoder_sizes(decoder.state_dict(), decoder.grid)
        with torch.device("meta"):
            made: Any = DDTRAEDecoder(
                **sizes, num_heads=decoder.num_heads, class_token=self.class_token, decode_dtype=self.decode_dtype
            )
        made.decoder = decoder
        made.latents_mean, made.latents_var = (each.expand(self._shape).clone() for each in (self.mean, self.var))
        made.pixels_mean, made.pixels_std = encoder.mean, encoder.std
        return made.eval()

    @property
    def _shape(self) -> tuple[int, int, int]:
        """(C, h, w) of the latents, without a class token."""
        grid = self.network.decoder.grid
        return self.latent_channels, grid, grid

    @property
    def timeshift(self) -> float:
        """The time shift for latents of this size, whether or not they carry a class token."""
        return dimension_timeshift(self._shape)

    def latent_shape(self, channels: int, image_size: int) -> tuple[int, int, int]:
        """Return (C, h, w), with a class token (C, h + 1, w); raise UserError for other images than
        the decoder makes.
        """
        size = self.network.decoder.image_size
        require(
            (channels, image_size) == (3, size),
            f"data: images of {channels} channels and {image_size} px do not fit this autoencoder, whose decoder makes "
            f"3 channels and {size} px; give data.image_size={size}, or the decoder of that size",
        )
        channels, height, width = self._shape
        return channels, height + token_rows(self.class_token, channels, width), width

    def image_size(self, latent_shape: tuple[int, int, int]) -> int:
        """Return the decoder's pixels per side; UserError for other latents than its."""
        size = self.network.decoder.image_size
        own = self.latent_shape(3, size)
        require(latent_shape == own, f"autoencoder: has latents of {by(own)}, the model of {by(latent_shape)}")
        return size

    @functools.cached_property
    def encoder_fingerprint(self) -> str:
        """SHA-256 of the encoder: neither decoder nor statistics change what is cached."""
        own = self.network.encoder.fingerprint
        return hashlib.sha256(f"{own} class token".encode()).hexdigest() if self.class_token else own

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of encoder, decoder and statistics."""
        rest = weights_hash(self.network.decoder, latents_mean=self.mean, latents_var=self.var)
        return hashlib.sha256(f"{self.encoder_fingerprint} {rest}".encode()).hexdigest()

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Return moments, the raw tokens, float32 (B, C, h, w), of uint8 images (B, 3, H, W)."""
        with autocast(images.device, self.encode_dtype):
            return torch.cat([self._tokens(c.float() / 255).float() for c in images.split(self.chunk_size)])

    def _tokens(self, pixels: Tensor) -> Tensor:
        """Return the moments of pixels (B, 3, H, W) in [0, 1]."""
        if not self.class_token:
            return self.network.encode(pixels)
        return join_token(*self.network.encoder.with_class_token(pixels))

    def sample(self, moments: Tensor, posterior_noise: Tensor | None = None) -> Tensor:
        """Return float32 latents (B, C, h, w) of moments (B, C, h, w); the noise is unused."""
        tokens, class_token = split_token(moments.float(), self.class_token)
        latents = (tokens - self.mean) / torch.sqrt(self.var + VARIANCE_EPS)
        return join_token(latents, class_token) if self.class_token else latents

    def to(self, device: torch.device) -> Self:
        """Move to a device and return itself; raise UserError where it lacks a dtype."""
        check_dtype("autoencoder.encode_dtype", self.encode_dtype, device)
        return super().to(device)


class RAE(RepresentationAutoencoder):
    """A representation autoencoder of files.

    Args:
        encoder: name of a timm model, a vision transformer or a convolutional network.
        encoder_weights: its file, or hub name (owner/name or owner/name@revision), with the names
            of timm, Meta or transformers; None: timm's own.
        decoder: the decoder's file, in `source` or here.
        decoder_heads: its attention heads, which no shape tells.
        statistics: file of `mean` and `var`, in `source` or here; None: latents are the tokens.
        source: hub name or local folder with these files; None: they are here.
        revision: commit of `source` on the hub, pinned so that the weights cannot change.
        chunk_size: images encoded or decoded at once, which bounds the memory.
        class_token: latents carry the encoder's class token, as REG denoises it
            (`ddt.model.class_token`): after the final norm without weights, not scaled further.
        encode_dtype, decode_dtype: "fp32", or "bf16" or "fp16" autocast. Decoding does not follow
            the caller's autocast: the authors measured a worse FID in bf16.

    Raises UserError where weights cannot be loaded or do not fit one another.
    """

    def __init__(
        self,
        encoder: str,
        decoder: str,
        encoder_weights: str | None = None,
        decoder_heads: int = 16,
        statistics: str | None = None,
        source: str | None = None,
        revision: str | None = None,
        chunk_size: int = 16,
        encode_dtype: Dtype = "fp32",
        decode_dtype: Dtype = "fp32",
        class_token: bool = False,
    ) -> None:
        file = find_file(decoder, source, revision, "decoder")
        found = {} if statistics is None else read_statistics(find_file(statistics, source, revision, "statistics"))
        network = read_decoder(file, decoder_heads, grid_of(found))
        frozen = FrozenEncoder(encoder, network.grid, find_encoder(encoder, encoder_weights, source))
        super().__init__(frozen, network, found, class_token, chunk_size, encode_dtype, decode_dtype)
