"""The figures of a look inside a model."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ddt.figures import ORANGE, WIDTH, pyplot, save_figure
from ddt.pictures import image_grid
from scripts.studies.inside.measure import EDGES, Film, Similarity, standard_error
from scripts.studies.study import draw_similarity

CELL = 0.85  # side of a small image, inches
SIDE = 64  # of an image of the animation at least, px
FRAME, PAUSE = 80, 2000  # milliseconds


def draw_similarities(z: Similarity, path: Path) -> None:
    """Write a panel per schedule: z's similarity, segments that share z, the encoder's steps."""
    count = len(z.schedules)
    figure, panels = pyplot().subplots(ncols=count, figsize=(min(WIDTH, 4 * count + 1), 3.9), squeeze=False)
    for axes, (name, steps) in zip(panels[0], z.schedules.items(), strict=True):
        image = draw_similarity(axes, z.values, steps)
        axes.plot(np.array(steps) + 0.5, np.array(steps) + 0.5, ".", color=ORANGE, markersize=6)
        chosen = " (chosen)" if steps == z.chosen else ""
        axes.set_title(f"{name}{chosen}: mean similarity\nof z to the z in use {z.to_z_in_use(name):.4f}")
    figure.colorbar(image, ax=panels, shrink=0.8, label="cosine similarity of z")
    save_figure(figure, path)


def draw_grid(pictures: np.ndarray, titles: list[str], names: list[str], title: str, path: Path) -> None:
    """Write images (rows, columns, H, W, 1 or 3), with titles of columns and names of rows."""
    rows, columns = pictures.shape[:2]
    figure, panels = pyplot().subplots(rows, columns, figsize=(CELL * columns + 0.8, CELL * rows + 0.7), squeeze=False)
    for row, name in enumerate(names):
        for column, heading in enumerate(titles):
            axes, picture = panels[row, column], pictures[row, column]
            axes.imshow(picture if picture.shape[-1] == 3 else picture[..., 0], cmap="gray", interpolation="nearest",
                        vmin=0, vmax=255)  # fmt: skip
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
            axes.grid(False)
            if row == 0:
                axes.set_title(heading)
        panels[row, 0].set_ylabel(name)
    figure.suptitle(title)
    save_figure(figure, path)


def at(times: list[float]) -> list[str]:
    """Return the titles of columns of some times."""
    return [f"t = {t:.2f}" for t in times]


def draw_components(colours: np.ndarray, times: list[float], names: list[str], shares: list[float], path: Path) -> None:
    """Write z at K times, colours (K, B, h, w, 3): an image per row, a time per column."""
    variances = ", ".join(f"{share:.0%}" for share in shares)
    title = f"z: first three principal components as red, green, blue ({variances} of the variance)"
    draw_grid(colours.swapaxes(0, 1), at(times), names, title, path)


def draw_film(film: Film, times: list[float], names: list[str], path: Path) -> None:
    """Write two rows per image: predicted clean image and x_t by time, then the sample."""
    ends = film.samples[:, None]  # (B, 1, H, W, C)
    strips = [np.concatenate([part.swapaxes(0, 1), ends], axis=1) for part in (film.predicted, film.noisy)]
    pictures = np.stack(strips, axis=1).reshape(-1, *strips[0].shape[1:])  # image by image, prediction above x_t
    rows = [name for each in names for name in (f"{each}\npredicted", "x_t")]
    draw_grid(pictures, [*at(times), "sample"], rows, "the predicted clean image, and x_t", path)


def write_animation(film: Film, path: Path) -> None:
    """Write a GIF: predicted clean images above x_t, a frame per time, then the samples, which stay
    for two seconds.
    """
    ends = [np.concatenate([film.samples] * 2)]
    frames = [np.concatenate(pair) for pair in zip(film.predicted, film.noisy, strict=True)] + ends  # (2B, H, W, C)
    columns = len(film.samples)
    grids = [image_grid(torch.from_numpy(frame).permute(0, 3, 1, 2), columns, min_cell=SIDE) for frame in frames]
    pictures = [Image.fromarray(grid).quantize() for grid in grids]
    milliseconds = [FRAME] * (len(pictures) - 1) + [PAUSE]
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=milliseconds, loop=0)


def draw_losses(errors: np.ndarray, path: Path) -> None:
    """Write the mean of the losses (n, 10) by bin of t, with its standard error over images."""
    edges = np.array(EDGES)
    figure, axes = pyplot().subplots(figsize=(5.5, 3.4))
    axes.errorbar((edges[1:] + edges[:-1]) / 2, errors.mean(0), standard_error(errors), np.diff(edges) / 2, fmt="o")
    axes.set(xlabel="t (0 is noise, 1 is data)", ylabel="flow-matching loss", xlim=(0, 1), ylim=(0, None),
             title=f"{len(errors)} held-out images, EMA weights")  # fmt: skip
    save_figure(figure, path)


def numbers(values: Any) -> list[Any]:
    """Return an array as nested lists of numbers of five digits."""
    array = np.asarray(values)
    return [numbers(row) for row in array] if array.ndim > 1 else [float(f"{value:.5g}") for value in array]
