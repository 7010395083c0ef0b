"""Published weights of DiT^DH: key names, settings inferred from shapes, and fixed tables, which
the files hold and the network computes. Source: docs/rae.md.
"""

import math
from typing import Any

import torch

from ddt.errors import require
from ddt.flow import dimension_timeshift
from ddt.model.layers import integer_rope_table, sincos_table
from ddt.model.published_names import Release, State, check_depth, count_blocks, is_ditdh, shape_of, stack_name

# of tables that are written here and by others: the last bits of frequency, sine and cosine
TABLE_TOLERANCE = 1e-5
INPUTS = ("s_embedder.proj.weight", "x_embedder.proj.weight")  # convolutions in the file


class ReleasedDiTDH(Release):
    """DiT^DH: blocks numbered through both halves, which differ in width."""

    def recognizes(self, state: State) -> bool:
        return is_ditdh(state)

    def usual_autoencoder(self, latent_size: int) -> str:
        return "rae_dinov2_b_512" if latent_size == 32 else "rae_dinov2_b"

    def settings(self, state: State, encoder_depth: int | None, patch_size: int | None, source: str) -> dict[str, Any]:
        shapes = [shape_of(state, key, 4, source) for key in INPUTS]
        (width, channels, *_), (wide, *_) = shapes
        for key, shape in zip(INPUTS, shapes, strict=True):
            require(shape[2:] == (1, 1), f"{source}: {key} has shape {shape}: published files have patches of 1×1")
        require(patch_size in (None, 1), f"patch_size={patch_size}: {source} has patches of 1×1; leave it out")
        depth = count_blocks(state, source)
        widths = [shape_of(state, f"blocks.{i}.norm1.weight", 1, source)[0] for i in range(depth)]
        if width == wide:
            require(
                encoder_depth is not None,
                f"{source}: both halves are {width} wide: give encoder_depth, which the file does not hold",
            )
            assert encoder_depth is not None
            check_depth(encoder_depth, depth, source)
        else:
            own = widths.count(width)
            require(
                0 < own < depth and widths == [width] * own + [wide] * (depth - own),
                f"{source}: blocks of width {', '.join(map(str, dict.fromkeys(widths)))} are not an encoder's of "
                f"{width}, then a decoder's of {wide}",
            )
            require(
                encoder_depth in (None, own),
                f"encoder_depth={encoder_depth}: {source} has {own} blocks of the encoder's width; leave it out",
            )
            encoder_depth = own
        heads = [shape_of(state, f"{half}_feat_rope.freqs_cos", 2, source)[1] for half in ("enc", "dec")]
        return {
            "in_channels": channels,
            "patch_size": 1,
            "hidden_size": width,
            "num_heads": width // heads[0],
            "depth": depth,
            "encoder_depth": encoder_depth,
            "num_classes": shape_of(state, "y_embedder.embedding_table.weight", 2, source)[0] - 1,
            "decoder_hidden_size": wide,
            "decoder_num_heads": wide // heads[1],
        }

    def published_name(self, name: str, settings: dict[str, Any]) -> str:
        half, _, rest = name.partition(".")
        first, stack = (0, "s_embedder") if half == "encoder" else (settings["encoder_depth"], "x_embedder")
        published = stack_name(rest, stack, first).replace("adaLN_modulation.0.", "adaLN_modulation.1.")
        published = published.replace("final_layer.norm.", "final_layer.norm_final.")
        return published.replace("projector.", "s_projector.") if rest.startswith("projector.") else published

    def check(self, settings: dict[str, Any]) -> None:
        super().check(settings)
        patch_size = settings["patch_size"]
        require(
            patch_size == 1,
            f"model.patch_size={patch_size}: the published format knows 1 alone; choose format=hub or diffusers",
        )

    def latent_size(self, state: State, settings: dict[str, Any], source: str) -> int | None:
        tokens = shape_of(state, "enc_feat_rope.freqs_cos", 2, source)[0]
        side = math.isqrt(tokens)
        require(side * side == tokens, f"{source}: {tokens} tokens are no square")
        return side

    def tables(self, settings: dict[str, Any], height: int, width: int) -> State:
        """Return the fixed tables of a file by their names."""
        found = {"pos_embed": sincos_table(settings["hidden_size"], height, width)[0][None]}
        for name, half in (("enc", ""), ("dec", "decoder_")):
            size, heads = (settings.get(f"{half}{key}") or settings[key] for key in ("hidden_size", "num_heads"))
            for kind, table in zip(("cos", "sin"), integer_rope_table(size // heads, height, width), strict=True):
                found[f"{name}_feat_rope.freqs_{kind}"] = table.repeat_interleave(2, dim=-1)  # of both of a pair
        return found

    def read(self, state: State, settings: dict[str, Any], source: str) -> State:
        side = self.latent_size(state, settings, source)
        assert side is not None
        tables = self.tables(settings, side, side)
        for key, table in tables.items():
            require(key in state, f"{source}: key {key} is missing")
            found = state[key]
            require(
                found.shape == table.shape,
                f"{source}: {key} has shape {tuple(found.shape)}, expected {tuple(table.shape)}",
            )
            require(
                torch.allclose(found.float(), table, rtol=0, atol=TABLE_TOLERANCE),
                f"{source}: {key} is another table of positions than this network's; its weights would give wrong "
                "images here, so use the published file",
            )
        return {key: value.flatten(1) if key in INPUTS else value for key, value in state.items() if key not in tables}

    def write(self, state: State, settings: dict[str, Any], latent_shape: tuple[int, int, int]) -> State:
        convolutions = {key: state[key][:, :, None, None] for key in INPUTS}
        return {**state, **convolutions, **self.tables(settings, *latent_shape[1:])}

    def unsaid(self, settings: dict[str, Any]) -> tuple[str, ...]:
        equal = settings.get("decoder_hidden_size") in (None, settings["hidden_size"])
        return ("encoder_depth",) if equal else ()

    def sampler(self, latent_shape: tuple[int, int, int]) -> dict[str, Any]:
        return {
            "num_steps": 49,  # 50 points
            "cfg_scale": 1.0,
            "cfg_interval": None,
            "last_step": None,
            "t_end": 0.999,
            "timeshift": dimension_timeshift(latent_shape),
        }
