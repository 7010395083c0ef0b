"""Square crops of nine colour photos of scikit-image and scikit-learn: colour data without a
download.

Shapes: n crops in all, S pixels per side.
"""

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ddt.data.images import MAX_IMAGE_SIZE, ArrayImages, Outline, Split
from ddt.data.reading import read_image
from ddt.draws import Stream, random_generator
from ddt.errors import UserError, require_count

# CC0 or public domain; china and flower CC-BY-2.0
PHOTOS = {
    "astronaut": ("skimage", "data/astronaut.png"),
    "chelsea": ("skimage", "data/chelsea.png"),
    "coffee": ("skimage", "data/coffee.png"),
    "rocket": ("skimage", "data/rocket.jpg"),
    "hubble_deep_field": ("skimage", "data/hubble_deep_field.jpg"),
    "ihc": ("skimage", "data/ihc.png"),
    "retina": ("skimage", "data/retina.jpg"),
    "china": ("sklearn", "datasets/images/china.jpg"),
    "flower": ("sklearn", "datasets/images/flower.jpg"),
}
SHARES = (0.4, 1.0)  # a crop's side, as shares of its photo's shorter side


def photo(name: str) -> Image.Image:
    """Return one of `PHOTOS` as RGB; raise UserError where its package is missing or lacks it."""
    module, file = PHOTOS[name]
    spec = importlib.util.find_spec(module)  # finds the folder without the seconds that importing it takes
    folders = spec.submodule_search_locations if spec else None
    path = Path(folders[0]) / file if folders else None
    if path is None or not path.is_file():
        package = {"skimage": "scikit-image", "sklearn": "scikit-learn"}[module]
        raise UserError(
            f"data=photos: {package} is missing, or lacks {Path(file).name}; run pip install -e '.[photos]'"
        )
    return read_image(path)


class Photos(ArrayImages):
    """Random square crops of the nine photos, uint8 (n, 3, S, S); a crop's class is its photo.

    Crop k of a photo is the same in every run and for every `crops`; photos take turns. "test"
    holds other crops of the same photos, so they overlap the training crops in content: this set
    shows that a colour pipeline works end to end and overfits; it measures nothing else.

    Args:
        split: "train" has `crops` crops per photo, "test" a fifth of that.
        image_size: S.
        crops: training crops per photo.

    Raises UserError where scikit-image is missing, and for sizes out of range.
    """

    packages = ("skimage", "sklearn")

    @classmethod
    def outline(cls, settings: Mapping[str, Any]) -> Outline:
        return Outline(3, settings["image_size"], len(PHOTOS), len(PHOTOS) * settings["crops"])

    def __init__(self, split: Split = "train", image_size: int = 64, crops: int = 200) -> None:
        require_count("data.image_size", image_size, 1, MAX_IMAGE_SIZE)
        require_count("data.crops", crops, 5, 100_000, ", a fifth of which is held out")
        pictures = {name: photo(name) for name in PHOTOS}
        count = (crops if split == "train" else crops // 5) * len(PHOTOS)
        labels = np.arange(count) % len(PHOTOS)
        stream = Stream.PHOTOS_TRAIN if split == "train" else Stream.PHOTOS_TEST
        images = np.empty((count, 3, image_size, image_size), dtype=np.uint8)
        names = []  # photo and box, so that the fingerprint covers the crops
        for position, label in enumerate(labels):
            name = list(PHOTOS)[label]
            picture = pictures[name]
            generator = random_generator(0, stream, position)
            side = round(min(picture.size) * generator.uniform(*SHARES))
            left = int(generator.integers(picture.width - side, endpoint=True))
            top = int(generator.integers(picture.height - side, endpoint=True))
            box = (left, top, left + side, top + side)
            crop = picture.resize((image_size, image_size), Image.Resampling.BICUBIC, box=box, reducing_gap=2.0)
            images[position] = np.asarray(crop).transpose(2, 0, 1)
            names.append(f"{name}/{side}+{left}+{top}")
        super().__init__(images, labels, list(PHOTOS), names)
