"""Published weights of DDT and of its baseline: key names, and settings inferred from shapes.

`ddt.checkpoint.published` reads and writes the files. Source: method.md 6.
"""

import abc
import re
import warnings
from typing import Any, ClassVar

from torch import Tensor

from ddt.errors import require

# (hidden_size, depth) -> encoder depths that the paper trained (method.md 5)
PUBLISHED_ENCODER_DEPTHS = {(768, 12): (4, 6, 8, 10), (1024, 24): (10, 12, 16, 20), (1152, 28): (22,)}
State = dict[str, Tensor]  # weights by their published names


class Release(abc.ABC):
    """How published files hold the weights of a family of networks, and how they were sampled."""

    downsampling: ClassVar[int] = 8  # pixels per side of a latent cell, where a file does not say its latents

    def usual_autoencoder(self, latent_size: int) -> str:
        """Return the name in conf/autoencoder of the latents, `latent_size` a side, of training."""
        return "sd_ft_ema"

    @abc.abstractmethod
    def recognizes(self, state: State) -> bool:
        """Return whether weights are of this family."""

    @abc.abstractmethod
    def settings(self, state: State, encoder_depth: int | None, patch_size: int | None, source: str) -> dict[str, Any]:
        """Return the constructor arguments inferred from shapes; UserError names `source`."""

    @abc.abstractmethod
    def published_name(self, name: str, settings: dict[str, Any]) -> str:
        """Return the published name of one of the network's weights."""

    def check(self, settings: dict[str, Any]) -> None:
        """Raise UserError for a network with weights that have no published names."""
        depth = settings.get("base_depth")
        require(
            depth is None,
            f"objective.base_depth={depth}: the published format knows no base head; choose format=hub or diffusers",
        )
        require(
            not settings.get("class_token"),
            f"model.class_token={settings.get('class_token')}: the published format knows none; choose format=hub",
        )

    def read(self, state: State, settings: dict[str, Any], source: str) -> State:
        """Return a file's weights, under its names, as the network has them: without fixed tables.

        Raises UserError, which names `source`, for tables of other values than the network's.
        """
        return state

    def write(self, state: State, settings: dict[str, Any], latent_shape: tuple[int, int, int]) -> State:
        """Return the inverse of `read`. latent_shape: (C, H, W), which fixed tables depend on."""
        return state

    def latent_size(self, state: State, settings: dict[str, Any], source: str) -> int | None:
        """Return the side of the latents that a file was trained on; None where it is not in it."""
        return None

    def unsaid(self, settings: dict[str, Any]) -> tuple[str, ...]:
        """Return the arguments of the network that are not in a file of its weights."""
        return ("encoder_depth", "patch_size")

    def sampler(self, latent_shape: tuple[int, int, int]) -> dict[str, Any]:
        """Return the published sampler as arguments of `SamplerSettings`, without a guide."""
        return {}


def shape_of(state: State, key: str, ndim: int, source: str) -> tuple[int, ...]:
    """Return the shape of a weight; UserError names a missing key, or one of other dimensions."""
    require(key in state, f"{source}: key {key} is missing")
    shape = tuple(state[key].shape)
    require(len(shape) == ndim and 0 not in shape, f"{source}: {key} has shape {shape}, expected {ndim} dimensions")
    return shape


def count_blocks(state: State, source: str) -> int:
    """Return the number of blocks of a file; UserError where some are missing."""
    indices = {int(key.split(".")[1]) for key in state if re.match(r"blocks\.\d{1,18}\.", key)}
    depth = len(indices)
    require(
        depth > 0 and max(indices) == depth - 1,
        f"{source}: {depth} blocks, numbered up to {max(indices, default=0)}: some are missing",
    )
    return depth


def check_depth(encoder_depth: int, depth: int, source: str) -> None:
    """Raise UserError where a number of encoder blocks leaves one half empty."""
    require(
        1 <= encoder_depth < depth,
        f"encoder_depth={encoder_depth}: {source} has {depth} blocks, choose 1..{depth - 1}",
    )


def read_sizes(state: State, patch_size: int | None, source: str) -> dict[str, Any]:
    """Return the constructor arguments that DDT and its baseline infer from shapes.

    patch_size: None means 2, as in all published models.
    """
    patch_size = 2 if patch_size is None else patch_size
    rows, hidden_size = shape_of(state, "final_layer.linear.weight", 2, source)
    require(
        patch_size >= 1 and rows % patch_size**2 == 0,
        f"patch_size={patch_size}: its square does not divide the {rows} output rows of {source}",
    )
    depth = count_blocks(state, source)
    return {
        "in_channels": rows // patch_size**2,
        "patch_size": patch_size,
        "hidden_size": hidden_size,
        "num_heads": hidden_size // shape_of(state, "blocks.0.attn.q_norm.weight", 1, source)[0],
        "depth": depth,
        "num_classes": shape_of(state, "y_embedder.embedding_table.weight", 2, source)[0] - 1,
    }


def stack_name(name: str, input_name: str, first_block: int) -> str:
    """Return the published name of a weight of one `BlockStack`."""
    head, _, tail = name.partition(".")
    tail = tail.replace("adaln.", "adaLN_modulation.0.")
    if head == "blocks":
        index, _, tail = tail.partition(".")
        return f"blocks.{int(index) + first_block}.{re.sub(r'^mixer[.]', 'attn.', tail)}"
    return f"{ {'input': input_name, 'output': 'final_layer'}.get(head, head) }.{tail}"


def is_ditdh(state: State) -> bool:
    """Return whether weights are those of a DiT^DH: by keys that no other family has."""
    return any(key in state for key in ("t_embedder.W", "pos_embed", "s_projector.weight"))


class ReleasedDiT(Release):
    """The undivided baseline: one input projection."""

    def recognizes(self, state: State) -> bool:
        known = ("x_embedder.", "final_layer.", "blocks.")
        return (
            "s_embedder.proj.weight" not in state
            and not is_ditdh(state)
            and any(key.startswith(known) for key in state)
        )

    def settings(self, state: State, encoder_depth: int | None, patch_size: int | None, source: str) -> dict[str, Any]:
        problem = f"{source}: has no s_embedder, so it is the undivided baseline: give encoder_depth=null"
        require(encoder_depth is None, problem)
        return read_sizes(state, patch_size, source)

    def published_name(self, name: str, settings: dict[str, Any]) -> str:
        return stack_name(name, "x_embedder", 0)


class ReleasedDDT(Release):
    """DDT: an input projection for each half, blocks numbered through both."""

    def recognizes(self, state: State) -> bool:
        return "s_embedder.proj.weight" in state and not is_ditdh(state)

    def settings(self, state: State, encoder_depth: int | None, patch_size: int | None, source: str) -> dict[str, Any]:
        require(encoder_depth is not None, f"{source}: is a DDT: give encoder_depth, which the file does not hold")
        assert encoder_depth is not None
        sizes = read_sizes(state, patch_size, source)
        width, depth = sizes["hidden_size"], sizes["depth"]
        check_depth(encoder_depth, depth, source)
        usual = PUBLISHED_ENCODER_DEPTHS.get((width, depth), (encoder_depth,))
        if encoder_depth not in usual:
            warnings.warn(
                f"encoder_depth={encoder_depth} is unusual for width {width} and {depth} blocks (published: "
                f"{', '.join(map(str, usual))}); a wrong one cannot be seen in the weights and gives wrong images",
                stacklevel=4,  # the caller of load_released
            )
        return {**sizes, "encoder_depth": encoder_depth}

    def check(self, settings: dict[str, Any]) -> None:
        super().check(settings)
        block = settings.get("decoder_block", "attention")
        require(
            block == "attention",
            f"model.decoder_block={block}: the published format knows attention alone; choose format=hub or diffusers",
        )
        for key in ("hidden_size", "num_heads"):
            value = settings.get(f"decoder_{key}")
            require(
                value in (None, settings.get(key)),
                f"model.decoder_{key}={value}: the published format knows that of the encoder alone; choose format=hub "
                "or diffusers",
            )

    def sampler(self, latent_shape: tuple[int, int, int]) -> dict[str, Any]:
        return {"cfg_scale": 3.0} if latent_shape[-1] == 64 else {}  # 512 px: FID 1.28; 256 px: 1.26

    def published_name(self, name: str, settings: dict[str, Any]) -> str:
        half, _, rest = name.partition(".")
        if half == "encoder":
            return stack_name(rest, "s_embedder", 0)
        return stack_name(rest, "x_embedder", settings["encoder_depth"])
