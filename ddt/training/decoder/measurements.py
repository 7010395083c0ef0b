"""What is measured of a decoder's EMA weights while it trains: its error on held-out images, and a
picture of reconstructions.

Shapes: B batch, H W pixels.
"""

import torch
from accelerate import Accelerator
from torch import Tensor

from ddt.autoencoder.rae import EXECUTION, RepresentationAutoencoder
from ddt.autoencoder.vit_decoder import ViTDecoder
from ddt.data.images import Images
from ddt.data.source import spread
from ddt.metrics.reconstruct import comparison, psnr
from ddt.objective.reconstruction import Reconstruction
from ddt.pictures import write_png
from ddt.precision import autocast
from ddt.training.decoder.run import DecoderRun
from ddt.training.measurements import MAX_VALIDATION_IMAGES, picture_or_warning, preview_path
from ddt.training.tracking import JsonlTracker

SHOWN = 16  # images of a picture


class DecoderMeasurements:
    """Measures what is due. Made and called on all processes; process 0 writes.

    batch_size: images that a process takes at once.
    """

    def __init__(self, run: DecoderRun, batch_size: int, accelerator: Accelerator) -> None:
        self.run, self.batch_size, self.accelerator = run, batch_size, accelerator

    def __call__(self, names: list[str], network: ViTDecoder, step: int, tracker: JsonlTracker | None) -> None:
        """Measure what `names` say of the EMA weights. All processes call it together."""
        run = self.run
        execution = {key: getattr(run.autoencoder, key) for key in EXECUTION}
        autoencoder = RepresentationAutoencoder(run.autoencoder.network.encoder, network, **execution)
        autoencoder.to(self.accelerator.device)
        if "validation" in names:
            values = self.errors(autoencoder)
            if tracker is not None:
                tracker.log(step, values)
        if "preview" in names and tracker is not None:
            path = preview_path(run.settings.run_dir, step)
            images = run.held_out if len(run.held_out.labels) else run.images
            with picture_or_warning(path):
                originals = self.load(images, spread(len(images.labels), SHOWN))
                made = autoencoder.decode(autoencoder.encode(originals))
                write_png(path, comparison(originals.cpu(), made.cpu()))
                tracker.image(step, "preview", path)

    def load(self, images: Images, indices: object) -> Tensor:
        """Return images at `indices`, uint8 (B, 3, H, W), on the device."""
        return torch.from_numpy(images.load(indices)).to(self.accelerator.device)  # type: ignore[arg-type]

    @torch.no_grad()
    def errors(self, autoencoder: RepresentationAutoencoder) -> dict[str, float]:
        """Return the loss without noise and GAN, its parts, and the PSNR in dB of 8-bit images:
        means over at most 2,048 held-out images. `batch_size` does not change them.
        """
        run, accelerator = self.run, self.accelerator
        of_run = run.objective
        objective = Reconstruction(
            autoencoder.network.decoder, of_run.mean, of_run.std, of_run.lpips, of_run.noise, of_run.lpips_weight,
            of_run.gan_weight,
        ).to(accelerator.device)  # fmt: skip
        chosen = spread(len(run.held_out.labels), MAX_VALIDATION_IMAGES)
        mine = chosen[accelerator.process_index :: accelerator.num_processes]
        sums: dict[str, Tensor] = {}
        zero = torch.zeros((), dtype=torch.float64, device=accelerator.device)
        for start in range(0, len(mine), self.batch_size):
            images = self.load(run.held_out, mine[start : start + self.batch_size])
            tokens = autoencoder.encode(images)
            with autocast(accelerator.device, run.settings.trainer.mixed_precision):
                pixels = objective.reconstruct(tokens)
                values = objective.errors(pixels, images.float() / 255)
            made = autoencoder.decode(tokens)
            values["psnr"] = torch.tensor(psnr(images, made))
            for key, value in values.items():
                sums[key] = sums.get(key, zero) + value.double().to(zero.device) * len(images)
        names = ["reconstruction", "l1", *(["lpips"] if of_run.lpips is not None else []), "psnr"]
        totals = accelerator.reduce(torch.stack([sums.get(name, zero) for name in names]), reduction="sum")
        means = dict(zip(names, (totals / len(chosen)).tolist(), strict=True))
        means["loss"] = means.pop("reconstruction")
        return {f"validation_{name}": value for name, value in means.items()}
