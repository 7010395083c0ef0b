"""The settings that the training loop follows."""

import dataclasses
from typing import Literal

from ddt.errors import require


@dataclasses.dataclass(frozen=True)
class TrainerSettings:
    """How long, how large and how often; see conf/trainer.

    max_steps: optimizer steps. global_batch_size: images a step over all processes. micro_batch_size: images a
    process takes at once (None: its whole share); gradients are accumulated over the rest. mixed_precision: "bf16"
    autocast over float32 weights, or "fp32" ("no", Accelerate's word, means the same). num_processes: None uses every
    visible GPU, or one CPU process. ema_decay: of the averaged weights. warmup_steps: linear warm-up of the learning
    rate; lr_schedule: "constant", or "linear" decay to 0 at max_steps. The `_every` periods count steps and 0 is
    never, but the last step is always saved and logged. num_workers: loading processes.
    eval_samples: images of each evaluation.

    Raises UserError for values that cannot be.
    """

    max_steps: int
    global_batch_size: int
    micro_batch_size: int | None
    mixed_precision: Literal["bf16", "fp32", "no"]
    num_processes: int | None
    ema_decay: float
    warmup_steps: int
    lr_schedule: Literal["constant", "linear"]
    save_every: int
    log_every: int
    validate_every: int
    preview_every: int
    num_workers: int
    eval_every: int = 0
    eval_samples: int = 5_000

    def __post_init__(self) -> None:
        for key in ("max_steps", "global_batch_size", "log_every"):
            require(getattr(self, key) >= 1, f"trainer.{key}={getattr(self, key)}: must be at least 1")
        for key in ("warmup_steps", "save_every", "validate_every", "preview_every", "num_workers", "eval_every"):
            require(getattr(self, key) >= 0, f"trainer.{key}={getattr(self, key)}: must be at least 0")
        require(
            2 <= self.eval_samples <= 1_000_000,
            f"trainer.eval_samples={self.eval_samples}: must lie in 2..1000000; statistics need at least 2",
        )
        for key in ("micro_batch_size", "num_processes"):
            value = getattr(self, key)
            require(value is None or value >= 1, f"trainer.{key}={value}: must be at least 1, or null")
        require(
            0 <= self.ema_decay < 1,
            f"trainer.ema_decay={self.ema_decay}: must lie in 0..1 (published: 0.9999)",
        )
        self.micro_batches(self.num_processes or 1)

    def micro_batches(self, num_processes: int) -> tuple[int, int]:
        """Return (images a micro-batch, micro-batches a step) of each of `num_processes` processes, or raise
        UserError.
        """
        share, rest = divmod(self.global_batch_size, num_processes)
        require(
            rest == 0 and share > 0,
            f"trainer.global_batch_size={self.global_batch_size} cannot be divided among {num_processes} processes: "
            f"choose a multiple of {num_processes}",
        )
        micro = self.micro_batch_size or share
        require(
            share % micro == 0,
            f"trainer.micro_batch_size={micro} does not divide the {share} images of each process "
            f"(trainer.global_batch_size={self.global_batch_size} over {num_processes}): choose a divisor of {share}",
        )
        return micro, share // micro

    def lr_factor(self, step: int) -> float:
        """Return what the base learning rate is multiplied by in step `step`, counted from 0."""
        warmup = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        if self.lr_schedule == "constant" or step < self.warmup_steps:
            return warmup
        return (self.max_steps - step) / (self.max_steps - self.warmup_steps)

    def due(self, every: int, step: int) -> bool:
        """Tell whether something done `every` so many steps, 0 being never, is due after `step` steps.

        At the end it is due whatever the period, unless that is 0.
        """
        return every > 0 and (step == self.max_steps or step % every == 0)
