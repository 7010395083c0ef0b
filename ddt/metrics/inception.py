"""Features of the Inception network that FID is defined by: torch-fidelity's port of the 2015 TensorFlow graph.

Shapes: B batch, n images, H W C, 2048 pool features, 2023 spatial ones (17 × 17 × 7), 1008 classes.
Source: the evaluator of openai/guided-diffusion (ADM), whose numbers are the published ones.
"""

import contextlib
import dataclasses
import io
import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from ddt.errors import UserError, first_line, require
from ddt.metrics.folder import ImageSource
from ddt.metrics.reference import NUM_POOL, NUM_SPATIAL
from ddt.metrics.statistics import Moments

log = logging.getLogger(__name__)
WEIGHTS_SHA256 = "6726825d"  # how the published file's hash begins
WEIGHTS_NAME = f"weights-inception-2015-12-05-{WEIGHTS_SHA256}.pth"
WEIGHTS_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{WEIGHTS_NAME}"
WEIGHTS_ADVICE = (
    f"give inception_weights=FILE, a copy of {WEIGHTS_URL} (pt_inception-2015-12-05-{WEIGHTS_SHA256}.pth is the same)"
)
RESIZE = "TensorFlow 1 bilinear to 299×299, no antialiasing"
NUM_SPATIAL_CHANNELS, NUM_CLASSES = 7, 1008


@dataclasses.dataclass(frozen=True)
class InceptionSettings:
    """What `features=inception` lets a user choose. batch_size: images the network takes at once."""

    batch_size: int

    def __post_init__(self) -> None:
        require(self.batch_size >= 1, f"features.batch_size={self.batch_size}: must be at least 1")


def find_weights(weights: Path | None) -> Path:
    """Return the weights file: the given one, or torch-fidelity's own, downloaded into torch's cache where it is
    missing.

    Raises UserError for a file that is not there, a TensorFlow graph, and where the download fails.
    """
    if weights is not None:
        require(
            weights.suffix != ".pb",
            f"inception_weights={weights}: TensorFlow graphs are not read; {WEIGHTS_ADVICE}",
        )
        require(weights.is_file(), f"inception_weights={weights}: no such file; {WEIGHTS_ADVICE}")
        return weights
    path = Path(torch.hub.get_dir()) / "checkpoints" / WEIGHTS_NAME
    if not path.is_file():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(WEIGHTS_URL, str(path), hash_prefix=WEIGHTS_SHA256)
        except (OSError, RuntimeError) as error:  # no network, another file at the address
            raise UserError(
                f"inception_weights=null: {WEIGHTS_NAME} cannot be downloaded ({first_line(error)}); {WEIGHTS_ADVICE}"
            ) from error
        log.info("%s: downloaded to %s", WEIGHTS_URL, path)
    return path


def load_network(weights: Path) -> nn.Module:
    """Return torch-fidelity's network with the weights of a .pth file, every one of them.

    Raises UserError for a file that is damaged, that holds more than tensors, or other ones than the network's.
    """
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    try:
        state = torch.load(weights, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file raises whatever its reader stumbles over
        raise UserError(
            f"inception_weights={weights}: cannot be read ({first_line(error)}); {WEIGHTS_ADVICE}"
        ) from error
    require(
        isinstance(state, dict) and all(isinstance(value, Tensor) for value in state.values()),
        f"inception_weights={weights}: holds no state dict; {WEIGHTS_ADVICE}",
    )
    # its constructor reads a file of any objects; it gets what has passed weights_only
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    try:
        with torch.random.fork_rng(devices=[]):  # it draws weights first
            return FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"], buffer)
    except RuntimeError as error:  # load_state_dict's, which lists every name
        problem = " ".join(str(error).split())
        problem = problem if len(problem) <= 160 else f"{problem[:160]}…"
        raise UserError(f"inception_weights={weights}: is not this network ({problem}); {WEIGHTS_ADVICE}") from error


@contextlib.contextmanager
def exact_arithmetic() -> Iterator[None]:
    """Turn off TF32 and all that chooses kernels by speed, and give the flags back afterwards."""
    before = torch.get_float32_matmul_precision()
    enabled = torch.backends.cudnn.enabled
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.backends.cudnn.flags(enabled=enabled, benchmark=False, deterministic=True, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


class InceptionFeatures:
    """Pool features, spatial features and class probabilities of RGB images of any size, as ADM's evaluator reads
    them.

    Args:
        weights: a .pth file, see `load_network`. device: of the network; None is CUDA where there is a GPU.
    """

    def __init__(self, weights: Path, device: torch.device | None = None) -> None:
        self.device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.weights = weights
        self.network = load_network(weights).to(self.device)
        self.spatial: Tensor | None = None
        self.network.Mixed_6d.branch1x1.register_forward_hook(self._keep_spatial)  # type: ignore[union-attr]

    def _keep_spatial(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self.spatial = output[:, :NUM_SPATIAL_CHANNELS]  # (B, 7, 17, 17), after the ReLU

    @torch.no_grad()
    def __call__(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return pool (B, 2048), spatial (B, 2023) and probabilities (B, 1008), float32, of uint8 images (B, H, W, 3).

        The spatial features are flattened H, W, C, the order of ADM's `mu_s`. The probabilities are of the logits
        without their bias.
        """
        pixels = torch.tensor(images).permute(0, 3, 1, 2).to(self.device)
        with exact_arithmetic(), torch.autocast(self.device.type, enabled=False):
            pool, logits = self.network(pixels)
            assert self.spatial is not None, "the hook has run"
            spatial = self.spatial.permute(0, 2, 3, 1).flatten(1)
            probabilities = logits.softmax(dim=1)
        self.spatial = None
        return pool.cpu().numpy(), spatial.cpu().numpy(), probabilities.cpu().numpy()


@dataclasses.dataclass(frozen=True)
class FeatureSet:
    """Features of n images: float32 arrays of those that metrics need image by image, moments of the others too."""

    pool: np.ndarray  # (n, 2048)
    probabilities: np.ndarray  # (n, 1008)
    pool_moments: Moments
    spatial_moments: Moments


def extract(images: ImageSource, features: InceptionFeatures, batch_size: int, name: str) -> FeatureSet:
    """Read a set of images once, in file order, and return its features; UserError where they are not finite."""
    pool = np.empty((len(images), NUM_POOL), dtype=np.float32)
    probabilities = np.empty((len(images), NUM_CLASSES), dtype=np.float32)
    pool_moments, spatial_moments = Moments(NUM_POOL), Moments(NUM_SPATIAL)
    with tqdm(total=len(images), unit="img", desc=name, mininterval=1.0) as progress:
        for batch in images.batches(batch_size):
            of_pool, of_spatial, of_classes = features(batch)
            if not all(np.isfinite(values).all() for values in (of_pool, of_spatial, of_classes)):
                raise UserError(f"inception_weights={features.weights}: the features are not finite; {WEIGHTS_ADVICE}")
            place = slice(progress.n, progress.n + len(batch))
            pool[place], probabilities[place] = of_pool, of_classes
            pool_moments.add(of_pool)
            spatial_moments.add(of_spatial)
            progress.update(len(batch))
    return FeatureSet(pool, probabilities, pool_moments, spatial_moments)
