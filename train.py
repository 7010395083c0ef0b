"""Train a DDT: `python train.py [model=… data=… key=value …]`. The same command again resumes."""

from typing import TYPE_CHECKING

from ddt.cli import command

if TYPE_CHECKING:
    from ddt.training.run import TrainSettings


@command("train", settings="ddt.training.run.TrainSettings", sweeps=True)
def main(settings: "TrainSettings") -> None:
    """Check what can be checked without weights, then train on all processes."""
    from ddt.distributed.launch import launch
    from ddt.training.loop import train
    from ddt.training.run import check, infer, inspect

    settings = infer(settings)
    check(settings)
    inspect(settings)
    launch(train, settings.trainer.num_processes, settings)


if __name__ == "__main__":
    main()
