"""Published checkpoints: their key names, and nothing else, live here (method.md 6).

A release is a Lightning `.ckpt` (`state_dict` with the prefixes below) or a `.safetensors` file
with the same key names, with or without prefix. `encoder_depth` and the patch size are not in the
file.
"""

import dataclasses
import re
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ddt.errors import UserError, first_line, require
from ddt.files import fsync, share
from ddt.model import DDT, Denoiser, DiT

EMA_PREFIX = "ema_denoiser."
SUFFIXES = (".ckpt", ".safetensors")
RAW_PREFIX = "denoiser."
TRAINER_PREFIX = "diffusion_trainer."  # the projector

# (hidden_size, depth) -> encoder depths that the paper trained (method.md 5)
PUBLISHED_ENCODER_DEPTHS = {(768, 12): (4, 6, 8, 10), (1024, 24): (10, 12, 16, 20), (1152, 28): (22,)}


def find_released(source: str) -> Path:
    """Return the weights file that `source` means: a file, a folder that holds just one, or a hub
    id, which is downloaded.

    Raises UserError where there is none, more than one, or no way to the hub.
    """
    path = Path(source)
    if path.is_file():
        return path
    if path.is_dir():
        found = sorted(p for p in path.iterdir() if p.suffix in SUFFIXES)
        require(
            len(found) == 1,
            f"released={source}: holds {len(found)} .ckpt or .safetensors files; name the file",
        )
        return found[0]
    require(
        re.fullmatch(r"[\w.-]+/[\w.-]+", source) is not None,
        f"released={source}: no such file or folder, and no hub id such as MCG-NJU/DDT-XL-22en6de-R256",
    )
    from huggingface_hub import hf_hub_download, list_repo_files

    try:
        names = [name for name in list_repo_files(source) if Path(name).suffix in SUFFIXES]
        require(
            len(names) == 1,
            f"released={source}: holds {len(names)} .ckpt or .safetensors files; download one and name it",
        )
        return Path(hf_hub_download(source, names[0]))
    except UserError:
        raise
    except Exception as error:  # the hub client's network errors have no common base across its versions
        raise UserError(
            f"released={source}: no such file or folder here, and the hub did not give it ({first_line(error)}); "
            "download the checkpoint and name the file"
        ) from error


@dataclasses.dataclass
class Parts:
    """The weights in a release file under the release's names, without prefix. A part that is not
    there is empty.
    """

    ema: dict[str, Tensor]
    raw: dict[str, Tensor]
    projector: dict[str, Tensor]


def read_parts(path: Path) -> Parts:
    """Return the weights of a release file.

    Raises UserError for a missing or unreadable file, one without `state_dict` or EMA weights, and
    a key of unknown prefix.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; give a published .ckpt or .safetensors file")
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            require(
                isinstance(content, dict) and "state_dict" in content,
                f"{path}: has no entry `state_dict`, so it is no Lightning checkpoint",
            )
            state = content["state_dict"]
    except (SafetensorError, OSError, RuntimeError, EOFError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: cannot be read, download it again ({str(error).splitlines()[0]})") from error
    except Exception as error:  # pickle's own errors have no common base; weights_only refuses code here
        if type(error).__module__ not in ("_pickle", "pickle"):
            raise
        raise UserError(f"{path}: holds more than weights and is not loaded ({str(error).splitlines()[0]})") from error
    prefixes = (EMA_PREFIX, RAW_PREFIX, TRAINER_PREFIX)
    if not any(key.startswith(prefixes) for key in state):
        return Parts(ema=state, raw={}, projector={})
    unknown = [key for key in state if not key.startswith(prefixes)]
    require(not unknown, f"{path}: unknown key {unknown[:1]}: every key must begin with one of {', '.join(prefixes)}")

    def part(prefix: str) -> dict[str, Tensor]:
        return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}

    parts = Parts(ema=part(EMA_PREFIX), raw=part(RAW_PREFIX), projector=part(f"{TRAINER_PREFIX}proj.0."))
    require(bool(parts.ema), f"{path}: holds no {EMA_PREFIX}* keys, so no EMA weights")
    return parts


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Return the EMA weights of a release file under the release's names; see `read_parts`."""
    return read_parts(path).ema


def our_name(key: str, encoder_depth: int | None) -> str | None:
    """Translate a release key; None where it is unknown. `encoder_depth=None` is the undivided
    baseline.
    """
    head, _, rest = key.partition(".")
    encoder = "" if encoder_depth is None else "encoder."
    decoder = "" if encoder_depth is None else "decoder."
    if head in ("t_embedder", "y_embedder"):
        return f"{encoder}{key}"
    if head == "x_embedder":
        return f"{decoder}input.{rest}"
    if head == "s_embedder" and encoder_depth is not None:
        return f"encoder.input.{rest}"
    if head == "final_layer":
        return f"{decoder}output.{rest.replace('adaLN_modulation.0', 'adaln')}"
    match = re.fullmatch(r"blocks\.(\d+)\.(.+)", key)
    if match is None:
        return None
    index, rest = int(match[1]), match[2].replace("adaLN_modulation.0", "adaln")
    rest = re.sub(r"^attn\.", "mixer.", rest)
    if encoder_depth is None or index < encoder_depth:
        return f"{encoder}blocks.{index}.{rest}"
    return f"decoder.blocks.{index - encoder_depth}.{rest}"


def their_name(name: str, encoder_depth: int | None) -> str:
    """Translate a name of this project's network into the release's: the inverse of `our_name`."""
    half, rest = ("", name) if encoder_depth is None else name.split(".", 1)
    head, _, tail = rest.partition(".")
    tail = tail.replace("adaln.", "adaLN_modulation.0.")
    if head == "blocks":
        index, _, tail = tail.partition(".")
        shift = encoder_depth or 0 if half == "decoder" else 0
        return f"blocks.{int(index) + shift}.{re.sub(r'^mixer[.]', 'attn.', tail)}"
    if head == "input":
        return f"{'s' if half == 'encoder' else 'x'}_embedder.{tail}"
    return f"final_layer.{tail}" if head == "output" else f"{head}.{tail}"


def check_releasable(network: dict[str, Any]) -> None:
    """Raise UserError where a network of these settings has weights that the release has no names
    for.
    """
    block = network.get("decoder_block", "attention")
    require(
        block == "attention",
        f"model.decoder_block={block}: the published format knows attention alone; choose format=hub or diffusers",
    )


def write_released(path: Path, state: dict[str, Tensor], encoder_depth: int | None) -> None:
    """Write weights under the release's names: `.safetensors` without prefix, or a `.ckpt` with
    those of Lightning.

    state: float32 weights under this project's names. encoder_depth None is the undivided baseline.
    Written under another name first. `load_released` reads them back bit for bit.
    """
    theirs = {their_name(name, encoder_depth): value.contiguous() for name, value in state.items()}
    for name in state:
        assert our_name(their_name(name, encoder_depth), encoder_depth) == name, f"{name}: has no name in the release"
    temporary = path.with_name(f".tmp-{path.name}")
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        save_file(theirs, temporary)
        share(temporary)
    else:
        torch.save({"state_dict": {f"{EMA_PREFIX}{key}": value for key, value in theirs.items()}}, temporary)
    fsync(temporary)
    temporary.rename(path)


def shape_of(state: dict[str, Tensor], key: str, source: str) -> torch.Size:
    """Return the shape of a weight, or raise UserError naming the missing key."""
    if key not in state:
        raise UserError(f"{source}: key {key} is missing")
    return state[key].shape


def architecture(state: dict[str, Tensor], encoder_depth: int | None, patch_size: int, source: str) -> dict[str, int]:
    """Read the constructor's arguments from the shapes of a release's weights.

    Raises UserError where a key is missing or encoder_depth or patch_size cannot be. Source:
    method.md 6.
    """
    known = ("x_embedder.", "final_layer.", "blocks.")
    require(any(key.startswith(known) for key in state), f"{source}: holds no DDT (no keys such as x_embedder.*)")
    undivided = "s_embedder.proj.weight" not in state
    if undivided and encoder_depth is not None:
        raise UserError(f"{source}: has no s_embedder, so it is the undivided baseline: give encoder_depth=null")
    if not undivided and encoder_depth is None:
        raise UserError(f"{source}: is a DDT: give encoder_depth, which the file does not hold")
    rows, hidden_size = shape_of(state, "final_layer.linear.weight", source)
    require(
        patch_size >= 1 and rows % patch_size**2 == 0,
        f"patch_size={patch_size}: its square does not divide the {rows} output rows of {source}",
    )
    indices = {int(key.split(".")[1]) for key in state if re.match(r"blocks\.\d+\.", key)}
    depth = len(indices)
    require(
        depth > 0 and max(indices) == depth - 1,
        f"{source}: {depth} blocks, numbered up to {max(indices, default=0)}: some are missing",
    )
    sizes = {
        "in_channels": rows // patch_size**2,
        "patch_size": patch_size,
        "hidden_size": hidden_size,
        "num_heads": hidden_size // shape_of(state, "blocks.0.attn.q_norm.weight", source)[0],
        "depth": depth,
        "num_classes": shape_of(state, "y_embedder.embedding_table.weight", source)[0] - 1,
    }
    if encoder_depth is None:
        return sizes
    require(
        1 <= encoder_depth < depth,
        f"encoder_depth={encoder_depth}: {source} has {depth} blocks, choose 1..{depth - 1}",
    )
    usual = PUBLISHED_ENCODER_DEPTHS.get((hidden_size, depth))
    if usual and encoder_depth not in usual:
        warnings.warn(
            f"encoder_depth={encoder_depth} is unusual for width {hidden_size} and {depth} blocks (published: "
            f"{', '.join(map(str, usual))}); a wrong one cannot be seen in the weights and gives wrong pictures",
            stacklevel=3,  # the caller of load_released
        )
    return {**sizes, "encoder_depth": encoder_depth}


def build_from_state(state: dict[str, Tensor], sizes: dict[str, Any], source: str) -> Denoiser:
    """Build the network of `architecture` and fill it strictly from a release's weights.

    Raises UserError naming any unknown key, missing key or wrong shape.
    """
    encoder_depth = sizes.get("encoder_depth")
    with torch.device("meta"):
        model: Denoiser = DiT(**sizes) if encoder_depth is None else DDT(**sizes)
    wanted = {key: value.shape for key, value in model.state_dict().items()}
    found: dict[str, Tensor] = {}
    for key, value in state.items():
        name = our_name(key, encoder_depth)
        require(name is not None and name in wanted, f"{source}: unknown key {key}")
        assert name is not None
        require(
            value.shape == wanted[name],
            f"{source}: {key} has shape {tuple(value.shape)}, expected {tuple(wanted[name])}",
        )
        require(value.is_floating_point() and bool(value.isfinite().all()), f"{source}: {key} holds no finite numbers")
        found[name] = value.float()
    missing = sorted(set(wanted) - set(found))
    require(not missing, f"{source}: the weights for {', '.join(missing[:3])} are missing ({len(missing)} in all)")
    model.load_state_dict(found, strict=True, assign=True)
    return model.eval().requires_grad_(True)


def load_released(path: str | Path, encoder_depth: int | None, patch_size: int = 2) -> Denoiser:
    """Load a published checkpoint into this project's network: EMA weights, float32, on the CPU.

    Args:
        path: a Lightning `.ckpt`, or a `.safetensors` file with the release's key names.
        encoder_depth: blocks of the encoder, 1..depth−1 (22 for the published XL); None for the
        undivided baseline.
        patch_size: p, 2 for all published models. The rest of the architecture is read from the
        shapes.

    Returns a `DDT`, or a `DiT` for the baseline. Raises UserError, a ValueError, naming any unknown
    or missing key, an impossible encoder_depth or patch_size, or an unreadable file; warns of an
    encoder_depth that the paper does not use for this width and depth. Source: method.md 6.
    """
    path = Path(path)
    state = read_state_dict(path)
    return build_from_state(state, architecture(state, encoder_depth, patch_size, path.name), path.name)
