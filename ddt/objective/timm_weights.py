"""Weights of timm's networks: from a local file of any layout, or from timm's model on the hub."""

import re
from pathlib import Path

import torch
from torch import Tensor

from ddt.errors import require
from ddt.hub import fetch
from ddt.tensor_files import read_state_dict

# of DINOv2: transformers' names → Meta's, which timm reads; query, key and value are joined
TRANSFORMERS = {
    r"embeddings\.(cls_token|mask_token|register_tokens)": r"\1",
    r"embeddings\.position_embeddings": "pos_embed",
    r"embeddings\.patch_embeddings\.projection\.(\w+)": r"patch_embed.proj.\1",
    r"encoder\.layer\.(\d+)\.(norm[12]\.\w+|mlp\.fc[12]\.\w+)": r"blocks.\1.\2",
    r"encoder\.layer\.(\d+)\.attention\.attention\.(query|key|value)\.(\w+)": r"blocks.\1.attn.qkv.\3",
    r"encoder\.layer\.(\d+)\.attention\.output\.dense\.(\w+)": r"blocks.\1.attn.proj.\2",
    r"encoder\.layer\.(\d+)\.layer_scale([12])\.lambda1": r"blocks.\1.ls\2.gamma",
    r"encoder\.layer\.(\d+)\.mlp\.weights_in\.(\w+)": r"blocks.\1.mlp.w12.\2",
    r"encoder\.layer\.(\d+)\.mlp\.weights_out\.(\w+)": r"blocks.\1.mlp.w3.\2",
    r"layernorm\.(\w+)": r"norm.\1",
}


def from_transformers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict of transformers' `Dinov2Model` under Meta's names; others as they are.

    Names that the layout does not have stay, for timm to refuse.
    """
    if not any(re.fullmatch(r"(dinov2\.)?embeddings\.cls_token", name) for name in state):
        return state
    renamed: dict[str, Tensor] = {}
    joined: dict[str, dict[str, Tensor]] = {}  # name of a qkv → its parts
    for name, value in state.items():
        short = name.removeprefix("dinov2.")
        pattern = next((each for each in TRANSFORMERS if re.fullmatch(each, short)), None)
        new = short if pattern is None else re.sub(pattern, TRANSFORMERS[pattern], short)
        part = re.search(r"\.(query|key|value)\.", short)
        if part is None:
            renamed[new] = value
        else:
            joined.setdefault(new, {})[part[1]] = value
    for name, parts in joined.items():
        if parts.keys() == {"query", "key", "value"} and len({value.shape for value in parts.values()}) == 1:
            renamed[name] = torch.cat([parts["query"], parts["key"], parts["value"]])
    return renamed


def read_timm_weights(path: Path, label: str, advice: str) -> dict[str, Tensor]:
    """Return the state dict of a file for a network of timm: with timm's names, or of DINOv2 with
    Meta's or transformers'. Raises UserError, beginning with `label`, where it cannot be read.
    """
    return from_transformers(read_state_dict(path, label, advice))


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
