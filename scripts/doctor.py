"""What this machine has for the project, and what is missing for which feature: `python -m
scripts.doctor`.

A report to read, and to paste into an issue. It must run where packages are missing or broken, so
its head imports nothing but the standard library.
"""

import argparse
import dataclasses
import functools
import importlib
import importlib.metadata
import json
import operator
import os
import re
import sys
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from ddt.errors import first_line
from scripts.machine import ROOT, disk, graphics, hub, logged_in, machine

TRAINING = "training on digits"
UNIMPORTABLE = "cannot be imported"
MODULES = {"hydra-core": "hydra", "pillow": "PIL", "scikit-learn": "sklearn"}  # where a package's module is called else
COMPARE: dict[str, Callable[[Any, Any], bool]] = {
    ">=": operator.ge, "<=": operator.le, "==": operator.eq, ">": operator.gt, "<": operator.lt,
}  # fmt: skip
# What training on digits imports. The others of pyproject.toml serve features of their own
DIGITS = (
    "accelerate", "filelock", "hydra-core", "numpy", "omegaconf", "pillow", "pydantic", "safetensors", "scikit-learn",
    "torch", "torch-fidelity", "torchvision", "tqdm",
)  # fmt: skip
EXTRAS = {
    "adaptive": "sampler=adaptive",
    "app": "the demo app",
    "dev": "the tests",
    "docs": "building the documentation",
    "photos": "data=photos",
    "slurm": "sweeps on Slurm",
}
# What the published recipe takes from the hub, as in conf/autoencoder and conf/alignment
SD_VAE, SD_VAE_REVISION = "stabilityai/sd-vae-ft-ema", "f04b2c4b98319346dad8c65879f680b1997b204a"
REPA_TARGET = "vit_base_patch14_dinov2.lvd142m"
VARIABLES = (
    "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "TORCHELASTIC_RUN_ID", "ACCELERATE_USE_CPU",
    "SLURM_JOB_ID", "SLURM_NNODES", "SLURM_NTASKS", "SLURM_STEP_NUM_TASKS", "SLURM_GPUS_ON_NODE", "SLURM_JOB_END_TIME",
    "CUDA_VISIBLE_DEVICES", "NCCL_DEBUG", "NCCL_SOCKET_IFNAME", "OMP_NUM_THREADS",
    "HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "TORCH_HOME", "WANDB_MODE",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Package:
    """A package of pyproject.toml. wanted: bounds of its version; problem: in words, None where
    there is none.
    """

    name: str
    wanted: str
    version: str | None
    problem: str | None


@dataclasses.dataclass(frozen=True)
class Feature:
    """How it stands with a feature. state: "ok", "download" (what it lacks is fetched at first use)
    or "missing"; note: why, in words; fix: the one command that helps.
    """

    state: Literal["ok", "download", "missing"]
    note: str = ""
    fix: str = ""


# --- packages


def requirements(root: Path = ROOT) -> dict[str, list[str]]:
    """Return what has to be installed, such as "torch>=2.11", under "" for all features and under
    the extras' names.

    From pyproject.toml, which an installation may be older than; where there is none, from the
    installed package.
    """
    path = root / "pyproject.toml"
    if path.is_file():
        project = tomllib.loads(path.read_text())["project"]
        return {"": project["dependencies"], **project["optional-dependencies"]}
    found: dict[str, list[str]] = {"": []}
    for line in importlib.metadata.requires("ddt") or []:
        requirement, _, condition = line.partition(";")
        extra = re.search(r"extra == ['\"](\w+)", condition)
        found.setdefault(extra[1] if extra else "", []).append(requirement.strip())
    return found


def release(version: str) -> tuple[int, ...]:
    """Return the numbers of a version, "2.11.0+cu128" as (2, 11): what follows them and zeros at
    the end make no difference to the bounds.
    """
    match = re.match(r"[\d.]*\d", version)
    return tuple(map(int, re.sub(r"(\.0+)+$", "", match[0]).split("."))) if match else ()


def within(version: str, bounds: str) -> bool:
    """Tell whether a version lies within bounds such as ">=1.3.2,<1.4"."""
    pairs = re.findall(r"(>=|<=|==|>|<)\s*([\w.]+)", bounds)
    return all(COMPARE[sign](release(version), release(bound)) for sign, bound in pairs)


def import_problem(package: str) -> str | None:
    """Import a package; return what is wrong with it in words, or None."""
    try:
        importlib.import_module(MODULES.get(package, package.replace("-", "_")))
    except Exception as error:  # a broken package raises anything: ImportError, OSError of a library, RuntimeError
        return f"{UNIMPORTABLE} ({type(error).__name__}: {first_line(error)})"
    return None


def look_at(requirement: str, imported: bool) -> Package:
    """Return the state of a required package; with `imported` it must be possible to import it,
    too.
    """
    match = re.match(r"[\w.-]+", requirement)
    assert match is not None, requirement
    name, wanted = match[0], requirement[match.end() :].strip()
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return Package(name, wanted, None, "not installed")
    if not within(version, wanted):
        return Package(name, wanted, version, f"is {version}, {wanted} is needed")
    return Package(name, wanted, version, import_problem(name) if imported else None)


# --- features


def from_hub(repository: str, files: Sequence[str], key: str, revision: str | None = None) -> Feature:
    """Return the state of a feature that needs files of the hub. key: the setting that takes a
    local copy instead.
    """
    from huggingface_hub import try_to_load_from_cache

    if all(isinstance(try_to_load_from_cache(repository, file, revision=revision), str) for file in files):
        return Feature("ok", f"{repository} is in the cache")
    command = f"hf download {repository} {' '.join(files)}" + (f" --revision {revision}" if revision else "")
    fix = f"{command}   (or {key}=PATH)"
    if hub(ask=False).startswith("off"):
        return Feature("missing", f"{repository} is not in the cache, and the hub is off", fix)
    return Feature("download", f"{repository} is not in the cache", fix)


def digits() -> Feature:
    """Training on digits downloads nothing; it writes a run folder."""
    parent = Path("runs") if Path("runs").exists() else Path()
    if not os.access(parent, os.W_OK):
        return Feature("missing", "runs/ cannot be written here", "cd FOLDER_OF_YOUR_OWN")
    return Feature("ok")


def own_images() -> Feature:
    """Training on a folder of images decodes them."""
    from PIL import features

    kinds = {"JPEG": "jpg", "PNG": "zlib", "WebP": "webp"}
    missing = [name for name, codec in kinds.items() if not features.check(codec)]
    if missing:
        return Feature("missing", f"Pillow reads no {', '.join(missing)}", "pip install --force-reinstall pillow")
    return Feature("ok")


def sd_vae() -> Feature:
    """Latents are SD-VAE's."""
    files = ("config.json", "diffusion_pytorch_model.safetensors")
    return from_hub(SD_VAE, files, "autoencoder.source", SD_VAE_REVISION)


def repa() -> Feature:
    """REPA aligns to DINOv2-B."""
    import timm

    return from_hub(timm.get_pretrained_cfg(REPA_TARGET).hf_hub_id, ["model.safetensors"], "alignment.weights")


def fd_dinov2() -> Feature:
    """FD-DINOv2 is measured in DINOv2-L."""
    import timm

    from ddt.metrics.dinov2 import MODEL

    return from_hub(timm.get_pretrained_cfg(MODEL).hf_hub_id, ["model.safetensors"], "features.weights")


def fid() -> Feature:
    """FID is measured in Inception."""
    import torch

    from ddt.metrics.inception import WEIGHTS_NAME, WEIGHTS_URL

    path = Path(torch.hub.get_dir()) / "checkpoints" / WEIGHTS_NAME
    if path.is_file():
        return Feature("ok", f"{WEIGHTS_NAME} is in torch's cache")
    fix = f"curl -L --create-dirs -o {path} {WEIGHTS_URL}   (or inception_weights=PATH)"
    return Feature("download", f"{WEIGHTS_NAME} is not in torch's cache", fix)


def compiled_blocks() -> Feature:
    """Compiled blocks need a compiler."""
    import torch

    from ddt.distributed.compile import missing_compiler

    missing = missing_compiler(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    if missing is None:
        return Feature("ok")
    fix = "pip install triton" if missing == "Triton" else "apt-get install g++ python3-dev"
    return Feature("missing", f"torch's compiler needs {missing}; all works uncompiled", fix)


def bf16(devices: list[dict[str, Any]]) -> Feature:
    """Bfloat16 is a matter of the GPUs; a CPU computes in it, too."""
    without = [device["name"] for device in devices if not device["bf16"]]
    if without:
        return Feature("missing", f"{without[0]} has none", "python train.py trainer.mixed_precision=fp32 …")
    return Feature("ok", "" if devices else "on the CPU")


def fsdp(devices: list[dict[str, Any]]) -> Feature:
    """Sharding needs torch's way to talk between processes: NCCL on GPUs, gloo on the CPU."""
    from torch import distributed

    backend = "nccl" if devices else "gloo"
    if not (distributed.is_available() and distributed.is_backend_available(backend)):
        return Feature("missing", f"this torch is built without {backend}", "pip install --force-reinstall torch")
    return Feature("ok", f"{len(devices)} GPU{'s' * (len(devices) > 1)}" if devices else "on the CPU")


def wandb_login() -> Feature:
    """W&B takes runs of people who are logged in."""
    return (
        Feature("ok") if logged_in() else Feature("missing", "not logged in; tracker.mode=offline works", "wandb login")
    )


def installed(packages: list[Package], fix: str) -> Feature:
    """Return the state of a feature as far as it depends on packages. fix: the command that
    installs them.
    """
    broken = [package for package in packages if package.problem is not None]
    # one that is not there, or of another version, is why others cannot be imported
    causes = [package for package in broken if not str(package.problem).startswith(UNIMPORTABLE)]
    if not broken:
        return Feature("ok")
    if not causes:  # pip leaves what seems to be there as it is
        causes, names = broken, " ".join(f"'{package.name}{package.wanted}'" for package in broken)
        fix = f"pip install --force-reinstall {names}"
    more = "" if len(causes) == 1 else f", and {len(causes) - 1} more: see packages"
    return Feature("missing", f"{causes[0].name} {causes[0].problem}{more}", fix)


def probed(probe: Callable[[], Feature]) -> Feature:
    """Return what a probe finds; one that fails does not keep the others from being reported."""
    try:
        return probe()
    except Exception as error:  # of any kind: what is looked for here is what breaks on this machine
        return Feature("missing", f"cannot be told ({type(error).__name__}: {first_line(error)})", "pip install -e .")


def features(packages: dict[str, list[Package]], devices: list[dict[str, Any]]) -> dict[str, Feature]:
    """Return the state of each feature from that of the packages, by extra as `requirements` has
    them, and the GPUs.
    """
    # what tells the state once the packages are right: those of training on digits, and these
    probes: dict[str, tuple[Callable[[], Feature], tuple[str, ...]]] = {
        TRAINING: (digits, ()),
        "training on your own images": (own_images, ()),
        "SD-VAE latents": (sd_vae, ("diffusers", "huggingface-hub")),
        "REPA (DINOv2)": (repa, ("timm", "huggingface-hub")),
        "FID (Inception)": (fid, ()),
        "FD-DINOv2": (fd_dinov2, ("timm", "huggingface-hub")),
        "compiled blocks": (compiled_blocks, ()),
        "bf16": (functools.partial(bf16, devices), ()),
        "FSDP": (functools.partial(fsdp, devices), ()),
        "W&B": (wandb_login, ("wandb",)),
    }
    found = {}
    for name, (probe, others) in probes.items():
        needed = installed([p for p in packages[""] if p.name in (*DIGITS, *others)], "pip install -e .")
        found[name] = probed(probe) if needed.state == "ok" else needed
    for extra in filter(None, packages):
        found[EXTRAS.get(extra, extra)] = installed(packages[extra], f"pip install -e '.[{extra}]'")
    return found


# --- the report


def examine(folder: Path, ask_hub: bool) -> dict[str, Any]:
    """Return the report as plain values: `machine`, `graphics`, `disk`, `environment`, `packages`
    by extra, and `features`.
    """
    packages = {
        extra: [look_at(requirement, imported=not extra) for requirement in needed]
        for extra, needed in requirements().items()
    }
    gpus = graphics()
    return {
        "machine": machine(),
        "graphics": gpus,
        "disk": disk(folder),
        "environment": {"hub": hub(ask_hub), **{key: os.environ[key] for key in VARIABLES if key in os.environ}},
        "packages": {extra: [dataclasses.asdict(package) for package in found] for extra, found in packages.items()},
        "features": {name: dataclasses.asdict(each) for name, each in features(packages, gpus["devices"]).items()},
    }


Rows = list[tuple[str, ...]]


def graphics_rows(found: dict[str, Any]) -> Rows:
    """Return what the report says of GPUs."""
    rows: Rows = [
        (
            f"gpu {number}",
            f"{device['name']}, {device['memory_gib']:.1f} GiB, capability {device['capability']}, "
            f"{'bf16' if device['bf16'] else 'no bf16'}",
        )
        for number, device in enumerate(found["devices"])
    ] or [("gpus", "none: CPU")]
    versions = ", ".join(f"{key} {found[key]}" for key in ("driver", "cuda", "cudnn", "nccl") if found.get(key))
    rows += [("versions", versions)] if versions else []
    return [*rows, ("problem", found["problem"])] if "problem" in found else rows


def disk_rows(found: dict[str, Any]) -> Rows:
    """Return what the report says of the disk."""
    rows: Rows = [("folder", found["folder"])]
    rows += [("free", f"{found['free_gib']:.1f} GiB")] if "free_gib" in found else []
    if "problem" in found:
        return [*rows, ("problem", found["problem"])]
    cache = "the page cache was asked to drop it" if found["cache_dropped"] else "FROM THE PAGE CACHE"
    return [
        *rows,
        ("writing", f"{found['write_mib_per_second']:.0f} MiB/s: {found['mib']:.0f} MiB, forced to disk every 16"),
        ("reading", f"{found['read_mib_per_second']:.0f} MiB/s: the same file; {cache}"),
    ]


def columns(rows: Rows) -> list[str]:
    """Return rows of words as indented lines with even columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(word.ljust(width) for word, width in zip(row, widths, strict=True)) for row in rows)
    return [f"  {line}".rstrip() for line in lines]


def written(report: dict[str, Any]) -> str:
    """Return the report as people read it."""
    features = report["features"].items()
    sections: dict[str, Rows] = {
        "machine": list(report["machine"].items()),
        "graphics": graphics_rows(report["graphics"]),
        "disk": disk_rows(report["disk"]),
        "environment": list(report["environment"].items()),
        "packages": [
            (p["name"], p["version"] or "–", p["wanted"], p["problem"] or "ok") for p in report["packages"][""]
        ],
        "features": [(name, each["state"], each["note"]) for name, each in features],
        "what helps": [(name, each["fix"]) for name, each in features if each["fix"]] or [("nothing is missing",)],
    }
    return "\n\n".join("\n".join([title, *columns(rows)]) for title, rows in sections.items()) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Examine the machine, write the report; return 0 where training on digits can run, else 1."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.doctor",
        description="Tell what this machine has, and what is missing for which feature.",
        epilog="Exit status: 0 where training on digits can run, else 1.",
    )
    parser.add_argument("--json", action="store_true", help="write the report as JSON")
    folder = Path("runs") if Path("runs").is_dir() else Path()
    parser.add_argument("--folder", default=folder, type=Path, help="where the disk is measured (runs/, or else here)")
    parser.add_argument("--hub", action="store_true", help="ask the Hugging Face hub whether it answers")
    chosen = parser.parse_args(arguments)
    report = examine(chosen.folder, chosen.hub)
    sys.stdout.write(f"{json.dumps(report, indent=2, ensure_ascii=False)}\n" if chosen.json else written(report))
    return int(report["features"][TRAINING]["state"] != "ok")


if __name__ == "__main__":
    sys.exit(main())
