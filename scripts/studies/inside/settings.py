"""The settings of a look inside."""

import dataclasses
from pathlib import Path
from typing import Any

from ddt.checkpoint.models import check_exist
from ddt.errors import MAX_BATCH, collect_errors, require, require_count
from ddt.files import check_new
from ddt.generation.image_set import ImageSet, Numbers, image_set
from ddt.generation.settings import SamplerOverrides
from ddt.precision import Dtype
from ddt.sampling.settings import SamplerSettings
from scripts.studies.study import check_counts

MAX_IMAGES = 16  # of a figure


@dataclasses.dataclass(frozen=True, kw_only=True)
class InsideSettings(SamplerOverrides):
    """See conf/study/inside.yaml. Raises UserError for wrong values and a folder with files."""

    ckpt: str
    out: str
    classes: Numbers | None
    seeds: Numbers | None
    columns: int
    frames: int
    loss_images: int
    batch_size: int
    data_root: str
    autoencoder: str
    dtype: Dtype | None

    def __post_init__(self) -> None:
        require_count("frames", self.frames, 0, 1000, " (0 writes no animation)")
        check_counts(self, columns=100, loss_images=MAX_BATCH, batch_size=MAX_BATCH)
        check_new(Path(self.out))
        check_exist(self.ckpt)

    def sampler_and_images(self, stored: dict[str, Any]) -> tuple[SamplerSettings, ImageSet]:
        """Return sampler and images, as sample.py does of the same settings."""
        from ddt.model import network_class

        network = stored["network"]
        sampler, images = collect_errors(
            lambda: self.resolve(stored["sampler"], network_class(network).shares_encoder, network.get("base_depth")),
            lambda: image_set(
                network["num_classes"], classes=self.classes, seeds=self.seeds, class_names=stored["class_names"]
            ),
        )
        require(
            not sampler.adaptive,
            "sampler=adaptive: chooses its own steps, at another t for each image; choose another sampler",
        )
        require(
            len(images.seeds) <= MAX_IMAGES,
            f"classes, seeds: make {len(images.seeds)} images; name at most {MAX_IMAGES}, as in classes=[3,7] "
            "seeds=0-3",
        )
        return sampler, images
