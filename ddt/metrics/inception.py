"""Features of FID's Inception network: torch-fidelity's port of the 2015 TensorFlow graph.

Shapes: B batch, H W pixels, 2048 pool features, 2023 spatial ones (17 × 17 × 7), 1008 classes.
Source: the evaluator of openai/guided-diffusion (ADM), whose numbers are the published ones.
"""

import functools
import io
import logging
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ddt.autoencoder.base import weights_hash
from ddt.errors import UserError, first_line, reason
from ddt.files import sha256
from ddt.metrics.features import exact_arithmetic
from ddt.metrics.inception_graph import read_graph
from ddt.metrics.settings import GRAPH_SHA256, WEIGHTS_ADVICE, WEIGHTS_NAME, WEIGHTS_SHA256, WEIGHTS_URL
from ddt.tensor_files import read_state_dict

log = logging.getLogger(__name__)
RESIZE = "TensorFlow 1 bilinear to 299×299, no antialiasing"
NUM_POOL, NUM_CLASSES = 2048, 1008
NUM_SPATIAL_CHANNELS = 7
NUM_SPATIAL = 17 * 17 * NUM_SPATIAL_CHANNELS


def find_weights() -> Path:
    """Return torch-fidelity's file, downloaded into torch's cache; UserError where that fails."""
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


def read_weights(weights: Path) -> dict[str, Tensor]:
    """Return the state dict in torch-fidelity's .pth file or ADM's .pb graph.

    Raises UserError for a file that is damaged or holds more than tensors.
    """
    if weights.suffix == ".pb":
        return read_graph(weights)
    return read_state_dict(weights, f"inception_weights={weights}", WEIGHTS_ADVICE)


def load_network(weights: Path) -> nn.Module:
    """Return torch-fidelity's network with the weights of a file.

    Raises UserError as `read_weights` does, and for other tensors than exactly the network's.
    """
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    # its constructor unpickles any objects, so it gets what has been read safely
    buffer = io.BytesIO()
    torch.save(read_weights(weights), buffer)
    buffer.seek(0)
    try:
        with torch.random.fork_rng(devices=[]):  # it samples weights first
            return FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"], buffer)
    except RuntimeError as error:  # load_state_dict's, which lists every name
        raise UserError(
            f"inception_weights={weights}: is not this network ({reason(error)}); {WEIGHTS_ADVICE}"
        ) from error


class InceptionFeatures:
    """Pool features, spatial features and class probabilities of RGB images of any size, as in
    ADM's evaluator; see `features.Extractor`. weights: a file, see `load_network`.
    """

    name, channels, image_size = "inception", 3, None
    spaces: ClassVar[dict[str, int]] = {"pool": NUM_POOL, "spatial": NUM_SPATIAL, "probabilities": NUM_CLASSES}
    rows = ("pool", "probabilities")
    distances: ClassVar[dict[str, str]] = {"fid": "pool", "sfid": "spatial"}
    pr_space = nearest_space = "pool"
    own_classes = False

    def __init__(self, weights: Path, batch_size: int = 64, device: torch.device | str = "cpu") -> None:
        self.weights, self.batch_size = weights, batch_size
        self.network = load_network(weights).to(device)
        self.spatial: Tensor | None = None
        self.network.Mixed_6d.branch1x1.register_forward_hook(self._keep_spatial)  # type: ignore[union-attr]

    def _keep_spatial(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self.spatial = output[:, :NUM_SPATIAL_CHANNELS]  # (B, 7, 17, 17), after the ReLU

    @functools.cached_property
    def hashes(self) -> dict[str, str]:
        """The SHA-256 of the file and of its tensors, equal for either kind of file."""
        return {"sha256": sha256(self.weights), "tensors_sha256": weights_hash(self.network)}

    def identity(self) -> dict[str, Any]:
        """Return what its features depend on."""
        return {
            "name": self.name,
            "network": "inception-v3-compat",
            "weights": {"path": str(self.weights), **self.hashes},
            "resize": RESIZE,
            "dtype": "float32",
        }

    def deviations(self) -> list[str]:
        """Return one line where the weights are neither published file."""
        if self.hashes["sha256"].startswith((WEIGHTS_SHA256, GRAPH_SHA256)):
            return []
        files = f"SHA-256 {WEIGHTS_SHA256}… of torch-fidelity, {GRAPH_SHA256[:8]}… of ADM"
        return [f"the Inception weights are neither published file ({files})"]

    @torch.no_grad()
    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """Return float32 pool (B, 2048), spatial (B, 2023) and probabilities (B, 1008) of uint8
        images (B, 3, H, W).

        Spatial features are flattened H, W, C, the order of ADM's `mu_s`. The probabilities are of
        the logits without their bias.
        """
        with exact_arithmetic(), torch.autocast(images.device.type, enabled=False):
            pool, logits = self.network(images)
            assert self.spatial is not None, "the hook has run"
            spatial = self.spatial.permute(0, 2, 3, 1).flatten(1)
            probabilities = logits.softmax(dim=1)
        self.spatial = None
        return {"pool": pool, "spatial": spatial, "probabilities": probabilities}
