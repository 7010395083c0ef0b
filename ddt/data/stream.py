"""The training stream: everything a step sees is a function of (seed, position).

Position p counts images since the start of training; step s of a run with global batch G holds the
positions s·G … s·G + G − 1. The image at p, its noise, time and label dropout come from counters,
never from a state, so a run resumes anywhere and on any number of processes with the same data and
noise.

Shapes: B batch; `latent_shape` is (C, H, W).
"""

import os
import shutil
import signal
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, Dataset, default_convert, get_worker_info

from ddt.data.images import Images
from ddt.draws import Stream, golden_sequence, random_generator
from ddt.errors import UserError, first_line, require

PREFETCHED = 2  # batches that a loading process holds ready, as is torch's default
SHARED_MEMORY = Path("/dev/shm")  # where loading processes put their batches
SHARED_MEMORY_FIX = "start the container with more (docker run --shm-size=8g), or give fewer num_workers"


class ImageOrder(Dataset):
    """The endless order of training images: each epoch is a permutation, a function of the seed."""

    def __init__(self, images: Images, seed: int) -> None:
        require(len(images.labels) > 0, "data: there are no training images")
        self.images, self.seed = images, seed
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def index(self, position: int) -> int:
        """Return the index of the image at a position."""
        epoch, offset = divmod(position, len(self.images.labels))
        if epoch != self._epoch:
            order = random_generator(self.seed, Stream.PERMUTATION, epoch).permutation(len(self.images.labels))
            self._epoch, self._order = epoch, order
        return int(self._order[offset])


class TrainingStream(ImageOrder):
    """The endless training stream, addressed by position: `stream[positions]` returns a batch.

    A batch is a dict of tensors:

    - of `Images.load_inputs`: `images`, or `moments` (and `features`) of a latent cache
    - `y`: int64 (B,)
    - `noise`: float32 (B, *latent_shape), standard normal
    - `time_normal`: float32 (B,), standard normal; `flow.TrainingTimes` turns it into t
    - `dropout_uniform`: float32 (B,) in [0, 1); below the dropout rate the label is dropped
    - `posterior_noise`: float32 (B, *latent_shape), only with `posterior` (stochastic autoencoders)

    Stored mirror images are chosen with probability ½. `aligned_until`: position from which on no
    alignment needs images or features (math.inf: it always does).
    """

    def __init__(
        self,
        images: Images,
        seed: int,
        latent_shape: tuple[int, int, int],
        posterior: bool = False,
        aligned_until: float = 0,
    ) -> None:
        super().__init__(images, seed)
        self.latent_shape, self.posterior, self.aligned_until = latent_shape, posterior, aligned_until

    def __getitem__(self, positions: list[int]) -> dict[str, Tensor]:
        """Return the batch at `positions`, in that order."""
        indices = np.array([self.index(p) for p in positions])
        shape = (len(positions), *self.latent_shape)
        noise = np.empty(shape, dtype=np.float32)
        posterior = np.empty(shape if self.posterior else (0,), dtype=np.float32)
        time_normal = np.empty(len(positions), dtype=np.float32)
        dropout = np.empty(len(positions), dtype=np.float32)
        flipped = np.zeros(len(positions), dtype=bool)
        for row, position in enumerate(positions):
            generator = random_generator(self.seed, Stream.TRAINING, position)
            generator.standard_normal(out=noise[row], dtype=np.float32)
            time_normal[row] = generator.standard_normal(dtype=np.float32)
            dropout[row] = generator.random(dtype=np.float32)
            if self.posterior:
                generator.standard_normal(out=posterior[row], dtype=np.float32)
            if self.images.flips == 2:
                flipped[row] = generator.random() < 0.5
        aligned = positions[0] < self.aligned_until
        batch = {
            **self.images.load_inputs(indices, flipped, aligned),
            "y": self.images.labels[indices],
            "noise": noise,
            "time_normal": time_normal,
            "dropout_uniform": dropout,
        }
        if self.posterior:
            batch["posterior_noise"] = posterior
        return {key: torch.from_numpy(value) for key, value in batch.items()}


class ReconstructionStream(ImageOrder):
    """The endless stream of images for a decoder: `stream[positions]` returns a batch.

    A batch is a dict of tensors:

    - `images`: uint8 (B, C, H, W), random crops (`Images.load_crops`)
    - `noise`: float32 (B, *latent_shape), standard normal
    - `noise_uniform`: float32 (B,) in [0, 1), of the noise's deviation
    - `augment_uniform`: float32 (3, 5, B) in [0, 1), of the discriminator's inputs: for fakes when
      the decoder learns, then for fakes and for images when the discriminator does

    Where the data set has mirror images, each is chosen with probability ½.
    """

    def __init__(self, images: Images, seed: int, latent_shape: tuple[int, int, int]) -> None:
        super().__init__(images, seed)
        self.latent_shape = latent_shape

    def __getitem__(self, positions: list[int]) -> dict[str, Tensor]:
        """Return the batch at `positions`, in that order."""
        generators = [random_generator(self.seed, Stream.RECONSTRUCTION, position) for position in positions]
        uniform = np.stack([generator.random(4 + 3 * 5, dtype=np.float32) for generator in generators])  # (B, 19)
        noise = np.stack([generator.standard_normal(self.latent_shape, dtype=np.float32) for generator in generators])
        images = self.images.load_crops(np.array([self.index(p) for p in positions]), uniform[:, :2])
        if self.images.flips == 2:
            images = np.where(uniform[:, 2, None, None, None] < 0.5, images[..., ::-1], images)
        augmentation = uniform[:, 4:].reshape(-1, 3, 5).transpose(1, 2, 0)
        return {
            "images": torch.from_numpy(np.ascontiguousarray(images)),
            "noise": torch.from_numpy(noise),
            "noise_uniform": torch.from_numpy(uniform[:, 3].copy()),
            "augment_uniform": torch.from_numpy(augmentation.copy()),
        }


def micro_batch_positions(
    start: int, end: int, global_batch_size: int, micro_batch_size: int, rank: int = 0, num_processes: int = 1
) -> Iterator[list[int]]:
    """Yield the positions of each micro-batch of a process, from step `start` to `end`.

    Over all processes they are the positions of these steps, once.
    """
    micro_steps = range(start * global_batch_size, end * global_batch_size, micro_batch_size * num_processes)
    for first in (position + rank * micro_batch_size for position in micro_steps):
        yield list(range(first, first + micro_batch_size))


class InSharedMemory(Dataset):
    """A data set whose loading processes move their batches to shared memory themselves. Left to
    it, torch does so in a thread, and the main process waits for ever for a batch that had no room.
    """

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __getitem__(self, batch: Any) -> Any:
        loaded = default_convert(self.dataset[batch])
        if get_worker_info() is not None:
            try:
                for tensor in tree_leaves(loaded):
                    tensor.share_memory_()
            except RuntimeError as error:
                raise UserError(f"{SHARED_MEMORY}: is full ({first_line(error)}); {SHARED_MEMORY_FIX}") from error
        return loaded


def load_batches(dataset: Dataset, batches: Iterable, num_workers: int, pin_memory: bool = False) -> Iterator:
    """Yield `dataset[batch]` as tensors for each of `batches`, loaded by `num_workers` processes;
    the global random state is left alone. Raises a loading process's UserError as its one line.
    """
    loader = DataLoader(
        InSharedMemory(dataset),
        sampler=batches,
        batch_size=None,  # the data set is indexed with a whole batch
        num_workers=num_workers,
        prefetch_factor=PREFETCHED if num_workers else None,
        pin_memory=pin_memory,
        generator=torch.Generator().manual_seed(0),
    )
    handler = signal.getsignal(signal.SIGCHLD)
    loaded = iter(loader)
    if threading.current_thread() is threading.main_thread():
        # torch's raises a lost process anywhere in this one; without it, it is raised below
        signal.signal(signal.SIGCHLD, handler)
    try:
        yield from loaded
    except UserError as error:  # from a loading process: the message is its traceback as text
        raise UserError(str(error).rsplit("UserError: ", 1)[-1].strip()) from None
    except (ConnectionError, EOFError) as error:  # its batch was announced, and cannot be fetched any more
        raise lost_process() from error
    except RuntimeError as error:
        if not str(error).startswith(("DataLoader worker", "Pin memory thread exited")):
            raise
        raise lost_process() from error


def lost_process() -> UserError:
    """Return the error of a process that was to read images and has ended."""
    return UserError(
        "num_workers: a data loading process has ended (killed, no memory?); run the same command again, perhaps with "
        "fewer"
    )


def check_shared_memory(dataset: Dataset, batch: Sequence[int], num_workers: int, key: str) -> None:
    """Raise UserError where the shared memory of this machine has no room for the batches that the
    loading processes of all its processes hold ready.

    batch: one of the indices of `load_batches`; its first image is loaded. key: the setting of
    `num_workers`.
    """
    if num_workers == 0 or not SHARED_MEMORY.is_dir():
        return
    size = len(batch) * sum(tensor.nbytes for tensor in tree_leaves(default_convert(dataset[batch[:1]])))
    of_each = size * PREFETCHED * int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    free = shutil.disk_usage(SHARED_MEMORY).free
    require(
        of_each * num_workers <= free,
        f"{SHARED_MEMORY}: {key}={num_workers} needs {of_each * num_workers / 2**20:,.0f} MiB of shared memory, "
        f"{free / 2**20:,.0f} MiB are free; {SHARED_MEMORY_FIX}, here at most {key}={free // of_each}",
    )


def validation_batch(images: Images, latent_shape: tuple[int, int, int], indices: np.ndarray) -> dict[str, Tensor]:
    """Return held-out images as a training batch, its times and noise the same for every seed.

    Time i lies at the quantile frac((i + ½)·0.618…) of the training distribution, a golden-ratio
    sequence, so any number of images covers all times evenly; no label is dropped.
    """
    generators = [random_generator(0, Stream.VALIDATION, int(i)) for i in indices]
    noise = np.stack([g.standard_normal(latent_shape, dtype=np.float32) for g in generators])
    posterior = np.stack([g.standard_normal(latent_shape, dtype=np.float32) for g in generators])
    inputs = images.load_inputs(indices, np.zeros(len(indices), dtype=bool), aligned=False)
    return {
        **{key: torch.from_numpy(value) for key, value in inputs.items()},
        "y": torch.from_numpy(images.labels[indices]),
        "noise": torch.from_numpy(noise),
        "posterior_noise": torch.from_numpy(posterior),
        "time_normal": torch.special.ndtri(torch.from_numpy(golden_sequence(indices))).float(),
        "dropout_uniform": torch.ones(len(indices)),
    }
