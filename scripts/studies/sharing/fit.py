"""Fit a recompute schedule to a checkpoint and its sampler, for `sample.py
recompute=schedule.json`.

python scripts/studies/sharing/fit.py ckpt=RUN_OR_CHECKPOINT budget=10 out=schedule.json
[templates=8] [num_steps=…]
"""

import logging
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from omegaconf import DictConfig

from ddt.checkpoint import folder as ckpt
from ddt.cli import CONF, arguments_for, checked, entry_point
from ddt.errors import require
from ddt.generation.generator import Dtype
from ddt.receipts import circumstances
from ddt.sampling.fitting import fit_schedule
from ddt.sampling.schedules import write_schedule
from ddt.sampling.settings import SamplerSettings
from scripts.studies.sharing.report import draw_similarity
from scripts.studies.sharing.unshared import find_shareable, place, unshared_sampler

log = logging.getLogger(__name__)


def check(ckpt: str, budget: int, out: str, templates: int, batch_size: int, dtype: Dtype | None) -> None:
    """Refuse settings that cannot be, and files that would be written over."""
    require(budget >= 1, f"budget={budget}: must be at least 1")
    require(templates >= 1, f"templates={templates}: must be at least 1")
    require(batch_size >= 1, f"batch_size={batch_size}: must be at least 1")
    require(Path(out).suffix == ".json", f"out={out}: give a .json file")
    for path in (Path(out), Path(out).with_suffix(".png")):
        require(not path.exists(), f"out={out}: {path} exists already and is not written over; choose another out=")


def draw(content: dict[str, Any], path: Path) -> None:
    """Write a picture of the similarity of z between all steps, and over it the segments that share
    one.
    """
    similarity, steps = np.array(content["similarity"]), content["recompute_steps"]
    figure, axes = plt.subplots(figsize=(5.6, 4.8), layout="constrained")
    image = draw_similarity(axes, similarity, steps)
    axes.set_title(f"the encoder runs at {len(steps)} of {len(similarity)} steps")
    figure.colorbar(image, ax=axes, label="cosine similarity of z")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def fit(folder: Path, stored: dict[str, Any], settings: SamplerSettings, arguments: dict[str, Any]) -> None:
    """Load the weights, fit, and write the file and its picture."""
    device, dtype = place(arguments["dtype"])
    model = ckpt.load_model(folder).to(device)
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == "bf16"):
        content = fit_schedule(
            model, tuple(stored["latent_shape"]), settings, arguments["budget"], device, arguments["templates"],
            arguments["batch_size"],
        )  # fmt: skip
    out = Path(arguments["out"])
    out.parent.mkdir(parents=True, exist_ok=True)
    draw(content, out.with_suffix(".png"))
    origin = {"ema_sha256": ckpt.weights_sha256(folder, "ema"), "dtype": dtype, **circumstances(device)}
    similarity = content.pop("similarity")
    write_schedule(out, {**content, **origin, "similarity": similarity})
    steps = content["recompute_steps"]
    log.info("the encoder runs at %d of %d steps: %s", len(steps), settings.num_steps, ", ".join(map(str, steps)))
    log.info("%s, %s", out, out.with_suffix(".png"))


@entry_point("fit_sharing_schedule", CONF / "study")
def main(cfg: DictConfig) -> None:
    """Check, fit, write."""
    config = checked(cfg)
    arguments = arguments_for(check, config)
    check(**arguments)
    folder, stored = find_shareable(arguments["ckpt"])
    settings = unshared_sampler(config, stored)
    steps, budget = settings.num_steps, arguments["budget"]
    require(budget <= steps, f"budget={budget}: must lie in 1..num_steps={steps}")
    fit(folder, stored, settings, arguments)


if __name__ == "__main__":
    main()
