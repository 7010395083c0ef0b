"""Networks of timm: their weights, from a local file of any layout or the hub, and feature maps.

Shapes: B images of H W pixels; h·w tokens of F features.
"""

import difflib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddt.errors import UserError, require
from ddt.hub import fetch
from ddt.tensor_files import read_state_dict

# transformers' names of DINOv2, ViT-MAE and SigLIP's vision tower → Meta's, of which most are
# timm's; query, key and value are joined
TRANSFORMERS = {
    r"embeddings\.(cls_token|mask_token|register_tokens)": r"\1",
    r"embeddings\.position_embeddings?(\.weight)?": "pos_embed",
    r"embeddings\.(?:patch_embeddings\.projection|patch_embedding)\.(\w+)": r"patch_embed.proj.\1",
    r"encoder\.layer\.(\d+)\.(norm[12]\.\w+|mlp\.fc[12]\.\w+)": r"blocks.\1.\2",
    r"encoder\.layer\.(\d+)\.attention\.attention\.(query|key|value)\.(\w+)": r"blocks.\1.attn.qkv.\3",
    r"encoder\.layer\.(\d+)\.attention\.output\.dense\.(\w+)": r"blocks.\1.attn.proj.\2",
    r"encoder\.layer\.(\d+)\.layer_scale([12])\.lambda1": r"blocks.\1.ls\2.gamma",
    r"encoder\.layer\.(\d+)\.mlp\.weights_in\.(\w+)": r"blocks.\1.mlp.w12.\2",
    r"encoder\.layer\.(\d+)\.mlp\.weights_out\.(\w+)": r"blocks.\1.mlp.w3.\2",
    r"layernorm\.(\w+)": r"norm.\1",
    # ViT-MAE
    r"encoder\.layer\.(\d+)\.layernorm_before\.(\w+)": r"blocks.\1.norm1.\2",
    r"encoder\.layer\.(\d+)\.layernorm_after\.(\w+)": r"blocks.\1.norm2.\2",
    r"encoder\.layer\.(\d+)\.intermediate\.dense\.(\w+)": r"blocks.\1.mlp.fc1.\2",
    r"encoder\.layer\.(\d+)\.output\.dense\.(\w+)": r"blocks.\1.mlp.fc2.\2",
    # SigLIP
    r"encoder\.layers\.(\d+)\.layer_norm([12])\.(\w+)": r"blocks.\1.norm\2.\3",
    r"encoder\.layers\.(\d+)\.(mlp\.fc[12]\.\w+)": r"blocks.\1.\2",
    r"encoder\.layers\.(\d+)\.self_attn\.(q_proj|k_proj|v_proj)\.(\w+)": r"blocks.\1.attn.qkv.\3",
    r"encoder\.layers\.(\d+)\.self_attn\.out_proj\.(\w+)": r"blocks.\1.attn.proj.\2",
    r"post_layernorm\.(\w+)": r"norm.\1",
}
PREFIX = r"(dinov2|dinov2_with_registers|vit|vision_model)\."  # of the network inside of a larger one
PARTS = {"query": 0, "key": 1, "value": 2, "q_proj": 0, "k_proj": 1, "v_proj": 2}


def from_transformers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict of transformers' `Dinov2Model`, `ViTMAEModel` or `SiglipVisionModel`
    under Meta's names; others as they are.

    Names that the layout does not have stay, for the network to refuse.
    """
    if not any(re.fullmatch(rf"({PREFIX})?embeddings\.(cls_token|position_embedding\.weight)", name) for name in state):
        return state
    renamed: dict[str, Tensor] = {}
    joined: dict[str, dict[int, Tensor]] = {}  # name of a qkv → its parts
    for name, value in state.items():
        short = re.sub(f"^{PREFIX}", "", name)
        pattern = next((each for each in TRANSFORMERS if re.fullmatch(each, short)), None)
        new = short if pattern is None else re.sub(pattern, TRANSFORMERS[pattern], short)
        part = re.search(rf"\.({'|'.join(PARTS)})\.", short)
        if pattern is not None and part is not None:
            joined.setdefault(new, {})[PARTS[part[1]]] = value
        else:
            renamed[new] = value[None] if new == "pos_embed" and value.ndim == 2 else value
    for name, parts in joined.items():
        if len(parts) == 3 and len({value.shape for value in parts.values()}) == 1:
            renamed[name] = torch.cat([parts[k] for k in range(3)])
    return renamed


def with_registers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict of DINOv2 with registers under timm's names; others as they are.

    timm adds positions to the patches alone: the class token gets its own for good.
    """
    if not {"register_tokens", "cls_token", "pos_embed"} <= state.keys():
        return state
    others = {name: value for name, value in state.items() if name not in ("register_tokens", "mask_token")}
    table = state["pos_embed"]
    return {
        **others,
        "reg_token": state["register_tokens"],
        "cls_token": state["cls_token"] + table[:, :1],
        "pos_embed": table[:, 1:],
    }


def read_timm_weights(path: Path, label: str, advice: str) -> dict[str, Tensor]:
    """Return the state dict of a file for a network of timm: with timm's names, or of DINOv2, MAE
    and SigLIP with Meta's or transformers'. Raises UserError, beginning with `label`, where it
    cannot be read.
    """
    return with_registers(from_transformers(read_state_dict(path, label, advice)))


def check_model(key: str, name: str) -> None:
    """Raise UserError for a name unknown to timm, with close ones; key: of the setting."""
    import timm

    known = {*timm.list_models(), *timm.list_models(include_tags=True)}
    if name not in known:
        close = difflib.get_close_matches(name, known, n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else "see timm.list_models()"
        raise UserError(f"{key}={name}: timm has no model of this name; {hint}")


def is_vit(network: Any) -> bool:
    """Return whether a network has patch tokens."""
    return hasattr(network, "num_prefix_tokens") and hasattr(network, "patch_embed")


def find_stage(network: Any, stride: int, key: str) -> int:
    """Return the number of the stage in `feature_info` whose map is a ViT's patch tokens, or a
    CNN's last of `stride`. Raises UserError, which begins with `key`, where there is none.
    """
    strides = [stage["reduction"] for stage in network.feature_info]
    if is_vit(network):
        return len(strides) - 1
    require(
        stride in strides and hasattr(network, "forward_intermediates"),
        f"{key}: has no feature map of stride {stride}, only {sorted(set(strides))}; choose another",
    )
    return max(i for i, each in enumerate(strides) if each == stride)


def extractor(network: Any, stage: int) -> Callable[[Tensor], Tensor]:
    """Remove what lies behind a stage, and return the function from normalised images
    (B, 3, H, W) to its map as tokens (B, h·w, F): of a ViT after the final norm, without class and
    registers.
    """
    if is_vit(network):
        network.reset_classifier(0)
        prefix = network.num_prefix_tokens
        return lambda pixels: network.forward_features(pixels)[:, prefix:]
    pruned = network.prune_intermediate_layers([stage], prune_norm=True, prune_head=True)

    def extract(pixels: Tensor) -> Tensor:
        maps = network.forward_intermediates(pixels, indices=pruned, intermediates_only=True, output_fmt="NCHW")
        return maps[0].flatten(2).transpose(1, 2)  # (B, h·w, F)

    return extract


def pretrained_file(name: str, label: str, advice: str) -> Path | None:
    """Return the file of timm's own weights of a network, from the hub's cache or downloaded; None
    where timm has them elsewhere. Raises UserError, beginning with `label`.
    """
    import timm

    source = timm.get_pretrained_cfg(name)
    if source is None or not source.hf_hub_id:
        return None
    wanted = [source.hf_hub_filename] if source.hf_hub_filename else ["model.safetensors", "pytorch_model.bin"]

    def choose(names: list[str]) -> list[str]:
        found = [name for name in wanted if name in names]
        require(bool(found), f"{label}: {source.hf_hub_id} on the hub holds no {wanted[0]}; {advice}")
        return found[:1]

    folder = fetch(source.hf_hub_id, label, choose, advice)
    return folder / choose([path.name for path in folder.iterdir()])[0]
