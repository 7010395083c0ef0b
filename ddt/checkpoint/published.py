"""Published checkpoints: Lightning `.ckpt` (`state_dict`, prefixes below) or `.safetensors`.

Each network family's `release` (`ddt.model.published_names`) has the key names; `encoder_depth` and
`patch_size` are not in the file. Source: method.md 6.
"""

import dataclasses
import pickle
import re
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ddt.checkpoint.hub import HUB_ID, hub_errors
from ddt.errors import UserError, first_line, require
from ddt.files import atomic_file, reset_permissions
from ddt.model import NETWORKS, Denoiser, build_network, load_network, network_class
from ddt.model.published_names import Release

PREFIXES = {"ema": "ema_denoiser.", "model": "denoiser.", "trainer": "diffusion_trainer."}
PROJECTOR = "proj.0."  # of the trainer: the alignment's
SUFFIXES = (".ckpt", ".safetensors")


def find_released(source: str) -> Path:
    """Return the weights file of `source`: itself, the only one in a folder, or that of a hub id.

    Raises UserError where there is none, more than one, or the download fails.
    """
    path = Path(source)
    if path.is_file():
        return path
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if p.suffix in SUFFIXES)
        require(len(files) == 1, f"released={source}: holds {len(files)} .ckpt or .safetensors files; name the file")
        return files[0]
    require(
        re.fullmatch(HUB_ID, source) is not None,
        f"released={source}: no such file or folder, and no hub id such as MCG-NJU/DDT-XL-22en6de-R256",
    )
    from huggingface_hub import hf_hub_download, list_repo_files

    with hub_errors(
        f"released={source}: no such file or folder here, and the hub did not give it ({{error}}); download the "
        "checkpoint and name the file"
    ):
        names = [name for name in list_repo_files(source) if Path(name).suffix in SUFFIXES]
        require(
            len(names) == 1,
            f"released={source}: holds {len(names)} .ckpt or .safetensors files; download one and name it",
        )
        return Path(hf_hub_download(source, names[0]))


def release_of(network: dict[str, Any]) -> Release:
    """Return the published format of a network's family; UserError for one without."""
    release = network_class(network).release
    if release is None:
        raise UserError(f"model._target_={network['_target_']}: was not published; choose format=hub or diffusers")
    return release


def read_file(path: Path) -> dict[str, dict[str, Tensor]]:
    """Return the "ema", "model" and "projector" weights of a published file, without prefixes.

    Only "ema" is never empty. Raises UserError for a missing or unreadable file, one without
    `state_dict` or EMA weights, and a key of unknown prefix.
    """
    require(path.is_file(), f"{path}: no such file; give a published .ckpt or .safetensors file")
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
    except UserError:
        raise
    except pickle.UnpicklingError as error:  # weights_only refuses code here
        raise UserError(f"{path}: holds more than weights and is not loaded ({first_line(error)})") from error
    except (SafetensorError, OSError, RuntimeError, EOFError, ValueError) as error:
        raise UserError(f"{path}: cannot be read, download it again ({first_line(error)})") from error
    known = tuple(PREFIXES.values())
    if not any(key.startswith(known) for key in state):
        return {"ema": state, "model": {}, "projector": {}}
    unknown = [key for key in state if not key.startswith(known)]
    require(not unknown, f"{path}: unknown key {unknown[:1]}: every key must begin with one of {', '.join(known)}")
    prefixes = {"ema": PREFIXES["ema"], "model": PREFIXES["model"], "projector": PREFIXES["trainer"] + PROJECTOR}
    parts = {
        part: {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        for part, prefix in prefixes.items()
    }
    require(bool(parts["ema"]), f"{path}: holds no {PREFIXES['ema']}* keys, so no EMA weights")
    return parts


@dataclasses.dataclass(frozen=True)
class Released:
    """A published checkpoint. name: of its file. network: settings for `build_network`.

    parts: its weights under the release's names; `weights` returns them under this project's.
    """

    name: str
    network: dict[str, Any]
    parts: dict[str, dict[str, Tensor]]

    def weights(self, part: Literal["ema", "model"] = "ema") -> dict[str, Tensor]:
        """Return a state dict of the network, float32.

        Raises UserError naming an unknown or missing key, a wrong shape or a non-finite value.
        """
        release = release_of(self.network)
        with torch.device("meta"):
            shapes = {key: value.shape for key, value in build_network(self.network).state_dict().items()}
        names = {release.published_name(name, self.network): name for name in shapes}
        state = {}
        for key, value in self.parts[part].items():
            require(key in names, f"{self.name}: unknown key {key}")
            shape = shapes[names[key]]
            require(value.shape == shape, f"{self.name}: {key} has shape {tuple(value.shape)}, expected {tuple(shape)}")
            require(
                value.is_floating_point() and bool(value.isfinite().all()),
                f"{self.name}: {key} holds NaN or infinite values, or integers",
            )
            state[names[key]] = value.float()
        missing = sorted(shapes.keys() - state.keys())
        require(
            not missing, f"{self.name}: the weights for {', '.join(missing[:3])} are missing ({len(missing)} in all)"
        )
        return state


def read_released(path: Path, encoder_depth: int | None, patch_size: int) -> Released:
    """Read a published file: the network family from its keys, the rest from the shapes.

    encoder_depth: None for the undivided baseline. Raises UserError for an unreadable file, an
    unknown family, and an impossible encoder_depth or patch_size.
    """
    parts = read_file(path)
    for target, kind in NETWORKS.items():
        if kind.release is not None and kind.release.recognizes(parts["ema"]):
            settings = kind.release.settings(parts["ema"], encoder_depth, patch_size, path.name)
            return Released(path.name, {"_target_": target, **settings}, parts)
    raise UserError(f"{path.name}: holds no DDT (no keys such as x_embedder.*)")


def load_released(path: str | Path, encoder_depth: int | None, patch_size: int = 2) -> Denoiser:
    """Load a published checkpoint as a `DDT`, or `DiT` (baseline): EMA weights, float32, CPU.

    Args:
        path: a Lightning `.ckpt`, or a `.safetensors` file with the release's key names.
        encoder_depth: blocks of the encoder, 1..depth−1 (22 for the published XL); None for the
            undivided baseline.
        patch_size: p, 2 for all published models.

    Raises UserError, a ValueError, naming an unknown or missing key, an impossible encoder_depth or
    patch_size, or an unreadable file; warns of an encoder_depth that the paper does not use for
    this width and depth. Source: method.md 6.
    """
    released = read_released(Path(path), encoder_depth, patch_size)
    return load_network(released.network, released.weights())


def check_releasable(network: dict[str, Any]) -> None:
    """Raise UserError where a network with these settings has weights without published names."""
    release_of(network).check(network)


def write_released(path: Path, network: dict[str, Any], state: dict[str, Tensor]) -> None:
    """Write weights atomically under the release's names: `.safetensors`, or `.ckpt` with prefixes.

    network: settings of `build_network`. state: its float32 weights, which `load_released` reads
    back bit for bit.
    """
    release = release_of(network)
    published = {release.published_name(name, network): value.contiguous() for name, value in state.items()}
    assert len(published) == len(state), "two weights have one published name"
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as temporary:
        if path.suffix == ".safetensors":
            save_file(published, temporary)
            reset_permissions(temporary)
        else:
            with temporary.open("wb") as file:
                torch.save({"state_dict": {PREFIXES["ema"] + key: value for key, value in published.items()}}, file)
