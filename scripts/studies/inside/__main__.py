"""Look inside a trained model: z over time, predictions on the way to an image, the loss by t.

python -m scripts.studies.inside ckpt=RUN_OR_CHECKPOINT out=FOLDER [classes=[3,7] seeds=0-3]
[recompute=dp:10] [num_steps=…]
"""

from typing import TYPE_CHECKING

from ddt.cli import CONF, command

if TYPE_CHECKING:
    from scripts.studies.inside.run import InsideSettings


@command("inside", settings="scripts.studies.inside.run.InsideSettings", folder=CONF / "study")
def main(settings: "InsideSettings") -> None:
    """Measure what a model does between noise and image, and write the pictures."""
    from scripts.studies.inside.run import look_inside

    look_inside(settings)


if __name__ == "__main__":
    main()
