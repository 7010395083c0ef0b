"""Sharing the encoder between neighbouring steps: recompute schedules and the velocity that follows one.

Shapes: B batch, C H W latent, N tokens, D width. Source: method.md 4, "Sharing the encoder between steps".
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ddt.errors import UserError, require
from ddt.guidance import Guidance
from ddt.model import Denoiser


def uniform_schedule(num_steps: int, every: int) -> list[int]:
    """Return the steps 0, every, 2·every, … below num_steps at which the encoder runs. Source: method.md 4.

    Raises UserError where num_steps or every is below 1.
    """
    require(num_steps >= 1, f"num_steps={num_steps}: must be at least 1")
    require(every >= 1, f"recompute every {every} steps: must be at least 1 (1 means no sharing)")
    return list(range(0, num_steps, every))


def check_schedule(recompute: Sequence[int], num_steps: int) -> list[int]:
    """Return the schedule as a sorted list; raise UserError unless it is a set of steps in range that holds step 0."""
    steps = sorted(set(recompute))
    require(len(steps) == len(recompute), f"recompute={list(recompute)}: a step is named twice")
    require(
        bool(steps) and steps[0] == 0,
        f"recompute={list(recompute)}: step 0 must be among them, there is no z yet",
    )
    require(
        steps[-1] < num_steps,
        f"recompute={list(recompute)}: step {steps[-1]} does not exist, num_steps={num_steps}",
    )
    return steps


class GuidedVelocity:
    """The velocity of a network for given classes, guided inside an interval, its encoder run on schedule.

    Args:
        model: a DDT, or with `recompute=None` any network `(x_t, t, y) → v` with `num_classes`.
        y: classes (B,) int64.
        grid: the solver's times, num_steps + 1 of them.
        guidance: strength and interval.
        recompute: steps at which the encoder runs; None runs the whole network at every step. At the others the last
        z is used
            as it is, including the time embedding it was made with.

    Conditional and unconditional half run as one batch of 2B where a step is guided, and as B where not. At a recompute
    step whose segment reaches into the interval the encoder runs for both halves. `encoder_calls` and
    `decoder_calls` count network evaluations an image: a guided step costs two.

    Source: method.md 4. Raises UserError for a schedule that is none, or one on a model without an encoder.
    """

    def __init__(
        self,
        model: Denoiser,
        y: Tensor,
        grid: Sequence[float],
        guidance: Guidance,
        recompute: Sequence[int] | None = None,
    ) -> None:
        num_steps = len(grid) - 1
        self.model = model
        self.guidance = guidance
        null_label = torch.full_like(y, model.num_classes)
        self.labels = torch.cat([y, null_label])  # (2B,)
        self.batch = len(y)
        self.encoder_calls = self.decoder_calls = 0
        self.z: Tensor | None = None  # (B or 2B, N, D)
        guided = [guidance.active(t) for t in grid[:-1]]
        self.encodes: dict[int, int] = {}  # step -> halves that the encoder runs for
        if recompute is not None:
            if not hasattr(model, "encoder"):
                raise UserError(
                    f"recompute: {type(model).__name__} has no encoder to share: use recompute=null, or a DDT model"
                )
            starts = check_schedule(recompute, num_steps)
            for start, end in zip(starts, [*starts[1:], num_steps], strict=True):
                self.encodes[start] = 2 if any(guided[start:end]) else 1
        self.shared = recompute is not None

    def _evaluate(self, x_t: Tensor, t: float, step: int, halves: int) -> Tensor:
        """Return the velocities (halves·B, C, H, W) of x_t (B, C, H, W), conditional half first."""
        if not self.shared:
            self.encoder_calls += halves
            return self.model(*self._inputs(x_t, t, halves))
        if step in self.encodes:
            self.z = self.model.encode(*self._inputs(x_t, t, self.encodes[step]))
            self.encoder_calls += self.encodes[step]
        assert self.z is not None, "a solver starts at step 0, where the encoder runs"
        return self.model.decode(x_t.repeat(halves, 1, 1, 1), self.z[: halves * self.batch])

    def _inputs(self, x_t: Tensor, t: float, halves: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return x_t, t and y for a batch of `halves` halves; t is filled on the device, nothing waits for it."""
        n = halves * self.batch
        times = torch.full((n,), t, dtype=torch.float32, device=x_t.device)
        return x_t.repeat(halves, 1, 1, 1), times, self.labels[:n]

    def __call__(self, x_t: Tensor, t: float, step: int) -> Tensor:
        """Return the float32 velocity (B, C, H, W) at x_t (B, C, H, W) and time t, in step `step`."""
        guided = self.guidance.active(t)
        halves = 2 if guided else 1
        v = self._evaluate(x_t, t, step, halves).float()
        self.decoder_calls += halves
        return self.guidance.combine(v) if guided else v
