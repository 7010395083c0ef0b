"""The model as a diffusers pipeline, with network and sampler as components.

`save_pretrained` writes folders that load without this project: each class's file there is made of
its module here and of all that it needs (`one_file.merge`). Where this project is installed,
`DDTPipeline.from_pretrained` loads them with the code here, and runs none of theirs.
"""

import functools
from typing import Any

import torch

from ddt.model import Denoiser
from ddt.pipeline import pipeline as shared
from ddt.pipeline.one_file import merge
from ddt.pipeline.pipeline import PARTS
from ddt.pipeline.scheduler import DDTScheduler
from ddt.pipeline.transformer import DDTTransformer2DModel
from ddt.version import __version__

__all__ = ["DDTPipeline", "DDTScheduler", "DDTTransformer2DModel", "build_pipeline"]

for kind in (shared.DDTPipeline, DDTTransformer2DModel, DDTScheduler):
    kind.code = staticmethod(functools.partial(merge, kind.__module__, kind.__name__, __version__))


class DDTPipeline(shared.DDTPipeline):
    """`pipeline.DDTPipeline`, loaded with the classes of this package."""

    @classmethod
    def load_config(cls, *args: Any, **kwargs: Any) -> Any:
        """Return the config of a folder with these classes in place of those in its files."""
        config = super().load_config(*args, **kwargs)
        classes = {"transformer": DDTTransformer2DModel, "scheduler": DDTScheduler}
        own = {part: [classes[part].__module__, classes[part].__name__] for part in PARTS}
        return {**config, "_class_name": cls.__name__, **own}


def build_pipeline(model: Denoiser, stored: dict[str, Any], vae: Any, id2label: dict[str, str]) -> DDTPipeline:
    """Return the pipeline of a network and its checkpoint's config; the network is not copied.

    vae: diffusers' autoencoder; None for a model of pixels.
    """
    settings = {key: value for key, value in stored["network"].items() if key != "activation_checkpointing"}
    with torch.device("meta"):
        transformer = DDTTransformer2DModel(stored["latent_shape"][1:], settings)
    transformer.network = model
    scheduler = DDTScheduler(**stored["sampler"])
    return DDTPipeline(transformer.eval(), vae, scheduler, id2label, stored["autoencoder"].get("chunk_size", 16))
