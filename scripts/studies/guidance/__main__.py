"""Search the guidance that suits a trained model: scale × interval × weights × schedule on few
images each, then the best of them on many, with noise of their own.

python -m scripts.studies.guidance ckpt=RUN features=digits reference=data:digits out=DIR
cfg_scale=[1,1.5,2,3] cfg_interval=[null,[0.3,1]] [weights=[ema,model]] [recompute=[null,uniform:5]]
[num_samples=1000] [top=3] [repeats=3]
"""

from typing import TYPE_CHECKING

from ddt.cli import CONF, command, reference_data

if TYPE_CHECKING:
    from scripts.studies.guidance.settings import GuidanceSettings


@command("guidance", settings="scripts.studies.guidance.settings.GuidanceSettings", folder=CONF / "study")
def main(settings: "GuidanceSettings") -> None:
    """Check all that needs no weights, then sample and measure both stages on all processes."""
    from ddt.distributed.launch import launch
    from scripts.studies.guidance.search import search

    checkpoints = settings.find_checkpoints()
    points = settings.points(checkpoints)
    data = reference_data(settings.reference)
    launch(search, settings.num_processes, settings, data, checkpoints, points)


if __name__ == "__main__":
    main()
