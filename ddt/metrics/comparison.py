"""Measured metrics beside published ones."""

import math
from typing import Any

DECIMALS = {"fid": 3, "sfid": 3, "inception_score": 3, "precision": 4, "recall": 4}


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
