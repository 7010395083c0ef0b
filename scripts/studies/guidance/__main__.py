"""Search the guidance that suits a trained model: scale × interval × weights × schedule on few
images each, then the best of them on many, with noise of their own.

python scripts/studies/guidance/__main__.py ckpt=RUN features=digits reference=data:digits out=DIR
cfg_scale=[1,1.5,2,3] cfg_interval=[null,[0.3,1]] [weights=[ema,model]] [recompute=[null,uniform:5]]
[num_samples=1000] [top=3] [repeats=3]
"""

import contextlib
import datetime
import functools
import json
import logging
import os
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from omegaconf import DictConfig

from ddt.cli import CONF, arguments_for, checked, entry_point
from ddt.distributed.launch import launch
from ddt.distributed.prepare import make_accelerator
from ddt.errors import require
from ddt.files import lock_folder, write_json
from ddt.generation.generator import Dtype, Generator, usual_dtype
from ddt.generation.image_set import SEED_STRIDE
from ddt.generation.load import stored_autoencoder
from ddt.metrics.features import check_features
from ddt.metrics.precision_recall import PrDtype
from ddt.metrics.scores import prepare
from ddt.receipts import circumstances, without_paths
from scripts.studies.guidance.points import Checkpoint, Interval, Point, Recompute
from scripts.studies.guidance.report import draw, result_of, tables
from scripts.studies.guidance.search import Search, best_of, chosen_metric, final_jobs, proxy_jobs
from scripts.studies.guidance.settings import AXES, find_checkpoints, listed, request_of, search_points
from scripts.studies.study import begin, comparison

log = logging.getLogger(__name__)
RESULT, WORK = "search", ".search"
AS_STORED = Literal["checkpoint"]


def check(
    ckpt: list[str], weights: list[str], recompute: list[AS_STORED | Recompute],
    timeshift: list[float | AS_STORED], cfg_scale: list[float | AS_STORED], cfg_interval: list[Interval | AS_STORED],
    num_samples: int, top: int, final_samples: int, repeats: int, metric: str | None, keep_samples: bool,
    reference: str, out: str, autoencoder: str, dtype: Dtype | None, batch_size: int, num_processes: int | None,
    cache_gib: float, inception_weights: str | None, pr_dtype: PrDtype,
) -> None:  # fmt: skip
    """Refuse settings that cannot be."""
    axes = {
        "ckpt": ckpt, "weights": weights, "recompute": recompute, "timeshift": timeshift, "cfg_scale": cfg_scale,
        "cfg_interval": cfg_interval,
    }  # fmt: skip
    for key, values in axes.items():
        require(len(values) > 0, f"{key}=[]: name at least one")
        twice = [value for n, value in enumerate(values) if value in values[:n]]
        require(not twice, f"{key}: names {twice[:1]} twice; name each value once")
    for key, count in {"top": top, "repeats": repeats, "batch_size": batch_size}.items():
        require(count >= 1, f"{key}={count}: must be at least 1")
    for key, count in {"num_samples": num_samples, "final_samples": final_samples}.items():
        require(2 <= count <= SEED_STRIDE, f"{key}={count}: must lie in 2..{SEED_STRIDE}; statistics need at least 2")
    require(cache_gib >= 0, f"cache_gib={cache_gib}: must be at least 0 (0 keeps no modulations)")


def run(config: dict[str, Any], checkpoints: list[Checkpoint], points: list[Point]) -> None:
    """Find everything, refuse what does not fit, then draw both stages, on each process."""
    accelerator = make_accelerator("no", patience=datetime.timedelta(days=1))  # one GPU may be hours behind another
    plan: dict[str, Any] | None = None
    device, main, out = accelerator.device, accelerator.is_main_process, Path(config["out"])
    dtype: Dtype = config["dtype"] or usual_dtype(device)
    request: dict[str, Any] = {}
    if main:  # it alone reads files for their hashes
        request = request_of(config, checkpoints, dtype, circumstances(device)["device"])
        plan = begin(out, request, "search", WORK)
    (complete,) = broadcast_object_list([(out / f"{RESULT}.json").exists()])  # as the main process sees it
    if complete:
        log.info("%s: complete, nothing to do", out / f"{RESULT}.json")
        return
    stored = checkpoints[0].stored
    autoencoder = stored_autoencoder(stored, config["autoencoder"]).to(device)
    reference, extractor = comparison(config, autoencoder, stored["latent_shape"], device)
    metric = chosen_metric(config["metric"], reference, extractor)
    make = functools.partial(
        Generator, autoencoder=autoencoder, shape=tuple(stored["latent_shape"]), dtype=dtype,
        device=device, cache_bytes=config["cache_gib"] * 2**30,
    )  # fmt: skip
    message = f"out={out}: another command is sampling this set; wait for it, or choose another out="
    with lock_folder(out / WORK, message) if main else contextlib.nullcontext():
        if main:
            inputs = {"reference": reference.identity(), "features": extractor.identity()}
            inputs = json.loads(json.dumps(without_paths(inputs)))
            require(
                plan is None or plan["inputs"] == inputs,
                f"out={out}: its points were measured with another content of reference, features or weights; choose "
                "another out=",
            )
            write_json(out / "plan.json", {"request": request, "inputs": inputs})
        search = Search(
            make, autoencoder.fingerprint, reference, extractor, prepare(reference, extractor, accelerator),
            config["pr_dtype"], metric, config["batch_size"], config["keep_samples"], accelerator,
        )  # fmt: skip
        proxy = search.run(proxy_jobs(points, config["num_samples"], out))
        order = best_of(proxy, metric, config["top"])
        jobs = final_jobs([points[n] for n in order], config["final_samples"], config["repeats"], out)
        final = search.run(jobs)
        if main:
            write(result_of(points, proxy, order, jobs, final, metric), request, accelerator, out)
            shutil.rmtree(out / WORK)


def write(result: dict[str, Any], request: dict[str, Any], accelerator: Accelerator, out: Path) -> None:
    """Write tables, picture and, last, the JSON file of a complete search."""
    (out / f"{RESULT}.md").write_text(tables(result) + "\n")
    draw(result, out / f"{RESULT}.png")
    about = {"num_processes": accelerator.num_processes, "threads": torch.get_num_threads(), "cores": os.cpu_count()}
    origin = {"command": shlex.join(["python", *sys.argv]), **circumstances(accelerator.device), **about}
    write_json(out / f"{RESULT}.json", {"request": request, **result, **origin})
    log.info("%s\n%s", tables(result), out / f"{RESULT}.png")


@entry_point("guidance_search", CONF / "study")
def main(cfg: DictConfig) -> None:
    """Check all that needs no weights, then search."""
    config = checked(cfg)
    config.update({key: listed(key, config[key]) for key in AXES})
    values = arguments_for(check, config)
    check(**values)
    config.update(values)
    check_features(config["features"], config["reference"], config["inception_weights"])
    checkpoints = find_checkpoints(config["ckpt"], config["weights"])
    points = search_points(config, checkpoints)
    require(
        config["top"] <= len(points), f"top={config['top']}: there are {len(points)} points; choose at most so many"
    )
    launch(run, config["num_processes"], config, checkpoints, points)


if __name__ == "__main__":
    main()
