"""A second loss on a hidden layer: alignment to a frozen feature extractor (REPA), or dispersion of
the batch. Source: method.md 1.

Shapes: B images; N tokens of width D in the denoiser; h·w tokens of F features in the target; P
width of the projector.

Settings (`REPA`, `Dispersive`; `IREPA` of irepa.py) are what a config file names; they load
nothing. Their `build` makes an `Alignment`: the trained `AlignmentLoss` and the frozen `Target`,
separate so that the target never enters a state dict, DDP or an EMA. To add one: settings and loss
in a file here, and a file in conf/alignment.
"""

import abc
import contextlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddt.errors import UserError, require, require_count
from ddt.files import sha256
from ddt.model.layers import MAX_SIZE
from ddt.objective.alignment_target import Target, check_target


class Projector(nn.Sequential):
    """Linear(D, P), SiLU, Linear(P, P), SiLU, Linear(P, F). Source: method.md 1."""

    def __init__(self, hidden_size: int, width: int, num_features: int) -> None:
        super().__init__(
            nn.Linear(hidden_size, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, num_features)
        )


def to_grid(features: Tensor, grid: tuple[int, int], token_grid: tuple[int, int]) -> Tensor:
    """Resize features (B, h·w, F) on `grid` bilinearly to (B, N, F) on `token_grid`, where they
    differ. Source: method.md 1.
    """
    if grid == token_grid:
        return features
    maps = features.transpose(1, 2).unflatten(2, grid)  # (B, F, h, w)
    maps = F.interpolate(maps, size=token_grid, mode="bilinear", align_corners=False)
    return maps.flatten(2).transpose(1, 2)  # (B, N, F)


class AlignmentLoss(nn.Module):
    """The trained side of REPA: `mean over tokens of 1 − cos(projector(h), target)`.

    Args:
        projector: from D to F.
        align_depth: encoder block (1-based) whose output is h.
        weight: beside the flow-matching loss, applied by the objective.
        grid: (h, w) of the features.
        token_grid: of the denoiser's tokens, to which the features are resized.
    """

    name = "repa_loss"

    def __init__(
        self, projector: nn.Module, align_depth: int, weight: float, grid: tuple[int, int], token_grid: tuple[int, int]
    ) -> None:
        super().__init__()
        self.projector = projector
        self.align_depth, self.weight = align_depth, weight
        self.grid, self.token_grid = grid, token_grid

    @property
    def features_shape(self) -> tuple[int, int]:
        """(h·w, F) of the features that it compares with."""
        return math.prod(self.grid), list(self.projector.parameters())[-1].numel()

    def prepare(self, features: Tensor) -> Tensor:
        """Return what of the target's features (B, h·w, F) is aligned to: all, as released."""
        return features

    def forward(self, hidden: Tensor, features: Tensor) -> Tensor:
        """Return the unweighted loss in 0..2 of hidden (B, N, D) and features (B, h·w, F)."""
        projected = self.projector(hidden)  # (B, N, F)
        with torch.autocast(hidden.device.type, enabled=False):  # squares of half-precision values overflow
            features = to_grid(self.prepare(features.float()), self.grid, self.token_grid)  # (B, N, F)
            return (1 - F.cosine_similarity(projected.float(), features, dim=-1)).mean()

    def readings(self, loss: float) -> dict[str, float]:
        """Return what a mean loss says beside itself, for the log."""
        return {"alignment_cosine": 1 - loss}


class DispersiveLoss(nn.Module):
    """`log mean over pairs i < j of exp(−‖h_i − h_j‖² / temperature)`, h of unit length, over the
    micro-batch of this process.

    Args: align_depth, encoder block (1-based) whose output is h; weight, beside the flow-matching
    loss, applied by the objective; temperature, of the pairs.

    Source: "Diffuse and Disperse", arXiv 2506.09027. Its PyTorch code divides ‖h_i − h_j‖² by the
    number of values of h instead of normalising h, and counts the pairs i = j.
    """

    name = "dispersive_loss"
    features_shape = None  # it compares with none

    def __init__(self, align_depth: int, weight: float, temperature: float) -> None:
        super().__init__()
        self.align_depth, self.weight, self.temperature = align_depth, weight, temperature

    def forward(self, hidden: Tensor, features: Tensor | None = None) -> Tensor:
        """Return the unweighted loss, at most 0, of hidden (B, N, D); features are unused.

        Raises UserError for a batch of one image, which has no pair.
        """
        if len(hidden) < 2:
            raise UserError(
                f"trainer.micro_batch_size={len(hidden)}: alignment=dispersive compares images; choose at least 2"
            )
        with torch.autocast(hidden.device.type, enabled=False):
            h = F.normalize(hidden.float().flatten(1), dim=1)  # (B, N·D)
            i, j = torch.triu_indices(len(h), len(h), offset=1, device=h.device)
            # ‖h_i − h_j‖² = 2 − 2 h_i·h_j avoids the (B, B, N·D) differences
            exponents = (2 * (h @ h.T)[i, j] - 2) / self.temperature  # (B(B−1)/2,)
            return exponents.logsumexp(0) - math.log(len(exponents))

    def readings(self, loss: float) -> dict[str, float]:
        """Return what a mean loss says beside itself, for the log: nothing."""
        return {}


@dataclass(frozen=True)
class CachedFeatures:
    """Features of a target that a data set holds, read in place of running the target.

    target: name of the timm model. weights_sha256: of its weight file, None for timm's own.
    fingerprint: of the weights in use. num_features: F. grid: (h, w). root: the cache's folder.
    """

    target: str
    weights_sha256: str | None
    fingerprint: str
    num_features: int
    grid: tuple[int, int]
    root: str


@dataclass(frozen=True)
class Alignment:
    """The alignment of a training; without arguments there is none.

    loss: the trained side, which the objective calls. end_step: the first step without it, counted
    from 0 (math.inf: never). needs_features: whether the loss compares with features of the images.
    target: the frozen network that computes them, None where they are cached or not needed.
    fingerprint: SHA-256 of the target's weights.
    """

    loss: AlignmentLoss | DispersiveLoss | None = None
    end_step: float = 0
    needs_features: bool = False
    target: Target | None = None
    fingerprint: str | None = None


class AlignmentSettings:
    """The settings that all alignments share; values out of range raise UserError.

    align_depth: encoder block (1-based) whose output h is used. weight: of the loss beside flow
    matching. until_step: the first step without the loss, counted from 0; None never ends it.
    """

    align_depth: int
    weight: float
    until_step: int | None

    packages: ClassVar[tuple[str, ...]] = ()  # that it needs

    def __post_init__(self) -> None:
        require(self.align_depth >= 1, f"alignment.align_depth={self.align_depth}: blocks are counted from 1")
        require(self.weight > 0, f"alignment.weight={self.weight}: must be above 0; alignment=none trains without")
        require_count("alignment.until_step", self.until_step, hint=", or null for the whole training")

    @property
    def end_step(self) -> float:
        """The first step without the loss, math.inf where it never ends."""
        return math.inf if self.until_step is None else self.until_step

    def check_depth(self, depth: int) -> None:
        """Raise UserError where an encoder of `depth` blocks has no block `align_depth`."""
        require(
            self.align_depth <= depth,
            f"alignment.align_depth={self.align_depth}: the encoder has {depth} blocks, choose 1..{depth}",
        )


@dataclass(frozen=True)
class FeatureAlignment(AlignmentSettings, abc.ABC):
    """Settings of an alignment to a frozen feature extractor.

    Args:
        target: name of a timm model.
        weights: its local file; None takes timm's own from the hub.

    Raises UserError for an unknown model, a missing file, or values out of range. Loads nothing.
    """

    target: str
    weights: str | None = None
    align_depth: int = 8
    weight: float = 0.5
    until_step: int | None = None

    needs_target: ClassVar[bool] = True
    packages: ClassVar[tuple[str, ...]] = ("timm",)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_target(self.target, self.weights)

    def build_target(self, image_size: int, outline: bool = False) -> Target:
        """Load the target for images of `image_size` px; raise UserError as `Target` does.

        outline: on the meta device, without weights, to count its cost.
        """
        if outline:
            with torch.device("meta"):
                return Target(self.target, None, image_size, pretrained=False)
        return Target(self.target, self.weights, image_size)

    @abc.abstractmethod
    def build_loss(
        self, hidden_size: int, num_features: int, grid: tuple[int, int], token_grid: tuple[int, int]
    ) -> AlignmentLoss:
        """Build the trained side; the projector's weights come from the global random state."""

    def check_cached(self, cached: CachedFeatures) -> None:
        """Raise UserError where cached features are not of this target and these weights."""
        require(
            cached.target == self.target,
            f"data.root={cached.root}: holds features of {cached.target}, but alignment.target={self.target}: "
            "choose one, or run the target with data.cached_features=false",
        )
        require(
            self.weights is None or sha256(Path(self.weights)) == cached.weights_sha256,
            f"alignment.weights={self.weights}: is not the file that the cached features of data.root={cached.root} "
            "come from; leave it out, or run the target with data.cached_features=false",
        )

    def build(
        self,
        hidden_size: int,
        token_grid: tuple[int, int],
        image_size: int,
        cached: CachedFeatures | None = None,
        outline: bool = False,
    ) -> Alignment:
        """Build the alignment of a denoiser of width D with tokens on `token_grid`.

        cached: features that replace the target. outline: everything on the meta device, without
        weights or fingerprint, to count its cost. Raises UserError where images or features do not
        fit the target.
        """
        if cached is not None:
            self.check_cached(cached)
        target = self.build_target(image_size, outline) if cached is None else None
        source = target or cached
        assert source is not None
        with torch.device("meta") if outline else contextlib.nullcontext():
            loss = self.build_loss(hidden_size, source.num_features, source.grid, token_grid)
        return Alignment(loss, self.end_step, True, target, None if outline else source.fingerprint)


@dataclass(frozen=True)
class REPA(FeatureAlignment):
    """Settings of REPA. projector_width: P; None is D, as released. Source: arXiv 2410.06940."""

    projector_width: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require_count("alignment.projector_width", self.projector_width, 1, MAX_SIZE, ", or null for the model's width")

    def build_loss(
        self, hidden_size: int, num_features: int, grid: tuple[int, int], token_grid: tuple[int, int]
    ) -> AlignmentLoss:
        projector = Projector(hidden_size, self.projector_width or hidden_size, num_features)
        return AlignmentLoss(projector, self.align_depth, self.weight, grid, token_grid)


@dataclass(frozen=True)
class Dispersive(AlignmentSettings):
    """Settings of the dispersive loss, which needs no target; see `DispersiveLoss`."""

    align_depth: int = 8
    weight: float = 0.5
    temperature: float = 1.0
    until_step: int | None = None

    needs_target: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.temperature > 0, f"alignment.temperature={self.temperature}: must be above 0")

    def build_loss(self) -> DispersiveLoss:
        """Build the loss; it has no weights."""
        return DispersiveLoss(self.align_depth, self.weight, self.temperature)

    def build(
        self,
        hidden_size: int,
        token_grid: tuple[int, int],
        image_size: int,
        cached: CachedFeatures | None = None,
        outline: bool = False,
    ) -> Alignment:
        """Build the alignment; see `FeatureAlignment.build`."""
        return Alignment(self.build_loss(), self.end_step)
