"""The model as a diffusers pipeline, with network and sampler as components.

`save_pretrained` writes folders that load without this project: each class's file there is made of
its module here and of all that it needs (`one_file.merge`). Where this project is installed,
`DDTPipeline.from_pretrained` loads them with the code here, and runs none of theirs.
"""

import functools
from typing import Any

import torch

from ddt.autoencoder import Autoencoder
from ddt.autoencoder.rae_component import DDTRAEDecoder
from ddt.model import Denoiser
from ddt.pipeline import pipeline as shared
from ddt.pipeline.one_file import merge
from ddt.pipeline.scheduler import DDTScheduler
from ddt.pipeline.transformer import DDTTransformer2DModel
from ddt.version import __version__

__all__ = ["COMPONENTS", "DDTPipeline", "DDTRAEDecoder", "DDTScheduler", "DDTTransformer2DModel", "build_pipeline"]

# components whose code a shared folder carries, beside that of the pipeline
COMPONENTS: dict[str, Any] = {kind.__name__: kind for kind in (DDTTransformer2DModel, DDTScheduler, DDTRAEDecoder)}
for kind in (shared.DDTPipeline, *COMPONENTS.values()):
    kind.code = staticmethod(functools.partial(merge, kind.__module__, kind.__name__, __version__))


class DDTPipeline(shared.DDTPipeline):
    """`pipeline.DDTPipeline`, loaded with the classes of this package."""

    @classmethod
    def load_config(cls, *args: Any, **kwargs: Any) -> Any:
        """Return the config of a folder with these classes in place of those in its files."""
        config = super().load_config(*args, **kwargs)
        classes = {part: COMPONENTS[named[1]] for part, named in config.items() if is_own(named)}
        own = {part: [kind.__module__, kind.__name__] for part, kind in classes.items()}
        return {**config, "_class_name": cls.__name__, **own}


def is_own(named: Any) -> bool:
    """Return whether an entry of model_index.json, [module, class], names one of `COMPONENTS`."""
    return isinstance(named, list | tuple) and len(named) == 2 and named[1] in COMPONENTS


def build_pipeline(
    model: Denoiser, stored: dict[str, Any], autoencoder: Autoencoder, id2label: dict[str, str]
) -> DDTPipeline:
    """Return the pipeline of a network and its checkpoint's config; the networks are not copied."""
    settings = {key: value for key, value in stored["network"].items() if key != "activation_checkpointing"}
    with torch.device("meta"):
        transformer = DDTTransformer2DModel(stored["latent_shape"][1:], settings)
    transformer.network = model
    scheduler = DDTScheduler(**stored["sampler"])
    chunk_size = stored["autoencoder"].get("chunk_size", 16)
    return DDTPipeline(transformer.eval(), autoencoder.diffusers_network(), scheduler, id2label, chunk_size)
