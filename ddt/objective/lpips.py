"""LPIPS: a perceptual distance of images, in features of VGG-16 with learned weights of channels.

Shapes: B images of H W pixels, K channels of a feature map.
Source: Zhang et al., arXiv 1801.03924, with the linear layers of taming-transformers, as RAE uses
them.
"""

import hashlib
from pathlib import Path

import torch
from torch import Tensor, nn

from ddt.errors import UserError, reason, require
from ddt.tensor_files import read_state_dict

VGG_FILE = "torchvision's vgg16-397923af.pth, from download.pytorch.org/models"
LINEAR_FILE = "vgg.pth of taming-transformers (MD5 d507d7349b931f0638a25a48a722f98a)"
# of files by these names, their hash and its first digits: other versions of LPIPS have one name
HASHES = {"vgg16-397923af.pth": ("sha256", "397923af"), "vgg.pth": ("md5", "d507d7349b931f0638a25a48a722f98a")}
STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))  # channels of convolutions
MEAN, STD = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of inputs in [−1, 1]
EPS = 1e-10


def vgg_stages() -> nn.ModuleList:
    """Return the convolutions of VGG-16 in five stages, each ending in a ReLU, under torchvision's
    names without `features.`, less the stage's.
    """
    stages, number, channels = nn.ModuleList(), 0, 3
    for widths in STAGES:
        stage = nn.Sequential()
        if number:
            stage.add_module(str(number), nn.MaxPool2d(2))
            number += 1
        for width in widths:
            stage.add_module(str(number), nn.Conv2d(channels, width, 3, padding=1))
            stage.add_module(str(number + 1), nn.ReLU())
            number, channels = number + 2, width
        stages.append(stage)
    return stages


def check_file(key: str, file: str | None, source: str) -> Path:
    """Return the path of a file of frozen weights; raise UserError where it is not given or not
    there. source: where it comes from.
    """
    require(file is not None, f"{key}: not set; give {source}")
    path = Path(str(file))
    require(path.is_file(), f"{key}={file}: no such file; give {source}")
    if path.name in HASHES:
        kind, expected = HASHES[path.name]
        with path.open("rb") as opened:
            found = hashlib.file_digest(opened, kind).hexdigest()
        require(
            found.startswith(expected),
            f"{key}={file}: is not the published file of this name ({kind} {found}); give {source}, or rename one of "
            "your own",
        )
    return path


def load_strictly(network: nn.Module, state: dict[str, Tensor], label: str, source: str) -> None:
    """Load a state dict into a module, frozen from then on; raise UserError unless it fits
    exactly.
    """
    try:
        network.load_state_dict({name: value.float() for name, value in state.items()}, assign=True)
    except RuntimeError as error:
        raise UserError(f"{label}: does not fit ({reason(error)}); give {source}") from error
    network.eval().requires_grad_(False)


class LPIPS:
    """The distance of images (B, 3, H, W) in [−1, 1]. No nn.Module, so nothing trains or saves it.

    Args:
        vgg_weights: file of VGG-16, with torchvision's names; its classifier is not used.
        linear_weights: file of the weights of channels, `lin0.model.1.weight` to `lin4…`.

    Raises UserError, which names the setting, for files that are missing or do not fit exactly.
    """

    def __init__(self, vgg_weights: str | None, linear_weights: str | None) -> None:
        vgg_file = check_file("reconstruction.vgg_weights", vgg_weights, VGG_FILE)
        linear_file = check_file("reconstruction.lpips_weights", linear_weights, LINEAR_FILE)
        with torch.device("meta"):
            self.stages = vgg_stages()
            self.linear = nn.ModuleList(nn.Conv2d(widths[-1], 1, 1, bias=False) for widths in STAGES)
        label = f"reconstruction.vgg_weights={vgg_weights}"
        vgg = read_state_dict(vgg_file, label)
        numbers = {name: f"{k}.{name}" for k, stage in enumerate(self.stages) for name in stage.state_dict()}
        features = {name.removeprefix("features."): v for name, v in vgg.items() if name.startswith("features.")}
        load_strictly(self.stages, {numbers.get(name, name): v for name, v in features.items()}, label, VGG_FILE)
        label = f"reconstruction.lpips_weights={linear_weights}"
        stored = read_state_dict(linear_file, label)
        linear = {name.replace(".model.1.", ".").removeprefix("lin"): value for name, value in stored.items()}
        load_strictly(self.linear, linear, label, LINEAR_FILE)
        self.mean, self.std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))  # (3, 1, 1)

    def to(self, device: torch.device) -> "LPIPS":
        """Move to a device and return itself."""
        for network in (self.stages, self.linear):
            network.to(device)
        self.mean, self.std = self.mean.to(device), self.std.to(device)
        return self

    def features(self, pixels: Tensor) -> list[Tensor]:
        """Return the five feature maps (B, K, h, w), of norm 1, of pixels in [−1, 1]."""
        x, maps = (pixels - self.mean) / self.std, []
        for stage in self.stages:
            x = stage(x)
            maps.append(x / (x.square().sum(1, keepdim=True).sqrt() + EPS))
        return maps

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        """Return the mean distance, a scalar, of pixels a and b (B, 3, H, W) in [−1, 1]."""
        pairs = zip(self.linear, self.features(a), self.features(b), strict=True)
        return torch.stack([linear((x - y).square()).mean((1, 2, 3)) for linear, x, y in pairs]).sum(0).mean()
