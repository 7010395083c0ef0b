"""Statistics of a data set as a reference file in ADM's format; see `ddt.metrics.reference`."""

import datetime
import json
import logging
from pathlib import Path

import numpy as np

from ddt.distributed.prepare import decide_on_main, make_accelerator
from ddt.errors import require
from ddt.metrics.features import check_images, extract
from ddt.metrics.images import DataImages, write_npz
from ddt.metrics.reference import KEYS, RECEIPT
from ddt.metrics.settings import ReferenceStatisticsSettings
from ddt.version import __version__

log = logging.getLogger(__name__)


def write_reference_statistics(settings: ReferenceStatisticsSettings, command: str) -> None:
    """Measure the images on all processes and write the file. command: for its receipt."""
    assert settings.features is not None
    accelerator = make_accelerator(timeout=datetime.timedelta(days=1))
    images, data = settings.data.build(split=settings.split), settings.choices["data"]
    images.require_pixels()
    require(images.flips == 1 or images.has_latents, "data.horizontal_flip=true: has no effect here; leave it out")
    require(not images.skips_broken, "data.skip_broken=true: has no effect here; remove the files instead")
    if accelerator.is_main_process:
        images.log_hints()
    decide_on_main(accelerator, lambda: images.check_contents(aligned=False, pixels=True))
    total = len(images.labels)
    require(total >= 2, f"split={settings.split}: data={data} holds {total} images of it; choose the other")
    measured = DataImages(f"data:{data}", images, choose(total, settings.num_images))
    extractor = settings.features.extractor(accelerator.device)
    extractor.rows = ()  # no vectors: a million would not fit in memory
    check_images(measured, "data", extractor)
    features = extract(measured, extractor, accelerator, measured.name)
    if features is None:
        return
    kept = DataImages(measured.name, images, measured.indices[choose(len(measured), settings.num_kept)])
    receipt = {
        "data": settings.data.plain(),
        "split": settings.split,
        "total": total,
        "transform": images.transform or "none",
        "command": command,
        "versions": {"ddt": __version__},
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "count": len(measured),
        "kept": len(kept),
        "size": list(measured.size),
        "fingerprint": measured.sha256,
        "features": extractor.identity(),
    }
    arrays: dict[str, np.ndarray] = {}
    for (mean, covariance), space in zip(KEYS, extractor.distances.values(), strict=False):
        arrays |= {mean: features.moments[space].mean, covariance: features.moments[space].covariance}
    arrays[RECEIPT] = np.array(json.dumps(receipt))
    write_npz(Path(settings.out), arrays, kept.batches(64), (len(kept), *kept.size, kept.channels))
    log.info("%s: statistics of %d images, %d of them kept", settings.out, len(measured), len(kept))


def choose(total: int, count: int | None) -> np.ndarray:
    """Return indices of `count` of `total` images, by a fixed seed; None is all."""
    if count is None or count >= total:
        return np.arange(total)
    return np.sort(np.random.default_rng(0).choice(total, count, replace=False))
