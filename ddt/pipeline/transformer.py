"""`DDTTransformer2DModel`: a network as a diffusers model. Shapes: B images, C H W latent."""

import operator
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor

from ddt.checkpoint.config import check_sides
from ddt.distributed.compile import allow_recompiles
from ddt.errors import UserError, first_line, require
from ddt.flow import velocity_of
from ddt.generation.generator import cast_weights
from ddt.model import Denoiser, network_class
from ddt.precision import Dtype

HALF_NAMES: dict[Any, Dtype] = {torch.bfloat16: "bf16", torch.float16: "fp16"}


def two_sides(value: Any) -> tuple[int, int]:
    """Return H and W of the latents; raise UserError for anything else."""
    try:
        height, width = (operator.index(side) for side in value)
    except (TypeError, ValueError) as error:
        raise UserError(f"sample_size={value}: give two whole numbers, height and width of the latents") from error
    return height, width


def build(settings: Any) -> Denoiser:
    """Build the network of `settings`; raise UserError for wrong ones."""
    require(isinstance(settings, dict), f"settings={settings}: give _target_ and arguments of a network")
    kind, arguments = network_class(settings), {key: settings[key] for key in settings if key != "_target_"}
    try:
        return kind(**arguments)
    except TypeError as error:  # an unknown or missing argument, or one of another type
        raise UserError(f"settings: {first_line(error)}") from error


class DDTTransformer2DModel(ModelMixin, ConfigMixin):
    """A network as a diffusers model.

    sample_size: H and W of the latents. settings: `_target_`, the network's name, and its
    arguments. Both come from config.json; raises UserError for wrong ones.
    """

    code: ClassVar[Callable[[], str]]  # returns the text of this class's file in a shared folder
    _repeated_blocks: ClassVar = ["Block"]

    @register_to_config
    def __init__(self, sample_size: tuple[int, int] | None = None, settings: dict[str, Any] | None = None) -> None:
        super().__init__()
        # of this object, not of the class: diffusers loads such a class only with accelerate
        self._keep_in_fp32_modules = ["norm", "norm1", "norm2", "q_norm", "k_norm", "embedding_table", "W"]
        sides = two_sides(sample_size)
        self.network = build(settings)
        check_sides("sample_size", sides, self.network.patch_size)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Load a folder or model of the hub; arguments of diffusers.

        dtype: of 16 bits, casts what autocast would cast at every call, so that the weights give
        the bits of sample.py.
        """
        chosen = {name: kwargs.pop(name) for name in ("torch_dtype", "dtype") if kwargs.get(name) in HALF_NAMES}
        model = super().from_pretrained(*args, **kwargs)
        for dtype in chosen.values():
            cast_weights(model.network, HALF_NAMES[dtype])
        return model

    @apply_forward_hook
    def denoiser(self) -> Denoiser:
        """Return the network, moved to its device by diffusers' offloading."""
        return self.network

    def forward(self, hidden_states: Tensor, timestep: Tensor, class_labels: Tensor) -> Tensor:
        """Return v_t (B, C, H, W) for x_t (B, C, H, W), t (B,) in [0, 1], 0 is noise, y (B,)."""
        output = self.network(hidden_states, timestep, class_labels)
        return velocity_of(output, hidden_states, timestep, self.network.prediction)

    def compile_repeated_blocks(self, *args: Any, **kwargs: Any) -> None:
        """Compile each block in place, at its first call; arguments of `torch.compile`."""
        allow_recompiles()
        super().compile_repeated_blocks(*args, **kwargs)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """As `compile_repeated_blocks`: the pipeline calls encoder and decoder, not this module."""
        self.compile_repeated_blocks(*args, **kwargs)
