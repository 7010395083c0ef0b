"""Features of a small classifier trained on a data set's own training images, for small sets that
Inception never saw. A distance in them is never called FID.

Shapes: B batch, C channels, H W pixels, F features, K classes.
"""

import dataclasses
import functools
import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from safetensors.torch import save_file
from torch import Tensor, nn

from ddt.autoencoder.base import from_uint8, weights_hash
from ddt.data.images import Images
from ddt.draws import Stream, random_generator
from ddt.errors import UserError, first_line
from ddt.files import atomic_file, cache_folder, reset_permissions
from ddt.logs import progress_bar
from ddt.metrics.features import exact_arithmetic
from ddt.metrics.settings import ClassifierSettings
from ddt.tensor_files import read_state_dict

log = logging.getLogger(__name__)
NUM_FEATURES = 64
NOT_KEPT = "the classifier is not kept (%s); name a folder by DDT_CACHE, or each evaluation trains it"
VERSION = 1  # of the network and of its training: kept classifiers of others are not read


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


def new_classifier(train: Images) -> SmallClassifier:
    """Return the untrained classifier of a data set, on the CPU; the global random state stays."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return SmallClassifier(train.channels, train.image_size, len(train.class_names))


def train_classifier(settings: ClassifierSettings, train: Images) -> SmallClassifier:
    """Return a classifier trained on the CPU, by one thread: neither cores nor processes of the
    machine change it.
    """
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return train_by_one_thread(settings, train)
    finally:
        torch.set_num_threads(num_threads)


def train_by_one_thread(settings: ClassifierSettings, train: Images) -> SmallClassifier:
    """See `train_classifier`."""
    model = new_classifier(train)
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
    return model


def pixels_hash(train: Images) -> str:
    """Return a hash of a data set's images."""
    digest, count = hashlib.sha256(), len(train.labels)
    for start in range(0, count, 512):
        digest.update(train.load(np.arange(start, min(start + 512, count))).tobytes())
    return digest.hexdigest()


def kept_classifier(settings: ClassifierSettings, train: Images) -> SmallClassifier:
    """Return a data set's classifier as `train_classifier` makes it, which happens once on a
    machine: it is kept in the folder `classifiers` of the cache (`ddt.files.cache_folder`).

    Raises UserError for a damaged file.
    """
    made_of = [
        VERSION, dataclasses.asdict(settings), train.fingerprint, pixels_hash(train), train.channels, train.image_size,
        torch.__version__, torch.backends.cpu.get_cpu_capability(),
    ]  # fmt: skip
    digest = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:16]
    path = cache_folder("classifiers") / f"{settings.data}_{digest}.safetensors"
    if path.is_file():
        return read_classifier(path, train)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(f"{path}.lock").acquire()  # of several processes the first trains
    except (OSError, NotImplementedError) as error:  # the latter: a file system without locks
        log.warning(NOT_KEPT, first_line(error))
        return train_classifier(settings, train)
    with lock:
        if path.is_file():
            return read_classifier(path, train)
        model = train_classifier(settings, train)
        try:
            with atomic_file(path) as temporary:
                save_file(model.state_dict(), temporary)
                reset_permissions(temporary)
        except OSError as error:  # a full disk
            log.warning(NOT_KEPT, first_line(error))
        return model


def read_classifier(path: Path, train: Images) -> SmallClassifier:
    """Return the kept classifier of a data set; UserError for a damaged file."""
    model, advice = new_classifier(train), "remove it, and it is trained anew"
    weights = read_state_dict(path, advice=advice)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(f"{path}: is not this classifier; {advice}") from error
    return model


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
        """The frozen classifier, made at its first use, after unsuitable samples were refused."""
        return kept_classifier(self.settings, self.train).eval().requires_grad_(False).to(self.device)

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
