"""Classes and seeds to images: `Generator` holds network, autoencoder, sampler and device.

Shapes: B batch, C H W latent (latents) or image (pixels).
"""

import contextlib
import dataclasses

import numpy as np
import torch
from torch import Tensor, nn

from ddt.autoencoder import Autoencoder
from ddt.draws import noise_of
from ddt.model import Denoiser
from ddt.precision import HALF_TYPES, Dtype, autocast, torch_dtype
from ddt.sampling.graphs import Graphs
from ddt.sampling.sample import Observer, sample_latents
from ddt.sampling.settings import SamplerSettings
from ddt.sampling.sharing import CACHE_BYTES


def cast_weights(model: nn.Module, dtype: Dtype) -> None:
    """Cast linears and convolutions in place to a 16-bit type, as autocast does at every call: the
    same bits under autocast in half the memory. Norms and embedding tables stay float32.
    """
    for layer in model.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d) and dtype in HALF_TYPES:
            layer.to(torch_dtype(dtype))


def check_finite(
    latents: Tensor, first: int = 0, advice: str = "dtype=fp32, forecast_order=0 or a smaller cfg_scale"
) -> None:
    """Raise FloatingPointError where latents (B, C, H, W), of image `first` and those after it, are
    NaN or infinite: they would be decoded to a constant picture.

    A device sync, so no part of sampling: whoever decodes latents or returns them calls it.
    """
    others = f" or one of the {len(latents) - 1} after it" if len(latents) > 1 else ""
    if not bool(latents.isfinite().all()):
        raise FloatingPointError(f"image {first}{others} is NaN or infinite: try {advice}")


@dataclasses.dataclass(frozen=True)
class Generator:
    """Samples images from classes and seeds."""

    model: Denoiser
    autoencoder: Autoencoder
    shape: tuple[int, int, int]  # (C, H, W) of a latent
    settings: SamplerSettings  # `recompute` resolved by `fitting.resolve_recompute` before sampling
    dtype: Dtype  # bf16, fp16: networks and autoencoder run under autocast
    device: torch.device
    guide: Denoiser | None = None  # the weaker network of autoguidance
    cache_bytes: float = CACHE_BYTES
    compiled: bool = False  # whether the networks' blocks are, for the receipt
    observe: Observer | None = None  # see `ddt.sample`
    graphs: Graphs = dataclasses.field(default_factory=Graphs)  # of the networks' calls, for few images

    def autocast(self) -> torch.autocast:
        """Return the autocast context of networks and autoencoder; each thread enters its own."""
        return autocast(self.device, self.dtype)

    def exact(self) -> contextlib.AbstractContextManager[None]:
        """Return the context in which equal calls give equal bits, and fp32 means no TF32."""
        return torch.backends.cudnn.flags(
            enabled=True, benchmark=False, deterministic=True, allow_tf32=self.dtype in HALF_TYPES
        )

    def latents(self, classes: list[int], seeds: list[int]) -> tuple[Tensor, dict[str, int]]:
        """Sample latents (B, C, H, W); return them and the network calls per image."""
        return self.from_noise(noise_of(seeds, self.shape).to(self.device), classes)

    @torch.no_grad()
    def from_noise(self, noise: Tensor, classes: list[int]) -> tuple[Tensor, dict[str, int]]:
        """As `latents`, from noise (B, C, H, W) on the device."""
        counts: dict[str, int] = {}
        y = torch.tensor(classes, device=self.device)
        with self.autocast():
            latents = sample_latents(
                self.model, noise, y, self.settings, guide=self.guide, cache_bytes=self.cache_bytes, counts=counts,
                observe=self.observe, call=self.graphs,
            )  # fmt: skip
        return latents, counts

    @torch.no_grad()
    def pixels(self, latents: Tensor, ready: torch.cuda.Event | None, stream: torch.cuda.Stream | None) -> np.ndarray:
        """Decode latents to uint8 images (B, H, W, C); on a GPU in `stream`, after `ready`."""
        with contextlib.nullcontext() if stream is None else torch.cuda.stream(stream), self.autocast():
            if stream is not None and ready is not None:
                stream.wait_event(ready)
                latents.record_stream(stream)
            return self.autoencoder.decode(latents).permute(0, 2, 3, 1).cpu().numpy()
