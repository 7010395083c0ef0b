"""The frozen encoder of a representation autoencoder: a timm network's patch tokens or feature map.

Shapes: B images of H W pixels, N = h·w tokens, C features.
Source: Zheng et al., arXiv 2510.11690, as its published decoders were trained.
"""

import fnmatch
import functools
import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddt.autoencoder.base import weights_hash
from ddt.errors import UserError, reason, require
from ddt.timm_networks import check_model, extractor, find_stage, is_vit, read_timm_weights

STRIDE = 16  # pixels of a convolutional network's input per position of its map
# in files, beside the network: the final norm's weights, which are not used, and other parts of
# whole models
UNUSED = ("norm", "fc_norm", "mask_token", "head", "attn_pool", "decoder", "text_model", "logit_scale", "logit_bias")


class Family(NamedTuple):
    """How published networks differ from timm's of the same name.

    settings: arguments of timm's constructor. antialias: of the bicubic resampling of positions.
    """

    settings: dict[str, Any]
    antialias: bool


FAMILIES = {  # by name
    "*.mae*": Family({"norm_layer": functools.partial(nn.LayerNorm, eps=1e-12)}, antialias=False),
    "*siglip*": Family({"act_layer": "gelu_tanh"}, antialias=False),
    "*": Family({}, antialias=True),  # DINOv2 among them
}


def family_of(name: str) -> Family:
    """Return the family of a timm model."""
    return next(family for pattern, family in FAMILIES.items() if fnmatch.fnmatch(name, pattern))


def resample_positions(table: Tensor, prefix: int, grid: int, antialias: bool) -> Tensor:
    """Resample positions (1, prefix + s², C) to (1, prefix + grid², C), bicubic, in float32; the
    rows of prefix tokens stay. Raises UserError for a table that is no square.
    """
    side = math.isqrt(max(table.shape[1] - prefix, 0))
    require(table.ndim == 3 and prefix + side**2 == table.shape[1], f"pos_embed is {tuple(table.shape)}, no square")
    if side == grid:
        return table
    square = table[:, prefix:].float().transpose(1, 2).unflatten(2, (side, side))  # (1, C, s, s)
    square = F.interpolate(square, size=(grid, grid), mode="bicubic", antialias=antialias)
    return torch.cat([table[:, :prefix], square.flatten(2).transpose(1, 2)], dim=1)


class FrozenEncoder(nn.Module):
    """The feature map of a timm network after a LayerNorm without weights: a vision transformer's
    patch tokens, or a convolutional network's last map of stride 16.

    Pixels of any size are resized (bicubic, not antialiased, not clamped) so that they make
    `grid`×`grid` tokens, then normalised by the network's mean and standard deviation. Class and
    register tokens are dropped.

    Args:
        name: of the timm model.
        grid: tokens per side.
        file: its weights, with the names of timm, Meta or transformers; None: on the meta device,
            to count its cost.
        changes: of timm's constructor, for a network smaller than the named one.

    Raises UserError for an unknown name, a network without such a map, or weights that are not
    exactly the network's (those of the final norm, and of heads, are left out).
    """

    mean: Tensor
    std: Tensor

    def __init__(self, name: str, grid: int, file: Path | None, **changes: Any) -> None:
        import timm

        super().__init__()
        label = f"autoencoder.encoder={name}"
        check_model("autoencoder.encoder", name)
        self.name, self.grid = name, grid
        family, settings = family_of(name), {**changes, "num_classes": 0}
        with torch.device("meta"):
            network: Any = timm.create_model(name, **settings)
            stage = find_stage(network, STRIDE, label)
            self.side = grid * network.feature_info[stage]["reduction"]  # pixels per side that the network sees
            if is_vit(network):
                plain = isinstance(network, timm.models.VisionTransformer)
                require(plain, f"{label}: is no plain vision transformer of timm; choose another")
                settings = {**settings, **family.settings, "global_pool": "", "img_size": self.side}
                network = timm.create_model(name, **settings)
        names = set(network.state_dict())
        self.extract = extractor(network, stage)
        self.num_features = network.feature_info[stage]["num_chs"]
        self.norm = nn.LayerNorm(self.num_features, eps=1e-6, elementwise_affine=False)
        if is_vit(network):
            self.norm.eps = network.norm.eps
            network.norm = nn.Identity()
        self.stored: dict[str, Tensor] = {}  # weights as stored, where they are not as used
        if file is not None:
            self.stored = load(network, file, names - set(network.state_dict()), family.antialias)
        self.network = network.eval().requires_grad_(False)
        for key in ("mean", "std"):
            values = torch.tensor(network.pretrained_cfg[key])[:, None, None]  # (3, 1, 1)
            self.register_buffer(key, values, persistent=False)

    def weights(self) -> dict[str, Tensor]:
        """Return the weights as stored, before positions are resampled to the grid."""
        return {**self.network.state_dict(), **self.stored}

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the weights as stored, mean and standard deviation, and grid."""
        grid = torch.tensor(self.grid)
        return weights_hash(self.network, **self.stored, mean=self.mean, std=self.std, grid=grid)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return tokens (B, C, h, w), row by row, of RGB pixels (B, 3, H, W) in [0, 1]."""
        tokens = self.norm(self.extract(self.prepare(pixels)))  # (B, N, C)
        return tokens.transpose(1, 2).unflatten(2, (self.grid, self.grid))

    def with_class_token(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the tokens as `forward` does, and the class token (B, C) after the same norm."""
        every = self.norm(self.network.forward_features(self.prepare(pixels)))  # (B, class + registers + N, C)
        tokens = every[:, self.network.num_prefix_tokens :].transpose(1, 2)
        return tokens.unflatten(2, (self.grid, self.grid)), every[:, 0]

    @property
    def has_class_token(self) -> bool:
        """Whether the network has a class token."""
        return getattr(self.network, "cls_token", None) is not None

    def prepare(self, pixels: Tensor) -> Tensor:
        """Return the network's input (B, 3, side, side) of pixels (B, 3, H, W) in [0, 1]."""
        size = (self.side, self.side)
        if pixels.shape[-2:] != size:
            pixels = F.interpolate(pixels, size=size, mode="bicubic", align_corners=False, antialias=False)
        return (pixels - self.mean) / self.std


def load(network: Any, file: Path, removed: set[str], antialias: bool) -> dict[str, Tensor]:
    """Load a file into an encoder on the meta device, without the weights that were `removed` from
    it; return those that are stored otherwise than the network has them, its positions.
    """
    label, advice = f"autoencoder.encoder_weights={file}", "give the file of this encoder"
    kind = network.pretrained_cfg["architecture"]
    classifier = network.pretrained_cfg.get("classifier") or "head"
    unused = UNUSED if is_vit(network) else (classifier,)
    state = {
        name: value.float() if value.is_floating_point() else value
        for name, value in read_timm_weights(file, label, advice).items()
        if name not in removed and name.split(".")[0] not in unused
    }
    stored = {}
    try:
        if is_vit(network):
            stored["pos_embed"] = state["pos_embed"]
            prefix = 0 if network.no_embed_class else network.num_prefix_tokens
            grid = network.patch_embed.grid_size[0]
            state["pos_embed"] = resample_positions(stored["pos_embed"], prefix, grid, antialias)
        network.load_state_dict(state, assign=True)
    except KeyError as error:
        raise UserError(f"{label}: is not a file of {kind} (has no {error}); {advice}") from error
    except (RuntimeError, UserError) as error:
        raise UserError(f"{label}: is not a file of {kind} ({reason(error)}); {advice}") from error
    return stored
