"""Latents that carry a class token: a vector of F features that is denoised beside the image (REG).

Such latents are (B, C, H + r, W): the image's H rows, then r = ⌈F/(C·W)⌉ rows that hold the token,
filled up with zeros. So noise, path, solvers, sharing and caches treat both alike.
Source: arXiv 2507.01467; docs/method.md, "Class token".
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def token_rows(num_features: int, channels: int, width: int) -> int:
    """Return r, the rows of latents (C, ·, W) that hold a token of num_features; 0 without one."""
    return math.ceil(num_features / (channels * width))


def join_token(image: Tensor, token: Tensor) -> Tensor:
    """Return latents (B, C, H + r, W) of an image's (B, C, H, W) and a token (B, F)."""
    _, channels, _, width = image.shape
    rows = token_rows(token.shape[1], channels, width)
    filled = F.pad(token, (0, channels * rows * width - token.shape[1]))
    return torch.cat([image, filled.unflatten(1, (channels, rows, width)).type_as(image)], dim=2)


def split_token(latents: Tensor, num_features: int) -> tuple[Tensor, Tensor]:
    """Return the image's latents (B, C, H, W) and the token (B, F): the inverse of `join_token`."""
    height = latents.shape[2] - token_rows(num_features, latents.shape[1], latents.shape[3])
    return latents[:, :, :height], latents[:, :, height:].flatten(1)[:, :num_features]
