"""A program for an environment without this project: loads shared folders and samples.

python alone.py JOBS OUT: jobs, a JSON list of {folder, call, …}; the images of each in OUT as
NNN.npy. custom: loaded with custom_pipeline=folder. dtype: of the network. again: a folder to save
to and load from before. hub: loaded as a model of a hub, of which only what diffusers asks for is
downloaded.
"""

import fnmatch
import importlib.util
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.pipelines import pipeline_utils
from diffusers.utils import dynamic_modules_utils


def serve(name, folder, cache):
    """Let diffusers find the model `name` with the files of a folder on a hub; files come to the
    cache when they are asked for.
    """
    files = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]

    def download(repo_id, filename, subfolder=None, **_):
        assert repo_id == name
        path = f"{subfolder}/{filename}" if subfolder else filename
        (cache / path).parent.mkdir(parents=True, exist_ok=True)
        return shutil.copy(folder / path, cache / path)

    def snapshot(repo_id, allow_patterns, ignore_patterns, **_):
        for path in files:
            allowed = any(fnmatch.fnmatch(path, pattern) for pattern in allow_patterns)
            if allowed and not any(fnmatch.fnmatch(path, pattern) for pattern in ignore_patterns):
                download(repo_id, path)
        return str(cache)

    info = SimpleNamespace(sha="0" * 40, siblings=[SimpleNamespace(rfilename=path) for path in files])
    for module in (pipeline_utils, dynamic_modules_utils):
        module.model_info = lambda *_, **__: info
        module.hf_hub_download = download
    pipeline_utils.snapshot_download = snapshot
    pipeline_utils._resolve_revision = lambda *_, **__: info.sha


def load(job, out):
    """Return the pipeline of a job."""
    name = job["folder"]
    if job.get("hub"):
        folder = Path(name)
        name = f"owner/{folder.parent.name}"
        serve(name, folder, out / "cache" / name)
    custom = {"custom_pipeline": name} if job.get("custom") else {}
    dtype = {"transformer": getattr(torch, job.get("dtype", "float32"))}
    pipeline = DiffusionPipeline.from_pretrained(name, trust_remote_code=True, dtype=dtype, **custom)
    if "again" in job:
        pipeline.save_pretrained(job["again"])
        pipeline = DiffusionPipeline.from_pretrained(job["again"], trust_remote_code=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def main(jobs, out):
    for package in ("ddt", "accelerate", "hydra", "omegaconf", "pydantic", "timm", "torchvision", "transformers"):
        assert importlib.util.find_spec(package) is None, f"{package} is installed"
    jobs = json.loads(Path(jobs).read_text())
    pipelines = [load(job, Path(out)) for job in jobs]  # all before any samples: none disturbs another
    for number, (job, pipeline) in enumerate(zip(jobs, pipelines, strict=True)):
        images = np.stack([np.asarray(image) for image in pipeline(**job["call"]).images])
        np.save(f"{out}/{number:03d}.npy", images)


if __name__ == "__main__":
    main(*sys.argv[1:])
