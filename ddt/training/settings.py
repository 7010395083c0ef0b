"""Settings of a training, of its loop, and of its estimate, parsed before torch is imported."""

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ddt.checkpoint.models import check_released
from ddt.config import Choice
from ddt.epochs import Steps, are_steps
from ddt.errors import MANY, MAX_BATCH, MAX_CLASSES, MAX_WORKERS, UserError, require, require_count
from ddt.figures import check_figure
from ddt.files import MAX_NAME_BYTES, check_new, is_run_name
from ddt.metrics.comparability import short
from ddt.metrics.settings import FeatureSettings, check_reference_path, check_weights
from ddt.sampling.settings import SamplerSettings

if TYPE_CHECKING:
    from ddt.training.ema import Rule

MARGIN = 60  # seconds that max_hours leaves for the last save, plus twice the longest pause and write so far
MIN_STD, MAX_STD = 1e-4, 0.28  # of power functions; a uniform average over the run has 1/√12 = 0.289

MEASURED = "give a benchmark.json of scripts/benchmark or a gpu_check.json of scripts/gpu_check.sh"
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
    a loss scale (`torch.amp.GradScaler`), "tf32" (float32 whose products run in TF32 on GPUs), or
    "fp32" ("no" is Accelerate's name for it).
    num_processes: None uses every visible GPU, or one CPU process. parallelism: "ddp" replicates
    the network, "fsdp" shards weights, EMAs and optimizer. reshard_after_forward: under FSDP free a
    block between its forward and its backward pass (ZeRO-3), or keep it (ZeRO-2). compile: the
    network's blocks (`ddt.distributed.compile`) and the alignment's target; None compiles on GPUs.
    cuda_graphs: of the blocks (`ddt.distributed.graphs`); None: where micro-batches are small.
    deterministic: PyTorch's deterministic algorithms alone (`ddt.precision.deterministic`).

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
    mixed_precision: Literal["bf16", "fp16", "tf32", "fp32", "no"]
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
    reshard_after_forward: bool = True
    compile: bool | None = None
    cuda_graphs: bool | None = None
    deterministic: bool = False
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
        self.check(
            "reshard_after_forward",
            self.reshard_after_forward or self.parallelism == "fsdp",
            "has no effect with trainer.parallelism=ddp; leave it out, or give trainer.parallelism=fsdp",
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


@dataclasses.dataclass(frozen=True)
class RunSettings:
    """The settings that every training has, whatever it trains. choices: the chosen file of each
    config group.

    Raises UserError for values that cannot be.
    """

    name: str
    seed: int
    data: Choice  # with the tracker before those whose comparison imports torch (`ddt.config.parse`)
    tracker: Choice
    autoencoder: Choice
    optimizer: Choice
    trainer: TrainerSettings
    choices: dict[str, str | None]

    def __post_init__(self) -> None:
        require(
            is_run_name(self.name),
            f"name={self.name}: give a folder name of letters, digits and _.=,+-, at most {MAX_NAME_BYTES} bytes long",
        )
        require_count("seed", self.seed, 0, 2**63 - 1)

    @property
    def run_dir(self) -> Path:
        """The run's folder."""
        return Path("runs") / self.name

    def plain(self) -> dict[str, Any]:
        """Return all settings as plain values, as `config.json` and checkpoints hold them."""

        def plain(value: Any) -> Any:
            if isinstance(value, Choice):
                return value.plain()
            if dataclasses.is_dataclass(value) and not isinstance(value, type):
                kind = type(value)
                return {"_target_": f"{kind.__module__}.{kind.__qualname__}", **dataclasses.asdict(value)}
            return value

        values = {field.name: plain(getattr(self, field.name)) for field in dataclasses.fields(self)}
        del values["choices"]
        return json.loads(json.dumps(values))


@dataclasses.dataclass(frozen=True)
class TrainSettings(RunSettings):
    """The settings of `train.py`; see conf/train.yaml."""

    init_from: str | None
    reference: str | None
    inception_weights: str | None
    model: Choice
    alignment: Choice | None
    objective: Choice
    sampler: SamplerSettings
    features: FeatureSettings | None

    def __post_init__(self) -> None:
        super().__post_init__()
        for check in (self.sampler.schedule, self.sampler.check_packages):
            try:
                check()
            except UserError as error:
                raise UserError(f"sampler.{error}") from error
        self.check_evaluation()
        if self.init_from is not None and not (self.run_dir / "checkpoints").is_dir():  # a resumed run reads its own
            check_released(self.init_from, "init_from")

    def check_evaluation(self) -> None:
        """Raise UserError where an evaluation while training cannot be, or settings of it have no
        effect.
        """
        features, reference, eval_every = self.features, self.reference, self.trainer.eval_every
        data = self.choices["data"]
        if features is None:
            require(eval_every == 0, f"trainer.eval_every={eval_every}: needs features=, such as inception or {data}")
            require(reference is None, f"reference={reference}: has no effect without features=; leave it out")
        else:
            require(
                eval_every > 0,
                f"features={features.name}: has no effect with trainer.eval_every=0; give a number of steps",
            )
        check_weights(features, self.inception_weights)
        if features is not None and features.data is not None:
            require(
                data in (features.data, f"{features.data}_latents"),
                f"features={features.name}: is the classifier of another data set than data={data}; choose other "
                "features",
            )
            require(
                reference is None,
                f"reference={reference}: features={features.name} compares with the training images; leave it out",
            )
        if reference is not None:
            check_reference_path(reference)


@dataclasses.dataclass(frozen=True)
class EstimateSettings:
    """See conf/estimate.yaml. Raises UserError for invalid values."""

    data: Choice
    model: Choice
    autoencoder: Choice
    alignment: Choice | None
    objective: Choice
    sampler: SamplerSettings
    trainer: TrainerSettings
    choices: dict[str, str | None]
    gpus: int
    device: str | None
    share: float | None
    measured: str | None
    memory_gb: float | None
    num_samples: int
    num_classes: int | None
    out: str | None
    plot: str | None

    may_be_missing = ("data.root",)  # nothing is read from it

    def __post_init__(self) -> None:
        out = None if self.out is None else Path(self.out)
        for key, most in (("gpus", MAX_BATCH), ("num_samples", MANY), ("num_classes", MAX_CLASSES)):
            require_count(key, getattr(self, key), 1, most)
        both = "has no effect with measured=, which brings its own; leave one out"
        for key, valid, message in (
            ("memory_gb", self.memory_gb is None or self.memory_gb > 0, "must be above 0"),
            ("device", self.measured is None or self.device is None, both),
            ("share", self.measured is None or self.share is None, both),
            ("out", out is None or out.suffix == ".json", "give a .json file"),
            ("measured", self.measured is None or Path(self.measured).is_file(), f"no such file; {MEASURED}"),
        ):
            require(valid, f"{key}={getattr(self, key)}: {message}")
        if out is not None:
            check_new(out)
        if self.plot is not None:
            check_figure(Path(self.plot), "plot")
        processes = self.trainer.num_processes
        require(processes is None, f"trainer.num_processes={processes}: has no effect here; give gpus={processes}")
        require(
            self.trainer.parallelism == "ddp" or self.gpus > 1,
            "trainer.parallelism=fsdp: needs several processes to shard among; give gpus=8, or leave it out",
        )
        self.trainer.micro_batches(self.gpus)


@dataclasses.dataclass(frozen=True)
class PosthocSettings:
    """See conf/posthoc_ema.yaml. std, decay: lengths of the EMAs to make, one or a list of each."""

    run: str
    std: list[float] | float | None
    decay: list[float] | float | None
    step: int | None
    powers: list[float] | None
    out: str

    def __post_init__(self) -> None:
        require(
            Path(self.run).is_dir(), f"run={self.run}: no such folder; give that of a run, such as runs/digits_nano"
        )
        stds, decays = self.lengths()
        require(len(stds) + len(decays) > 0, "std: not set; give std= (such as 0.07), decay= (such as 0.9999), or both")
        for std in stds:
            require(
                MIN_STD <= std < MAX_STD,
                f"std={std}: must lie in {MIN_STD}..{MAX_STD}, relative to the steps done (uniform: 0.289)",
            )
        for decay in decays:
            require(0 < decay < 1, f"decay={decay}: must lie in 0..1, such as 0.9999")
        both = {f"std_{std:g}" for std in stds} | {f"decay_{decay:g}" for decay in decays}
        require(len(both) == len(stds) + len(decays), "std, decay: two of the lengths have one name; give each once")

    def lengths(self) -> tuple[list[float], list[float]]:
        """Return std and decay as lists."""
        stds, decays = ([value] if isinstance(value, float) else value or [] for value in (self.std, self.decay))
        return stds, decays

    def rules(self) -> "dict[str, Rule]":
        """Return the EMA rules by the name of their folder."""
        from ddt.training.ema import ConstantDecay, PowerFunction

        stds, decays = self.lengths()
        rules: dict[str, Rule] = {f"std_{std:g}": PowerFunction(std) for std in stds}
        return rules | {f"decay_{decay:g}": ConstantDecay(decay) for decay in decays}

    def folders(self) -> dict[str, Path]:
        """Return the folder of each EMA: `out` for a single number, else one inside it."""
        single = isinstance(self.std, float) != isinstance(self.decay, float) and len(self.rules()) == 1
        return {name: Path(self.out) if single else Path(self.out) / name for name in self.rules()}
