"""The frozen encoder of a representation autoencoder: patch tokens of a vision transformer of timm.

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
from ddt.timm_weights import check_model, read_timm_weights

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
    """Patch tokens of a timm network after a final LayerNorm without weights, as a map.

    Pixels of any size are resized (bicubic, not antialiased, not clamped) so that they make
    `grid`×`grid` tokens, then normalised by the network's mean and standard deviation. Class and
    register tokens are dropped.

    Args:
        name: of the timm model.
        grid: tokens per side.
        file: its weights, with the names of timm, Meta or transformers; None: on the meta device,
            to count its cost.
        changes: of timm's constructor, for a network smaller than the named one.

    Raises UserError for an unknown name, a network without patch tokens, or weights that are not
    exactly the network's (those of the final norm, and of heads, are left out).
    """

    mean: Tensor
    std: Tensor

    def __init__(self, name: str, grid: int, file: Path | None, **changes: Any) -> None:
        import timm

        super().__init__()
        check_model("autoencoder.encoder", name)
        self.name, self.grid = name, grid
        family = family_of(name)
        with torch.device("meta"):
            outline = timm.create_model(name, **changes)
            require(
                isinstance(outline, timm.models.VisionTransformer),
                f"autoencoder.encoder={name}: is no plain vision transformer of timm, which has patch tokens; choose "
                "another",
            )
            stride = outline.patch_embed.patch_size[0]
            self.side = grid * stride  # pixels per side that the network sees
            settings = {**family.settings, **changes, "num_classes": 0, "global_pool": "", "img_size": self.side}
            network: Any = timm.create_model(name, **settings)
        network.norm = nn.LayerNorm(network.num_features, eps=network.norm.eps, elementwise_affine=False)
        self.prefix, self.num_features = network.num_prefix_tokens, network.num_features
        self.positions: Tensor = network.pos_embed.detach()  # as stored, before they are resampled to the grid
        if file is not None:
            self.positions = load(network, file, family.antialias)
        self.network = network.eval().requires_grad_(False)
        for key in ("mean", "std"):
            values = torch.tensor(network.pretrained_cfg[key])[:, None, None]  # (3, 1, 1)
            self.register_buffer(key, values, persistent=False)

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the weights as stored, mean and standard deviation, and grid."""
        grid = torch.tensor(self.grid)
        return weights_hash(self.network, pos_embed=self.positions, mean=self.mean, std=self.std, grid=grid)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return tokens (B, C, h, w), row by row, of RGB pixels (B, 3, H, W) in [0, 1]."""
        tokens = self.network.forward_features(self.prepare(pixels))[:, self.prefix :]  # (B, N, C)
        return tokens.transpose(1, 2).unflatten(2, (self.grid, self.grid))

    def prepare(self, pixels: Tensor) -> Tensor:
        """Return the network's input (B, 3, side, side) of pixels (B, 3, H, W) in [0, 1]."""
        size = (self.side, self.side)
        if pixels.shape[-2:] != size:
            pixels = F.interpolate(pixels, size=size, mode="bicubic", align_corners=False, antialias=False)
        return (pixels - self.mean) / self.std


def load(network: Any, file: Path, antialias: bool) -> Tensor:
    """Load a file into an encoder on the meta device; return the file's table of positions."""
    label, advice = f"autoencoder.encoder_weights={file}", "give the file of this encoder"
    stored = read_timm_weights(file, label, advice)
    state = {name: value.float() for name, value in stored.items() if name.split(".")[0] not in UNUSED}
    kind = network.pretrained_cfg["architecture"]
    try:
        positions = state["pos_embed"]
        prefix = 0 if network.no_embed_class else network.num_prefix_tokens
        state["pos_embed"] = resample_positions(positions, prefix, network.patch_embed.grid_size[0], antialias)
        network.load_state_dict(state, assign=True)
    except KeyError as error:
        raise UserError(f"{label}: is not a file of {kind} (has no {error}); {advice}") from error
    except (RuntimeError, UserError) as error:
        raise UserError(f"{label}: is not a file of {kind} ({reason(error)}); {advice}") from error
    return positions
