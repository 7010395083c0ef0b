"""Features of a small classifier trained on a data set's own training images, for small sets that
Inception never saw. A distance in them is never called FID.

Shapes: B batch, C channels, H W pixels, F features, K classes.
"""

import functools
from typing import Any

import torch
from torch import Tensor, nn

from ddt.autoencoder.base import from_uint8, weights_hash
from ddt.data.images import Images
from ddt.draws import Stream, random_generator
from ddt.logs import progress_bar
from ddt.metrics.features import exact_arithmetic
from ddt.metrics.settings import ClassifierSettings

NUM_FEATURES = 64


class SmallClassifier(nn.Module):
    """Three convolutions, one hidden layer of F = 64 features, K classes."""

    def __init__(self, channels: int, image_size: int, num_classes: int) -> None:
        super().__init__()
        side = (image_size + 3) // 4  # two strides of 2, each rounded up
        self.trunk = nn.Sequential(
            nn.Conv2d(channels, 32, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(32, 64, 3, padding=1, stride=2),
            nn.GELU(),
            nn.Conv2d(64, 128, 3, padding=1, stride=2),
            nn.GELU(),
            nn.Flatten(),
            nn.Linear(128 * side * side, NUM_FEATURES),
            nn.GELU(),
        )
        self.head = nn.Linear(NUM_FEATURES, num_classes)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return features (B, F) and logits (B, K) of uint8 images (B, C, H, W)."""
        features = self.trunk(from_uint8(images))
        return features, self.head(features)


def train_classifier(settings: ClassifierSettings, train: Images) -> SmallClassifier:
    """Train a classifier from a fixed seed on the CPU, frozen; the global random state stays."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = SmallClassifier(train.channels, train.image_size, len(train.class_names))
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate)
    count, step = len(train.labels), 0
    num_steps = settings.epochs * -(-count // settings.batch_size)
    progress = progress_bar(total=settings.epochs * count, unit="img", unit_scale=True, desc="classifier")
    with torch.enable_grad(), progress:
        for epoch in range(settings.epochs):
            order = random_generator(0, Stream.CLASSIFIER, epoch).permutation(count)
            for start in range(0, count, settings.batch_size):
                indices = order[start : start + settings.batch_size]
                _, logits = model(torch.from_numpy(train.load(indices)))
                loss = nn.functional.cross_entropy(logits, torch.from_numpy(train.labels[indices]))
                optimizer.param_groups[0]["lr"] = settings.learning_rate * (1 - step / num_steps)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                step += 1
                progress.update(len(indices))
    return model.eval().requires_grad_(False)


class ClassifierFeatures:
    """Features of a trained classifier, its class probabilities, and the pixels themselves."""

    rows = ("features", "probabilities", "pixels")
    pr_space, nearest_space = "features", "pixels"
    own_classes = True
    batch_size = 512

    def __init__(self, settings: ClassifierSettings, train: Images, device: torch.device) -> None:
        self.settings, self.train, self.device, self.name = settings, train, device, settings.name
        self.channels, self.image_size = train.channels, train.image_size
        self.spaces = {
            "features": NUM_FEATURES,
            "probabilities": len(train.class_names),
            "pixels": train.channels * train.image_size**2,
        }
        self.distances = {f"fd_{settings.data}": "features"}

    @functools.cached_property
    def model(self) -> SmallClassifier:
        """The classifier, trained at its first use, after unsuitable samples were refused.

        Trained with one thread, so that neither cores nor processes of the machine change it.
        """
        num_threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return train_classifier(self.settings, self.train).to(self.device)
        finally:
            torch.set_num_threads(num_threads)

    def identity(self) -> dict[str, Any]:
        """Return what its features depend on."""
        return {
            "name": self.name,
            "network": "classifier of the training images",
            "epochs": self.settings.epochs,
            "batch_size": self.settings.batch_size,
            "learning_rate": self.settings.learning_rate,
            "weights": {"tensors_sha256": weights_hash(self.model)},
            "dtype": "float32",
        }

    def deviations(self) -> list[str]:
        """Return one line: no published numbers are in these features."""
        return [f"features={self.name} are those of a small classifier of this project"]

    @torch.no_grad()
    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """Return features (B, F), probabilities (B, K) and pixels in [0, 1] (B, C·H·W)."""
        with exact_arithmetic(), torch.autocast(images.device.type, enabled=False):
            features, logits = self.model(images)
            return {
                "features": features,
                "probabilities": logits.softmax(dim=1),
                "pixels": images.flatten(1).float() / 255,
            }
