"""A checkpoint, its diffusers folder, and the images of sample.py that both must make."""

import numpy as np
import torch
from conftest import SMALL, WIDE, run_inside, small_checkpoint, small_network, small_rae
from safetensors.torch import save_file

from ddt.autoencoder import build_autoencoder
from ddt.export import ExportSettings, export

CALL = {"class_labels": ["a", 4, "a", 4], "seeds": [3, 3, 8, 8]}  # the images of `sampled`


def exported(folder, **arguments):
    """A checkpoint and its diffusers folder."""
    checkpoint = small_checkpoint(folder / "checkpoint", **arguments)
    export(ExportSettings(str(checkpoint), "diffusers", str(folder / "exported")))
    return checkpoint, folder / "exported"


def exported_rae(folder, class_token=0, **changes):
    """A checkpoint of a DiT^DH on latents of a small RAE with statistics, and its diffusers folder.

    class_token: features of the latents' class token, 64 of this encoder. changes: of the RAE.
    """
    settings = small_rae(folder / "rae", chunk_size=3, class_token=class_token > 0, **changes)
    statistics = {"mean": torch.randn(64, 4, 4), "var": torch.rand(64, 4, 4)}
    save_file(statistics, folder / "rae" / "statistics.safetensors")
    settings["statistics"] = str(folder / "rae" / "statistics.safetensors")
    autoencoder = build_autoencoder(settings)
    arguments = dict(in_channels=64, patch_size=1, class_token=class_token)
    return exported(
        folder,
        model=small_network("ditdh", **arguments),
        network={"_target_": "ddt.model.DiTDH", **SMALL, **WIDE, **arguments},
        autoencoder=settings,
        autoencoder_fingerprint=autoencoder.fingerprint,
        latent_shape=list(autoencoder.latent_shape(3, 16)),
    )


def sampled(checkpoint, out, *settings):
    """Images of sample.py, uint8 (n, H, W, C)."""
    arguments = [f"ckpt={checkpoint}", f"out={out}", "num_processes=1", "seeds=[3,8]", "classes=[0,4]"]
    done = run_inside("sample", *arguments, *settings)
    assert done.returncode == 0, done.stderr
    with np.load(out / "samples.npz") as file:
        return file["arr_0"]
