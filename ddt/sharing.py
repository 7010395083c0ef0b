"""Sharing the encoder between neighbouring steps: a network whose z is kept, and the guided velocity made of it.

Shapes: B batch, C H W latent, N tokens, D width. Source: method.md 4, "Sharing the encoder between steps".
"""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from ddt.errors import UserError
from ddt.guidance import Guidance
from ddt.model import DDT, Denoiser
from ddt.schedules import check_schedule

CACHE_BYTES = 4 * 2**30  # modulations kept by default


class SharedNetwork:
    """A network for given labels whose encoder need not run at every call; the decoder's modulations are kept with z.

    Args:
        model: a DDT, or with `share=False` any network `(x_t, t, y) → v`.
        labels: classes (n,) int64, conditional ones first; a call may ask for the first of them only.
        share: whether `encode` and `decode` are called apart.
        cache_bytes: bound on the memory of kept modulations; what does not fit is computed at each call.

    `encoder_calls` and `decoder_calls` count evaluations of the network an image; `cached_bytes` is the most memory
    that kept modulations have taken.
    """

    def __init__(self, model: Denoiser, labels: Tensor, share: bool, cache_bytes: float = CACHE_BYTES) -> None:
        if share and not isinstance(model, DDT):
            raise UserError(
                f"recompute: {type(model).__name__} has no encoder to share: use recompute=null, or a DDT model"
            )
        self.model, self.labels, self.share, self.cache_bytes = model, labels, share, cache_bytes
        self.z: Tensor | None = None  # (n, N, D)
        self.modulations: list[Tensor] = []  # (n, N, 6D) each, of the first decoder layers
        self.encoder_calls = self.decoder_calls = self.cached_bytes = 0

    def _inputs(self, x_t: Tensor, t: float | Tensor, copies: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return x_t, t and y for `copies` times the batch; t is filled on the device, nothing waits for it."""
        if not isinstance(t, Tensor):
            t = torch.full((len(x_t),), t, dtype=torch.float32, device=x_t.device)
        return x_t.repeat(copies, 1, 1, 1), t.float().repeat(copies), self.labels[: copies * len(x_t)]

    def encode(self, x_t: Tensor, t: float | Tensor, copies: int, keep: bool) -> None:
        """Compute z for `copies` times the batch; with `keep`, for several calls, the decoder's modulations too."""
        assert isinstance(self.model, DDT)
        self.modulations = []  # freed before the next ones are made
        self.z = self.model.encode(*self._inputs(x_t, t, copies))
        self.encoder_calls += copies
        if keep:
            self.modulations = self.model.decoder.modulations(self.z, self.cache_bytes)
            self.cached_bytes = max(self.cached_bytes, sum(m.nbytes for m in self.modulations))

    def velocity(self, x_t: Tensor, t: float | Tensor, copies: int) -> Tensor:
        """Return float32 velocities (copies·B, C, H, W) of x_t (B, C, H, W), by the kept z where it is shared."""
        self.decoder_calls += copies
        if not self.share:
            self.encoder_calls += copies
            return self.model(*self._inputs(x_t, t, copies)).float()
        assert isinstance(self.model, DDT)
        assert self.z is not None, "a solver starts at step 0, where the encoder runs"
        n = copies * len(x_t)
        modulations = [m[:n] for m in self.modulations]
        return self.model.decode(x_t.repeat(copies, 1, 1, 1), self.z[:n], modulations).float()


class GuidedVelocity:
    """The velocity of a network for given classes, guided where guidance is active, its encoder run on schedule.

    Args:
        model: a DDT, or with `recompute=None` any network `(x_t, t, y) → v` with `num_classes`.
        y: classes (B,) int64.
        times: for each step the times at which the solver calls (`solvers.call_times`).
        guidance: when and how strongly.
        recompute: steps at which the encoder runs; None runs the whole network at every call. At the others the last z
            is used as it is, including the time embedding it was made with.
        guide: the weaker network of autoguidance, asked for the same classes; None guides away from the unconditional
            velocity of `model` itself.
        cache_bytes: bound on the memory of kept modulations, of each network.

    Without a guide, conditional and unconditional half run as one batch of 2B where a call is guided, and as B where
    not. At every call of a recompute step the encoder runs, at no call of another step; where the step's segment is
    guided anywhere it runs for both halves. Source: method.md 4.

    Raises UserError for a schedule that is none, or one on a model without an encoder.
    """

    def __init__(
        self,
        model: Denoiser,
        y: Tensor,
        times: Sequence[Sequence[float]],
        guidance: Guidance,
        recompute: Sequence[int] | None = None,
        guide: Denoiser | None = None,
        cache_bytes: float = CACHE_BYTES,
    ) -> None:
        self.guidance = guidance
        labels = y if guide else torch.cat([y, torch.full_like(y, model.num_classes)])
        share = recompute is not None
        self.network = SharedNetwork(model, labels, share, cache_bytes)
        share_guide = share and isinstance(guide, DDT)  # a guide without encoder runs whole
        self.guide = SharedNetwork(guide, y, share_guide, cache_bytes) if guide else None
        self.segments: dict[int, tuple[bool, bool]] = {}  # its first step -> is it guided anywhere, has it other steps
        if recompute is not None:
            starts = check_schedule(recompute, len(times))
            for start, end in itertools.pairwise([*starts, len(times)]):
                guided = any(guidance.active(t, step) for step in range(start, end) for t in times[step])
                self.segments[start] = guided, end - start > 1

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
            reaches, keep = self.segments[step]
            self.network.encode(x_t, t, 2 if reaches and self.guide is None else 1, keep)
            if self.guide is not None and self.guide.share and reaches:
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
        """The network evaluations an image so far: `encoder`, `decoder`, and of a guide `guide_encoder`, …"""
        counts = {"encoder": self.network.encoder_calls, "decoder": self.network.decoder_calls}
        if self.guide is not None:
            counts |= {"guide_encoder": self.guide.encoder_calls, "guide_decoder": self.guide.decoder_calls}
        return counts

    @property
    def cached_bytes(self) -> int:
        """The most memory that kept modulations have taken."""
        return self.network.cached_bytes + (self.guide.cached_bytes if self.guide else 0)
