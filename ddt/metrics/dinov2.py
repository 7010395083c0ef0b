"""Features of DINOv2 ViT-L/14 for FD-DINOv2: the class token after the final norm.

Shapes: B batch, H W pixels, F features (1024 of ViT-L).
Source: Stein et al., arXiv 2306.04675, and its evaluator dgm-eval; resizing as in EDM2's evaluator.
"""

import copy
import math
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch_fidelity import register_feature_extractor
from torch_fidelity.feature_extractor_base import FeatureExtractorBase

from ddt.autoencoder.base import weights_hash
from ddt.errors import UserError, reason, require
from ddt.files import sha256
from ddt.metrics.features import exact_arithmetic
from ddt.metrics.settings import DINOV2_L, dinov2_advice
from ddt.timm_networks import pretrained_file, read_timm_weights

SIDE, GRID = 224, 16  # pixels and tokens per side
OFFSET = 0.1  # tokens that the hub's rule adds to the grid
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet


def hub_positions(table: Tensor) -> Tensor:
    """Resample positions (1, 1 + s², F) to (1, 1 + 16², F) by the rule of DINOv2's hub model.

    Bicubic without antialiasing, at a scale of (16 + 0.1)/s, not 16/s; the class token's row stays.
    Source: `interpolate_pos_encoding` of facebookresearch/dinov2, for its models without registers.
    """
    side = math.isqrt(table.shape[1] - 1)
    scale = (GRID + OFFSET) / side
    grid = table[:, 1:].float().transpose(1, 2).unflatten(2, (side, side))  # (1, F, s, s)
    grid = F.interpolate(grid, scale_factor=(scale, scale), mode="bicubic")
    return torch.cat([table[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)


def load_network(model: str, weights: str | None, key: str = "features.weights") -> Any:
    """Load a frozen DINOv2 of timm for images of 224×224, with the hub's positions.

    weights: a file with timm's names, Meta's or transformers'; None downloads timm's own. Raises
    UserError, naming `key`, unless it can be read and holds exactly the network's tensors.
    """
    import timm

    settings: dict[str, Any] = {"weight_init": "skip"}  # every weight is loaded; sampling them first is slow
    label, advice = f"{key}={'null' if weights is None else weights}", dinov2_advice(model, key)
    file = pretrained_file(model, f"{label}: {model}", advice) if weights is None else Path(weights)
    stored = {} if file is None else read_timm_weights(file, label, advice)
    if file is not None:
        with torch.device("meta"):
            outline = timm.create_model(model).state_dict()
        for name in ("pos_embed", "patch_embed.proj.weight"):  # timm would resample them until they fit
            shape = tuple(stored[name].shape) if name in stored else "missing"
            require(
                shape == tuple(outline[name].shape),
                f"{label}: is not a file of {model} ({name} is {shape}, not {tuple(outline[name].shape)}); {advice}",
            )
        settings["pretrained_cfg_overlay"] = {"state_dict": stored}
    try:
        with torch.random.fork_rng(devices=[]):  # timm samples some weights all the same
            network = timm.create_model(model, pretrained=True, **settings)  # at 518 px, so nothing is resampled
    except Exception as error:  # of timm's filters, of load_state_dict, of a download: no common base
        raise UserError(f"{label}: is not a file of {model} ({reason(error)}); {advice}") from error
    network.pretrained_cfg.pop("state_dict", None)  # timm keeps a reference to all weights
    network.eval().requires_grad_(False)
    table = hub_positions(network.pos_embed)
    network.set_input_size(SIDE)  # resamples by timm's own rule
    network.pos_embed.copy_(table)
    return network


@torch.no_grad()
def class_tokens(network: Any, images: Tensor) -> Tensor:
    """Return the class tokens (B, F), float32, of uint8 RGB images (B, 3, H, W) of any size."""
    require(
        images.dtype == torch.uint8 and images.ndim == 4 and images.shape[1] == 3,
        f"features=dinov2: takes uint8 RGB images (B, 3, H, W), found {images.dtype} {tuple(images.shape)}",
    )
    mean, std = (torch.tensor(values, device=images.device)[:, None, None] for values in (MEAN, STD))  # (3, 1, 1)
    with exact_arithmetic(), torch.autocast(images.device.type, enabled=False):
        # overshoot is neither clamped nor rounded, as in EDM2
        pixels = F.interpolate(images.float(), size=(SIDE, SIDE), mode="bicubic", antialias=True, align_corners=False)
        return network.forward_features((pixels / 255 - mean) / std)[:, 0]


class FeatureExtractorDINOv2(FeatureExtractorBase):
    """The same features for `torch_fidelity.calculate_metrics`, by the name registered below.

    Distances in torch-fidelity's own DINOv2, which resizes otherwise, are not FD-DINOv2.
    feature_extractor_weights_path: see `load_network`. A subclass may name another model.
    """

    model = DINOV2_L

    def __init__(
        self,
        name: str,
        features_list: list[str],
        feature_extractor_weights_path: str | None = None,
        feature_extractor_internal_dtype: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(name, features_list)
        require(
            feature_extractor_internal_dtype in (None, "float32"),
            f"feature_extractor_internal_dtype={feature_extractor_internal_dtype}: {name} computes in float32",
        )
        self.network = load_network(self.model, feature_extractor_weights_path, "feature_extractor_weights_path")

    def forward(self, images: Tensor) -> tuple[Tensor]:
        """Return class tokens, float32 ((B, F),), of uint8 images (B, 3, H, W)."""
        return (class_tokens(self.network, images),)

    @staticmethod
    def get_provided_features_list() -> tuple[str]:
        """Return the one name of features."""
        return ("class_token",)

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        """Return the features that a metric is computed in."""
        return dict.fromkeys(("isc", "fid", "kid", "prc"), "class_token")[metric]

    @staticmethod
    def can_be_compiled() -> bool:
        """Return False: a compiled graph would leave out `exact_arithmetic`."""
        return False


register_feature_extractor("dinov2-vit-l-14-timm", FeatureExtractorDINOv2)


class DINOv2:
    """The class tokens of a network of timm. Raises UserError as `load_network` does."""

    name, channels, image_size = "dinov2", 3, None
    rows = ("features",)
    distances: ClassVar[dict[str, str]] = {"fd_dinov2": "features"}
    pr_space = nearest_space = "features"
    own_classes = False

    def __init__(self, model: str, weights: str | None, batch_size: int, device: torch.device) -> None:
        network = load_network(model, weights)
        self.model, self.batch_size = model, batch_size
        self.spaces: dict[str, int] = {"features": network.num_features}
        self._identity: dict[str, Any] = {
            "name": self.name,
            "model": model,
            "weights": {
                "path": weights,
                "sha256": None if weights is None else sha256(Path(weights)),
                "tensors_sha256": weights_hash(network),
            },
            "resize": f"bicubic to {SIDE}×{SIDE}, antialiased",
            "position table": f"the hub's rule: bicubic, scale ({GRID} + {OFFSET})/37, not antialiased",
            "dtype": "float32",
        }
        self.network = network.to(device)

    def identity(self) -> dict[str, Any]:
        """Return what the features depend on."""
        return copy.deepcopy(self._identity)

    def deviations(self) -> list[str]:
        """Return one line: why FD-DINOv2 may not be the published one."""
        if self.model != DINOV2_L:
            return [f"features.model={self.model}: published FD-DINOv2 is of {DINOV2_L}"]
        return [
            "no hash of DINOv2's published weights is known here, and FD-DINOv2 was not compared with published values"
        ]

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """Return {"features": (B, F)}, float32, of uint8 images (B, 3, H, W) on its device."""
        return {"features": class_tokens(self.network, images)}
