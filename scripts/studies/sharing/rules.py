"""The rules of a sharing curve: kinds of schedules, with and without forecasts of z, at budgets of
encoder runs.
"""

import re

import numpy as np

from ddt.errors import UserError, require
from ddt.generation.generator import Generator
from ddt.sampling.fitting import fit_schedule
from ddt.sampling.schedules import optimal_schedule, uniform_schedule

Schedules = dict[str, dict[str, list[int]]]  # kind -> budget -> steps at which the encoder runs, as JSON holds them


def parse_rule(rule: str) -> tuple[str, int]:
    """Return the kind of schedule and the forecast order that "uniform", "dp+1", … mean."""
    match = re.fullmatch(r"(uniform|dp)(?:\+([12]))?", rule)
    if match is None:
        raise UserError(f"rules={rule}: give uniform or dp, with +1 or +2 where z is forecast, as in dp+1")
    return match[1], int(match[2] or 0)


def check_rules(rules: list[str], budgets: list[int], num_steps: int) -> None:
    """Raise UserError for a rule that is none, and a budget that a sampler of num_steps steps
    cannot spend.
    """
    kinds = {parse_rule(rule)[0] for rule in rules}
    for key, values in (("rules", rules), ("budgets", budgets)):
        require(len(values) > 0, f"{key}=[]: name at least one")
        require(len(set(values)) == len(values), f"{key}={values}: names one twice")
    for budget in budgets:
        require(1 <= budget <= num_steps, f"budgets={budget}: must lie in 1..num_steps={num_steps}")
        runs = len(uniform_for(num_steps, budget))
        require(
            "uniform" not in kinds or runs == budget,
            f"budgets={budget}: no every r-th of {num_steps} steps makes {budget}; choose {runs}, or dp rules alone",
        )


def uniform_for(num_steps: int, budget: int) -> list[int]:
    """Return the uniform schedule of the most steps, at most `budget`."""
    return uniform_schedule(num_steps, -(-num_steps // budget))


def schedules_of(generator: Generator, rules: list[str], budgets: list[int], num_templates: int) -> Schedules:
    """Return for each kind of schedule and each budget the steps at which the encoder runs; dp is
    fitted here.
    """
    steps = generator.settings.num_steps
    kinds = {parse_rule(rule)[0] for rule in rules}
    schedules = {"uniform": {str(budget): uniform_for(steps, budget) for budget in budgets}}
    if "dp" in kinds:
        with generator.autocast():
            fitted = fit_schedule(
                generator.model, generator.shape, generator.settings, budgets[0], generator.device, num_templates
            )
        similarity = np.array(fitted["similarity"])
        schedules["dp"] = {str(budget): optimal_schedule(similarity, budget) for budget in budgets}
    return {kind: schedules[kind] for kind in sorted(kinds)}
