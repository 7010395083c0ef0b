"""A second loss on a hidden layer: alignment to a frozen feature extractor (REPA), or dispersion of
the batch.

Shapes: B images of H W pixels; N tokens of width D in the denoiser; h·w tokens of F features in the
target; P width of the projector. Source: method.md 1.

Settings (`REPA`, `Dispersive`) are what a config file names; they load nothing. Their `build` makes
an `Alignment`: what is trained (`AlignmentLoss`) and, apart, what is frozen (`Target`), so that the
target never enters a state dict, DDP or an EMA. To add one: its settings and its loss in a file
here, and a file in conf/alignment.
"""

import difflib
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddt.autoencoder.base import weights_hash
from ddt.errors import UserError, require
from ddt.files import sha256

CELL = 16  # pixels a side of the image that one token of the target covers, whatever the target's own stride
Extract = Callable[[Tensor], Tensor]


def reason(error: Exception) -> str:
    """Return an error's text in one line, each of its lines cut: lists of weights can be long."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(line if len(line) <= 160 else f"{line[:160]}…" for line in lines[:4]) or type(error).__name__


def check_target(name: str, weights: str | None) -> None:
    """Raise UserError for a name that timm does not know, with close ones, or weights that are no
    file.
    """
    import timm

    known = {*timm.list_models(), *timm.list_models(include_tags=True)}
    if name not in known:
        close = difflib.get_close_matches(name, known, n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else "see timm.list_models()"
        raise UserError(f"alignment.target={name}: timm has no model of this name; {hint}")
    if weights is not None:
        require(Path(weights).is_file(), f"alignment.weights={weights}: no such file")


def weights_overlay(weights: str, classifier: str | tuple[str, ...] | None) -> dict[str, Any]:
    """Return the changes to timm's `pretrained_cfg` that make it load a file's weights, all of
    them.

    The model gets a head of as many classes as the file's, none where it has none, and timm no
    classifier to drop: its loading is strict only where it drops nothing.
    """
    import timm

    try:
        stored = timm.models.load_state_dict(weights)
    except Exception as error:  # a damaged file raises whatever its reader stumbles over
        raise UserError(f"alignment.weights={weights}: cannot be read ({reason(error)}); copy it again") from error
    head = classifier[0] if isinstance(classifier, tuple) else classifier
    rows = stored.get(f"{head}.weight")
    return {
        "state_dict": stored,
        "custom_load": False,
        "num_classes": 0 if rows is None else len(rows),
        "classifier": None,
    }


def load_network(
    name: str, weights: str | None, image_size: int, pretrained: bool = True
) -> tuple[Any, Extract, int, int]:
    """Load a frozen timm network; return it, its features as a function, their number F, and its
    input's side.

    The function maps normalised images (B, 3, side, side) to (B, h·w, F). pretrained=False leaves
    the weights as timm makes them. Raises UserError where the weights cannot be loaded or are not
    exactly the network's, or where it has no feature map that fits.
    """
    import timm

    check_target(name, weights)
    with torch.device("meta"):  # its structure alone: the input size must be known before the weights are loaded
        outline = timm.create_model(name)
    is_vit = hasattr(outline, "num_prefix_tokens") and hasattr(outline, "patch_embed")
    strides = [stage["reduction"] for stage in outline.feature_info]
    require(
        is_vit or (CELL in strides and hasattr(outline, "forward_intermediates")),
        f"alignment.target={name}: has no feature map of stride {CELL}, only {sorted(set(strides))}; choose another",
    )
    stage = len(strides) - 1 if is_vit else max(i for i, stride in enumerate(strides) if stride == CELL)
    side = strides[stage] * image_size // CELL
    settings: dict[str, Any] = {}
    if is_vit or outline.pretrained_cfg.get("fixed_input_size", False):
        settings["img_size"] = side
    if type(outline) is timm.models.VisionTransformer:
        settings["weight_init"] = "skip"  # every weight comes from the file; drawing a billion first takes minutes
    overlay = None if weights is None else weights_overlay(weights, outline.pretrained_cfg.get("classifier"))
    try:
        network = timm.create_model(name, pretrained=pretrained, pretrained_cfg_overlay=overlay, **settings)
    except Exception as error:  # of the hub client, of timm's filters or of load_state_dict: no common base
        if weights is not None:
            problem = f"alignment.weights={weights}: is not a file of {name} ({reason(error)})"
        else:
            problem = (
                f"alignment.target={name}: pretrained weights cannot be loaded ({reason(error)}); "
                "on a machine without a hub give alignment.weights=FILE"
            )
        raise UserError(problem) from error
    network.pretrained_cfg.pop("state_dict", None)  # timm keeps what it was given
    network.eval().requires_grad_(False)
    if is_vit:
        network.reset_classifier(0)
        prefix = network.num_prefix_tokens

        def extract(pixels: Tensor) -> Tensor:
            return network.forward_features(pixels)[:, prefix:]  # after the final norm, without class and registers

    else:
        kept = network.prune_intermediate_layers([stage], prune_norm=True, prune_head=True)

        def extract(pixels: Tensor) -> Tensor:
            maps = network.forward_intermediates(pixels, indices=kept, intermediates_only=True, output_fmt="NCHW")
            return maps[0].flatten(2).transpose(1, 2)  # (B, h·w, F)

    return network, extract, outline.feature_info[stage]["num_chs"], side


class Target:
    """A frozen feature extractor of timm: patch tokens of a vision transformer, or a convolutional
    network's feature map of stride 16.

    Images are normalised with the model's own mean and standard deviation and resized (bicubic, not
    antialiased) so that one token covers 16×16 of their pixels. The table of positions is resampled
    by timm to that grid, as the release does it. It is no module, so nothing trains, saves or
    averages it.

    Args:
        name: of the timm model. weights: a local file (.safetensors, .pth, .bin); None takes timm's
        own from the hub.
        image_size: H = W of the images. compiled: compile the network. pretrained: False loads no
        weights.

    Attributes: num_features, F; grid, (h, w). Raises UserError where the weights cannot be loaded
    or do not fit exactly, or an image is not of whole 16×16 cells.
    Source: method.md 1.
    """

    num_features: int
    grid: tuple[int, int]

    def __init__(
        self, name: str, weights: str | None, image_size: int, compiled: bool = False, pretrained: bool = True
    ) -> None:
        require(
            image_size >= CELL and image_size % CELL == 0,
            f"data.image_size={image_size}: alignment.target={name} needs a multiple of {CELL}",
        )
        with torch.random.fork_rng(devices=[]):  # timm draws initial weights; the caller's draws stay as they were
            self.network, extract, self.num_features, self.side = load_network(name, weights, image_size, pretrained)
        self.name, self.weights = name, weights
        self.extract: Extract = torch.compile(extract) if compiled else extract
        self.grid = (image_size // CELL, image_size // CELL)
        statistics = self.network.pretrained_cfg
        self.mean = torch.tensor(statistics["mean"])[:, None, None]  # (3, 1, 1)
        self.std = torch.tensor(statistics["std"])[:, None, None]

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the weights that the features depend on, at the grid they are used at, and of
        mean and std.
        """
        return weights_hash(self.network, mean=self.mean, std=self.std)

    def to(self, device: torch.device | str) -> "Target":
        """Move to a device and return itself."""
        self.network.to(device)
        self.mean, self.std = self.mean.to(device), self.std.to(device)
        return self

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Return features (B, h·w, F), float32, without graph, of uint8 images (B, 3, H, W).

        Grey images (B, 1, H, W) stand for three equal channels. The network runs under the caller's
        autocast.
        """
        pixels = (images.float() / 255 - self.mean) / self.std  # (B, 3, H, W)
        pixels = F.interpolate(pixels, size=(self.side, self.side), mode="bicubic")
        features = self.extract(pixels).float()  # (B, h·w, F)
        if features.shape[1] != self.grid[0] * self.grid[1]:  # no call that builds the message on the good path
            raise UserError(
                f"alignment.target={self.name}: gives {features.shape[1]} tokens, not {self.grid[0]}×{self.grid[1]}; "
                "choose another"
            )
        return features


class Projector(nn.Sequential):
    """The trained map from hidden tokens to features: Linear(D, P), SiLU, Linear(P, P), SiLU,
    Linear(P, F).

    Source: method.md 1.
    """

    def __init__(self, hidden_size: int, width: int, num_features: int) -> None:
        super().__init__(
            nn.Linear(hidden_size, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, num_features),
        )


def to_grid(features: Tensor, grid: tuple[int, int], wanted: tuple[int, int]) -> Tensor:
    """Resize tokens (B, h·w, F) on `grid` = (h, w) bilinearly to (B, h'·w', F) on `wanted`; the
    same grid is left alone.

    Source: method.md 1.
    """
    if grid == wanted:
        return features
    maps = features.transpose(1, 2).unflatten(2, grid)  # (B, F, h, w)
    maps = F.interpolate(maps, size=wanted, mode="bilinear", align_corners=False)
    return maps.flatten(2).transpose(1, 2)  # (B, h'·w', F)


class AlignmentLoss(nn.Module):
    """The trained side of REPA: the projector and `mean over tokens of 1 − cos(projector(h),
    target)`.

    Args:
        projector: from D to F. align_depth: encoder block (1-based) whose output is h.
        weight: beside the flow-matching loss; the loop applies it.
        grid: of the features. wanted_grid: of the denoiser's tokens, to which the features are
        resized.
    """

    name = "repa_loss"

    def __init__(
        self,
        projector: nn.Module,
        align_depth: int,
        weight: float,
        grid: tuple[int, int],
        wanted_grid: tuple[int, int],
    ) -> None:
        super().__init__()
        self.projector = projector
        self.align_depth, self.weight = align_depth, weight
        self.grid, self.wanted_grid = grid, wanted_grid

    def forward(self, hidden: Tensor, features: Tensor) -> Tensor:
        """Return the loss, a float32 scalar in 0..2, not weighted, of hidden (B, N, D) and features
        (B, h·w, F).

        Source: method.md 1.
        """
        projected = self.projector(hidden)  # (B, N, F)
        with torch.autocast(hidden.device.type, enabled=False):  # squares of half-precision values overflow
            wanted = to_grid(features.float(), self.grid, self.wanted_grid)  # (B, N, F)
            return (1 - F.cosine_similarity(projected.float(), wanted, dim=-1)).mean()


class DispersiveLoss(nn.Module):
    """Dispersion of a batch: `log mean over pairs i < j of exp(−‖h_i − h_j‖² / temperature)`, h of
    unit length.

    It is taken over the micro-batch of this process: pairs across processes or accumulated batches
    are not seen.

    Args:
        align_depth: encoder block (1-based) whose output is h. weight: beside the flow-matching
            loss; the loop applies it. temperature: of the pairs.

    Source: "Diffuse and Disperse", arXiv 2506.09027. Its PyTorch code divides ‖h_i − h_j‖² by the
    number of values of h instead of normalising h, and counts the pairs i = j.
    """

    name = "dispersive_loss"

    def __init__(self, align_depth: int, weight: float, temperature: float) -> None:
        super().__init__()
        self.align_depth, self.weight, self.temperature = align_depth, weight, temperature

    def forward(self, hidden: Tensor, features: Tensor | None = None) -> Tensor:
        """Return the loss, a float32 scalar of at most 0, not weighted, of hidden (B, N, D);
        features are not used.

        Raises UserError for a batch of one image, which has no pair.
        """
        if len(hidden) < 2:
            raise UserError(
                f"trainer.micro_batch_size={len(hidden)}: alignment=dispersive compares images; choose at least 2"
            )
        with torch.autocast(hidden.device.type, enabled=False):
            h = F.normalize(hidden.float().flatten(1), dim=1)  # (B, N·D)
            i, j = torch.triu_indices(len(h), len(h), offset=1, device=h.device)
            # ‖h_i − h_j‖² = 2 − 2 h_i·h_j: no difference of every pair is ever held
            exponents = (2 * (h @ h.T)[i, j] - 2) / self.temperature  # (B(B−1)/2,)
            return exponents.logsumexp(0) - math.log(len(exponents))


class CachedFeatures(Protocol):
    """Features of a target that a data set holds, read in place of running the target. See
    `ddt.data.images.CachedFeatures`.
    """

    @property
    def target(self) -> str: ...
    @property
    def weights_sha256(self) -> str | None: ...
    @property
    def fingerprint(self) -> str: ...
    @property
    def num_features(self) -> int: ...
    @property
    def grid(self) -> tuple[int, int]: ...
    @property
    def root(self) -> str: ...


@dataclass(frozen=True)
class Alignment:
    """What a training needs of its alignment; without arguments it has none.

    loss: the trained side, which the objective calls. end_step: the first step without it, counted
    from 0 (math.inf: never). needs_features: whether it compares with features of the images.
    target: the frozen network that computes them, None where they are cached or not needed.
    fingerprint: SHA-256 of the target's weights.
    """

    loss: AlignmentLoss | DispersiveLoss | None = None
    end_step: float = 0
    needs_features: bool = False
    target: Target | None = None
    fingerprint: str | None = None


def build_alignment(
    settings: "REPA | Dispersive | None",
    hidden_size: int,
    grid: tuple[int, int],
    image_size: int,
    cached: CachedFeatures | None = None,
) -> Alignment:
    """Build what settings describe for a denoiser of width `hidden_size` and tokens on `grid`.

    cached: the features that the data set holds, if any. Raises UserError where the images are not
    what the target takes, or the cached features are another target's.
    """
    return Alignment() if settings is None else settings.build(hidden_size, grid, image_size, cached)


def check_settings(align_depth: int, weight: float, until_step: int | None) -> None:
    """Raise UserError for settings that make no loss, naming the key and the fix."""
    require(align_depth >= 1, f"alignment.align_depth={align_depth}: blocks are counted from 1")
    require(weight > 0, f"alignment.weight={weight}: must be above 0; alignment=none trains without")
    require(
        until_step is None or until_step >= 1,
        f"alignment.until_step={until_step}: must be at least 1, or null for the whole training",
    )


def end_step(until_step: int | None) -> float:
    """Return the first step without an alignment: `until_step`, or never (math.inf) with None."""
    return math.inf if until_step is None else until_step


@dataclass(frozen=True)
class REPA:
    """Settings of an alignment to a frozen feature extractor. Source: method.md 1; REPA, arXiv
    2410.06940.

    Args:
        target: name of a timm model. weights: its local file; None takes timm's own from the hub.
        align_depth: encoder block (1-based) whose output is aligned. weight: of the loss beside
        flow matching.
        until_step: the first step without alignment, counted from 0; None aligns throughout.
        projector_width: P; None is D, as released.
        compile: compile the target.

    Raises UserError for an unknown model, a file that is not there, or values out of range. It
    loads nothing.
    """

    target: str
    weights: str | None = None
    align_depth: int = 8
    weight: float = 0.5
    until_step: int | None = None
    projector_width: int | None = None
    compile: bool = False

    needs_target: ClassVar[bool] = True
    loss_name: ClassVar[str] = AlignmentLoss.name

    def __post_init__(self) -> None:
        check_settings(self.align_depth, self.weight, self.until_step)
        require(
            self.projector_width is None or self.projector_width >= 1,
            f"alignment.projector_width={self.projector_width}: must be at least 1, or null for the model's width",
        )
        check_target(self.target, self.weights)

    def build_target(self, image_size: int) -> Target:
        """Load the frozen network for images of `image_size` pixels a side; raise UserError as
        `Target` does.
        """
        return Target(self.target, self.weights, image_size, self.compile)

    def outline_target(self, image_size: int) -> Target:
        """Build the frozen network on the meta device, without weights: what its cost is counted
        on.
        """
        with torch.device("meta"):
            return Target(self.target, None, image_size, pretrained=False)

    def build_loss(
        self, hidden_size: int, num_features: int, grid: tuple[int, int], wanted_grid: tuple[int, int]
    ) -> AlignmentLoss:
        """Build the trained side from D, F, the target's grid (h, w) and that of the denoiser's
        tokens.

        The projector's weights are drawn from the global random state.
        """
        projector = Projector(hidden_size, self.projector_width or hidden_size, num_features)
        return AlignmentLoss(projector, self.align_depth, self.weight, grid, wanted_grid)

    def check_cached(self, cached: CachedFeatures) -> None:
        """Raise UserError where cached features are not of this target and these weights."""
        require(
            cached.target == self.target,
            f"data.root={cached.root}: holds features of {cached.target}, but alignment.target={self.target}: "
            "choose one, or run the target with data.cached_features=false",
        )
        if self.weights is not None:
            require(
                sha256(Path(self.weights)) == cached.weights_sha256,
                f"alignment.weights={self.weights}: is not the file that the cached features of data.root="
                f"{cached.root} come from; leave it out, or run the target with data.cached_features=false",
            )

    def build(
        self, hidden_size: int, grid: tuple[int, int], image_size: int, cached: CachedFeatures | None
    ) -> Alignment:
        """See `build_alignment`."""
        if cached is not None:
            self.check_cached(cached)
        target = self.build_target(image_size) if cached is None else None
        source = target or cached
        assert source is not None
        loss = self.build_loss(hidden_size, source.num_features, source.grid, grid)
        return Alignment(loss, end_step(self.until_step), True, target, source.fingerprint)


@dataclass(frozen=True)
class Dispersive:
    """Settings of the dispersive loss, which needs no target; see `DispersiveLoss`.

    Args:
        align_depth: encoder block (1-based) whose output is dispersed. weight: of the loss beside
        flow matching.
        temperature: of the pairs. until_step: the first step without it, counted from 0; None keeps
        it throughout.

    Raises UserError for values out of range.
    """

    align_depth: int = 8
    weight: float = 0.5
    temperature: float = 1.0
    until_step: int | None = None

    needs_target: ClassVar[bool] = False
    loss_name: ClassVar[str] = DispersiveLoss.name

    def __post_init__(self) -> None:
        check_settings(self.align_depth, self.weight, self.until_step)
        require(self.temperature > 0, f"alignment.temperature={self.temperature}: must be above 0")

    def build_loss(self) -> DispersiveLoss:
        """Build the loss; it has no weights."""
        return DispersiveLoss(self.align_depth, self.weight, self.temperature)

    def build(
        self, hidden_size: int, grid: tuple[int, int], image_size: int, cached: CachedFeatures | None
    ) -> Alignment:
        """See `build_alignment`."""
        return Alignment(self.build_loss(), end_step(self.until_step))


def check_depth(align_depth: int, depth: int) -> None:
    """Raise UserError where an encoder of `depth` blocks has no block `align_depth` (1-based)."""
    require(
        1 <= align_depth <= depth,
        f"alignment.align_depth={align_depth}: the encoder has {depth} blocks, choose 1..{depth}",
    )
