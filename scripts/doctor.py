"""Report packages, disks, compiler and weights, and commands for missing ones: `python
scripts/doctor.py`, after torch's report (`torch.utils.collect_env`). Nothing is downloaded, no key
is shown. Status 1: a required package is missing.
"""

import argparse
import importlib.metadata
import os
import shutil
import sys
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent


class Check(NamedTuple):
    """One line of the report. state: ok, missing, or download (at first use). fix: a command."""

    name: str
    state: str
    note: str = ""
    fix: str = ""


def unmet(requirements: Iterable[str]) -> list[str]:
    """Return unmet requirements, such as "torch 2.9.1, needed: torch>=2.11"."""
    problems = []
    for requirement in map(Requirement, requirements):
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            problems.append(f"{requirement} is not installed")
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            problems.append(f"{requirement.name} {version}, needed: {requirement}")
    return problems


def packages() -> Iterator[Check]:
    """Check the packages of pyproject.toml: the required ones, then each extra's."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = {"required": project["dependencies"], **project["optional-dependencies"]}
    for name, requirements in groups.items():
        problems = unmet(requirements)
        fix = "pip install -e ." if name == "required" else f"pip install -e '.[{name}]'"
        missing = Check(f"packages: {name}", "missing", "; ".join(problems), fix)
        yield missing if problems else Check(f"packages: {name}", "ok")


def on_hub(name: str, repository: str, files: list[str], key: str, revision: str | None = None) -> Check:
    """Check that files of the hub are cached. key: the setting that takes a local copy."""
    import huggingface_hub.constants

    cached = (huggingface_hub.try_to_load_from_cache(repository, file, revision=revision) for file in files)
    if all(isinstance(path, str) for path in cached):
        return Check(name, "ok", f"{repository} is cached")
    command = f"hf download {repository} {' '.join(files)}" + (f" --revision {revision}" if revision else "")
    state = "missing" if huggingface_hub.constants.HF_HUB_OFFLINE else "download"
    return Check(name, state, f"{repository} is not cached", f"{command}   (or {key}=PATH)")


def weights() -> Iterator[Check]:
    """Check the pretrained networks that conf/ names."""
    import timm
    import torch

    from ddt.metrics.settings import WEIGHTS_NAME, WEIGHTS_URL

    def conf(name: str) -> dict[str, str]:
        return yaml.safe_load((ROOT / "conf" / f"{name}.yaml").read_text())

    vae, files = conf("autoencoder/sd_ft_ema"), ["config.json", "diffusion_pytorch_model.safetensors"]
    yield on_hub("SD-VAE latents", vae["source"], files, "autoencoder.source", vae["revision"])
    for name, model, key in (
        ("REPA (DINOv2-B)", conf("alignment/repa_dinov2_b")["target"], "alignment.weights"),
        ("FD-DINOv2 (DINOv2-L)", conf("features/dinov2")["model"], "features.weights"),
    ):
        yield on_hub(name, timm.get_pretrained_cfg(model).hf_hub_id, ["model.safetensors"], key)
    path = Path(torch.hub.get_dir()) / "checkpoints" / WEIGHTS_NAME
    fix = "" if path.is_file() else f"curl -L --create-dirs -o {path} {WEIGHTS_URL}   (or inception_weights=PATH)"
    yield Check("FID (Inception)", "download" if fix else "ok", str(path), fix)


def machine() -> Iterator[Check]:
    """Check the disks, the compiler and the hub's login."""
    import huggingface_hub.constants
    import torch

    from ddt.distributed.compile import missing_compiler

    for name, folder in {"runs/": Path("runs"), "hub cache": Path(huggingface_hub.constants.HF_HUB_CACHE)}.items():
        there = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
        note = f"{there}: {shutil.disk_usage(there).free / 2**30:.1f} GiB free"
        writable = os.access(there, os.W_OK)
        yield Check(f"disk: {name}", "ok" if writable else "missing", note if writable else f"{note}, read-only")
    compiler = missing_compiler(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    fix = "pip install triton" if compiler == "Triton" else "apt-get install g++ python3-dev"
    missing = Check("compiled blocks", "missing", f"torch.compile needs {compiler}; all works uncompiled", fix)
    yield missing if compiler else Check("compiled blocks", "ok")
    token = huggingface_hub.get_token()
    note = "logged in" if token else "not logged in; only uploads and private models need it"
    yield Check("Hugging Face hub", "ok", note, "" if token else "hf auth login")


def main() -> None:
    """Print the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    from torch.utils.collect_env import get_pretty_env_info

    checks = [*packages(), *machine(), *weights()]
    print(get_pretty_env_info(), end="\n\n")
    for check in checks:
        print(f"{check.name:<22}{check.state:<10}{check.note}".rstrip())
        if check.fix:
            print(f"{'':<22}{check.fix}")
    sys.exit(1 if checks[0].state == "missing" else 0)


if __name__ == "__main__":
    main()
