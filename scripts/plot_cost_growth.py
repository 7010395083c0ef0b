"""Draw how counted cost grows with tokens, depth, encoder depth, batch and processes, and print the same numbers.

python scripts/plot_cost_growth.py [model=xl_22en6de] out=FILE.png
"""

import dataclasses
import logging
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from omegaconf import DictConfig

from ddt.autoencoder import Identity
from ddt.config import build
from ddt.cost import attention_macs, network_macs, num_tokens, sampling_macs
from ddt.errors import require
from ddt.estimate import Recipe, activation_bytes, exchanged_bytes, memory, with_checkpointing
from ddt.model import DDT
from ddt.objective import FlowMatching
from scripts.entry import arguments_for, checked, entry_point

log = logging.getLogger(__name__)
CHANNELS, CLASSES, CELL, SIZE = 4, 1000, 8, 256  # SD-VAE's latents of ImageNet
SIZES = (128, 256, 384, 512, 768, 1024)  # pixels a side
BATCHES = (8, 16, 32, 64, 128, 256)
PROCESSES = (1, 2, 4, 8, 16, 32, 64)
Curves = dict[str, list[float]]  # what is drawn: a value at each point of an axis


def network(settings: dict[str, Any], **changes: Any) -> DDT:
    """Build a network on the meta device."""
    with torch.device("meta"):
        return build({**settings, **changes}, in_channels=CHANNELS, num_classes=CLASSES)()


def over_sizes(model: DDT) -> Curves:
    """Return GFLOP of a forward at each of SIZES, and of them the products of attention."""
    cells = [size // CELL for size in SIZES]
    return {
        "forward": [2e-9 * network_macs(model, cell, cell).total for cell in cells],
        "of it q·k and weights·v": [2e-9 * attention_macs(model, num_tokens(model, cell, cell)) for cell in cells],
    }


def over_encoder_depth(settings: dict[str, Any], depths: list[int], sampler: Any) -> Curves:
    """Return TFLOP of an image drawn at each encoder depth of one total, without and with sharing at every 5th step."""
    ways = {"encoder at every step": None, "at every 5th step": "uniform:5"}
    cell = SIZE // CELL
    return {
        name: [
            2e-12
            * sampling_macs(
                network(settings, encoder_depth=depth), cell, cell, dataclasses.replace(sampler, recompute=recompute)
            )
            for depth in depths
        ]
        for name, recompute in ways.items()
    }


def over_batches(objective: FlowMatching, recipe: Recipe) -> Curves:
    """Return GB of a device at each of BATCHES, by what is kept between the passes."""
    found = memory(recipe)
    micro, _ = recipe.trainer.micro_batches(recipe.gpus)
    ways = {"all activations kept": found["activations"] / micro}
    for name, kind in {"selective checkpointing": "selective", "activation checkpointing": True}.items():
        ways[name] = activation_bytes(with_checkpointing(objective, kind), recipe.shape, recipe.bf16)
    rest = found["total"] - found["activations"]
    return {name: [1e-9 * (rest + batch * each) for batch in BATCHES] for name, each in ways.items()}


def over_processes(recipe: Recipe) -> Curves:
    """Return GB that each of PROCESSES sends in a step of one micro-batch."""
    curves: Curves = {}
    for kind in ("ddp", "fsdp"):
        trainer = dataclasses.replace(recipe.trainer, parallelism=kind)
        several = [dataclasses.replace(recipe, trainer=trainer, gpus=n) for n in PROCESSES if n > 1]
        curves[kind] = [0.0, *(1e-9 * exchanged_bytes(one) for one in several)]
    return curves


def curves_of(settings: dict[str, Any], trainer: Any, sampler: Any) -> dict[tuple[str, str], tuple[list[int], Curves]]:
    """Return what is drawn by axis and unit: the points along the axis, and the curves."""
    model = network({**settings, "activation_checkpointing": False})
    require(isinstance(model, DDT), "model: the undivided baseline has no encoder depth; choose a DDT, as b_8en4de")
    objective = FlowMatching(model)
    recipe = Recipe(
        objective, None, Identity(), (CHANNELS, SIZE // CELL, SIZE // CELL), SIZE, None, True, 0, trainer, sampler, 1, 1
    )
    total, encoder = settings["depth"], settings["encoder_depth"]
    depths = [total * k // 4 for k in (2, 4, 6, 8)]
    deeper = [network(settings, depth=depth, encoder_depth=max(1, depth * encoder // total)) for depth in depths]
    forwards = [2e-9 * network_macs(one, SIZE // CELL, SIZE // CELL).total for one in deeper]
    halves = sorted({*range(2, total, max(1, total // 7)), encoder})
    return {
        ("pixels a side", "GFLOP a forward"): (list(SIZES), over_sizes(model)),
        ("blocks", "GFLOP a forward"): (depths, {"forward": forwards}),
        ("blocks of the encoder", "TFLOP an image drawn"): (halves, over_encoder_depth(settings, halves, sampler)),
        ("images a micro-batch", "GB a GPU"): (list(BATCHES), over_batches(objective, recipe)),
        ("processes", "GB each sends a step"): (list(PROCESSES), over_processes(recipe)),
    }


def plot(model: dict[str, Any], trainer: Any, sampler: Any, out: str) -> None:
    """Count, print, and write a picture with a panel an axis."""
    require(Path(out).suffix in (".png", ".pdf", ".svg"), f"out={out}: give a .png, .pdf or .svg file")
    require(not Path(out).exists(), f"out={out}: exists already and is not written over; choose another")
    found = curves_of(model, trainer, sampler)
    figure = plt.figure(figsize=(14, 8), layout="constrained")
    for number, ((axis, unit), (points, curves)) in enumerate(found.items(), start=1):
        axes = figure.add_subplot(2, 3, number)
        log.info("%s: %s", axis, ", ".join(map(str, points)))
        for name, values in curves.items():
            log.info("  %s, %s: %s", unit, name, ", ".join(f"{value:.4g}" for value in values))
            axes.plot(points, values, marker="o", markersize=3, label=name)
        axes.set(xlabel=axis, ylabel=unit, ylim=(0, None))
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    figure.savefig(out, dpi=100)


@entry_point("plot_cost_growth")
def main(cfg: DictConfig) -> None:
    """Check, count, draw."""
    config = checked(cfg)
    values = arguments_for(plot, config, besides=("model", "trainer", "sampler"))
    plot(config["model"], build(config["trainer"]), build(config["sampler"]), **values)


if __name__ == "__main__":
    main()
