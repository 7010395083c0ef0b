"""iREPA: REPA whose projector is a convolution over the token grid, to features with less of their
mean. Source: arXiv 2512.10794.

Shapes: B images; N tokens of width D in the denoiser; h·w tokens of F features in the target.
"""

from dataclasses import dataclass

from torch import Tensor, nn

from ddt.errors import require
from ddt.objective.alignment import AlignmentLoss, FeatureAlignment


class ConvProjector(nn.Module):
    """A convolution D → F over the tokens' grid, of odd kernel size, zero-padded."""

    def __init__(self, hidden_size: int, num_features: int, token_grid: tuple[int, int], kernel_size: int) -> None:
        super().__init__()
        self.token_grid = token_grid
        self.conv = nn.Conv2d(hidden_size, num_features, kernel_size, padding=kernel_size // 2)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return (B, N, F) for hidden (B, N, D)."""
        maps = hidden.transpose(1, 2).unflatten(2, self.token_grid)  # (B, D, h, w)
        return self.conv(maps).flatten(2).transpose(1, 2)


def spatial_norm(features: Tensor, mean_share: float) -> Tensor:
    """Return `(f − mean_share·mean)/(std + 1e-6)` of features (B, h·w, F): mean and unbiased
    standard deviation over the tokens of an image, per channel.
    """
    mean, std = features.mean(1, keepdim=True), features.std(1, keepdim=True)
    return (features - mean_share * mean) / (std + 1e-6)


class IREPALoss(AlignmentLoss):
    """As `AlignmentLoss`, with features normalised by `spatial_norm`."""

    def __init__(self, *args: object, mean_share: float, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]
        self.mean_share = mean_share

    def prepare(self, features: Tensor) -> Tensor:
        return spatial_norm(features, self.mean_share)


@dataclass(frozen=True)
class IREPA(FeatureAlignment):
    """Settings of iREPA. kernel_size: of the convolution, odd; the paper's 3, though its training
    script's own default is 1. mean_share: of the features' mean that is subtracted.

    Raises UserError as `FeatureAlignment` does. Loads nothing.
    """

    weight: float = 1.0
    kernel_size: int = 3
    mean_share: float = 0.6

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.kernel_size in (1, 3, 5, 7),
            f"alignment.kernel_size={self.kernel_size}: choose 1, 3, 5 or 7 (published: 3)",
        )
        require(0 <= self.mean_share <= 1, f"alignment.mean_share={self.mean_share}: must lie in 0..1 (published: 0.6)")

    def build_loss(
        self, hidden_size: int, num_features: int, grid: tuple[int, int], token_grid: tuple[int, int]
    ) -> IREPALoss:
        projector = ConvProjector(hidden_size, num_features, token_grid, self.kernel_size)
        return IREPALoss(projector, self.align_depth, self.weight, grid, token_grid, mean_share=self.mean_share)
