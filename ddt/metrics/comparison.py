"""What may be set beside published numbers, and a table that does it."""

import math
from typing import Any

from ddt.metrics.inception import WEIGHTS_SHA256
from ddt.metrics.reference import NUM_POOL, Reference

PUBLISHED_COUNT = 50_000
ORDER_TOLERANCE = 0.02  # the Inception Score in file order may differ by this share from that of a shuffled file
DECIMALS = {"fid": 3, "sfid": 3, "inception_score": 3, "precision": 4, "recall": 4}


def order_matters(metrics: dict[str, Any]) -> bool:
    """Tell whether the Inception Score is an artefact of the order of the samples, by class as a rule."""
    score, shuffled = metrics["inception_score"], metrics["inception_score_shuffled"]
    return None not in (score, shuffled) and abs(score - shuffled) > ORDER_TOLERANCE * shuffled


def order_warning(metrics: dict[str, Any]) -> str:
    """Return one line that says so."""
    return (
        f"the Inception Score depends on the order of the samples: {metrics['inception_score']:.2f} in the file's, "
        f"{metrics['inception_score_shuffled']:.2f} shuffled; samples grouped by class score too low"
    )


def obstacles(
    metrics: dict[str, Any], count: int, reference: Reference, weights_sha256: str, pr_dtype: str
) -> list[str]:
    """Return the reasons, one line each, for which the metrics of `count` samples compare with no published ones."""
    found = []
    if reference.pool is None:
        assert reference.images is not None
        of_images = f"statistics of its {len(reference.images):,} images, not of a whole training set"
        found.append(f"the reference has no mu and sigma: FID and sFID use {of_images}")
        if len(reference.images) <= NUM_POOL:
            found.append(f"the reference has fewer images than feature dimensions ({NUM_POOL}): singular covariance")
    if count != PUBLISHED_COUNT:
        found.append(f"{count:,} samples instead of {PUBLISHED_COUNT:,}: FID and sFID depend on their number")
    if count <= NUM_POOL:
        found.append(f"fewer samples ({count:,}) than feature dimensions ({NUM_POOL}): singular covariance")
    if not weights_sha256.startswith(WEIGHTS_SHA256):
        found.append(f"the Inception weights are not the published file (SHA-256 {WEIGHTS_SHA256}…)")
    if pr_dtype != "float16":
        found.append(f"precision and recall in {pr_dtype}: published ones are in ADM's float16")
    if order_matters(metrics):
        found.append(order_warning(metrics))
    return found


def compare(metrics: dict[str, Any], published: dict[str, Any]) -> str:
    """Lay measured metrics out beside published ones, as an aligned table of text.

    Both hold any of fid, sfid, inception_score, precision and recall; a value that is missing or None is shown as "–".
    Below it stand the reasons, if `metrics` has any, why the two do not compare.
    """

    def shown(value: float | None, name: str, sign: str = "") -> str:
        return "–" if value is None or math.isnan(value) else f"{value:{sign}.{DECIMALS[name]}f}"

    lines = [f"{'':<16}{'measured':>12}{'published':>12}{'difference':>12}"]
    for name in DECIMALS:
        ours, theirs = metrics.get(name), published.get(name)
        difference = None if ours is None or theirs is None else ours - theirs
        cells = (shown(ours, name), shown(theirs, name), shown(difference, name, "+"))
        lines.append(f"{name:<16}" + "".join(f"{cell:>12}" for cell in cells))
    lines += [f"not comparable: {reason}" for reason in metrics.get("not_comparable_because") or []]
    return "\n".join(lines)
