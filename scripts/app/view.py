"""How the app shows a checkpoint and a result: text, numbers, galleries."""

import html
import urllib.parse
from pathlib import Path

import torch

from scripts.app.controls import class_choices
from scripts.app.jobs import Drawn, Result, Studio

CSS = """
.gradio-container { max-width: 1280px !important; margin: 0 auto !important; }
.html-container { padding: 0 !important; }
.tiles { display: flex; gap: 12px; flex-wrap: wrap; }
.tile { flex: 1 1 130px; padding: 10px 14px; border: 1px solid var(--border-color-primary); border-radius: 8px;
        background: var(--block-background-fill); }
.tile span { display: block; font-size: 12px; color: var(--body-text-color-subdued); }
.tile b { display: block; font-size: 24px; font-weight: 600; line-height: 1.4; color: var(--body-text-color); }
.sets { display: flex; gap: 16px; flex-wrap: wrap; }
.set { flex: 1 1 300px; padding: 12px 14px; border: 1px solid var(--border-color-primary); border-radius: 8px;
       background: var(--block-background-fill); }
.set h3 { margin: 0 0 10px; font-size: 14px; font-weight: 600; }
.pictures { display: grid; gap: 10px; }
.pictures figure, .pictures img { margin: 0 !important; }
.pictures a { display: block; padding: 0; }
.pictures img { display: block; width: 100%; border-radius: 4px; }
.pictures figcaption { font-size: 12px; text-align: center; color: var(--body-text-color-subdued);
                       overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.strip { margin-top: 12px; font-size: 12px; color: var(--body-text-color-subdued); }
.strip svg { display: block; width: 100%; height: 14px; margin-top: 4px; }
.strip .run { fill: var(--primary-500); }
.strip .rest { fill: var(--border-color-primary); }
"""
COLUMNS = 6  # classes that have a column each


def summary(studio: Studio) -> str:
    """Return what the checkpoint is, as Markdown."""
    model, stored = studio.generator.model, studio.stored
    height, width, _ = studio.image_shape
    blocks = f"{len(model.encoder.blocks)} + {len(model.decoder.blocks)}" if model.shares_encoder else "undivided"
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    device = studio.generator.device
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return (
        f"**{width}×{height} px**, {model.num_classes} classes · {type(model).__name__} of {blocks} blocks, "
        f"{millions:.1f} M parameters · {studio.source.weights} weights of step {stored['step']:,} · "
        f"{studio.generator.dtype} on {where} · `{studio.source.folder}`"
    )


def tile(name: str, value: str, more: str = "") -> str:
    """Return a number with its name above and what else there is to say below, as HTML."""
    return f'<div class="tile"><span>{name}</span><b>{value}</b><span>{more}</span></div>'


def numbers_of(result: Result) -> str:
    """Return what was measured and counted, and the steps at which the encoder ran, as HTML."""
    drawn, plain = result.drawn, result.plain
    rate, calls, steps = drawn.receipt["images_per_second"], drawn.calls, drawn.receipt["recompute_steps"]
    tiles = [tile("Time", f"{drawn.seconds:.2f} s", f"{rate:.3g} pictures/s")]
    if plain is not None:
        times = plain.seconds / drawn.seconds
        tiles.append(tile("Speed by sharing", f"{times:.2f} ×", f"{plain.seconds:.2f} s without"))
    saved = 1 - calls["encoder"] / calls["decoder"]  # without sharing, each runs at every call
    shared = "" if steps is None else f"{saved:.0%} of {calls['decoder']:g} saved"
    tiles.append(tile("Encoder calls", f"{calls['encoder']:g}", shared or "a picture"))
    tiles.append(tile("Decoder calls", f"{calls['decoder']:g}", "a picture"))
    if result.difference is not None:
        tiles.append(tile("Change by sharing", f"{result.difference:.2f}", "mean a pixel, of 255"))
    strip = "" if steps is None else strip_of(steps, result.request.settings.num_steps)
    return f'<div class="tiles">{"".join(tiles)}</div>{strip}'


def strip_of(steps: list[int], num_steps: int) -> str:
    """Return a strip with a cell for each step, filled where the encoder ran, as HTML."""
    cells = "".join(
        f'<rect x="{k}" width="0.85" height="1" class="{"run" if k in steps else "rest"}"/>' for k in range(num_steps)
    )
    return (
        f'<div class="strip">The encoder ran at {len(steps)} of {num_steps} steps, from noise to picture'
        f'<svg viewBox="0 0 {num_steps} 1" preserveAspectRatio="none" role="img">'
        f"<title>steps {', '.join(map(str, steps))}</title>{cells}</svg></div>"
    )


def pictures_of(result: Result, class_names: list[str]) -> str:
    """Return the pictures with their classes, a class a column where there are few, both sets side
    by side, as HTML.
    """
    images, names = result.request.images, {label: name for name, label in class_choices(class_names)}
    classes = len(set(images.classes))
    columns = classes if classes <= COLUMNS else 5

    def panel(drawn: Drawn, title: str) -> str:
        figures = "".join(
            f'<figure title="seed {seed}"><a href="{file_url(path)}" target="_blank"><img src="{file_url(path)}" '
            f'alt="{html.escape(names[label])}, seed {seed}"></a><figcaption>{html.escape(names[label])}</figcaption>'
            "</figure>"
            for path, label, seed in zip(drawn.pictures, images.classes, images.seeds, strict=True)
        )
        style = f"grid-template-columns: repeat({columns}, minmax(0, {result.side}px))"
        return f'<section class="set"><h3>{title}</h3><div class="pictures" style="{style}">{figures}</div></section>'

    sharing = result.drawn.receipt["recompute_steps"] is not None
    panels = panel(result.drawn, "With sharing" if sharing else "Pictures")
    if result.plain is not None:
        panels += panel(result.plain, "Without sharing")
    return f'<div class="sets">{panels}</div>'


def file_url(path: Path) -> str:
    """Return the address of a file, relative to the page."""
    return f"gradio_api/file={urllib.parse.quote(str(path))}"
