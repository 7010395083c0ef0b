"""What a number is called, and whether it compares with published ones."""

from typing import Any

from ddt.metrics.features import Extractor
from ddt.metrics.reference import Reference

PUBLISHED_COUNT = 50_000
IMAGENET = 1_281_167  # training images
PUBLISHED_IMAGES = 10_000  # of ADM's references, for precision and recall
ORDER_TOLERANCE = 0.02  # the Inception Score in file order may differ by this share from that of a shuffled file
TITLES = {
    "fid": "FID",
    "sfid": "sFID",
    "inception_score": "Inception Score",
    "inception_score_shuffled": "Inception Score, shuffled",
    "fd_dinov2": "FD-DINOv2",
}


def short(count: int) -> str:
    """Return a number of images as people write it: 50K, 1500, 300."""
    return f"{count // 1000}K" if count >= 1000 and count % 1000 == 0 else str(count)


def title(name: str) -> str:
    """Return what people call a metric."""
    return TITLES.get(name, name.replace("fd_", "FD-") if has_title(name) else name.replace("_", " "))


def has_title(name: str) -> bool:
    """Tell whether a metric's name takes the number of samples, as in FID-5K."""
    return name in TITLES or name.startswith("fd_")


def labels(
    metrics: dict[str, Any], count: int, reference: Reference, extractor: Extractor, pr_dtype: str
) -> dict[str, str]:
    """Return a label for each metric: the number of samples, and what is unusual about it."""
    result = {}
    for name in metrics:
        base = name.removesuffix("_real")
        if name != base:
            result[name] = f"{title(base)}, real images"
            continue
        remarks = remarks_on(name, metrics, count, reference, extractor, pr_dtype)
        number = f"-{short(count)}" if has_title(name) else f" of {short(count)} samples"
        result[name] = title(name) + number + (f" ({', '.join(remarks)})" if remarks else "")
    return result


def remarks_on(
    name: str, metrics: dict[str, Any], count: int, reference: Reference, extractor: Extractor, pr_dtype: str
) -> list[str]:
    """Return what is unusual about a metric of `count` samples, in few words each."""
    if name == "inception_score":
        return ["samples grouped by class"] if order_matters(metrics) else []
    if name in ("class_accuracy", "inception_score_shuffled"):  # of the samples alone
        return []
    remarks = ["validation images"] if reference.is_validation else []
    if name in extractor.distances:
        if not extractor.own_classes and (not reference.statistics or reference.is_part):
            remarks.append(f"of {reference.count:,} reference images")
        if min(count, reference.count) <= extractor.spaces[extractor.distances[name]]:
            remarks.append("singular covariance")
    elif reference.images is not None and not extractor.own_classes and len(reference.images) != PUBLISHED_IMAGES:
        remarks.append(f"of {len(reference.images):,} reference images")
    if name in ("precision", "recall") and pr_dtype != "float16":
        remarks.append(pr_dtype)
    return remarks


def order_matters(metrics: dict[str, Any]) -> bool:
    """Tell whether the Inception Score depends on the order of the samples, by class as a rule."""
    score, shuffled = metrics.get("inception_score"), metrics.get("inception_score_shuffled")
    return score is not None and shuffled is not None and abs(score - shuffled) > ORDER_TOLERANCE * shuffled


def order_warning(metrics: dict[str, Any]) -> str:
    """Return one line that says so."""
    return (
        f"the Inception Score depends on the order of the samples: {metrics['inception_score']:.2f} in the file's, "
        f"{metrics['inception_score_shuffled']:.2f} shuffled; samples grouped by class score too low"
    )


def obstacles(
    metrics: dict[str, Any], count: int, size: tuple[int, int], reference: Reference, extractor: Extractor,
    pr_dtype: str,
) -> list[str]:  # fmt: skip
    """Return why metrics of `count` samples of `size` (H, W) compare with no published ones."""
    if extractor.own_classes:
        return extractor.deviations()
    made, images = reference.made, reference.images
    main_space, names = next(iter(extractor.distances.values())), " and ".join(map(title, extractor.distances))
    dimensions = extractor.spaces[main_space]
    theirs = tuple(images.size if images is not None else (made or {}).get("size", size))
    total = made["total"] if made is not None else IMAGENET
    num_images = PUBLISHED_IMAGES if images is None else len(images)
    checks = [
        (
            not reference.statistics,
            f"the reference has no mu and sigma: {names} use statistics of {num_images:,} images, not of a file with "
            "those of a whole training set",
        ),
        (
            reference.is_validation,
            "the reference was made of validation images; published numbers are against the training set",
        ),
        (
            reference.count <= dimensions,
            f"the reference has no more images than features ({dimensions}): singular covariance",
        ),
        (
            bool(reference.statistics) and images is None and made is None,
            "the reference does not say of what images its mu and sigma are",
        ),
        (total != IMAGENET, f"the reference is of a set of {total:,} images, not of ImageNet's {IMAGENET:,}"),
        (reference.is_part, f"the reference was made of {reference.count:,} of {total:,} images"),
        (
            bool(reference.statistics) and num_images != PUBLISHED_IMAGES,
            f"precision and recall of {num_images:,} reference images instead of {PUBLISHED_IMAGES:,}",
        ),
        (
            theirs != tuple(size),
            f"the reference's images are of {theirs[0]}×{theirs[1]} pixels, the samples of {size[0]}×{size[1]}",
        ),
        (
            count != PUBLISHED_COUNT,
            f"{count:,} samples instead of {PUBLISHED_COUNT:,}: every number depends on how many there are",
        ),
        (count <= dimensions, f"no more samples ({count:,}) than features ({dimensions}): singular covariance"),
        *((True, reason) for reason in extractor.deviations()),
        (pr_dtype != "float16", f"precision and recall in {pr_dtype}: published ones are in ADM's float16"),
    ]
    reasons = [reason for holds, reason in checks if holds]
    return [*reasons, order_warning(metrics)] if order_matters(metrics) else reasons
