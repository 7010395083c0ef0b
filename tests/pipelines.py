"""A checkpoint, its diffusers folder, and the images of sample.py that both must make."""

import numpy as np
from conftest import run_inside, small_checkpoint

from ddt.export import ExportSettings, export

CALL = {"class_labels": ["a", 4, "a", 4], "seeds": [3, 3, 8, 8]}  # the images of `sampled`


def exported(folder, **arguments):
    """A checkpoint and its diffusers folder."""
    checkpoint = small_checkpoint(folder / "checkpoint", **arguments)
    export(ExportSettings(str(checkpoint), "diffusers", str(folder / "exported")))
    return checkpoint, folder / "exported"


def sampled(checkpoint, out, *settings):
    """Images of sample.py, uint8 (n, H, W, C)."""
    arguments = [f"ckpt={checkpoint}", f"out={out}", "num_processes=1", "seeds=[3,8]", "classes=[0,4]"]
    done = run_inside("sample", *arguments, *settings)
    assert done.returncode == 0, done.stderr
    with np.load(out / "samples.npz") as file:
        return file["arr_0"]
