"""Which images make a set: a class and a seed for each."""

import dataclasses
import re

from ddt.draws import Stream, random_generator
from ddt.errors import UserError, require

SEED_STRIDE = 1_000_000
MAX_SEED = 2**32  # torch's CPU generator uses no more bits
Numbers = int | str | list[int | str]


@dataclasses.dataclass(frozen=True)
class ImageSet:
    """Class and seed of each image, in the order of the file; classes are interleaved."""

    classes: list[int]  # (n,)
    seeds: list[int]  # (n,)


def read_numbers(key: str, value: Numbers) -> list[int]:
    """Return the integers of a setting: 7, "0-49", "1,5,9-12", or a list of such.

    Raises UserError naming `key` for anything else, and for duplicates.
    """
    numbers: list[int] = []
    pieces = value if isinstance(value, list) else [value]
    shown = f"[{', '.join(map(str, value))}]" if isinstance(value, list) else value
    for word in ",".join(map(str, pieces)).split(",") if pieces else []:
        match = re.fullmatch(r"\s*(-?\d+)(?:\s*-\s*(\d+))?\s*", word)
        if match is None:
            more = ", or random" if key == "classes" else ""
            raise UserError(f"{key}={shown}: {word} is no whole number; write [1,5,7], 0-49 or [0-9,20]{more}")
        first, last = int(match[1]), int(match[2] or match[1])
        require(first <= last, f"{key}={shown}: {word} runs backwards; write the smaller number first")
        require(last < first + SEED_STRIDE, f"{key}={shown}: {word} is longer than {SEED_STRIDE} numbers")
        numbers += range(first, last + 1)
    require(len(numbers) > 0, f"{key}=[]: name at least one, or leave it out")
    require(len(set(numbers)) == len(numbers), f"{key}={shown}: names a number twice")
    return numbers


def write_numbers(numbers: list[int]) -> str:
    """Return numbers in their order as text with ranges, "0-49,60", short for most sets."""
    pieces: list[list[int]] = []
    for number in numbers:
        if pieces and number == pieces[-1][1] + 1:
            pieces[-1][1] = number
        else:
            pieces.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in pieces)


def image_set(
    num_classes: int,
    num_samples: int | None = None,
    classes: Numbers | None = None,
    seeds: Numbers | None = None,
    seed: int = 0,
) -> ImageSet:
    """Return the set: with `seeds` (default 0..7) every seed with every class, seed by seed; with
    `num_samples` alone, image k of class `classes[k % K]` and seed `seed·1,000,000 + k`.

    `classes` defaults to all; "random" gives each seed one image, of a class sampled from it.
    Raises UserError for an unknown class, a seed out of 0..2³²−1, and counts that disagree.
    """
    require(
        seed == 0 or (seeds is None and num_samples is not None),
        f"seed={seed}: numbers the images of num_samples= alone; give that, or choose seeds=",
    )
    if seeds is not None:
        which = read_numbers("seeds", seeds)
        wrong = [s for s in which if not 0 <= s < MAX_SEED]
        require(not wrong, f"seeds={wrong[:3]}: a seed must lie in 0..{MAX_SEED - 1}")
    elif num_samples is not None:
        require(1 <= num_samples <= SEED_STRIDE, f"num_samples={num_samples}: must lie in 1..{SEED_STRIDE}")
        last = MAX_SEED // SEED_STRIDE - 2  # beyond are the seeds of templates (ddt.sampling.fitting)
        require(0 <= seed <= last, f"seed={seed}: must lie in 0..{last}")
        which = [seed * SEED_STRIDE + k for k in range(num_samples)]
    else:
        which = list(range(8))
    if classes == "random":
        labels = [int(random_generator(0, Stream.CLASSES, s).integers(num_classes)) for s in which]
        total = len(which)
    else:
        chosen = list(range(num_classes)) if classes is None else read_numbers("classes", classes)
        wrong = [c for c in chosen if not 0 <= c < num_classes]
        require(not wrong, f"classes={wrong[:3]}: the model has classes 0..{num_classes - 1}")
        if seeds is None and num_samples is not None:
            return ImageSet([chosen[k % len(chosen)] for k in range(num_samples)], which)
        labels = [c for _ in which for c in chosen]
        which = [s for s in which for _ in chosen]
        total = len(labels)
    require(
        num_samples in (None, total),
        f"num_samples={num_samples}: disagrees with seeds= and classes=, which make {total} images; leave it out",
    )
    return ImageSet(labels, which)
