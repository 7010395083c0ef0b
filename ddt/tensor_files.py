"""Files of tensors: safetensors, torch's pickles without their code, and .npy by the row.

The only reader of released checkpoints, pretrained weights and our own checkpoints. What a file is
follows from its content, not from its name; what holds no tensors is named as what it is. Files are
mapped where the file system can (some network and FUSE file systems cannot), and read elsewhere.
"""

import contextlib
import dataclasses
import errno
import hashlib
import math
import pickle
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from ddt.errors import UserError, brief, first_line, require
from ddt.files import atomic_file, file_errors

MAGIC = {  # first bytes → what the file is
    b"version https://git-lfs": "is a Git LFS pointer, not the file itself; fetch it by `git lfs pull`",
    b"\x93NUMPY": "is a NumPy array (.npy)",
    b"\x89PNG": "is a picture (PNG)",
    b"\xff\xd8\xff": "is a picture (JPEG)",
    b"\x89HDF": "is an HDF5 file",
    b"GGUF": "is a GGUF file",
    b"\x1f\x8b": "is packed by gzip; unpack it",
    b"%PDF": "is a PDF",
}
# What training scripts pickle beside their weights, settings and counters, by module or full name.
HARMLESS = re.compile(
    r"(argparse|datetime|jsonargparse|lightning|numpy|omegaconf|pathlib|pytorch_lightning|typing)\..+"
    r"|builtins\.(bool|dict|float|int|list|str|tuple)|collections\.defaultdict"
)
# those of files in torch's format before 1.6, whose names torch does not list
LEGACY = ("argparse.Namespace", "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar", "numpy.dtype")
WRAPPERS = ("_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
CONTAINERS = ("state_dict_ema", "model_ema", "state_dict", "model")  # of a state dict, the preferred one first


class Skipped:
    """Stands for an object beside the weights: nothing of its class is imported or run."""

    def __new__(cls, *args: Any, **kwargs: Any) -> "Skipped":
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def skipped_dict(*args: Any) -> dict[Any, Any]:
    """Stands for `collections.defaultdict`, which is filled after it is made."""
    return {}


def is_safetensors(path: Path) -> bool:
    """Return whether a file begins as safetensors does: the length of a JSON header, then it."""
    with path.open("rb") as file:
        length, brace = int.from_bytes(file.read(8), "little"), file.read(1)
    return brace == b"{" and length < 2**32


def foreign(path: Path) -> str:
    """Return what a file is that holds no tensors, "" where it may hold some."""
    with path.open("rb") as file:
        head = file.read(512)
    if not head.strip():
        return "is empty"
    for magic, kind in MAGIC.items():
        if head.startswith(magic):
            return kind
    if is_safetensors(path):
        return ""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
        if any(name.endswith("/constants.pkl") for name in names):
            return "is a TorchScript program, whose tensors are not read"
        if any(name.endswith("/data.pkl") for name in names):
            return ""
        if names and all(name.endswith(".npy") for name in names):
            return f"is an npz of NumPy arrays ({brief(', '.join(names), 60)})"
        return f"is a zip of {len(names):,} other files ({brief(names[0], 60) if names else 'none'}, …)"
    text = head.decode("utf-8", errors="ignore").strip()
    if any(byte < 32 and byte not in b"\t\n\r\f\x1b" for byte in head) or not text:
        return ""
    if re.match(r"<(!doctype|html|\?xml)", text, re.IGNORECASE):
        return "is a web page, such as that of an error or a login, not the file itself"
    return f"is {'JSON' if text[0] in '{[' else 'text'} ({brief(text, 40)})"


def load_torch(path: Path) -> Any:
    """Return what a torch file holds, on the CPU; objects of `HARMLESS` names become `Skipped`."""
    try:
        names = set(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except (ValueError, RuntimeError):  # torch's format before 1.6, or damaged
        names = set(LEGACY)
    stand_ins: list[Any] = [
        (skipped_dict if name == "collections.defaultdict" else Skipped, name)
        for name in names
        if HARMLESS.fullmatch(name)
    ]
    options: dict[str, Any] = {"map_location": "cpu", "weights_only": True}
    with torch.serialization.safe_globals(stand_ins):
        try:
            return torch.load(path, mmap=True, **options)
        except (OSError, RuntimeError, SafetensorError):  # no mmap here, torch's format before 1.6, or a wrong suffix
            with path.open("rb") as file:
                return torch.load(file, **options)


def load_safetensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file, on the CPU."""
    try:
        return safetensors.torch.load_file(path)
    except OSError:  # a file system without mmap
        return safetensors.torch.load(path.read_bytes())


def read_tensors(path: Path, name: str = "", advice: str = "copy or download it again") -> Any:
    """Return the content of a file of tensors: a state dict, or what torch saved around one.

    name: what messages call it, such as "alignment.weights=FILE". Tensors lie on the CPU, perhaps
    mapped from the file. No code of the file runs. Raises UserError for a file that cannot be read,
    is of another kind, or holds objects that are no weights.
    """
    name = name or str(path)
    require(path.is_file(), f"{name}: no such file; {advice}")
    try:
        kind = foreign(path)
        require(not kind, f"{name}: {kind}; {advice}")
        return load_safetensors(path) if is_safetensors(path) else load_torch(path)
    except UserError:
        raise
    except pickle.UnpicklingError as error:  # weights_only's, whose text advises against itself
        found = re.search(r"GLOBAL (\S+)", str(error))
        if found is None:
            detail = str(error).rpartition("WeightsUnpickler error:")[2].strip().partition("\n")[0]
            raise UserError(f"{name}: cannot be read ({brief(detail)}); {advice}") from error
        raise UserError(
            f"{name}: holds more than weights, an object {brief(found[1], 80)}, and is not loaded; ask for a file of "
            "the weights alone, such as .safetensors"
        ) from error
    except Exception as error:  # a damaged file raises whatever its reader stumbles over
        raise UserError(f"{name}: cannot be read ({first_line(error)}); {advice}") from error


def unwrapped(key: str) -> str:
    """Return the name of a weight without the parts that DDP, FSDP and `torch.compile` add to it,
    anywhere and in any order: `ema_denoiser._orig_mod.module.x` is `ema_denoiser.x`.
    """
    return ".".join(part for part in key.split(".") if part not in WRAPPERS)


def state_dict(values: Any, name: str, advice: str = "give a file of weights") -> dict[str, Tensor]:
    """Return a state dict with unwrapped keys.

    Raises UserError for other values than tensors, and two keys that become one.
    """
    kind = brief(type(values).__name__, 40)
    require(isinstance(values, dict), f"{name}: holds no state dict, but a {kind}; {advice}")
    require(len(values) > 0, f"{name}: holds no tensors; {advice}")
    state: dict[str, Tensor] = {}
    for key, value in values.items():
        short = unwrapped(str(key))
        require(
            isinstance(value, Tensor), f"{name}: holds no state dict, for {brief(str(key), 60)} is no tensor; {advice}"
        )
        dense = value.device.type == "cpu" and value.layout == torch.strided and not value.is_quantized
        require(
            dense and value.numel() * value.element_size() <= value.untyped_storage().nbytes(),
            f"{name}: {brief(str(key), 60)} is no plain tensor; {advice}",
        )
        require(short not in state, f"{name}: has {brief(short, 60)} twice, one of them in a wrapper; {advice}")
        state[short] = value
    return state


def read_state_dict(path: Path, name: str = "", advice: str = "copy or download it again") -> dict[str, Tensor]:
    """Return the state dict of a file, bare or under one of `CONTAINERS`; see `read_tensors`."""
    content = read_tensors(path, name, advice)
    inner = [content[key] for key in CONTAINERS if key in content] if isinstance(content, dict) else []
    return state_dict(next((value for value in inner if isinstance(value, dict)), content), name or str(path), advice)


# --- arrays


class ArrayWriter:
    """Appends rows to the .npy file that `write_array` has opened."""

    def __init__(self, path: Path, file: IO[bytes], dtype: np.dtype, shape: tuple[int, ...]) -> None:
        self.path, self.file, self.digest, self.size = path, file, hashlib.sha256(), 0
        header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(self, header)  # through `write`, so that the hash covers it

    def write(self, data: bytes) -> None:
        """Append bytes."""
        with file_errors(self.path):  # here, for several are written at a time
            self.file.write(data)
        self.digest.update(data)
        self.size += len(data)

    def append(self, values: np.ndarray) -> None:
        """Append rows (B, …) of the file's dtype."""
        self.write(values.tobytes())

    def record(self) -> dict[str, Any]:
        """Return size and SHA-256 of the file, once all rows are appended."""
        return {"size": self.size, "sha256": self.digest.hexdigest()}


@contextlib.contextmanager
def write_array(path: Path, dtype: np.dtype | str, shape: tuple[int, ...]) -> Iterator[ArrayWriter]:
    """Write a .npy file of `shape` row by row, atomically, making its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as temporary, temporary.open("wb") as file:
        yield ArrayWriter(path, file, np.dtype(dtype), shape)


@dataclasses.dataclass(frozen=True)
class UnmappedArray:
    """An array of a .npy file on a file system without mmap; what is indexed is read at once.

    offset: of the first number, in bytes.
    """

    path: Path
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype

    def __getitem__(self, index: np.ndarray | tuple[np.ndarray, ...]) -> np.ndarray:
        """Return the parts at integer arrays (B,), one for each of the first dimensions, (B, …)."""
        first = index if isinstance(index, tuple) else (index,)
        parts = np.ravel_multi_index(first, self.shape[: len(first)])
        result = np.empty((len(parts), *self.shape[len(first) :]), dtype=self.dtype)
        size = result[0].nbytes if len(result) else 0
        with file_errors(self.path), self.path.open("rb") as file:
            for row, part in zip(result, parts.tolist(), strict=True):
                file.seek(self.offset + part * size)
                data = file.read(size)
                if len(data) != size:
                    raise OSError(errno.EIO, "ends early", str(self.path))
                row[...] = np.frombuffer(data, dtype=self.dtype).reshape(row.shape)
        return result


def open_array(path: Path) -> np.ndarray | UnmappedArray:
    """Return the array of a .npy file, whose parts are read when they are indexed.

    Raises ValueError or EOFError for a damaged file, OSError, which names the file, where it cannot
    be read.
    """
    try:
        with file_errors(path):
            return np.load(path, mmap_mode="r", allow_pickle=False)
    except OSError as error:
        if error.errno != errno.ENODEV:
            raise
    with file_errors(path), path.open("rb") as file:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(file)
        size = path.stat().st_size - file.tell()
        if fortran or dtype.hasobject or size < math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{path}: no array of rows, or cut short")
        return UnmappedArray(path, file.tell(), shape, dtype)
