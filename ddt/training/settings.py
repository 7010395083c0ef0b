"""Settings of the training loop."""

import dataclasses
import math
import re
from typing import Literal

from ddt.data.stream import MAX_BATCH, MAX_WORKERS
from ddt.epochs import Steps, are_steps
from ddt.errors import MANY, require, require_count
from ddt.metrics.comparability import short
from ddt.training.ema import MAX_STD, MIN_STD
from ddt.training.stopping import MARGIN

METRIC_SUFFIX = re.compile(r"_[\d.]+[kmb]?$")  # of all numbers of samples


def metric_suffix(num_samples: int) -> str:
    """Return the suffix of an evaluation's logged metrics, its number of samples: `_5k`."""
    return f"_{short(num_samples).lower()}"


@dataclasses.dataclass(frozen=True)
class TrainerSettings:
    """Length, batch, precision, EMA and periods of a training; see conf/trainer.

    max_steps: optimizer steps. global_batch_size: images per step over all processes.
    micro_batch_size: images per forward pass of a process (None: its share of the batch); gradients
    are accumulated. mixed_precision: "bf16" or "fp16" autocast over float32 weights, fp16 with
    a loss scale (`torch.amp.GradScaler`), or "fp32" ("no" is Accelerate's name for it).
    num_processes: None uses every visible GPU, or one CPU process. parallelism: "ddp" replicates
    the network, "fsdp" shards weights, EMAs and optimizer. compile: the network's blocks
    (`ddt.distributed.compile`); None compiles on GPUs.

    ema_decay: of the EMA weights. ema_decays: of further EMAs. ema_powers: relative standard
    deviations of power-function EMAs (EDM2), saved as a snapshot every `snapshot_every` steps, for
    post-hoc EMA. warmup_steps: linear warm-up of the learning rate. lr_schedule: "constant", or a
    "linear" or "cosine" decay to lr_end times the base learning rate, from step decay_after (None:
    the end of the warm-up) to step decay_end (None: max_steps). clip_norm: largest gradient norm.
    Fields of type `Steps` may be epochs, until `ddt.epochs.in_steps`.

    Periods `_every` count steps; 0 is never, but the last step is always saved and logged.
    keep_last: checkpoints that stay (None: all), beside those of every `keep_every`-th step and
    the best by the logged metric `keep_best`. max_hours: the run stops with a checkpoint before.
    num_workers: data loading processes. eval_samples: images per evaluation.

    Raises UserError for values that are invalid or would have no effect.
    """

    max_steps: Steps
    global_batch_size: int
    micro_batch_size: int | None
    mixed_precision: Literal["bf16", "fp16", "fp32", "no"]
    num_processes: int | None
    ema_decay: float
    warmup_steps: Steps
    lr_schedule: Literal["constant", "linear", "cosine"]
    save_every: int
    log_every: int
    validate_every: int
    preview_every: int
    num_workers: int
    decay_after: Steps | None = None
    decay_end: Steps | None = None
    lr_end: float = 0.0
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
        for key, least, most in (
            ("max_steps", 1, MANY), ("log_every", 1, MANY), ("warmup_steps", 0, MANY), ("save_every", 0, MANY),
            ("validate_every", 0, MANY), ("preview_every", 0, MANY), ("eval_every", 0, MANY),
            ("snapshot_every", 0, MANY), ("keep_every", 0, MANY), ("global_batch_size", 1, MAX_BATCH),
            ("num_workers", 0, MAX_WORKERS),
        ):  # fmt: skip
            if are_steps(getattr(self, key)):
                require_count(f"trainer.{key}", getattr(self, key), least, most)
        for key in ("micro_batch_size", "num_processes"):
            require_count(f"trainer.{key}", getattr(self, key), 1, MAX_BATCH, ", or null")
        for key in ("clip_norm", "max_hours"):
            value = getattr(self, key)
            self.check(key, value is None or 0 < value < math.inf, "must be above 0, or null")
        samples = self.eval_samples
        self.check("eval_samples", 2 <= samples <= 1_000_000, "must lie in 2..1000000; statistics need at least 2")
        self.check(
            "max_hours",
            self.max_hours is None or self.max_hours * 3600 > 2 * MARGIN,
            f"give more than {2 * MARGIN / 3600:.3f}, for the run stops {MARGIN} s and two saves before",
        )
        self.check_decay()
        self.check_emas()
        self.check_retention()
        self.micro_batches(self.num_processes or 1)

    def check(self, key: str, valid: bool, message: str) -> None:
        """Raise UserError("trainer.key=value: message") unless `valid`."""
        value = getattr(self, key)
        require(valid, f"trainer.{key}={list(value) if isinstance(value, tuple) else value}: {message}")

    def check_decay(self) -> None:
        """Raise UserError for a decay of the learning rate that cannot be, or is none."""
        self.check("lr_end", 0 <= self.lr_end <= 1, "must lie in 0..1; it is a factor on optimizer.lr")
        after, end = self.decay_after, self.decay_end
        if are_steps(self.warmup_steps, after, end, self.max_steps):
            self.check(
                "decay_end",
                end is None or self.warmup_steps < end <= MANY,
                f"must lie after trainer.warmup_steps={self.warmup_steps}, or be null",
            )
            last = (self.max_steps if end is None else end) - 1
            self.check(
                "decay_after",
                after is None or (self.warmup_steps <= after <= last),
                f"must lie in trainer.warmup_steps={self.warmup_steps}..{last}, or be null",
            )
        for key in ("decay_after", "decay_end", "lr_end"):
            self.check(
                key,
                self.lr_schedule != "constant" or not getattr(self, key),
                "has no effect with trainer.lr_schedule=constant; choose linear or cosine, or leave it out",
            )

    def check_emas(self) -> None:
        """Raise UserError for invalid EMA settings."""
        self.check("ema_decay", 0 <= self.ema_decay < 1, "must lie in 0..1 (published: 0.9999)")
        self.check("ema_decays", all(0 <= decay < 1 for decay in self.ema_decays), "each must lie in 0..1")
        self.check(
            "ema_powers",
            all(MIN_STD <= std < MAX_STD for std in self.ema_powers),
            f"each is a relative standard deviation in {MIN_STD}..{MAX_STD}, such as 0.05",
        )
        for key in ("ema_decays", "ema_powers"):
            values = getattr(self, key)
            names = {f"{value:g}" for value in values}  # of their weights in a checkpoint
            self.check(key, len(names) == len(values), "names a value twice (to six digits)")
        self.check(
            "snapshot_every",
            self.snapshot_every == 0 or len(self.ema_powers) > 0,
            "has no effect without trainer.ema_powers=; give [0.05,0.1], or 0",
        )

    def check_retention(self) -> None:
        """Raise UserError for invalid settings of which checkpoints stay."""
        self.check(
            "keep_last",
            self.keep_last is None or self.keep_last >= 2,
            "must be at least 2, for the newest may turn out damaged; or null to keep all",
        )
        if self.keep_last is None:
            for key in ("keep_every", "keep_best"):
                self.check(key, not getattr(self, key), "has no effect without trainer.keep_last=: all are kept")
        self.check(
            "keep_every",
            self.keep_every == 0 or (self.save_every > 0 and self.keep_every % self.save_every == 0),
            f"must be a multiple of trainer.save_every={self.save_every}",
        )
        if self.keep_best is None:
            return
        suffix = metric_suffix(self.eval_samples)
        self.check(
            "keep_best",
            self.keep_best == "validation_loss" or self.keep_best.endswith(suffix),
            f"give validation_loss, or a metric of trainer.eval_samples={self.eval_samples} samples, such as "
            f"fid{suffix}",
        )
        period = "validate_every" if self.keep_best == "validation_loss" else "eval_every"
        every = getattr(self, period)
        self.check("keep_best", every > 0, f"is never measured; set trainer.{period}, a multiple of trainer.save_every")
        self.check(
            "keep_best",
            self.save_every > 0 and every % self.save_every == 0,
            f"is measured every {every} steps, which is no multiple of trainer.save_every={self.save_every}; a "
            "checkpoint is measured only where both coincide",
        )

    def micro_batches(self, num_processes: int) -> tuple[int, int]:
        """Return (images per micro-batch, micro-batches per step) of each process, or UserError."""
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
        """Return the factor on the base learning rate in step `step`, counted from 0."""
        warmup = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        after = self.warmup_steps if self.decay_after is None else self.decay_after
        if self.lr_schedule == "constant" or step < after:
            return warmup
        end = self.max_steps if self.decay_end is None else self.decay_end
        left = max(end - step, 0) / (end - after)
        left = left if self.lr_schedule == "linear" else 0.5 - 0.5 * math.cos(math.pi * left)
        return self.lr_end + (1 - self.lr_end) * left

    @property
    def may_end_later(self) -> bool:
        """Whether max_steps can be raised without another learning rate in the steps before."""
        return self.lr_schedule == "constant" or self.decay_end is not None

    def due(self, every: int, step: int) -> bool:
        """Return whether a period of `every` steps (0: never) ends after `step`.

        The last step ends every period.
        """
        return every > 0 and (step == self.max_steps or step % every == 0)
