"""Compare the evaluation with ADM's own evaluator, which runs in TensorFlow: the same files, the same network.

python scripts/compare_with_adm.py evaluator=PATH/evaluator.py python=PYTHON_WITH_TENSORFLOW \
    graph=PATH/classify_image_graph_def.pb samples=NPZ reference=NPZ [distance_tolerance=0.002 …]

Exit status 1 where a number differs by more than is expected.
"""

import logging
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from omegaconf import DictConfig

from ddt.errors import UserError, require
from ddt.evaluation import evaluate
from ddt.files import sha256
from ddt.metrics.inception import InceptionSettings
from ddt.metrics.npz import NpzImages
from ddt.metrics.precision_recall import NUM_NEIGHBOURS
from ddt.metrics.sources import open_images
from ddt.training import make_accelerator
from evaluate import load_reference
from scripts.entry import arguments_for, checked, entry_point

log = logging.getLogger(__name__)
PRINTED = {"Inception Score": "inception_score", "FID": "fid", "sFID": "sfid", "Precision": "precision",
           "Recall": "recall"}  # fmt: skip
NUMBER = r"nan|-?inf|-?[\d.]+(?:e[-+]\d+)?"
GRAPH = "classify_image_graph_def.pb"  # what the evaluator looks for in its working directory
PUBLISHED = "c8f10ab1406c45d105d7f5b347e5be06c118bd2ddef1c54789c263ebae7f1ca7"  # of guided-diffusion at 22e0df8


def open_npz(path: str, key: str) -> NpzImages:
    """Open images that both sides can read; raise UserError for others."""
    images = open_images(Path(path), key)
    if not isinstance(images, NpzImages):
        raise UserError(f"{key}={path}: a folder of images; the evaluator reads an npz file alone")
    require(len(images) > NUM_NEIGHBOURS, f"{key}={path}: holds {len(images)} images; give more than {NUM_NEIGHBOURS}")
    return images


def run_evaluator(evaluator: Path, python: str, graph: Path, reference: Path, samples: Path) -> dict[str, float]:
    """Return the five numbers that the evaluator prints; its progress goes on to the terminal."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / GRAPH).symlink_to(graph.resolve())  # found there, it is not downloaded
        command = [python, *map(str, (evaluator.resolve(), reference.resolve(), samples.resolve()))]
        done = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, text=True, check=False)
    require(done.returncode == 0, f"evaluator={evaluator}: ended with status {done.returncode}; its message is above")
    found = dict(re.findall(rf"^({'|'.join(PRINTED)}): ({NUMBER})$", done.stdout, re.M))
    missing = [label for label in PRINTED if label not in found]
    require(not missing, f"evaluator={evaluator}: printed no {', '.join(missing)}; give ADM's evaluator.py, unmodified")
    return {name: float(found[label]) for label, name in PRINTED.items()}


def compare(theirs: dict[str, float], ours: dict[str, float], allowed: dict[str, float]) -> list[str]:
    """Print both sides' numbers with their differences; return the names of those too far apart."""
    log.info("%-16s %12s %12s %12s %12s", "", "evaluator", "ddt", "difference", "allowed")
    apart = []
    for name, value in theirs.items():
        difference = ours[name] - value
        agree = abs(difference) <= allowed[name] or (math.isnan(value) and math.isnan(ours[name]))
        log.info("%-16s %12.6f %12.6f %+12.1e %12.1e%s", name, value, ours[name], difference, allowed[name],
                 "" if agree else "  too far apart")  # fmt: skip
        apart += [] if agree else [name]
    return apart


def compare_with_adm(
    evaluator: str, python: str, graph: str, samples: str, reference: str, distance_tolerance: float,
    score_tolerance: float, share_tolerance: float, share_images: int,
) -> None:  # fmt: skip
    """Measure on both sides and compare; raise UserError where they disagree."""
    require(Path(evaluator).is_file(), f"evaluator={evaluator}: no such file; give guided-diffusion's evaluator.py")
    interpreter = shutil.which(python)
    if interpreter is None:
        raise UserError(f"python={python}: no such program; give an interpreter that has TensorFlow")
    require(graph.endswith(".pb") and Path(graph).is_file(), f"graph={graph}: no such .pb file; give ADM's {GRAPH}")
    tolerances = (distance_tolerance, score_tolerance, share_tolerance, share_images)
    require(min(tolerances) >= 0, "a tolerance is below 0; give 0 or more")
    drawn, real = open_npz(samples, "samples"), open_npz(reference, "reference")
    accelerator = make_accelerator("no")
    against, extractor = load_reference(str(real.path), None, InceptionSettings(graph), accelerator.device)
    require(len(against.statistics) != 1, f"reference={reference}: has mu, but not mu_s, which the evaluator reads too")
    if sha256(Path(evaluator)) != PUBLISHED:
        log.warning("warning: %s is not the evaluator.py of guided-diffusion at 22e0df8", evaluator)
    # not resolved: a virtual environment's interpreter is a link
    theirs = run_evaluator(Path(evaluator), os.path.abspath(interpreter), Path(graph), real.path, drawn.path)
    with tempfile.TemporaryDirectory() as folder:
        metrics = evaluate(drawn, against, extractor, Path(folder), accelerator)
    assert metrics is not None, "one process is the main one"
    ours = {name: math.nan if metrics[name] is None else metrics[name] for name in theirs}
    allowed = {
        "inception_score": score_tolerance * abs(theirs["inception_score"]),
        "fid": distance_tolerance,
        "sfid": distance_tolerance,
        "precision": share_tolerance + share_images / len(drawn),
        "recall": share_tolerance + share_images / len(real),
    }
    apart = compare(theirs, ours, allowed)
    require(not apart, f"differ by more than expected: {', '.join(apart)}")
    log.info("all five agree")


@entry_point("compare_with_adm")
def main(cfg: DictConfig) -> None:
    """Check, measure twice, compare."""
    compare_with_adm(**arguments_for(compare_with_adm, checked(cfg)))


if __name__ == "__main__":
    main()
