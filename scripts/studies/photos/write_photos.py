"""Write the photo crops of data=photos as a folder of JPEG files, one sub-folder a class: own
images to try things on.

python scripts/studies/photos/write_photos.py out=FOLDER [image_size=128 crops=60]
"""

import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from omegaconf import DictConfig
from PIL import Image
from tqdm import tqdm

from ddt.cli import arguments_for, checked, entry_point
from ddt.data.photos import Photos
from ddt.errors import UserError, require

log = logging.getLogger(__name__)


def write_photos(out: str, image_size: int, crops: int) -> None:
    """Write `crops` pictures a photo, of `image_size` pixels a side, into the folder `out`, which
    must not exist.
    """
    folder = Path(out)
    require(not folder.exists(), f"out={out}: exists already and is not written over; choose another folder")
    try:
        photos = Photos(image_size=image_size, crops=crops)
    except UserError as error:  # which names the settings of data=photos
        raise UserError(str(error).removeprefix("data.")) from error
    for name in photos.class_names:
        (folder / name).mkdir(parents=True)
    for k in tqdm(range(len(photos.labels)), unit="img", desc="writing", mininterval=1.0):
        pixels = photos.load(np.array([k]))[0].transpose(1, 2, 0)  # (H, W, C)
        Image.fromarray(pixels).save(folder / photos.class_names[photos.labels[k]] / f"{k:04d}.jpg", quality=95)
    log.info("%s: %d images in %d sub-folders", folder, len(photos.labels), len(photos.class_names))


@entry_point("write_photos")
def main(cfg: DictConfig) -> None:
    """Check, write."""
    write_photos(**arguments_for(write_photos, checked(cfg)))


if __name__ == "__main__":
    main()
