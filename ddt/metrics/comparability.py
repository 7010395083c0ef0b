"""What a number is called, and what may be set beside published ones."""

from typing import Any

from ddt.metrics.dinov2 import MODEL as DINOV2
from ddt.metrics.features import Extractor
from ddt.metrics.inception import GRAPH_SHA256, WEIGHTS_SHA256
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
    return TITLES.get(name, name.replace("fd_", "FD-") if named(name) else name.replace("_", " "))


def named(name: str) -> bool:
    """Tell whether a metric has a name of its own, which takes the number of samples as in FID-5K."""
    return name in TITLES or name.startswith("fd_")


def validation(reference: Reference) -> bool:
    """Tell whether a reference was made of images that no model is trained on."""
    return reference.made is not None and reference.made.get("split") == "test"


def remarks_on(
    name: str, metrics: dict[str, Any], count: int, reference: Reference, extractor: Extractor, pr_dtype: str
) -> list[str]:
    """Return what is unusual about a metric of `count` samples, in few words each."""
    found: list[str] = []
    if name == "inception_score":
        return ["samples grouped by class"] if order_matters(metrics) else []
    if name in ("class_accuracy", "inception_score_shuffled"):  # of the samples alone
        return []
    if validation(reference):
        found.append("validation images")
    if name in extractor.distances:
        total = reference_count(reference)
        if not extractor.own_classes and (not reference.statistics or chosen(reference)):
            found.append(f"of {total:,} reference images")
        if min(count, total) <= extractor.spaces[extractor.distances[name]]:
            found.append("singular covariance")
    elif reference.images is not None and not extractor.own_classes and len(reference.images) != PUBLISHED_IMAGES:
        found.append(f"of {len(reference.images):,} reference images")
    if name in ("precision", "recall") and pr_dtype != "float16":
        found.append(pr_dtype)
    return found


def labels(
    metrics: dict[str, Any], count: int, reference: Reference, extractor: Extractor, pr_dtype: str
) -> dict[str, str]:
    """Return for each metric of `count` samples a label that says by itself what may not be
    compared: the number of samples, and what is unusual about it.
    """
    found = {}
    for name in metrics:
        base = name.removesuffix("_real")
        if name != base:
            found[name] = f"{title(base)}, real images"
            continue
        remarks = remarks_on(name, metrics, count, reference, extractor, pr_dtype)
        number = f"-{short(count)}" if named(name) else f" of {short(count)} samples"
        found[name] = title(name) + number + (f" ({', '.join(remarks)})" if remarks else "")
    return found


def chosen(reference: Reference) -> bool:
    """Tell whether a file of ours holds the statistics of a part of its data set alone."""
    return reference.made is not None and reference.made["count"] < reference.made["total"]


def reference_count(reference: Reference) -> float:
    """Return how many images a reference's statistics are of; of a file that does not say,
    infinitely many.
    """
    if reference.made is not None:
        return reference.made["count"]
    return float("inf") if reference.statistics or reference.images is None else len(reference.images)


def order_matters(metrics: dict[str, Any]) -> bool:
    """Tell whether the Inception Score is an artefact of the order of the samples, by class as a
    rule.
    """
    score, shuffled = metrics.get("inception_score"), metrics.get("inception_score_shuffled")
    return score is not None and shuffled is not None and abs(score - shuffled) > ORDER_TOLERANCE * shuffled


def order_warning(metrics: dict[str, Any]) -> str:
    """Return one line that says so."""
    return (
        f"the Inception Score depends on the order of the samples: {metrics['inception_score']:.2f} in the file's, "
        f"{metrics['inception_score_shuffled']:.2f} shuffled; samples grouped by class score too low"
    )


def other_network(identity: dict[str, Any]) -> list[str]:
    """Return one line where an extractor is not the published one."""
    if identity["name"] == "inception" and not identity["weights"]["sha256"].startswith((WEIGHTS_SHA256, GRAPH_SHA256)):
        files = f"SHA-256 {WEIGHTS_SHA256}… of torch-fidelity, {GRAPH_SHA256[:8]}… of ADM"
        return [f"the Inception weights are neither published file ({files})"]
    if identity["name"] != "dinov2":
        return []
    if identity["model"] != DINOV2:
        return [f"features.model={identity['model']}: published FD-DINOv2 is of {DINOV2}"]
    return ["no hash of DINOv2's published weights is known here, and FD-DINOv2 was not compared with published values"]


def obstacles(
    metrics: dict[str, Any], count: int, size: tuple[int, int], reference: Reference, extractor: Extractor,
    pr_dtype: str,
) -> list[str]:  # fmt: skip
    """Return the reasons, one line each, for which the metrics of `count` samples compare with no
    published ones.
    """
    if extractor.own_classes:
        return [f"features={extractor.name} are those of a small classifier of this project"]
    found, main = [], next(iter(extractor.distances))
    dimensions, distances = extractor.spaces[extractor.distances[main]], " and ".join(map(title, extractor.distances))
    if not reference.statistics:
        assert reference.images is not None
        of_images = f"statistics of {len(reference.images):,} images, not of a file with those of a whole training set"
        found.append(f"the reference has no mu and sigma: {distances} use {of_images}")
    if validation(reference):
        found.append("the reference was made of validation images; published numbers are against the training set")
    if reference_count(reference) <= dimensions:
        found.append(f"the reference has no more images than features ({dimensions}): singular covariance")
    if reference.statistics and reference.images is None and reference.made is None:
        found.append("the reference does not say of what images its mu and sigma are")
    if reference.made is not None and reference.made["total"] != IMAGENET:
        found.append(f"the reference is of a set of {reference.made['total']:,} images, not of ImageNet's {IMAGENET:,}")
    if chosen(reference):
        assert reference.made is not None
        found.append(f"the reference was made of {reference.made['count']:,} of {reference.made['total']:,} images")
    if reference.statistics and reference.images is not None and len(reference.images) != PUBLISHED_IMAGES:
        number = f"{len(reference.images):,} reference images instead of {PUBLISHED_IMAGES:,}"
        found.append(f"precision and recall of {number}")
    theirs = reference.images.size if reference.images is not None else (reference.made or {}).get("size", size)
    if tuple(theirs) != tuple(size):
        shown = ("×".join(map(str, each)) for each in (theirs, size))
        found.append("the reference's images are of {} pixels, the samples of {}".format(*shown))
    if count != PUBLISHED_COUNT:
        found.append(f"{count:,} samples instead of {PUBLISHED_COUNT:,}: every number depends on how many there are")
    if count <= dimensions:
        found.append(f"no more samples ({count:,}) than features ({dimensions}): singular covariance")
    found += other_network(extractor.identity())
    if pr_dtype != "float16":
        found.append(f"precision and recall in {pr_dtype}: published ones are in ADM's float16")
    if order_matters(metrics):
        found.append(order_warning(metrics))
    return found
