"""The golden numbers of RAE (tests/golden/rae): networks with random weights, in its conventions.

There τ = 1 − t, and the output is ε − x.
"""

import functools

import torch
from conftest import GOLDEN
from safetensors.torch import load_file, save_file

import ddt

RAE = GOLDEN / "rae"
CLOSE = dict(rtol=1e-4, atol=1e-5)


@functools.cache
def golden(name):
    return load_file(RAE / f"{name}.safetensors")


def weights(name="network", prefix="model."):
    """The state dict of a golden network under its published names."""
    found = golden(name).items()
    return {key.removeprefix(prefix): value.clone() for key, value in found if key.startswith(prefix)}


def network(folder, name="network", prefix="model.", **arguments):
    """A golden network, loaded as a published file is."""
    path = folder / f"{name}.safetensors"
    save_file(weights(name, prefix), path)
    return ddt.load_released(path, **arguments)


def shifted(tau, shift):
    return shift * tau / (1 + (shift - 1) * tau)


def normal_of(u):
    """The standard normal samples that become the times of uniform draws u."""
    return -torch.special.ndtri(u.double()).float()
