"""Sharing the encoder between neighbouring steps: a network that keeps z_t, and the guided velocity
made of it.

Shapes: B batch, n of 1 or 2 copies of it (conditional, unconditional half), C H W latent, N tokens,
D width. Source: method.md 4, "Sharing the encoder between steps".
"""

import itertools
from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ddt.errors import UserError
from ddt.model import Denoiser
from ddt.sampling.settings import SamplerSettings

CACHE_BYTES = 4 * 2**30  # of modulations kept by default


def require_encoder(model: Denoiser) -> None:
    """Raise UserError for a network that has no encoder to share."""
    if not model.shares_encoder:
        raise UserError(
            f"recompute: {type(model).__name__} has no encoder to share: use recompute=null, or a DDT model"
        )


class Encoded(NamedTuple):
    """What one run of the encoder leaves behind."""

    t: float
    z: Tensor  # (n, N, D)
    modulations: list[Tensor]  # (n, N, 6D) each, of the first decoder layers


class Mixture(Sequence[Tensor]):
    """The decoder's modulations, layer by layer, as the weighted sum of those of several z, made
    when asked for.

    What was not kept is computed for each z before it is mixed, so that the sum is the same however
    much was kept.
    """

    def __init__(self, model: Denoiser, past: Sequence[Encoded], weights: Sequence[float], n: int) -> None:
        self.layers = model.modulation_layers
        self.past, self.weights, self.n = past, weights, n

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, i: Any) -> Any:
        total = self._modulation(self.past[0], i) * self.weights[0]
        for encoded, weight in zip(self.past[1:], self.weights[1:], strict=True):
            total.add_(self._modulation(encoded, i), alpha=weight)
        return total

    def _modulation(self, encoded: Encoded, i: int) -> Tensor:
        """Return the modulations (n, N, 6D or 2D) of layer i by one z."""
        if i < len(encoded.modulations):
            return encoded.modulations[i][: self.n]
        return self.layers[i](encoded.z[: self.n])


class SharedNetwork:
    """A network for given labels whose encoder need not run at every call; the decoder's
    modulations are kept with z.

    Args:
        model: a network with an encoder to share, or with `share=False` any.
        labels: classes (n,) int64, conditional ones first; a call may ask for the first of them
            only.
        share: whether `encode` and `decode` are called apart.
        forecast_order: what z is between two runs of the encoder. 0: the last z as it is, including
            the time embedding it was made with (method.md 4). 1, 2: the polynomial in t through the
            last two or three z. The modulations are linear in z, so theirs is the same polynomial,
            and kept ones still need no matrix product.
        cache_bytes: bound on the memory of kept modulations; what does not fit is computed at each
            call.

    `encoder_calls` and `decoder_calls` count evaluations of the network per image; `cached_bytes`
    is the most memory that kept modulations have taken.
    """

    def __init__(
        self,
        model: Denoiser,
        labels: Tensor,
        share: bool,
        forecast_order: int = 0,
        cache_bytes: float = CACHE_BYTES,
    ) -> None:
        if share:
            require_encoder(model)
        self.model, self.labels, self.share = model, labels, share
        self.past: deque[Encoded] = deque(maxlen=forecast_order + 1)
        self.cache_bytes = cache_bytes / (forecast_order + 1)  # of each run of the encoder
        self.encoder_calls = self.decoder_calls = self.cached_bytes = 0

    def _inputs(self, x_t: Tensor, t: float | Tensor, copies: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return x_t, t and y for `copies` times the batch; t is filled on the device: no sync."""
        if not isinstance(t, Tensor):
            t = torch.full((len(x_t),), t, dtype=torch.float32, device=x_t.device)
        return x_t.repeat(copies, 1, 1, 1), t.float().repeat(copies), self.labels[: copies * len(x_t)]

    def encode(self, x_t: Tensor, t: float, copies: int, keep: bool) -> None:
        """Compute z for `copies` times the batch; with `keep`, for several calls, the decoder's
        modulations too.
        """
        if self.past and (self.past[-1].t == t or self.past.maxlen == 1):  # Heun meets the same t twice
            self.past.pop()
        elif len(self.past) == self.past.maxlen:
            self.past.popleft()  # freed before the next one is made
        z = self.model.encode(*self._inputs(x_t, t, copies))
        self.encoder_calls += copies
        modulations = self.model.modulations(z, self.cache_bytes) if keep else []
        self.past.append(Encoded(t, z, modulations))
        kept = sum(m.nbytes for encoded in self.past for m in encoded.modulations)
        self.cached_bytes = max(self.cached_bytes, kept)

    def velocity(self, x_t: Tensor, t: float | Tensor, copies: int) -> Tensor:
        """Return float32 velocities (copies·B, C, H, W) of x_t (B, C, H, W), by the kept z where it
        is shared.
        """
        self.decoder_calls += copies
        if not self.share:
            self.encoder_calls += copies
            return self.model(*self._inputs(x_t, t, copies)).float()
        assert not isinstance(t, Tensor), "with a time for each image nothing is shared"
        n = copies * len(x_t)
        both, last = x_t.repeat(copies, 1, 1, 1), self.past[-1]
        past = list(itertools.takewhile(lambda encoded: len(encoded.z) >= n, reversed(self.past)))[::-1]
        if t == last.t or len(past) == 1:
            return self.model.decode(both, last.z[:n], [m[:n] for m in last.modulations]).float()
        weights = extrapolation_weights([encoded.t for encoded in past], t)
        return self.model.decode(both, last.z[:n], Mixture(self.model, past, weights, n)).float()


def extrapolation_weights(times: Sequence[float], t: float) -> list[float]:
    """Return the values at t of the Lagrange polynomials through `times`, (len(times),); they add
    up to 1.
    """
    nodes = np.array(times)
    return [float(np.prod((t - np.delete(nodes, i)) / (node - np.delete(nodes, i)))) for i, node in enumerate(nodes)]


class Segment(NamedTuple):
    """What the encoder does in the step that begins a segment of steps with one z."""

    both_halves: bool  # runs for the unconditional half too
    keep: bool  # several calls read this z: the decoder's modulations are kept


def segments(settings: SamplerSettings) -> dict[int, Segment]:
    """Return the segments of a sampler by their first steps; none where nothing is shared.

    Where a segment is guided anywhere its encoder runs for both halves, and so it does in the
    segments from which a guided one is forecast.
    """
    starts, times, guidance = settings.schedule(), settings.call_times(), settings.guidance()
    if starts is None:
        return {}
    ends, order = [*starts[1:], len(times)], settings.forecast_order
    guided = [
        any(guidance.active(t, step) for step in range(start, end) for t in times[step])
        for start, end in zip(starts, ends, strict=True)
    ]
    return {
        start: Segment(any(guided[i : i + 1 + order]), end - start > 1 or order > 0)
        for i, (start, end) in enumerate(zip(starts, ends, strict=True))
    }


class GuidedVelocity:
    """The velocity of a network for given classes, guided where guidance is active, its encoder run
    on schedule.

    Args:
        model: a network with an encoder to share, or with `settings.recompute` None any.
        y: classes (B,) int64.
        settings: guidance, schedule and forecasts of the sampler.
        guide: the weaker network of autoguidance, asked for the same classes; None guides away from
            the unconditional velocity of `model` itself.
        cache_bytes: see `SharedNetwork`; the bound of each network.

    Without a guide, conditional and unconditional half run as one batch of 2B where a call is
    guided, and as B where not. At every call of a recompute step the encoder runs, at no call of
    another step (`segments`). Source: method.md 4.

    Raises UserError for a schedule on a model without an encoder.
    """

    def __init__(
        self,
        model: Denoiser,
        y: Tensor,
        settings: SamplerSettings,
        guide: Denoiser | None = None,
        cache_bytes: float = CACHE_BYTES,
    ) -> None:
        self.guidance, self.segments = settings.guidance(), segments(settings)
        labels = y if guide else torch.cat([y, torch.full_like(y, model.num_classes)])
        share, order = settings.recompute is not None, settings.forecast_order
        self.network = SharedNetwork(model, labels, share, order, cache_bytes)
        # a guide without an encoder runs whole
        self.guide = SharedNetwork(guide, y, share and guide.shares_encoder, order, cache_bytes) if guide else None

    def __call__(self, x_t: Tensor, t: float | Tensor, step: int) -> Tensor:
        """Return the float32 velocity (B, C, H, W) at x_t (B, C, H, W) and time t, in step `step`.

        t may be a tensor (B,), a time for each image, where nothing is shared.
        """
        mask = None
        if isinstance(t, Tensor):
            mask = self.guidance.mask(t)
            guided = bool(mask.any())
        else:
            guided = self.guidance.active(t, step)
            if step in self.segments:
                both_halves, keep = self.segments[step]
                self.network.encode(x_t, t, 2 if both_halves and self.guide is None else 1, keep)
                if self.guide is not None and self.guide.share and both_halves:
                    self.guide.encode(x_t, t, 1, keep)
        if not guided:
            return self.network.velocity(x_t, t, 1)
        if self.guide is None:
            v, v_guide = self.network.velocity(x_t, t, 2).chunk(2)
        else:
            v, v_guide = self.network.velocity(x_t, t, 1), self.guide.velocity(x_t, t, 1)
        combined = self.guidance.combine(v, v_guide)
        return combined if mask is None else torch.where(mask[:, None, None, None], combined, v)

    @property
    def calls(self) -> dict[str, int]:
        """The network evaluations per image so far: `encoder`, `decoder`, and of a guide
        `guide_encoder`, …
        """
        counts = {"encoder": self.network.encoder_calls, "decoder": self.network.decoder_calls}
        if self.guide is not None:
            counts |= {"guide_encoder": self.guide.encoder_calls, "guide_decoder": self.guide.decoder_calls}
        return counts

    @property
    def cached_bytes(self) -> int:
        """The most memory that kept modulations have taken."""
        return self.network.cached_bytes + (self.guide.cached_bytes if self.guide else 0)
