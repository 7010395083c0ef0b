"""A decoder's training with a small discriminator; imports little, for spawned processes do."""

from pathlib import Path

from safetensors.torch import load_file

import ddt.training.decoder.run
from ddt.objective.discriminator import FrozenDINO
from ddt.training.decoder.loop import train

STAGE1 = Path(__file__).parent / "golden" / "rae" / "stage1.safetensors"


def small_dino(file=None):
    """Four small random blocks, where ViT-S/8 takes seconds an image."""
    state = {key.removeprefix("dino."): v for key, v in load_file(STAGE1).items() if key.startswith("dino.")}
    return FrozenDINO(state, depths=(2, 4), depth=4, patch_size=56, embed_dim=16, num_heads=2)


def train_with_small_dino(settings):
    """Train on this process of several."""
    ddt.training.decoder.run.load_dino = small_dino
    train(settings)
