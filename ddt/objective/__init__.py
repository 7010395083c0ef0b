"""Training losses: one file an objective, alignment beside it."""

from ddt.objective.flow_matching import FlowMatching

__all__ = ["FlowMatching"]
