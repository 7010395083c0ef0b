"""Features of images: here, those of a small classifier trained on a data set's own real training images.

Such features measure small sets that Inception never saw. A distance in them is never called FID.
Shapes: B batch, C channels, H W pixels, F features, K classes.
"""

import logging
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from ddt.autoencoder import from_uint8
from ddt.data import draws
from ddt.errors import require
from ddt.images import Images

log = logging.getLogger(__name__)
CLASSIFIER_STREAM = 16  # beside the streams of ddt.data


def batches(count: int, batch_size: int = 512) -> Iterator[np.ndarray]:
    """Yield the indices 0..count−1 in slices of at most batch_size."""
    for start in range(0, count, batch_size):
        yield np.arange(start, min(start + batch_size, count))


class SmallClassifier(nn.Module):
    """Three convolutions, one hidden layer of F = 64 features, K classes, for images of a few dozen pixels."""

    def __init__(self, channels: int, image_size: int, num_classes: int, num_features: int = 64) -> None:
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
            nn.Linear(128 * side * side, num_features),
            nn.GELU(),
        )
        self.head = nn.Linear(num_features, num_classes)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return features (B, F) and logits (B, K) of uint8 images (B, C, H, W)."""
        features = self.trunk(from_uint8(images))
        return features, self.head(features)


class ClassifierFeatures:
    """Features and predicted classes by a classifier trained on real training images, the same for the same data.

    Args:
        epochs: passes over the training images. batch_size, learning_rate: of AdamW, with linear decay.

    `fit` trains it, from a fixed seed; until then it has no features.
    """

    def __init__(self, epochs: int, batch_size: int = 128, learning_rate: float = 2e-3) -> None:
        require(epochs >= 1, f"features.epochs={epochs}: must be at least 1")
        require(batch_size >= 1, f"features.batch_size={batch_size}: must be at least 1")
        require(learning_rate > 0, f"features.learning_rate={learning_rate}: must be above 0")
        self.epochs, self.batch_size, self.learning_rate = epochs, batch_size, learning_rate
        self.settings = {"epochs": epochs, "batch_size": batch_size, "learning_rate": learning_rate}
        self.model: SmallClassifier | None = None

    def fit(self, images: Images) -> None:
        """Train the classifier on `images`, leaving the global random state as it was."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = SmallClassifier(images.channels, images.image_size, len(images.class_names))
        optimizer = torch.optim.AdamW(model.parameters(), lr=self.learning_rate)
        steps = self.epochs * -(-len(images.labels) // self.batch_size)
        progress = tqdm(
            total=self.epochs * len(images.labels),
            unit="img",
            unit_scale=True,
            desc="classifier",
            mininterval=1.0,
        )
        step = 0
        for epoch in range(self.epochs):
            order = draws(0, CLASSIFIER_STREAM, epoch).permutation(len(images.labels))
            for chosen in batches(len(order), self.batch_size):
                indices = order[chosen]
                _, logits = model(torch.from_numpy(images.load(indices)))
                loss = nn.functional.cross_entropy(logits, torch.from_numpy(images.labels[indices]))
                optimizer.param_groups[0]["lr"] = self.learning_rate * (1 - step / steps)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                step += 1
                progress.update(len(indices))
        progress.close()
        self.model = model.eval().requires_grad_(False)

    @torch.no_grad()
    def __call__(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return features (B, F) float32 and predicted classes (B,) int64 of uint8 images (B, C, H, W)."""
        assert self.model is not None, "fit comes first"
        features, logits = self.model(torch.from_numpy(images))
        return features.numpy(), logits.argmax(dim=1).numpy()
