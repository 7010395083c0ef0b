"""Which images make a set: a class and a seed for each."""

import dataclasses
import logging
import re
from collections.abc import Sequence

from ddt.class_names import synonyms
from ddt.config import did_you_mean, shown
from ddt.draws import Stream, random_generator
from ddt.errors import UserError, require

log = logging.getLogger(__name__)
NUMBERS = re.compile(r"\s*(-?\d+)(?:\s*-\s*(\d+))?\s*")  # 7 or 0-49
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
    listed = shown(value)
    for word in ",".join(map(str, pieces)).split(",") if pieces else []:
        match = NUMBERS.fullmatch(word)
        if match is None:
            raise UserError(f"{key}={listed}: {word} is no whole number; write [1,5,7], 0-49 or [0-9,20]")
        first, last = int(match[1]), int(match[2] or match[1])
        require(first <= last, f"{key}={listed}: {word} runs backwards; write the smaller number first")
        require(last < first + SEED_STRIDE, f"{key}={listed}: {word} is longer than {SEED_STRIDE} numbers")
        numbers += range(first, last + 1)
    require(len(numbers) > 0, f"{key}=[]: name at least one, or leave it out")
    require(len(set(numbers)) == len(numbers), f"{key}={listed}: names a number twice")
    return numbers


def named_class(name: str, class_names: Sequence[str], start: str) -> int:
    """Return the number of a class by its name, one of ImageNet's English names of its synset, or a
    unique beginning of one, in upper or lower case.

    start: of the message. Raises UserError for an unknown name, and for one of several classes.
    """
    words = synonyms(list(class_names))
    names: dict[str, set[int]] = {}
    for k, (own, others) in enumerate(zip(class_names, words, strict=True)):
        for word in (own, *others):
            names.setdefault(word.lower(), set()).add(k)
    exact = {k for k, own in enumerate(class_names) if own == name} or names.get(name.lower())
    begun = {k for word, numbers in names.items() if word.startswith(name.lower()) for k in numbers}
    found = sorted(exact or begun)
    told = ", ".join(f"{k} ({words[k][0] if words[k] else class_names[k]})" for k in found[:4])
    require(len(found) > 0, f"{start} no class and no whole number{did_you_mean(name.lower(), names)}")
    require(len(found) == 1, f"{start} the name of {len(found)} classes, {told}; give more of it, or a number")
    if not exact:
        log.info("%s class %s", start, told)
    return found[0]


def read_classes(value: Numbers, class_names: Sequence[str]) -> list[int]:
    """Return the class numbers of a setting: numbers as `read_numbers` takes them, and names as
    `named_class` does. What is a number, or a range, is never a name, and a warning says so where
    it could be one.

    Raises UserError for an unknown name, and for one that several classes have.
    """
    numbers: list[int | str] = []
    for piece in value if isinstance(value, list) else [value]:
        whole = str(piece) in class_names  # a name may hold a comma
        for word in [str(piece)] if whole else str(piece).split(","):
            name = word.strip()
            if NUMBERS.fullmatch(word):
                numbers.append(word)
                if name.isdecimal() and name in class_names and class_names.index(name) != int(name) < len(class_names):
                    log.warning(
                        "warning: classes=%s: numbers count the classes from 0, so %s is the class named %s; the one "
                        "named %s is %d", shown(value), name, class_names[int(name)], name, class_names.index(name),
                    )  # fmt: skip
                continue
            numbers.append(named_class(name, class_names, f"classes={shown(value)}: {name} is"))
    return read_numbers("classes", numbers)


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
    class_names: Sequence[str] = (),
) -> ImageSet:
    """Return the set: with `seeds` (default 0..7) every seed with every class, seed by seed; with
    `num_samples` alone, image k of class `classes[k % K]` and seed `seed·1,000,000 + k`.

    `classes` are numbers or `class_names`, and default to all; "random" gives each seed one image,
    of a class sampled from it.
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
        chosen = list(range(num_classes)) if classes is None else read_classes(classes, class_names)
        wrong = [c for c in chosen if not 0 <= c < num_classes]
        counted = " (they are counted from 0, whatever their names)" if any(map(str.isdecimal, class_names)) else ""
        require(not wrong, f"classes={wrong[:3]}: the model has classes 0..{num_classes - 1}{counted}")
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
