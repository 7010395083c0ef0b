"""Sharing the encoder between steps: `SharedNetwork` keeps z_t, `GuidedVelocity` guides.

Shapes: B batch, n = B or 2B rows (conditional, then unconditional half), C H W latent, N tokens,
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
from ddt.flow import velocity_of
from ddt.model import Denoiser
from ddt.sampling.graphs import Function, direct
from ddt.sampling.guidance import Guidance
from ddt.sampling.settings import SamplerSettings, check_base_head

CACHE_BYTES = 4 * 2**30  # default bound on cached modulations
UNGUIDED = Guidance()


def require_encoder(model: Denoiser) -> None:
    """Raise UserError for a network that has no encoder to share."""
    if not model.shares_encoder:
        raise UserError(
            f"recompute: {type(model).__name__} has no encoder to share: use recompute=null, or a DDT model"
        )


class Encoded(NamedTuple):
    """z_t of one run of the encoder, and the decoder's modulations by it."""

    t: float
    z_t: Tensor  # (n, N, D)
    modulations: list[Tensor]  # (n, N, 6D) each, of the first decoder layers
    base: Tensor | None  # (n, C, H, W), the base head's output, where internal guidance reads it


class Mixture(Sequence[Tensor]):
    """The weighted sum of the decoder's modulations by several z_t, computed a layer at a time.

    Those not cached are computed for each z_t and then mixed: the same bits whatever was cached.
    """

    def __init__(self, model: Denoiser, kept: Sequence[Encoded], weights: Sequence[float], n: int) -> None:
        self.model, self.layers = model, model.modulation_layers
        self.kept, self.weights, self.n = kept, weights, n
        self.conditions: dict[float, Tensor] = {}  # by the time of z_t

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, i: Any) -> Any:
        total = self._modulation(self.kept[0], i) * self.weights[0]
        for encoded, weight in zip(self.kept[1:], self.weights[1:], strict=True):
            total.add_(self._modulation(encoded, i), alpha=weight)
        return total

    def _modulation(self, encoded: Encoded, i: int) -> Tensor:
        """Return the modulation (n, N, 6D or 2D) of layer i by one z_t."""
        if i < len(encoded.modulations):
            return encoded.modulations[i][: self.n]
        if encoded.t not in self.conditions:
            self.conditions[encoded.t] = self.model.condition(encoded.z_t[: self.n])
        return self.layers[i](self.conditions[encoded.t])


class SharedNetwork:
    """A network for given labels that keeps z_t, and decoder modulations by it, between steps.

    Args:
        model: a network with an encoder to share, or any with `share=False`.
        labels: classes (n,) int64, conditional ones first; a call may use only the first B.
        share: whether the encoder runs only in `encode`; False runs the whole model at each call.
        forecast_order: z_t between two runs of the encoder. 0: the last z_t, including its time
            embedding (method.md 4). 1, 2: the polynomial in t through the last two or three z_t.
            Modulations are linear in z_t: theirs is the same polynomial, and cached ones still need
            no matrix product.
        cache_bytes: bound on cached modulations; those that do not fit are computed at each call.
        internal: guidance away from the base head, of each half by itself. Between two runs of the
            encoder its output stays, or is forecast, as z_t is.
        call: how the network's functions are called, as `graphs.Graphs` does.
    """

    def __init__(
        self,
        model: Denoiser,
        labels: Tensor,
        share: bool,
        forecast_order: int,
        cache_bytes: float,
        internal: Guidance = UNGUIDED,
        call: Function = direct,
    ) -> None:
        if share:
            require_encoder(model)
        self.model, self.labels, self.share, self.internal, self.call = model, labels, share, internal, call
        self.kept: deque[Encoded] = deque(maxlen=forecast_order + 1)  # z_t kept between steps, newest last
        self.cache_bytes = cache_bytes / (forecast_order + 1)  # for each run of the encoder
        self.encoder_calls = self.decoder_calls = 0  # network evaluations per image
        self.cached_bytes = 0  # peak memory of cached modulations

    def _inputs(self, x_t: Tensor, t: float | Tensor, copies: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return x_t, t and y for `copies` times the batch, without device sync."""
        if not isinstance(t, Tensor):
            t = torch.full((len(x_t),), t, dtype=torch.float32, device=x_t.device)
        return x_t.repeat(copies, 1, 1, 1), t.float().repeat(copies), self.labels[: copies * len(x_t)]

    def encode(self, x_t: Tensor, t: float, copies: int, cache: bool, with_base: bool = False) -> None:
        """Compute and keep z_t for `copies` times the batch; with `cache` also its modulations, and
        with `with_base` the base head's output.
        """
        if self.kept and (self.kept[-1].t == t or self.kept.maxlen == 1):  # Heun calls the same t twice
            self.kept.pop()
        elif len(self.kept) == self.kept.maxlen:
            self.kept.popleft()  # free its memory first
        inputs, base = self._inputs(x_t, t, copies), None
        if with_base:
            z_t, base = self.call(self.model.encode_with_base, *inputs)
        else:
            z_t = self.call(self.model.encode, *inputs)
        self.encoder_calls += copies
        modulations = self.call(self.model.modulations, z_t, self.cache_bytes) if cache else []
        self.kept.append(Encoded(t, z_t, modulations, base))
        cached = sum(m.nbytes for encoded in self.kept for m in encoded.modulations)
        self.cached_bytes = max(self.cached_bytes, cached)

    def velocity(self, x_t: Tensor, t: float | Tensor, copies: int) -> Tensor:
        """Return float32 velocities (copies·B, C, H, W) at x_t (B, C, H, W), by the kept z_t."""
        self.decoder_calls += copies
        both, times, labels = self._inputs(x_t, t, copies)
        if self.share:
            assert not isinstance(t, Tensor), "with a time for each image nothing is shared"
            output = self._decode(both, t)
        else:
            self.encoder_calls += copies
            output = self._run(t, both, times, labels)
        return velocity_of(output.float(), both, times, self.model.prediction)

    def _run(self, t: float | Tensor, x_t: Tensor, times: Tensor, labels: Tensor) -> Tensor:
        """Return the output (n, C, H, W) of the whole model, guided by its base head's."""
        if not (self.internal.scale != 1 if isinstance(t, Tensor) else self.internal.active(t)):
            return self.call(self.model, x_t, times, labels)
        v, v_base, _ = self.call(self.model.forward_with_base, x_t, times, labels)
        combined = self.internal.combine(v.float(), v_base.float())
        return torch.where(self.internal.mask(times)[:, None, None, None], combined, v.float())

    def _decode(self, x_t: Tensor, t: float) -> Tensor:
        """Return the decoder's output (n, C, H, W) at x_t (n, C, H, W), by the kept z_t."""
        n, last = len(x_t), self.kept[-1]
        kept = list(itertools.takewhile(lambda encoded: len(encoded.z_t) >= n, reversed(self.kept)))[::-1]
        if t == last.t or len(kept) == 1:
            kept, weights = [last], [1.0]
            output = self.call(self.model.decode, x_t, last.z_t[:n], [m[:n] for m in last.modulations])
        else:
            weights = extrapolation_weights([encoded.t for encoded in kept], t)
            output = self.model.decode(x_t, last.z_t[:n], Mixture(self.model, kept, weights, n))
        if not self.internal.active(t):
            return output
        bases = [weight * encoded.base[:n].float() for weight, encoded in zip(weights, kept, strict=True)
                  if encoded.base is not None]  # fmt: skip
        assert len(bases) == len(kept), "segments that are guided, or forecast from, have the base head's output"
        return self.internal.combine(output.float(), torch.stack(bases).sum(0))


def extrapolation_weights(times: Sequence[float], t: float) -> list[float]:
    """Return the values (len(times),) at t of the Lagrange polynomials through `times`; sum 1."""
    nodes = np.array(times)
    return [float(np.prod((t - np.delete(nodes, i)) / (node - np.delete(nodes, i)))) for i, node in enumerate(nodes)]


class Segment(NamedTuple):
    """How the encoder runs in the first step of a segment of steps that share one z_t."""

    both_halves: bool  # for the unconditional half too
    cache: bool  # several calls read this z_t: the decoder's modulations are cached
    with_base: bool  # for the base head too


def segments(settings: SamplerSettings) -> dict[int, Segment]:
    """Return the segments of a sampler by their first steps; none where nothing is shared.

    The encoder runs for both halves where any call of the segment is guided, and in the segments
    from which a guided one is forecast; likewise for the base head where one is guided internally.
    """
    starts, times = settings.schedule(), settings.call_times()
    if starts is None:
        return {}
    ends, order = [*starts[1:], len(times)], settings.forecast_order
    guided, internal = (
        [
            any(guidance.active(t, step) for step in range(start, end) for t in times[step])
            for start, end in zip(starts, ends, strict=True)
        ]
        for guidance in (settings.guidance(), settings.internal())
    )
    return {
        start: Segment(
            both_halves=any(guided[i : i + 1 + order]),
            cache=end - start > 1 or order > 0,
            with_base=any(internal[i : i + 1 + order]),
        )
        for i, (start, end) in enumerate(zip(starts, ends, strict=True))
    }


class GuidedVelocity:
    """A network's velocity, guided where guidance is active, its encoder run on schedule.

    Args:
        model: a network with an encoder to share, or any where `settings.recompute` is None.
        y: classes (B,) int64.
        settings: guidance, schedule and forecasts of the sampler.
        guide: the weaker network of autoguidance; None guides away from the unconditional velocity.
        cache_bytes: see `SharedNetwork`; for each network. call: likewise.

    Without a guide, a guided call runs both halves as one batch of 2B, another B alone. The encoder
    runs at every call of a recompute step and at no other (`segments`). Source: method.md 4.
    Internal guidance is of each half of the model, before they are combined; a guide has none.
    Raises UserError for a schedule on a model without an encoder, and for internal guidance of one
    without a base head.
    """

    def __init__(
        self,
        model: Denoiser,
        y: Tensor,
        settings: SamplerSettings,
        guide: Denoiser | None = None,
        cache_bytes: float = CACHE_BYTES,
        call: Function = direct,
    ) -> None:
        self.guidance, self.segments = settings.guidance(), segments(settings)
        labels = y if guide else torch.cat([y, torch.full_like(y, model.num_classes)])
        share, order = settings.recompute is not None, settings.forecast_order
        check_base_head(settings, model.base_depth)
        self.network = SharedNetwork(model, labels, share, order, cache_bytes, settings.internal(), call)
        # a guide without an encoder runs whole
        self.guide = None
        if guide is not None:
            self.guide = SharedNetwork(guide, y, share and guide.shares_encoder, order, cache_bytes, call=call)

    def __call__(self, x_t: Tensor, t: float | Tensor, step: int) -> Tensor:
        """Return the float32 velocity (B, C, H, W) at x_t (B, C, H, W) and time t in a step; where
        nothing is shared, t may be a tensor (B,), a time for each image.
        """
        mask = None
        if isinstance(t, Tensor):
            mask = self.guidance.mask(t)
            guided = bool(mask.any())
        else:
            guided = self.guidance.active(t, step)
            if step in self.segments:
                both_halves, cache, with_base = self.segments[step]
                self.network.encode(x_t, t, 2 if both_halves and self.guide is None else 1, cache, with_base)
                if self.guide is not None and self.guide.share and both_halves:
                    self.guide.encode(x_t, t, 1, cache)
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
        """Network evaluations per image: `encoder`, `decoder`, with a guide `guide_encoder`, …"""
        counts = {"encoder": self.network.encoder_calls, "decoder": self.network.decoder_calls}
        if self.guide is not None:
            counts |= {"guide_encoder": self.guide.encoder_calls, "guide_decoder": self.guide.decoder_calls}
        return counts

    @property
    def cached_bytes(self) -> int:
        """Peak memory of cached modulations."""
        return self.network.cached_bytes + (self.guide.cached_bytes if self.guide else 0)
