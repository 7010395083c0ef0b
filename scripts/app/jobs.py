"""What the app does with a request: draws it by the code of sample.py into a folder of its own, and
tells of each step.

Shapes: n images, C H W.
"""

import collections
import dataclasses
import json
import shutil
import tempfile
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor

from ddt.checkpoint import folder as ckpt
from ddt.generation.generator import Generator
from ddt.generation.load import checkpoint_receipt, load_generator, stored_autoencoder
from ddt.generation.parts import rows
from ddt.generation.sample_set import sample_set
from ddt.pictures import enlarged, write_pngs
from ddt.sampling.settings import SamplerSettings
from scripts.app.controls import Limits, Request, Source, defaults_of, request_of

KEPT = 20  # requests whose files stay
MIN_SIDE = 128  # px of a picture on the page
Tell = Callable[[float, str], None]  # how much is done, 0..1, and what is being done


class Interrupted(Exception):
    """A user has asked to stop."""


@dataclasses.dataclass(frozen=True)
class Drawn:
    """A set that was drawn: its folder, the receipt in it, and pictures large enough to look at."""

    folder: Path
    receipt: dict[str, Any]
    pictures: list[Path]

    @property
    def seconds(self) -> float:
        """The time from the first network call to the last file, without warm-up and fitting."""
        return self.receipt["samples"] / self.receipt["images_per_second"]

    @property
    def calls(self) -> dict[str, float]:
        """The network calls an image: `encoder` and `decoder`."""
        return self.receipt["network_calls_an_image"]


@dataclasses.dataclass(frozen=True)
class Result:
    """What a request left. plain: the same set without sharing, where it was asked for. files: for
    download.
    """

    request: Request
    drawn: Drawn
    plain: Drawn | None
    files: list[Path]

    @property
    def side(self) -> int:
        """The width of a picture on the page, px."""
        with Image.open(self.drawn.pictures[0]) as picture:
            return picture.width

    @property
    def difference(self) -> float | None:
        """The mean absolute difference between the two sets' pixels, of 255."""
        if self.plain is None:
            return None
        ours, theirs = (np.load(each.folder / "samples.npz")["arr_0"] for each in (self.drawn, self.plain))
        return float(np.abs(ours.astype(np.int16) - theirs).mean())


class Studio:
    """A checkpoint that is loaded once and draws what is asked for, one request at a time, into
    folders under `root`.

    Raises UserError as sample.py does for a checkpoint that cannot be sampled.
    """

    def __init__(self, source: Source, limits: Limits, root: Path, accelerator: Accelerator) -> None:
        self.source, self.limits, self.root, self.accelerator = source, limits, root, accelerator
        self.stored = ckpt.read_config(source.folder)
        self.defaults = defaults_of(self.stored, limits)
        self.generator: Generator = load_generator(
            source.folder,
            SamplerSettings(),  # of each request
            stored_autoencoder(self.stored, source.autoencoder),
            accelerator.device,
            weights=source.weights,
            dtype=source.dtype,
        )
        self.receipt = checkpoint_receipt(source.folder, source.weights, self.generator)
        self.lock = threading.Lock()
        self.fitted: dict[str, list[int]] = {}  # by the settings, for the next request
        self.warm: set[int] = set()
        self.kept: collections.deque[Path] = collections.deque()
        self.image_shape = self.warm_up(1)

    def warm_up(self, count: int) -> tuple[int, ...]:
        """Draw `count` images in four steps, with and without sharing, so that no time told later
        is that of a first call; return the shape (H, W, C) of an image.
        """
        plain = SamplerSettings(num_steps=4, last_step=None, cfg_scale=2.0, cfg_interval=(0.3, 1.0))
        shared = dataclasses.replace(plain, recompute=[0, 1], forecast_order=1)
        for settings in [shared, plain] if self.generator.model.shares_encoder else [plain]:
            generator = dataclasses.replace(self.generator, settings=settings)
            with generator.exact():
                latents, _ = generator.latents([0] * count, list(range(count)))
                shape = generator.pixels(latents, None, None).shape[1:]
        self.warm.add(count)
        return shape

    def draw(self, values: dict[str, Any], tell: Tell, stopped: Callable[[], bool]) -> Result:
        """Draw what the values of the controls ask for.

        tell hears of each step. Raises UserError for values that cannot be, and Interrupted soon
        after `stopped` tells so; nothing is left then.
        """
        request = request_of(values, self.stored, self.limits, self.source)
        with self.lock:
            folder = Path(tempfile.mkdtemp(prefix="set-", dir=self.root))
            try:
                result = self._draw(request, folder, tell, stopped)
            except BaseException:
                shutil.rmtree(folder)
                raise
            self.kept.append(folder)
            while len(self.kept) > KEPT:
                shutil.rmtree(self.kept.popleft())
        return result

    def _draw(self, request: Request, folder: Path, tell: Tell, stopped: Callable[[], bool]) -> Result:
        """Warm up for these batches, draw one set or both, and lay out the files."""
        progress = Progress(request, self.source.batch_size, tell, stopped)
        progress.check()
        total, batch_size = len(request.images.seeds), self.source.batch_size
        for count in {min(total, batch_size), total % batch_size} - self.warm - {0}:
            self.warm_up(count)
        if self.new(request.settings):
            tell(0.0, "fitting the schedule to the model")
        drawn, plain = self._draw_set(request, folder, progress), None
        files = [folder / "samples.npz", zipped(folder, folder / "pictures.zip"), folder / "receipt.json"]
        if request.plain is not None:
            plain = self._draw_set(request.plain, folder / "unshared", progress)
            others = ("samples.npz", "receipt.json", "grid.png")
            files.append(zipped(plain.folder, folder / "unshared.zip", *others))
        return Result(request, drawn, plain, files)

    def new(self, settings: SamplerSettings) -> bool:
        """Tell whether a schedule has to be fitted to these settings first."""
        return str(settings.recompute).startswith("dp:") and str(settings) not in self.fitted

    def _draw_set(self, request: Request, out: Path, progress: "Progress") -> Drawn:
        """Draw one set by `sample_set` and read back what it wrote."""
        sample_set(
            dataclasses.replace(self.generator, settings=request.settings, observe=progress),
            images=request.images,
            batch_size=self.source.batch_size,
            out=out,
            checkpoint=self.receipt,
            accelerator=self.accelerator,
            png="all",
            command=request.command,
            fitted=self.fitted.get(str(request.settings)),
        )
        receipt = json.loads((out / "receipt.json").read_text())
        if self.new(request.settings):
            self.fitted[str(request.settings)] = receipt["recompute_steps"]
        count, pictures = len(request.images.seeds), out / "png"
        if min(self.image_shape[:2]) < MIN_SIDE:
            pictures = out / "enlarged"
            images = torch.from_numpy(np.stack(list(rows(out / "samples.npz")))).permute(0, 3, 1, 2)
            write_pngs(pictures, enlarged(images, MIN_SIDE).permute(0, 2, 3, 1).numpy(), count)
        return Drawn(out, receipt, [pictures / f"{k:06d}.png" for k in range(count)])


class Progress:
    """Counts the velocities of a request (`Generator.observe`), tells of each percent, and ends it
    when asked to.
    """

    def __init__(self, request: Request, batch_size: int, tell: Tell, stopped: Callable[[], bool]) -> None:
        self.tell, self.stopped = tell, stopped
        batches = -(-len(request.images.seeds) // batch_size) * (1 if request.plain is None else 2)
        calls = sum(map(len, request.settings.call_times()))
        self.total, self.done, self.told = batches * calls, 0, -1
        self.what = f"drawing {len(request.images.seeds)} pictures"
        if request.plain is not None:
            self.what += ", with and without sharing"

    def check(self) -> None:
        """Raise Interrupted if the user has asked to stop."""
        if self.stopped():
            raise Interrupted

    def __call__(self, step: int, t: float | Tensor, x_t: Tensor, v: Tensor) -> None:
        """Count one velocity."""
        self.check()
        self.done += 1
        percent = 100 * self.done // self.total
        if percent > self.told:
            self.told = percent
            self.tell(self.done / self.total, self.what)


def zipped(folder: Path, path: Path, *others: str) -> Path:
    """Write the pictures of a set, and other files of it by their names, as a zip."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:  # PNG and npz gain nothing by deflation
        for file in [*sorted((folder / "png").iterdir()), *(folder / name for name in others)]:
            archive.write(file, file.relative_to(folder))
    return path
