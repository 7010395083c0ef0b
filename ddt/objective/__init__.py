"""Training losses: one file an objective, alignment beside it.

To add one: a subclass of `Objective` (`ddt/objective/base.py`) in a file here, its name in this
file, and a file in conf/objective whose `_target_` is `ddt.objective.NAME`. Validation calls it.
"""

from ddt.objective.base import Objective
from ddt.objective.flow_matching import FlowMatching

__all__ = ["FlowMatching", "Objective"]
