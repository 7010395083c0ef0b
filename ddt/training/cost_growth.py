"""How a recipe's counted cost grows with image size, depth, encoder depth, batch and processes, as
a figure. The counts are those of `ddt.training.estimate`.
"""

import dataclasses
from pathlib import Path
from typing import Any

from ddt.config import Choice
from ddt.figures import WIDTH, label_lines, pyplot, save_figure
from ddt.model import Denoiser
from ddt.model.cost import attention_macs, network_macs, num_tokens
from ddt.model.layers import Checkpointing
from ddt.sampling.cost import sampling_macs
from ddt.training.estimate import (
    Recipe,
    activation_bytes,
    build_recipe,
    exchanged_bytes,
    memory,
    with_checkpointing,
)
from ddt.training.settings import EstimateSettings

GIGA, TERA = 1e9, 1e12
SIZES = (0.5, 1, 1.5, 2, 3, 4)  # of the recipe's own
DEPTHS = (0.5, 1, 1.5, 2)
BATCHES = (8, 16, 32, 64, 128, 256)
PROCESSES = (1, 2, 4, 8, 16, 32, 64)
SHARED = "at one of {} steps"


@dataclasses.dataclass(frozen=True)
class Panel:
    """What grows: values of each curve at the points of an axis."""

    title: str
    axis: str
    points: list[int]
    curves: dict[str, list[float]]


def tokens_at(model: Denoiser, shape: tuple[int, int, int], factor: float) -> int | None:
    """Return N of images `factor` times as wide as those of a latent (C, H, W), None where it is
    no whole number.
    """
    extra = int(bool(model.class_token))
    side = (num_tokens(model, *shape[1:]) - extra) ** 0.5 * factor
    return int(side) ** 2 + extra if side.is_integer() else None


def over_sizes(recipe: Recipe) -> Panel:
    """Return GFLOP per forward by image size."""
    model = recipe.objective.denoiser
    found = {factor: tokens_at(model, recipe.shape, factor) for factor in SIZES}
    sizes = {round(recipe.image_size * factor): tokens for factor, tokens in found.items() if tokens is not None}
    curves = {
        "whole forward": [2 / GIGA * model.macs(tokens).total for tokens in sizes.values()],
        "attention": [2 / GIGA * attention_macs(model, tokens) for tokens in sizes.values()],
    }
    return Panel("GFLOP per forward", "image size (pixels a side)", list(sizes), curves)


def over_depths(settings: EstimateSettings) -> Panel:
    """Return GFLOP per forward by the number of blocks, a like share of them in the encoder."""
    depth, encoder = (settings.model.settings[key] for key in ("depth", "encoder_depth"))
    depths = sorted({max(2, round(depth * factor)) for factor in DEPTHS})
    recipes = [changed(settings, depth=n, encoder_depth=max(1, n * encoder // depth)) for n in depths]
    forwards = [2 / GIGA * network_macs(one.objective.denoiser, *one.shape[1:]).total for one in recipes]
    return Panel("GFLOP per forward", "blocks, encoder and decoder", depths, {"whole forward": forwards})


def over_encoder_depths(settings: EstimateSettings) -> Panel:
    """Return TFLOP per sample by the encoder's depth at one total, without and with sharing."""
    depth, encoder = (settings.model.settings[key] for key in ("depth", "encoder_depth"))
    depths = sorted({*range(2, depth, max(1, depth // 7)), encoder})
    recipes = [changed(settings, encoder_depth=n) for n in depths]
    every = min(5, recipes[0].sampler.num_steps)

    def per_sample(recipe: Recipe, recompute: str | None) -> float:
        sampler = dataclasses.replace(recipe.sampler, recompute=recompute)
        return 2 / TERA * sampling_macs(recipe.objective.denoiser, *recipe.shape[1:], sampler)

    ways = {"encoder at every step": None, SHARED.format(every): f"uniform:{every}"}
    curves = {name: [per_sample(one, recompute) for one in recipes] for name, recompute in ways.items()}
    return Panel("TFLOP per sample", f"blocks of the encoder, of {depth}", depths, curves)


def over_batches(recipe: Recipe) -> Panel:
    """Return GB of a device by its batch, by what is kept between forward and backward pass."""
    held = memory(recipe)
    rest = held["total"] - held["activations"]
    kinds: dict[str, Checkpointing] = {"none": False, "selective": "selective", "full": True}
    each = {
        name: activation_bytes(with_checkpointing(recipe.objective, kind), recipe.shape, recipe.half)
        for name, kind in kinds.items()
    }
    curves = {name: [(rest + batch * size) / GIGA for batch in BATCHES] for name, size in each.items()}
    return Panel(
        "GB of memory per GPU,\nby activation checkpointing", "images per GPU and micro-batch", list(BATCHES), curves
    )


def over_processes(recipe: Recipe) -> Panel:
    """Return GB that each process sends per step, by their number."""
    smallest = recipe.trainer.micro_batch_size or 1  # images of a process
    counts = [n for n in PROCESSES if recipe.trainer.global_batch_size % (n * smallest) == 0]
    curves = {}
    for name, parallelism in (("DDP", "ddp"), ("FSDP", "fsdp")):
        trainer: Any = dataclasses.replace(recipe.trainer, parallelism=parallelism)  # type: ignore[arg-type]
        several = [dataclasses.replace(recipe, trainer=trainer, gpus=n) for n in counts]
        curves[name] = [exchanged_bytes(one) / GIGA for one in several]
    return Panel("GB sent per process and step", "processes", counts, curves)


def changed(settings: EstimateSettings, **changes: int) -> Recipe:
    """Return the recipe with other depths of the model, without alignment; a base head moves with
    the encoder's end where that comes before its block.
    """
    model = Choice(settings.model.target, {**settings.model.settings, **changes})
    objective = settings.objective
    if (base := objective.settings.get("base_depth")) is not None:
        base = min(base, model.settings["encoder_depth"])
        objective = Choice(objective.target, {**objective.settings, "base_depth": base})
    return build_recipe(dataclasses.replace(settings, model=model, objective=objective, alignment=None))


def plot_growth(settings: EstimateSettings, recipe: Recipe, path: Path) -> list[Panel]:
    """Count for a network with an encoder, write the figure and return what it shows."""
    panels = [over_sizes(recipe), over_depths(settings), over_encoder_depths(settings), over_batches(recipe),
              over_processes(recipe)]  # fmt: skip
    figure, axes = pyplot().subplot_mosaic("001122;.3344.", figsize=(WIDTH, 5))
    for place, panel in zip(axes.values(), panels, strict=True):
        for name, values in panel.curves.items():
            place.plot(panel.points, values, marker="o", label=name)
        place.set(title=panel.title, xlabel=panel.axis, ylim=(0, 1.12 * max(map(max, panel.curves.values())) or 1))
        label_lines(place)
    save_figure(figure, path)
    return panels
