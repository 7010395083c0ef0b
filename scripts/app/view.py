"""Show a checkpoint and a result on the page."""

import gradio as gr
import numpy as np
import torch

from ddt.tables import markdown_table
from scripts.app.controls import class_choices
from scripts.app.studio import SampledSet, Studio

TITLES = ("With sharing", "Without sharing")


def summary(studio: Studio) -> str:
    """Return image size, network, weights and device as Markdown."""
    model, device = studio.generator.model, studio.generator.device
    height, width, _ = studio.image_shape
    blocks = f"{len(model.encoder.blocks)} + {len(model.decoder.blocks)}" if model.shares_encoder else "undivided"
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    guide = "" if studio.settings.guide is None else f" · guided by `{studio.settings.guide}`"
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return (
        f"**{width}×{height} px**, {model.num_classes} classes · {type(model).__name__} of {blocks} blocks, "
        f"{millions:.1f} M parameters · {studio.settings.weights} weights of step {studio.stored['step']:,} · "
        f"{studio.generator.dtype} on {where} · `{studio.settings.ckpt}`{guide}"
    )


def numbers(sets: list[SampledSet]) -> str:
    """Return time, network calls and the steps at which the encoder ran, as Markdown."""
    receipts = [each.receipt for each in sets]
    calls = [receipt["network_calls_an_image"] for receipt in receipts]
    rows = [
        ["Time", *(f"{each.seconds:.2f} s" for each in sets)],
        ["Images per second", *(f"{receipt['images_per_second']:.3g}" for receipt in receipts)],
        *([f"{part.capitalize()} calls per image", *(f"{each[part]:g}" for each in calls)] for part in calls[0]),
    ]
    steps, num_steps = receipts[0]["recompute_steps"], sets[0].request.sampler.num_steps
    lines = [markdown_table(["", *([""] if steps is None else TITLES[: len(sets)])], rows)]
    if len(sets) > 1:
        ours, theirs = (np.load(each.folder / "samples.npz")["arr_0"] for each in sets)
        difference = np.abs(ours.astype(np.int16) - theirs).mean()
        speed = sets[1].seconds / sets[0].seconds
        lines.append(f"**{speed:.2f} × as fast** with sharing; the pixels differ by {difference:.2f} of 255 on average")
    if steps is not None:
        saved = 1 - calls[0]["encoder"] / calls[0]["decoder"]  # without sharing, each runs at every call
        cells = "".join("■" if k in steps else "□" for k in range(num_steps))
        strip = " ".join(cells[k : k + 10] for k in range(0, num_steps, 10))
        lines.append(f"The encoder ran at {len(steps)} of {num_steps} steps, {saved:.0%} of its calls saved: {strip}")
    return "\n\n".join(lines)


def galleries(sets: list[SampledSet], class_names: list[str]) -> list[gr.Gallery | gr.ImageSlider]:
    """Return updates of both galleries and the slider; the last two are for a comparison alone."""
    names = {label: name for name, label in class_choices(class_names)}
    images, shared = sets[0].request.images, sets[0].receipt["recompute_steps"] is not None
    captions = [names[k] for k in images.classes]
    if len(sets) == 1:  # two galleries have room for the names alone
        captions = [f"{name}, seed {seed}" for name, seed in zip(captions, images.seeds, strict=True)]
    num_classes = len(set(images.classes))
    columns = num_classes if num_classes <= 6 else 5  # few classes: a column each
    updates: list[gr.Gallery | gr.ImageSlider] = []
    for each, title in zip(sets, TITLES if shared else ["Images"], strict=False):
        captioned = list(zip(sorted((each.folder / "png").iterdir()), captions, strict=True))
        updates.append(gr.Gallery(captioned, label=title, columns=columns, visible=True))
    if len(sets) == 1:
        return [*updates, gr.Gallery(visible=False), gr.ImageSlider(visible=False)]
    return [*updates, gr.ImageSlider((sets[1].folder / "grid.png", sets[0].folder / "grid.png"), visible=True)]
