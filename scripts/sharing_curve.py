"""Measure the quality of shared sampling against its speed, for every rule and budget, on a trained model.

python scripts/sharing_curve.py ckpt=RUN features=digits reference=data:digits out=DIR [budgets=[25,10,5]] [repeats=3]
"""

import dataclasses
import json
import logging
import os
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from ddt import checkpoint as ckpt
from ddt.autoencoder import Autoencoder
from ddt.config import build
from ddt.errors import require
from ddt.files import sha256, write_json
from ddt.generation import Generator, circumstances, locked
from ddt.metrics.distances import FrechetReference, classifier_reference, inception_reference
from ddt.metrics.inception import find_weights
from ddt.metrics.reference import read_reference
from ddt.sharing_curve import KEPT, Curve
from ddt.sharing_rules import check_rules, schedules_of
from evaluate import reference_data
from sample import stored_autoencoder
from scripts.entry import CONF, arguments_for, checked, composing, entry_point
from scripts.sharing_report import draw, summarise, table
from scripts.unshared import Dtype, find_shareable, place, unshared_sampler

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


def comparison(config: dict[str, Any], autoencoder: Autoencoder, shape: list[int]) -> Callable[[], FrechetReference]:
    """Return the function that makes the reference ready, once all that it reads has been found and suits the model."""
    features, reference = HydraConfig.get().runtime.choices.features, config["reference"]
    if features == "inception":
        require(not reference.startswith("data:"), f"features=inception: reference={reference} is no file; give an npz")
        require(
            autoencoder.latent_channels is not None or shape[0] == 3,
            f"features=inception: reads RGB images, this model draws {shape[0]} channel; use a classifier's features",
        )
        base = read_reference(Path(reference))
        weights = find_weights(config["inception_weights"] and Path(config["inception_weights"]))
        batch_size = build(config["features"]).batch_size
        return lambda: inception_reference(base, weights, batch_size)
    require(config["inception_weights"] is None, f"inception_weights: has no effect with features={features}")
    with composing(CONF):
        data, node = reference_data(reference, features)
    train = build(node)(split="train")
    found = autoencoder.latent_shape(train.channels, train.image_size)
    require(
        list(found) == list(shape),
        f"reference={reference}: has latents of shape {list(found)}, the model draws {list(shape)}; give its own data",
    )
    return lambda: classifier_reference(data, build(config["features"]), train)


def begin(out: Path, request: dict[str, Any]) -> dict[str, Any] | None:
    """Return the plan that an earlier call of the same command left in `out`, or None; refuse any other content."""
    require(not out.exists() or out.is_dir(), f"out={out}: is a file; give a folder")
    if not out.exists() or not any(path.name != KEPT for path in out.iterdir()):
        return None
    try:
        plan = json.loads((out / "plan.json").read_text())
        same = plan["request"] == json.loads(json.dumps(request))
    except (OSError, ValueError, KeyError, TypeError):
        same = False
    require(same, f"out={out}: holds another curve or other files and is not written over; choose another out=")
    return plan


def write(curve: Curve, rows: list[dict[str, Any]], plan: dict[str, Any], out: Path) -> None:
    """Write table, picture and, last, the JSON file of a complete curve."""
    summary, name = summarise(curve, rows), curve.reference.name
    (out / f"{RESULT}.md").write_text(table(summary, name) + "\n")
    draw(summary, name, out / f"{RESULT}.png")
    origin = {"command": shlex.join(["python", *sys.argv]), **circumstances(curve.generator.device)}
    about = {"threads": torch.get_num_threads(), "cores": os.cpu_count(), "load_after": os.getloadavg()[0]}
    write_json(out / f"{RESULT}.json", {**plan, "summary": summary, "points": rows, **origin, **about})
    log.info("%s\n%s", table(summary, name), out / f"{RESULT}.png")


def measure(config: dict[str, Any], folder: Path, stored: dict[str, Any], settings: Any) -> None:
    """Find everything, refuse what does not fit, then fit the schedules and draw the points."""
    device, dtype = place(config["dtype"])
    out, keys = Path(config["out"]), ("reference", "rules", "budgets", "repeats", "num_samples", "batch_size")
    request = {
        **{key: config[key] for key in (*keys, "templates", "autoencoder", "inception_weights", "cache_gib")},
        "features": config["features"],
        "ema_sha256": sha256(folder / "ema.safetensors"),
        "sampler": dataclasses.asdict(settings),
        "dtype": dtype,
        "device": circumstances(device)["device"],
    }
    plan = begin(out, request)
    if (out / f"{RESULT}.json").exists():
        log.info("%s: complete, nothing to do", out / f"{RESULT}.json")
        return
    autoencoder = stored_autoencoder(stored, config["autoencoder"])
    ready = comparison(config, autoencoder, stored["latent_shape"])
    generator = Generator(
        model=ckpt.load_model(folder).to(device), autoencoder=autoencoder.to(device),
        shape=tuple(stored["latent_shape"]), settings=settings, recompute=None, dtype=dtype, device=device,
        cache_bytes=config["cache_gib"] * 2**30,
    )  # fmt: skip
    with locked(out / KEPT):
        if plan is None:
            schedules = schedules_of(generator, config["rules"], config["budgets"], config["templates"])
            plan = {"request": request, "schedules": schedules}
            write_json(out / "plan.json", plan)
        curve = Curve(
            generator, plan["schedules"], config["rules"], ready(), config["repeats"], config["num_samples"],
            config["batch_size"], out,
        )  # fmt: skip
        write(curve, curve.run(), plan, out)
        shutil.rmtree(out / KEPT)


@entry_point("sharing_curve", CONF / "sharing")
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
