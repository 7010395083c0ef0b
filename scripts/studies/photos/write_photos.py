"""Write the crops of data=photos as JPEG files, one sub-folder per class, to try things on.

python -m scripts.studies.photos.write_photos out=FOLDER [image_size=128 crops=60]
"""

import dataclasses
import logging
from pathlib import Path

from ddt.cli import command
from ddt.errors import UserError
from ddt.files import atomic_folder, check_new

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Settings:
    """out: the folder to write, which must not exist. image_size: px per side. crops: per photo."""

    out: str
    image_size: int
    crops: int

    def __post_init__(self) -> None:
        check_new(Path(self.out))


@command("write_photos", settings="scripts.studies.photos.write_photos.Settings")
def main(settings: Settings) -> None:
    """Crop and write."""
    import numpy as np
    from PIL import Image

    from ddt.data.photos import Photos
    from ddt.logs import progress_bar

    folder = Path(settings.out)
    try:
        photos = Photos(image_size=settings.image_size, crops=settings.crops)
    except UserError as error:  # which names the settings of data=photos
        raise UserError(str(error).removeprefix("data.")) from error
    with atomic_folder(folder) as temporary:
        for name in photos.class_names:
            (temporary / name).mkdir()
        for k in progress_bar(iterable=range(len(photos.labels)), unit="img", desc="writing"):
            pixels = photos.load(np.array([k]))[0].transpose(1, 2, 0)  # (H, W, C)
            Image.fromarray(pixels).save(temporary / photos.class_names[photos.labels[k]] / f"{k:04d}.jpg", quality=95)
    log.info("%s: %d images in %d sub-folders", folder, len(photos.labels), len(photos.class_names))


if __name__ == "__main__":
    main()
