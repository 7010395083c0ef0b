"""Differentiable augmentation of what a discriminator sees, a function of uniform numbers.

Shapes: B images of C channels and H W pixels. Source: Zhao et al., arXiv 2006.10738; ranges as RAE
has them.
"""

import torch
from torch import Tensor

NUM_UNIFORM = 5  # per image
MAX_SHIFT = 1 / 8  # of a side


def shifted(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Return images (B, C, H, W) whose pixel (i, j) is (i + rows, j + columns) of the given ones, 0
    where that lies outside. rows, columns: int64 (B,).
    """
    size, device = images.shape, images.device
    i = torch.arange(size[2], device=device) + rows[:, None]  # (B, H)
    j = torch.arange(size[3], device=device) + columns[:, None]  # (B, W)
    inside = ((i >= 0) & (i < size[2]))[:, :, None] & ((j >= 0) & (j < size[3]))[:, None, :]  # (B, H, W)
    image = torch.arange(size[0], device=device)[:, None, None]
    moved = images.movedim(1, -1)[image, i.clamp(0, size[2] - 1)[:, :, None], j.clamp(0, size[3] - 1)[:, None, :]]
    return (moved * inside[..., None]).movedim(-1, 1)


def augment(images: Tensor, uniform: Tensor) -> Tensor:
    """Return images (B, C, H, W) moved by up to an eighth of their sides, then brighter by ±½, of
    0 to 2 times their saturation and ½ to 1½ times their contrast.

    uniform: (5, B) in [0, 1), for rows, columns, brightness, saturation and contrast.
    """
    offsets = [round(MAX_SHIFT * side) for side in images.shape[2:]]
    rows, columns = ((u * (2 * most + 1)).floor().long() - most for u, most in zip(uniform, offsets, strict=False))
    brightness, saturation, contrast = uniform[2:NUM_UNIFORM, :, None, None, None]  # (B, 1, 1, 1)
    images = shifted(images, rows, columns) + (brightness - 0.5)
    grey = images.mean(1, keepdim=True)
    images = (images - grey) * (2 * saturation) + grey
    mean = images.mean((1, 2, 3), keepdim=True)
    return (images - mean) * (contrast + 0.5) + mean
