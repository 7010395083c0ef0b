"""Train a DDT: `python train.py [model=… data=… key=value …]`. The same command again resumes."""

from pathlib import Path
from typing import TYPE_CHECKING

from ddt.cli import command

if TYPE_CHECKING:
    from ddt.training.settings import TrainSettings


def outcome(run_dir: Path) -> float | None:
    """Return what a sweeper such as Hydra's Optuna plugin may minimise (`last_measurement`)."""
    from ddt.training.tracking import last_measurement

    return last_measurement(run_dir)


@command("train", settings="ddt.training.settings.TrainSettings", outcome=outcome)
def main(settings: "TrainSettings") -> None:
    """Check what can be checked without weights, then train on all processes."""
    from ddt.distributed.launch import launch
    from ddt.training.loop import train
    from ddt.training.run import check, count_steps, infer, inspect

    settings = infer(settings)
    check(settings)
    settings = count_steps(settings)
    inspect(settings)
    launch(train, settings.trainer.num_processes, settings)


if __name__ == "__main__":
    main()
