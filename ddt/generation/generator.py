"""What turns classes and seeds into images: a network, its autoencoder, a sampler, a device.

Shapes: B batch, C H W latent (latents) or image (pixels).
"""

import contextlib
import dataclasses
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from ddt.autoencoder import Autoencoder
from ddt.draws import noise_of
from ddt.model import Denoiser
from ddt.sampling.sample import Observer, sample_latents
from ddt.sampling.settings import SamplerSettings
from ddt.sampling.sharing import CACHE_BYTES

Dtype = Literal["bf16", "fp32"]


def usual_dtype(device: torch.device) -> Dtype:
    """Return the precision that networks run in on a device unless another is asked for."""
    return "bf16" if device.type == "cuda" else "fp32"


def cast_weights(model: nn.Module) -> None:
    """Cast in place to bfloat16 those weights that autocast casts at every call: of linear layers
    and convolutions.

    Under autocast the results stay the same bits, and weights take half the memory; norms and
    tables of embeddings, which autocast leaves alone, stay float32.
    """
    for layer in model.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            layer.to(torch.bfloat16)


@dataclasses.dataclass(frozen=True)
class Generator:
    """What turns a class and a seed into an image.

    model, guide: networks; guide is the weaker one of autoguidance, or None. shape: (C, H, W) of a
    latent. settings: the sampler; before images are sampled, `fitting.resolve_recompute` makes a
    list of its `recompute`. dtype: "bf16" runs networks and autoencoder under autocast. compiled:
    whether the networks' blocks are, for the receipt. observe: see `ddt.sample`.
    """

    model: Denoiser
    autoencoder: Autoencoder
    shape: tuple[int, int, int]
    settings: SamplerSettings
    dtype: Dtype
    device: torch.device
    guide: Denoiser | None = None
    cache_bytes: float = CACHE_BYTES
    compiled: bool = False
    observe: Observer | None = None

    def autocast(self) -> torch.autocast:
        """Return the context of the networks; every thread enters its own."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.dtype == "bf16")

    def exact(self) -> contextlib.AbstractContextManager[None]:
        """Return the context in which equal calls on one GPU give equal bits, and fp32 means
        float32.
        """
        return torch.backends.cudnn.flags(
            enabled=True, benchmark=False, deterministic=True, allow_tf32=self.dtype == "bf16"
        )

    def latents(self, classes: list[int], seeds: list[int]) -> tuple[Tensor, dict[str, int]]:
        """Return the latents (B, C, H, W) of some images, and the network calls per image."""
        return self.from_noise(noise_of(seeds, self.shape).to(self.device), classes)

    @torch.no_grad()
    def from_noise(self, noise: Tensor, classes: list[int]) -> tuple[Tensor, dict[str, int]]:
        """Return what `latents` does, of the noise (B, C, H, W) itself."""
        counts: dict[str, int] = {}
        y = torch.tensor(classes, device=self.device)
        with self.autocast():
            latents = sample_latents(
                self.model, noise, y, self.settings, guide=self.guide, cache_bytes=self.cache_bytes, counts=counts,
                observe=self.observe,
            )  # fmt: skip
        return latents, counts

    @torch.no_grad()
    def pixels(self, latents: Tensor, ready: torch.cuda.Event | None, stream: torch.cuda.Stream | None) -> np.ndarray:
        """Return uint8 images (B, H, W, C); on a GPU in a stream of its own, once `ready` has
        passed.
        """
        with contextlib.nullcontext() if stream is None else torch.cuda.stream(stream), self.autocast():
            if stream is not None and ready is not None:
                stream.wait_event(ready)
                latents.record_stream(stream)
            return self.autoencoder.decode(latents).permute(0, 2, 3, 1).cpu().numpy()
