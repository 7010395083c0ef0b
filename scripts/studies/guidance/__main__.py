"""Search a model's best guidance: scale × interval × weights × schedule on few samples each, then
the best of them on many, with noise of their own.

python -m scripts.studies.guidance ckpt=RUN features=digits reference=data:digits out=DIR
cfg_scale=[1,1.5,2,3] cfg_interval=[null,[0.3,1]] [weights=[ema,model]] [recompute=[null,uniform:5]]
"""

from typing import Any

from ddt.cli import CONF, command, reference_data


@command("guidance", settings="scripts.studies.guidance.settings.GuidanceSettings", folder=CONF / "study")
def main(settings: Any) -> None:
    """Check what needs no weights, then run both stages on all processes."""
    from ddt.distributed.launch import launch
    from scripts.studies.guidance.search import search

    checkpoints = settings.find_checkpoints()
    points = settings.points(checkpoints)
    data = reference_data(settings.reference)
    launch(search, settings.num_processes, settings, data, checkpoints, points)


if __name__ == "__main__":
    main()
