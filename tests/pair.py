"""Several trainings on one pair of processes, which takes seconds to start; imports little, for
both import it.
"""

import contextlib

from accelerate.state import AcceleratorState
from late import late_shards

from ddt.distributed.launch import launch
from ddt.training.loop import train


def train_all(*runs):
    """Train one run after another, each as if its process were new, in one process group; that of
    the name "late" with `late_shards`.
    """
    for settings in runs:
        with late_shards() if settings.run_dir.name == "late" else contextlib.nullcontext():
            train(settings)
        AcceleratorState._reset_state(reset_partial_state=True)


def train_on_two(*runs):
    """Train the runs of some `TrainSettings` on two processes, in the present folder."""
    launch(train_all, 2, *runs)
