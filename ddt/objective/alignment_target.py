"""The frozen feature extractor of REPA: a network of timm. Source: method.md 1.

Shapes: B images of H W pixels; h·w tokens of F features.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ddt.autoencoder.base import weights_hash
from ddt.errors import UserError, reason, require
from ddt.timm_networks import check_model, extractor, find_stage, is_vit, pretrained_file, read_timm_weights

CELL = 16  # pixels per side of the image that one token of the target covers, whatever the target's own stride
Extract = Callable[[Tensor], Tensor]


def check_target(name: str, weights: str | None) -> None:
    """Raise UserError for a name unknown to timm, with close ones, or a missing weight file."""
    check_model("alignment.target", name)
    if weights is not None:
        require(Path(weights).is_file(), f"alignment.weights={weights}: no such file")


def weights_overlay(stored: dict[str, Tensor], classifier: str | tuple[str, ...] | None) -> dict[str, Any]:
    """Return the changes to timm's `pretrained_cfg` that make it load all of a file's weights.

    The model gets a head of as many classes as the file's (0: none), and timm no classifier to
    drop: its loading is strict only where it drops nothing.
    """
    head = classifier[0] if isinstance(classifier, tuple) else classifier
    rows = stored.get(f"{head}.weight")
    num_classes = 0 if rows is None or not rows.ndim else len(rows)
    return {"state_dict": stored, "custom_load": False, "num_classes": num_classes, "classifier": None}


def load_network(name: str, weights: str | None, image_size: int, pretrained: bool) -> tuple[Any, Extract, int, int]:
    """Load a frozen timm network; return it, its features as a function, F, and its input's side.

    The function maps normalised images (B, 3, side, side) to (B, h·w, F). pretrained=False leaves
    the weights as timm makes them. Raises UserError where the weights cannot be loaded or are not
    exactly the network's, or where it has no feature map that fits.
    """
    import timm

    check_target(name, weights)
    with torch.device("meta"):  # its structure alone: the input size must be known before the weights are loaded
        outline = timm.create_model(name)
    stage = find_stage(outline, CELL, f"alignment.target={name}")
    side = outline.feature_info[stage]["reduction"] * image_size // CELL
    settings: dict[str, Any] = {}
    if is_vit(outline) or outline.pretrained_cfg.get("fixed_input_size", False):
        settings["img_size"] = side
    if type(outline) is timm.models.VisionTransformer:
        settings["weight_init"] = "skip"  # every weight comes from the file; a billion random ones take minutes
    overlay = None
    label, advice = f"alignment.weights={weights}", "copy it again"
    if weights is None and pretrained:
        label, advice = f"alignment.target={name}", "on a machine without a hub give alignment.weights=FILE"
        file = pretrained_file(name, label, advice)
    else:
        file = None if weights is None else Path(weights)
    if file is not None:
        stored = read_timm_weights(file, label, advice)
        overlay = weights_overlay(stored, outline.pretrained_cfg.get("classifier"))
    try:
        network = timm.create_model(name, pretrained=pretrained, pretrained_cfg_overlay=overlay, **settings)
    except Exception as error:  # of timm's filters, of load_state_dict, of a download: no common base
        problem = "its weights cannot be had from timm" if file is None else f"is not a file of {name}"
        raise UserError(f"{label}: {problem} ({reason(error)}); {advice}") from error
    network.pretrained_cfg.pop("state_dict", None)  # else timm holds on to the file's weights
    network.eval().requires_grad_(False)
    return network, extractor(network, stage), outline.feature_info[stage]["num_chs"], side


class Target:
    """A frozen feature extractor: patch tokens of a ViT, or a CNN's feature map of stride 16.

    Images are normalised with the model's own mean and standard deviation and resized (bicubic, not
    antialiased) so that one token covers 16×16 of their pixels; timm resamples the position
    embedding to that grid, as the release does. No nn.Module, so nothing trains or saves it.

    Args:
        name: of the timm model.
        weights: a local file, also of DINOv2 in Meta's or transformers' layout; None takes timm's
            own from the hub.
        image_size: H = W of the images.
        pretrained: False loads no weights.

    Attributes: num_features, F; grid, (h, w). Raises UserError where the weights cannot be loaded
    or do not fit exactly, or an image is not of whole 16×16 cells. Source: method.md 1.
    """

    num_features: int
    grid: tuple[int, int]

    def __init__(self, name: str, weights: str | None, image_size: int, pretrained: bool = True) -> None:
        require(
            image_size >= CELL and image_size % CELL == 0,
            f"data.image_size={image_size}: alignment.target={name} needs a multiple of {CELL}",
        )
        with torch.random.fork_rng(devices=[]):  # timm's initialisation leaves the caller's random state alone
            self.network, self.extract, self.num_features, self.side = load_network(
                name, weights, image_size, pretrained
            )
        self.name, self.weights = name, weights
        self.grid = (image_size // CELL, image_size // CELL)
        statistics = self.network.pretrained_cfg
        self.mean = torch.tensor(statistics["mean"])[:, None, None]  # (3, 1, 1)
        self.std = torch.tensor(statistics["std"])[:, None, None]

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the weights in use, at the grid they are used at, and of mean and std."""
        return weights_hash(self.network, mean=self.mean, std=self.std)

    def to(self, device: torch.device | str) -> "Target":
        """Move to a device and return itself."""
        self.network.to(device)
        self.mean, self.std = self.mean.to(device), self.std.to(device)
        return self

    def compile(self) -> None:
        """Compile the network, when it is first called, for batches of one size."""
        # otherwise torch chooses kernels by timing them: other last bits in each process
        self.extract = torch.compile(self.extract, dynamic=False, options={"deterministic": True})

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Return features (B, h·w, F), float32, without graph, of uint8 images (B, 3, H, W).

        Grey images (B, 1, H, W) stand for three equal channels. Runs under the caller's autocast.
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
