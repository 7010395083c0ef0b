"""Export a checkpoint: a hub folder, a diffusers pipeline, or the published key names
(docs/export.md).

    python scripts/export.py ckpt=RUN_OR_CHECKPOINT format=hub out=FOLDER
    python scripts/export.py ckpt=RUN_OR_CHECKPOINT format=diffusers out=FOLDER
        [metrics=METRICS_JSON] [license=…] [push=owner/name]   (either format)
    python scripts/export.py ckpt=RUN_OR_CHECKPOINT format=released out=FILE
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ddt.cli import CONF, command

if TYPE_CHECKING:
    from ddt.checkpoint.settings import ExportSettings


@command("export", settings="ddt.checkpoint.settings.ExportSettings", folder=CONF / "export")
def main(settings: ExportSettings) -> None:
    """Check everything, write, and push to the hub if push= is set."""
    from ddt.export import export

    export(settings)


if __name__ == "__main__":
    main()
