"""The settings of the study of sharing, and of a fitted schedule."""

import dataclasses
import re
from pathlib import Path
from typing import Any

from ddt.checkpoint.models import check_exist
from ddt.errors import UserError, require, require_count
from ddt.files import check_new
from ddt.flow import MAX_STEPS
from ddt.generation.image_set import SEED_STRIDE
from ddt.generation.settings import SamplerOverrides
from ddt.metrics.settings import FeatureSettings, check_features
from ddt.precision import Dtype
from ddt.sampling.schedules import MAX_TEMPLATES, uniform_schedule
from scripts.studies.study import MAX_REPEATS, check_counts


@dataclasses.dataclass(frozen=True, kw_only=True)
class FitSettings(SamplerOverrides):
    """See conf/study/sharing_fit.yaml. Raises UserError for wrong values and existing files."""

    ckpt: str
    budget: int
    out: str
    templates: int
    batch_size: int
    dtype: Dtype | None

    def __post_init__(self) -> None:
        check_counts(self, budget=MAX_STEPS, templates=MAX_TEMPLATES, batch_size=MAX_TEMPLATES)
        out = Path(self.out)
        require(out.suffix == ".json", f"out={out}: give a .json file")
        for path in (out, out.with_suffix(".png")):
            check_new(path)
        check_exist(self.ckpt)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SharingSettings(SamplerOverrides):
    """See conf/study/sharing.yaml. Raises UserError for wrong values."""

    ckpt: str
    reference: str
    out: str
    features: FeatureSettings | None
    rules: list[str]
    budgets: list[int]
    repeats: int
    num_samples: int
    batch_size: int
    templates: int
    inception_weights: str | None
    autoencoder: str
    dtype: Dtype | None
    cache_gib: float

    def __post_init__(self) -> None:
        check_counts(self, repeats=MAX_REPEATS, batch_size=SEED_STRIDE, templates=MAX_TEMPLATES)
        require_count("num_samples", self.num_samples, 2, SEED_STRIDE, "; statistics need some")
        require_count("cache_gib", self.cache_gib, 0, hint=" (0 keeps no modulations)")
        for rule in self.rules:
            parse_rule(rule)
        for key in ("rules", "budgets"):
            values = getattr(self, key)
            require(len(values) > 0, f"{key}=[]: name at least one")
            require(len(set(values)) == len(values), f"{key}={values}: names one twice")
        check_features(self.features, self.reference, self.inception_weights)
        check_exist(self.ckpt)

    @property
    def kinds(self) -> set[str]:
        """The kinds of schedules that the rules use."""
        return {parse_rule(rule)[0] for rule in self.rules}

    def check_budgets(self, num_steps: int) -> None:
        """Raise UserError for a budget that is impossible in num_steps steps."""
        for budget in self.budgets:
            require(1 <= budget <= num_steps, f"budgets={budget}: must lie in 1..num_steps={num_steps}")
            runs = len(uniform_for(num_steps, budget))
            require(
                "uniform" not in self.kinds or runs == budget,
                f"budgets={budget}: no every r-th of {num_steps} steps makes {budget}; choose {runs}, or dp rules "
                "alone",
            )

    def request(self) -> dict[str, Any]:
        """Return the settings that the result depends on, as plain values."""
        keys = (
            "reference", "rules", "budgets", "repeats", "num_samples", "batch_size", "templates", "autoencoder",
            "inception_weights", "cache_gib",
        )  # fmt: skip
        features: Any = self.features
        return {**{key: getattr(self, key) for key in keys}, "features": dataclasses.asdict(features)}


def parse_rule(rule: str) -> tuple[str, int]:
    """Return the kind of schedule and the forecast order of "uniform", "dp+1", …"""
    match = re.fullmatch(r"(uniform|dp)(?:\+([12]))?", rule)
    if match is None:
        raise UserError(f"rules={rule}: give uniform or dp, with +1 or +2 where z is forecast, as in dp+1")
    return match[1], int(match[2] or 0)


def uniform_for(num_steps: int, budget: int) -> list[int]:
    """Return the uniform schedule of the most encoder runs, at most `budget`."""
    return uniform_schedule(num_steps, -(-num_steps // budget))
