"""Look inside a trained model: z over time, predicted images over time, the loss by t.

python -m scripts.studies.inside ckpt=RUN_OR_CHECKPOINT out=FOLDER [classes=[3,7] seeds=0-3]
[recompute=dp:10] [num_steps=…]
"""

from typing import Any

from ddt.cli import CONF, command


@command("inside", settings="scripts.studies.inside.settings.InsideSettings", folder=CONF / "study")
def main(settings: Any) -> None:
    """Measure, and write the figures and inside.json."""
    from scripts.studies.inside.run import look_inside

    look_inside(settings)


if __name__ == "__main__":
    main()
