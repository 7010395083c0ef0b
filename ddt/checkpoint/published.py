"""Published checkpoints: Lightning `.ckpt` (`state_dict`, prefixes below) or `.safetensors`.

Each network family's `release` (`ddt.model.published_names`) has the key names; `encoder_depth` and
`patch_size` of a DDT are not in the file. Source: method.md 6.
"""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ddt.autoencoder import part_of_autoencoder
from ddt.checkpoint.models import ADVICE, PUBLISHED, hub_file
from ddt.checkpoint.settings import SUFFIXES, Part
from ddt.errors import UserError, require
from ddt.files import atomic_file, reset_permissions
from ddt.hub import fetch, resolve
from ddt.model import NETWORKS, Denoiser, build_network, load_network, network_class
from ddt.model.published_names import Release
from ddt.tensor_files import read_tensors, state_dict

PREFIXES = {"ema": "ema_denoiser.", "model": "denoiser.", "trainer": "diffusion_trainer."}
PROJECTOR = "proj.0."  # of the trainer: the alignment's
READ_SUFFIXES = (*SUFFIXES, ".pt", ".pth")  # of those found in a folder; a named file may have any
WEIGHTS: dict[Part, str] = {"ema": "EMA", "model": "raw"}


def find_released(source: str, key: str = "released") -> Path:
    """Return the weights file of `source`: itself, the only one in a folder or of a hub id, the
    file of a hub id `owner/name:PATH`, or that of a name in `PUBLISHED`.

    key: the setting, for messages. Raises UserError where there is none, more than one, or the
    download fails.
    """
    label = f"{key}={source}"
    if not Path(source).exists():
        source = PUBLISHED[source].source if source in PUBLISHED else source
        named_file = hub_file(source)
        if named_file is not None:
            repository, file = named_file

            def named(names: list[str]) -> list[str]:
                require(file in names, f"{label}: the hub's {repository} has no file {file}; give another")
                return [file]

            return fetch(repository, label, named, ADVICE) / file

    def only(names: list[str]) -> list[str]:
        found = [name for name in names if Path(name).suffix in READ_SUFFIXES and "/" not in name]
        require(
            len(found) == 1,
            f"{key}={source}: holds {len(found)} files of weights ({', '.join(READ_SUFFIXES)}); name the file",
        )
        return found

    path = resolve(source, label, only, ADVICE)
    if path.is_dir():
        return path / only([file.name for file in path.iterdir() if file.is_file()])[0]
    return path


def release_of(network: dict[str, Any]) -> Release:
    """Return the published format of a network's family; UserError for one without."""
    release = network_class(network).release
    if release is None:
        raise UserError(f"model._target_={network['_target_']}: was not published; choose format=hub or diffusers")
    return release


def read_file(path: Path) -> dict[str, dict[str, Tensor]]:
    """Return the "ema", "model" and "projector" weights of a published file, without prefixes.

    The file is a Lightning checkpoint, a bare state dict, whose weights count as "ema", or holds
    state dicts `ema` and `model`. Parts of names that DDP or `torch.compile` added are removed.
    Raises UserError for a missing or unreadable file, one without weights, and a key of unknown
    prefix.
    """
    name, advice = str(path), "give a published .ckpt or .safetensors file"
    content = read_tensors(path, name, f"{advice}, or download it again")
    parts: dict[str, dict[str, Tensor]] = {"ema": {}, "model": {}, "projector": {}}
    if isinstance(content, dict) and "state_dict" not in content:
        whole = [part for part in WEIGHTS if isinstance(content.get(part), dict)]
        if whole:
            return parts | {part: state_dict(content[part], f"{name}: {part}", advice) for part in whole}
    nested = isinstance(content, dict) and "state_dict" in content
    state = state_dict(content["state_dict"] if nested else content, name, advice)
    known = tuple(PREFIXES.values())
    if not any(key.startswith(known) for key in state):
        return parts | {"ema": state}
    unknown = [key for key in state if not key.startswith(known)]
    require(not unknown, f"{path}: unknown key {unknown[:1]}: every key must begin with one of {', '.join(known)}")
    prefixes = {"ema": PREFIXES["ema"], "model": PREFIXES["model"], "projector": PREFIXES["trainer"] + PROJECTOR}
    return {
        part: {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        for part, prefix in prefixes.items()
    }


@dataclasses.dataclass(frozen=True)
class Released:
    """A published checkpoint. name: of its file. network: settings for `build_network`.

    parts: its weights under the release's names; `weights` returns them under this project's.
    latent_size: side of the latents, None where it is not in the file.
    """

    name: str
    network: dict[str, Any]
    parts: dict[str, dict[str, Tensor]]
    latent_size: int | None = None

    @property
    def release(self) -> Release:
        """The format of the network's family."""
        return release_of(self.network)

    def weights(self, part: Part = "ema") -> dict[str, Tensor]:
        """Return a state dict of the network, float32.

        Raises UserError where the file has no such weights, naming an unknown or missing key, a
        wrong shape or a non-finite value.
        """
        others = " and ".join(f"weights={other}" for other in WEIGHTS if self.parts[other])
        require(
            bool(self.parts[part]),
            f"weights={part}: {self.name} holds no {WEIGHTS[part]} weights ({PREFIXES[part]}*); give {others}",
        )
        release = self.release
        with torch.device("meta"):
            shapes = {key: value.shape for key, value in build_network(self.network).state_dict().items()}
        names = {release.published_name(name, self.network): name for name in shapes}
        state = {}
        for key, value in release.read(self.parts[part], self.network, self.name).items():
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


def read_released(path: Path, encoder_depth: int | None, patch_size: int | None, target: str | None = None) -> Released:
    """Read a published file: the network family from its keys, the rest from the shapes.

    encoder_depth, patch_size: None where the file says, and for the undivided baseline. target: the
    family that it must be, a key of `NETWORKS`; None: any. Raises UserError for an unreadable file,
    an unknown or another family, and an impossible encoder_depth or patch_size.
    """
    parts = read_file(path)
    state = parts["ema"] or parts["model"]
    found, release = find_release(state, path.name)
    require(
        target in (None, found),
        f"{path.name}: is a {short_name(found)}, not a {short_name(str(target))}; give a file of that, or choose the "
        "model of this",
    )
    settings = release.settings(state, encoder_depth, patch_size, path.name)
    latent_size = release.latent_size(state, settings, path.name)
    return Released(path.name, {"_target_": found, **settings}, parts, latent_size)


def short_name(target: str) -> str:
    """Return the name of a class without its package."""
    return target.rpartition(".")[2]


def find_release(state: dict[str, Tensor], source: str) -> tuple[str, Release]:
    """Return the network family, a key of `NETWORKS`, whose weights these are, and its published
    format; UserError, which says what they are where that is known, for others.
    """
    for target, kind in NETWORKS.items():
        if kind.release is not None and kind.release.recognizes(state):
            return target, kind.release
    part = part_of_autoencoder(state)
    what = f"is {part}" if part else "holds no DDT (no keys such as x_embedder.*)"
    raise UserError(f"{source}: {what}; give the file of a DDT, a DiT or a DiT^DH")


def load_released(
    path: str | Path, encoder_depth: int | None = None, patch_size: int | None = None, weights: Part = "ema"
) -> Denoiser:
    """Load a published checkpoint as a `DDT`, `DiT` (its baseline) or `DiTDH` (of RAE): float32, on
    the CPU.

    Args:
        path: a Lightning checkpoint or a bare state dict with the release's key names, in torch's
            format or safetensors.
        encoder_depth: blocks of the encoder of a DDT, 1..depth−1 (22 for the published XL), and of
            a DiTDH whose halves are equally wide; None for the others, which say it.
        patch_size: p of a DDT, None: 2, as in all published models. A DiTDH file says it.
        weights: "ema", or "model" (raw). The weights of a bare state dict count as "ema".

    Raises UserError, a ValueError, naming an unknown or missing key, an impossible encoder_depth or
    patch_size, or an unreadable file; warns of an encoder_depth that the paper does not use for
    this width and depth. Source: method.md 6.
    """
    require(weights in WEIGHTS, f"weights={weights}: choose from {', '.join(WEIGHTS)}")
    released = read_released(Path(path), encoder_depth, patch_size)
    return load_network(released.network, released.weights(weights))


def check_releasable(network: dict[str, Any]) -> None:
    """Raise UserError where a published file cannot hold a network with these settings."""
    release_of(network).check(network)
    prediction = network.get("prediction", "v")
    require(
        prediction == "v",
        f"objective.prediction={prediction}: the published format knows v alone; choose format=hub or diffusers",
    )


def sizes_to_load(network: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of `load_released` that a file of such a network needs."""
    return {key: network.get(key) for key in release_of(network).unsaid(network)}


def write_released(
    path: Path, network: dict[str, Any], state: dict[str, Tensor], latent_shape: tuple[int, int, int]
) -> None:
    """Write weights atomically under the release's names: `.safetensors`, or `.ckpt` with prefixes.

    network: settings of `build_network`. state: its float32 weights, which `load_released` reads
    back bit for bit. latent_shape: (C, H, W), for the fixed tables that some files hold.
    """
    release = release_of(network)
    published = {release.published_name(name, network): value.contiguous() for name, value in state.items()}
    assert len(published) == len(state), "two weights have one published name"
    published = {k: v.contiguous() for k, v in release.write(published, network, latent_shape).items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as temporary:
        if path.suffix == ".safetensors":
            save_file(published, temporary)
            reset_permissions(temporary)
        else:
            with temporary.open("wb") as file:
                torch.save({"state_dict": {PREFIXES["ema"] + key: value for key, value in published.items()}}, file)
