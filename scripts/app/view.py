"""Show a checkpoint and a result on the page."""

import gradio as gr
import numpy as np
import torch

from ddt.tables import markdown_table
from ddt.version import project_urls
from scripts.app.controls import class_choices
from scripts.app.studio import Result, SampledSet, Studio

TITLES = ("With sharing", "Without sharing")


def summary(studio: Studio) -> str:
    """Return links, image size, network, weights and device as Markdown."""
    model, device = studio.generator.model, studio.generator.device
    height, width, _ = studio.image_shape
    blocks = f"{len(model.encoder.blocks)} + {len(model.decoder.blocks)}" if model.shares_encoder else "undivided"
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    guide = "" if studio.settings.guide is None else f" · guided by `{studio.settings.guide}`"
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    links = " · ".join(f"[{name}]({url})" for name, url in project_urls().items())
    return (
        f"Decoupled Diffusion Transformer: {links}\n\n"
        f"**{width}×{height} px**, {model.num_classes} classes · {type(model).__name__} of {blocks} blocks, "
        f"{millions:.1f} M parameters · {studio.settings.weights} weights of step {studio.stored['step']:,} · "
        f"{studio.generator.dtype} on {where} · `{studio.settings.ckpt}`{guide}"
    )


def giga(macs: int) -> str:
    """Return a count in billions with three digits."""
    return f"{macs / 1e9:.3g} G"


def numbers(result: Result) -> str:
    """Return the counted and measured saving, the steps at which the encoder ran, time and network
    calls as Markdown.
    """
    sets, lines = result.sets, []
    receipts = [each.receipt for each in sets]
    calls = [receipt["network_calls_an_image"] for receipt in receipts]
    steps, num_steps = receipts[0]["recompute_steps"], sets[0].request.sampler.num_steps
    if steps is not None and result.macs is not None:
        shared, unshared = result.macs
        lines.append(f"## {1 - shared / unshared:.0%} fewer multiply-accumulates")
        lines.append(f"Counted: {giga(shared)} per image instead of {giga(unshared)} without sharing.")
    elif result.macs is not None:
        lines.append(f"## {giga(result.macs[0])} multiply-accumulates per image")
    if len(sets) > 1:
        ours, theirs = (np.load(each.folder / "samples.npz")["arr_0"] for each in sets)
        difference, count = np.abs(ours.astype(np.int16) - theirs).mean(), len(result.speedups)
        lines[-1:] = [
            f"{' '.join(lines[-1:])} Measured: **{np.median(result.speedups):.2f} × as fast**, the median of {count} "
            f"comparison{'s' * (count > 1)} of these settings. The pixels differ by {difference:.2f} of 255 on average."
        ]
    if steps is not None:
        cells = "".join("■" if k in steps else "□" for k in range(num_steps))
        strip = " ".join(cells[k : k + 10] for k in range(0, num_steps, 10))
        lines.append(f"The encoder ran at {len(steps)} of {num_steps} steps: {strip}")
    rows = [
        ["Time", *(f"{each.seconds:.2f} s" for each in sets)],
        ["Images per second", *(f"{receipt['images_per_second']:.3g}" for receipt in receipts)],
        *([f"{part.capitalize()} calls per image", *(f"{each[part]:g}" for each in calls)] for part in calls[0]),
    ]
    head = ["Images", ""] if steps is None else ["Encoder sharing", *["with", "without"][: len(sets)]]
    lines.append(markdown_table(head, rows))
    return "\n\n".join(lines)


def galleries(sets: list[SampledSet], class_names: list[str]) -> list[gr.Gallery | gr.ImageSlider]:
    """Return updates of the slider and both galleries, a class a column; the slider and the second
    gallery are for a comparison alone.
    """
    names = class_choices(class_names)
    images, shared = sets[0].request.images, sets[0].receipt["recompute_steps"] is not None
    captions = [f"{names[k]}, seed {seed}" for k, seed in zip(images.classes, images.seeds, strict=True)]
    updates = [gr.ImageSlider(visible=False), gr.Gallery(visible=False), gr.Gallery(visible=False)]
    for place, (each, title) in enumerate(zip(sets, TITLES if shared else ["Images"], strict=False), 1):
        captioned = list(zip(sorted((each.folder / "png").iterdir()), captions, strict=True))
        updates[place] = gr.Gallery(captioned, label=title, columns=len(set(images.classes)), visible=True)
    if len(sets) > 1:
        updates[0] = gr.ImageSlider((sets[1].folder / "grid.png", sets[0].folder / "grid.png"), visible=True)
    return updates
