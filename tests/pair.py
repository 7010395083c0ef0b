"""Several trainings on one pair of processes, which takes seconds to start; imports little, for
both import it.
"""

from accelerate.state import AcceleratorState

from ddt.distributed.launch import launch
from ddt.training.loop import train


def train_all(*runs):
    """Train one run after another, each as if its process were new, in one process group."""
    for settings in runs:
        train(settings)
        AcceleratorState._reset_state(reset_partial_state=True)


def train_on_two(*runs):
    """Train the runs of some `TrainSettings` on two processes, in the present folder."""
    launch(train_all, 2, *runs)
