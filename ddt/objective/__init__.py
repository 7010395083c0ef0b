"""Training losses. The velocity loss is `velocity_loss` in flow_matching.py, that of a class token
in reg.py; REPA and the dispersive loss on a hidden layer are in alignment.py, the frozen network of
REPA in alignment_target.py.

To add an objective: a subclass of `Objective` (base.py) in a file here, its name in this file, and
a file in conf/objective whose `_target_` is `ddt.objective.NAME`. Validation calls it.
"""

from ddt.objective.base import Objective, check_alignment, network_arguments
from ddt.objective.flow_matching import FlowMatching
from ddt.objective.reg import REG

__all__ = ["REG", "FlowMatching", "Objective", "check_alignment", "network_arguments"]
