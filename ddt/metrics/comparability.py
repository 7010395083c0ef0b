"""The labels of metrics, and whether they compare with published ones."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ddt.metrics.features import Extractor
    from ddt.metrics.reference import Reference

PUBLISHED_COUNT = 50_000
IMAGENET = 1_281_167  # training images
PUBLISHED_IMAGES = 10_000  # of ADM's references, for precision and recall
ORDER_TOLERANCE = 0.02  # by which the Inception Score in file order may differ, relative to that of a shuffled file
TITLES = {
    "fid": "FID",
    "sfid": "sFID",
    "inception_score": "Inception Score",
    "inception_score_shuffled": "Inception Score, shuffled",
    "fd_dinov2": "FD-DINOv2",
}
FEATURES = {"dinov2": "DINOv2", "fashion_mnist": "Fashion-MNIST"}  # names of extractors as people write them


def short(count: int) -> str:
    """Return a number of images as people write it: 50K, 1500, 300."""
    return f"{count // 1000}K" if count >= 1000 and count % 1000 == 0 else str(count)


def title(name: str) -> str:
    """Return what people call a metric."""
    words = name.replace("fd_", "FD-") if name.startswith("fd_") else name.replace("_", " ")
    return TITLES.get(name, words)


def in_words(name: str, count: str) -> str:
    """Return a metric of `count` samples as the title of a figure says it, in two lines."""
    if not name.startswith("fd_"):
        return f"{title(name)}\nof {count} samples"
    features = name.removeprefix("fd_")
    return f"Fréchet distance of {count} samples,\n{FEATURES.get(features, features)} features"


def labels(
    metrics: dict[str, Any], count: int, reference: Reference, extractor: Extractor, pr_dtype: str
) -> dict[str, str]:
    """Return a label for each metric of `count` samples: their number, and what is unusual."""
    result = {}
    for name in metrics:
        if name.endswith("_real"):
            result[name] = f"{title(name.removesuffix('_real'))}, real images"
            continue
        label = title(name)
        label += f"-{short(count)}" if name in TITLES or name.startswith("fd_") else f" of {short(count)} samples"
        remarks = remarks_on(name, metrics, count, reference, extractor, pr_dtype)
        result[name] = label + (f" ({', '.join(remarks)})" if remarks else "")
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
    """Return whether the Inception Score depends on the samples' order, as a rule by class."""
    score, shuffled = metrics.get("inception_score"), metrics.get("inception_score_shuffled")
    return score is not None and shuffled is not None and abs(score - shuffled) > ORDER_TOLERANCE * shuffled


def order_warning(metrics: dict[str, Any]) -> str:
    """Return the warning that it does."""
    return (
        f"the Inception Score depends on the order of the samples: {metrics['inception_score']:.2f} in the file's, "
        f"{metrics['inception_score_shuffled']:.2f} shuffled; samples grouped by class score too low"
    )


def reasons_not_comparable(
    metrics: dict[str, Any], count: int, size: tuple[int, int], reference: Reference, extractor: Extractor,
    pr_dtype: str,
) -> list[str]:  # fmt: skip
    """Return why metrics of `count` samples of `size` (H, W) compare with no published ones."""
    if extractor.own_classes:
        return extractor.deviations()
    receipt, images, statistics = reference.receipt, reference.images, bool(reference.statistics)
    names, space = " and ".join(map(title, extractor.distances)), next(iter(extractor.distances.values()))
    num_features = extractor.spaces[space]
    height, width = images.size if images is not None else (receipt or {}).get("size", size)
    total = receipt["total"] if receipt is not None else IMAGENET
    num_images = PUBLISHED_IMAGES if images is None else len(images)
    reasons = {
        f"the reference has no mu and sigma: {names} use statistics of {num_images:,} images, not of a file with "
        "those of a whole training set": not statistics,
        "the reference was made of validation images; published numbers are against the training set": (
            reference.is_validation
        ),
        f"the reference has no more images than features ({num_features}): singular covariance": (
            reference.count <= num_features
        ),
        "the reference does not say of what images its mu and sigma are": (
            statistics and images is None and receipt is None
        ),
        f"the reference is of a set of {total:,} images, not of ImageNet's {IMAGENET:,}": total != IMAGENET,
        f"the reference was made of {reference.count:,} of {total:,} images": reference.is_part,
        f"precision and recall of {num_images:,} reference images instead of {PUBLISHED_IMAGES:,}": (
            statistics and num_images != PUBLISHED_IMAGES
        ),
        f"the reference's images are of {height}×{width} pixels, the samples of {size[0]}×{size[1]}": (
            (height, width) != tuple(size)
        ),
        f"{count:,} samples instead of {PUBLISHED_COUNT:,}: every number depends on how many there are": (
            count != PUBLISHED_COUNT
        ),
        f"no more samples ({count:,}) than features ({num_features}): singular covariance": count <= num_features,
        **dict.fromkeys(extractor.deviations(), True),
        f"precision and recall in {pr_dtype}: published ones are in ADM's float16": pr_dtype != "float16",
    }
    lines = [reason for reason, holds in reasons.items() if holds]
    return [*lines, order_warning(metrics)] if order_matters(metrics) else lines
