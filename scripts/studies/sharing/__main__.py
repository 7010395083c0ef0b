"""Measure the quality of shared sampling against its speed, for every rule and budget, on a trained
model.

python scripts/studies/sharing/__main__.py ckpt=RUN features=digits reference=data:digits out=DIR
[budgets=[25,10,5]] [repeats=3]
"""

import dataclasses
import logging
import os
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from omegaconf import DictConfig

from ddt.checkpoint import folder as ckpt
from ddt.cli import CONF, arguments_for, checked, entry_point
from ddt.distributed.prepare import make_accelerator
from ddt.errors import require
from ddt.files import lock_folder, write_json
from ddt.generation.generator import Dtype
from ddt.generation.load import load_generator, stored_autoencoder
from ddt.metrics.scores import prepare
from ddt.receipts import circumstances
from scripts.studies.sharing.curve import KEPT, Curve
from scripts.studies.sharing.report import draw, summarise, table
from scripts.studies.sharing.rules import check_rules, schedules_of
from scripts.studies.sharing.unshared import find_shareable, place, unshared_sampler
from scripts.studies.study import begin, comparison

log = logging.getLogger(__name__)
RESULT = "sharing_curve"


def check(
    ckpt: str, reference: str, out: str, rules: list[str], budgets: list[int], repeats: int, num_samples: int,
    batch_size: int, templates: int, inception_weights: str | None, autoencoder: str, dtype: Dtype | None,
    cache_gib: float,
) -> None:  # fmt: skip
    """Refuse settings that cannot be."""
    counts = {"repeats": repeats, "batch_size": batch_size, "templates": templates}
    for key, value in counts.items():
        require(value >= 1, f"{key}={value}: must be at least 1")
    require(num_samples >= 2, f"num_samples={num_samples}: statistics need at least 2")
    require(cache_gib >= 0, f"cache_gib={cache_gib}: must be at least 0 (0 keeps no modulations)")


def write(curve: Curve, rows: list[dict[str, Any]], plan: dict[str, Any], out: Path) -> None:
    """Write table, picture and, last, the JSON file of a complete curve."""
    summary, name = summarise(curve, rows), curve.distance_name
    (out / f"{RESULT}.md").write_text(table(summary, name) + "\n")
    draw(summary, name, out / f"{RESULT}.png")
    origin = {"command": shlex.join(["python", *sys.argv]), **circumstances(curve.generator.device)}
    about = {"threads": torch.get_num_threads(), "cores": os.cpu_count(), "load_after": os.getloadavg()[0]}
    write_json(out / f"{RESULT}.json", {**plan, "summary": summary, "points": rows, **origin, **about})
    log.info("%s\n%s", table(summary, name), out / f"{RESULT}.png")


def measure(config: dict[str, Any], folder: Path, stored: dict[str, Any], settings: Any) -> None:
    """Find everything, refuse what does not fit, then fit the schedules and draw the points."""
    (device, dtype), accelerator = place(config["dtype"]), make_accelerator("no")
    out, keys = Path(config["out"]), ("reference", "rules", "budgets", "repeats", "num_samples", "batch_size")
    request = {
        **{key: config[key] for key in (*keys, "templates", "autoencoder", "inception_weights", "cache_gib")},
        "features": config["features"],
        "ema_sha256": ckpt.weights_sha256(folder, "ema"),
        "sampler": dataclasses.asdict(settings),
        "dtype": dtype,
        "device": circumstances(device)["device"],
    }
    plan = begin(out, request, "curve", KEPT)
    if (out / f"{RESULT}.json").exists():
        log.info("%s: complete, nothing to do", out / f"{RESULT}.json")
        return
    autoencoder = stored_autoencoder(stored, config["autoencoder"])
    reference, extractor = comparison(config, autoencoder, stored["latent_shape"], device)
    generator = load_generator(folder, settings, autoencoder, device, dtype=dtype, cache_gib=config["cache_gib"])
    message = f"out={out}: another command is sampling this set; wait for it, or choose another out="
    with lock_folder(out / KEPT, message):
        if plan is None:
            schedules = schedules_of(generator, config["rules"], config["budgets"], config["templates"])
            plan = {"request": request, "schedules": schedules}
            write_json(out / "plan.json", plan)
        curve = Curve(
            generator, plan["schedules"], config["rules"], extractor, prepare(reference, extractor, accelerator),
            config["repeats"], config["num_samples"], config["batch_size"], out,
        )  # fmt: skip
        write(curve, curve.run(), plan, out)
        shutil.rmtree(out / KEPT)


@entry_point("sharing_curve", CONF / "study")
def main(cfg: DictConfig) -> None:
    """Check, measure."""
    config = checked(cfg)
    values = arguments_for(check, config)
    check(**values)
    config.update(values)
    folder, stored = find_shareable(config["ckpt"])
    settings = unshared_sampler(config, stored)
    check_rules(config["rules"], config["budgets"], settings.num_steps)
    measure(config, folder, stored, settings)


if __name__ == "__main__":
    main()
