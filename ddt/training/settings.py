"""The settings that the training loop follows."""

import dataclasses
import math
from typing import Literal

from ddt.errors import require
from ddt.metrics.comparability import short
from ddt.training.stopping import MARGIN


def metric_suffix(num_samples: int) -> str:
    """Return how the logged names of an evaluation end: with the number of samples it is of, as in
    `fid_5k`.
    """
    return f"_{short(num_samples).lower()}"


@dataclasses.dataclass(frozen=True)
class TrainerSettings:
    """How long, how large and how often; see conf/trainer.

    max_steps: optimizer steps. global_batch_size: images a step over all processes.
    micro_batch_size: images a process takes at once (None: its whole share); gradients are
    accumulated over the rest. mixed_precision: "bf16" autocast over float32 weights, or "fp32"
    ("no", Accelerate's word, means the same). num_processes: None uses every visible GPU, or one
    CPU process. parallelism: "ddp" keeps the whole network on each process, "fsdp" shards weights,
    averages and optimizer among them. compile: the network's blocks (`ddt.distributed.compile`);
    None compiles on GPUs.

    ema_decay: of the averaged weights. ema_decays: further averages kept beside; ema_powers:
    relative standard deviations of power-function averages (EDM2), of which `snapshot_every` so
    many steps a snapshot is kept, for any length afterwards. warmup_steps: linear warm-up of the
    learning rate; lr_schedule: "constant", or decay to 0 at max_steps by a "linear" or "cosine"
    law. clip_norm: gradients of a larger norm are scaled down to it.

    The `_every` periods count steps and 0 is never, but the last step is always saved and logged.
    keep_last: how many checkpoints stay (None: all), beside those of every `keep_every`-th step and
    the best by the logged `keep_best`.
    max_hours: the run stops with a checkpoint before so many hours are over. num_workers: loading
    processes.
    eval_samples: images of each evaluation.

    Raises UserError for values that cannot be, or that would have no effect.
    """

    max_steps: int
    global_batch_size: int
    micro_batch_size: int | None
    mixed_precision: Literal["bf16", "fp32", "no"]
    num_processes: int | None
    ema_decay: float
    warmup_steps: int
    lr_schedule: Literal["constant", "linear", "cosine"]
    save_every: int
    log_every: int
    validate_every: int
    preview_every: int
    num_workers: int
    eval_every: int = 0
    eval_samples: int = 5_000
    parallelism: Literal["ddp", "fsdp"] = "ddp"
    compile: bool | None = None
    ema_decays: tuple[float, ...] = ()
    ema_powers: tuple[float, ...] = ()
    snapshot_every: int = 0
    clip_norm: float | None = None
    keep_last: int | None = None
    keep_every: int = 0
    keep_best: str | None = None
    max_hours: float | None = None

    def __post_init__(self) -> None:
        for key in ("max_steps", "global_batch_size", "log_every"):
            require(getattr(self, key) >= 1, f"trainer.{key}={getattr(self, key)}: must be at least 1")
        for key in (
            "warmup_steps", "save_every", "validate_every", "preview_every", "num_workers", "eval_every",
            "snapshot_every", "keep_every",
        ):  # fmt: skip
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
        self.check_averages()
        for key in ("clip_norm", "max_hours"):
            value = getattr(self, key)
            require(value is None or 0 < value < math.inf, f"trainer.{key}={value}: must be above 0, or null")
        require(
            self.max_hours is None or self.max_hours * 3600 > 2 * MARGIN,
            f"trainer.max_hours={self.max_hours}: give more than {2 * MARGIN / 3600:.3f}, for the run stops {MARGIN} s "
            "and two saves before",
        )
        self.check_retention()
        self.micro_batches(self.num_processes or 1)

    def check_averages(self) -> None:
        """Raise UserError for averages beside the first that cannot be."""
        for decay in self.ema_decays:
            require(0 <= decay < 1, f"trainer.ema_decays={list(self.ema_decays)}: each must lie in 0..1")
        for std in self.ema_powers:
            require(
                0 < std < 0.28,  # a flat average over the whole run has 1/√12 = 0.289
                f"trainer.ema_powers={list(self.ema_powers)}: each is a relative standard deviation in 0..0.28, such "
                "as 0.05",
            )
        for key in ("ema_decays", "ema_powers"):
            values = getattr(self, key)
            require(len(set(values)) == len(values), f"trainer.{key}={list(values)}: names a value twice")
        require(
            self.snapshot_every == 0 or len(self.ema_powers) > 0,
            f"trainer.snapshot_every={self.snapshot_every}: has no effect without trainer.ema_powers=; give "
            "[0.05,0.1], or 0",
        )

    def check_retention(self) -> None:
        """Raise UserError for rules of which checkpoints stay that cannot be, or have no effect."""
        require(
            self.keep_last is None or self.keep_last >= 2,
            f"trainer.keep_last={self.keep_last}: must be at least 2, for the newest may turn out damaged; or null to "
            "keep all",
        )
        if self.keep_last is None:
            for key in ("keep_every", "keep_best"):
                value = getattr(self, key)
                require(not value, f"trainer.{key}={value}: has no effect without trainer.keep_last=: all are kept")
        require(
            self.keep_every == 0 or (self.save_every > 0 and self.keep_every % self.save_every == 0),
            f"trainer.keep_every={self.keep_every}: must be a multiple of trainer.save_every={self.save_every}",
        )
        if self.keep_best is not None:
            require(
                self.keep_best == "validation_loss" or self.keep_best.endswith(metric_suffix(self.eval_samples)),
                f"trainer.keep_best={self.keep_best}: give validation_loss, or a metric of trainer.eval_samples="
                f"{self.eval_samples} samples, such as fid{metric_suffix(self.eval_samples)}",
            )
            measured = self.validate_every if self.keep_best == "validation_loss" else self.eval_every
            require(
                measured > 0,
                f"trainer.keep_best={self.keep_best}: is never measured; set trainer."
                f"{'validate_every' if self.keep_best == 'validation_loss' else 'eval_every'}, a multiple of "
                "trainer.save_every",
            )
            require(
                self.save_every > 0 and measured % self.save_every == 0,
                f"trainer.keep_best={self.keep_best}: is measured every {measured} steps, which is no multiple of "
                f"trainer.save_every={self.save_every}; a checkpoint has a number only where both fall together",
            )

    def micro_batches(self, num_processes: int) -> tuple[int, int]:
        """Return (images a micro-batch, micro-batches a step) of each of `num_processes` processes,
        or raise UserError.
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
        left = (self.max_steps - step) / (self.max_steps - self.warmup_steps)
        return left if self.lr_schedule == "linear" else 0.5 - 0.5 * math.cos(math.pi * left)

    def due(self, every: int, step: int) -> bool:
        """Tell whether something done `every` so many steps, 0 being never, is due after `step`
        steps.

        At the end it is due whatever the period, unless that is 0.
        """
        return every > 0 and (step == self.max_steps or step % every == 0)
