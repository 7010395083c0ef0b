"""A training stream that is a function of (seed, position)."""

import os
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from ddt.data.images import ArrayImages
from ddt.data.stream import TrainingStream, check_shared_memory, load_batches, micro_batch_positions, validation_batch
from ddt.draws import Stream, random_generator
from ddt.errors import UserError


def numbered(count=10):
    """Images whose only pixel is their index."""
    return ArrayImages(np.arange(count, dtype=np.uint8).reshape(-1, 1, 1, 1), np.arange(count) % 3, ["a", "b", "c"])


def stream(seed=0, count=10, **options):
    return TrainingStream(numbered(count), seed, (1, 2, 2), **options)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_every_epoch_visits_every_image_once_in_a_new_order():
    s = stream()
    epochs = [[s.index(p) for p in range(e * 10, (e + 1) * 10)] for e in range(3)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert [stream(seed=1).index(p) for p in range(10)] != epochs[0]


def test_a_batch_is_a_function_of_seed_and_position():
    positions = [3, 14, 27]
    assert same(stream()[positions], stream()[positions])
    alone = [stream()[[p]] for p in positions]
    for key, value in stream()[positions].items():
        assert torch.equal(value, torch.cat([b[key] for b in alone]))
    other = stream(seed=1)[positions]
    assert not torch.equal(other["noise"], stream()[positions]["noise"])


def test_draws_have_the_distributions_they_are_used_for():
    batch = stream(posterior=True)[list(range(4000))]
    for key in ("noise", "time_normal", "posterior_noise"):
        assert abs(batch[key].mean()) < 0.05
        assert abs(batch[key].std() - 1) < 0.05
    assert abs((batch["dropout_uniform"] < 0.1).float().mean() - 0.1) < 0.02
    assert abs(torch.corrcoef(torch.stack([batch["noise"].flatten(), batch["posterior_noise"].flatten()]))[0, 1]) < 0.05
    assert batch["noise"].unique().numel() > 0.999 * batch["noise"].numel()


def test_streams_of_draws_do_not_overlap():
    first = [random_generator(0, stream, 0).standard_normal() for stream in Stream] + [
        random_generator(1, Stream.PERMUTATION, 0).standard_normal(),
        random_generator(0, Stream.PERMUTATION, 1).standard_normal(),
    ]
    assert len(set(first)) == len(Stream.__members__) + 2  # __members__ counts a number given twice, too


@pytest.mark.parametrize(("num_processes", "micro"), [(1, 12), (2, 3), (3, 1), (2, 6)])
def test_processes_and_micro_batches_share_a_step_exactly(num_processes, micro):
    positions = [
        p for r in range(num_processes) for m in micro_batch_positions(5, 6, 12, micro, r, num_processes) for p in m
    ]
    assert sorted(positions) == list(range(60, 72))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_loader_gives_the_stream_and_leaves_the_global_random_state(num_workers):
    state = torch.get_rng_state()
    batches = list(load_batches(stream(), micro_batch_positions(2, 5, 4, 2), num_workers))
    assert torch.equal(torch.get_rng_state(), state)
    assert len(batches) == 6
    for i, batch in enumerate(batches):
        assert same(batch, stream()[[8 + 2 * i, 9 + 2 * i]])


def test_a_full_shared_memory_is_told_and_hangs_nothing(monkeypatch):
    """Left to torch, a batch that finds no room is dropped in a thread, and its reader waits."""

    def full(self):
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")

    monkeypatch.setattr(torch.Tensor, "share_memory_", full)  # which the loading process inherits
    with pytest.raises(UserError, match=r"^/dev/shm: is full .*No space left.*--shm-size=8g.*fewer num_workers$"):
        list(load_batches(stream(), micro_batch_positions(2, 5, 4, 2), 1))
    assert len(list(load_batches(stream(), micro_batch_positions(2, 5, 4, 2), 0))) == 6


@pytest.mark.parametrize(("processes", "most"), [(None, 4), (2, 2)])
def test_shared_memory_is_compared_before_the_first_step(monkeypatch, processes, most):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if processes is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    batch = list(range(50_000, 58_192))
    size = sum(tensor.nbytes for tensor in stream()[batch].values())
    free = 2 * 4 * size  # two batches of four loading processes
    monkeypatch.setattr("ddt.data.stream.SHARED_MEMORY", Path("."))
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=free))
    check_shared_memory(stream(), batch, most, "trainer.num_workers")
    check_shared_memory(stream(), batch, 0, "trainer.num_workers")
    line = rf"trainer\.num_workers={most + 1} needs .*--shm-size.*at most trainer\.num_workers={most}$"
    with pytest.raises(UserError, match=line):
        check_shared_memory(stream(), batch, most + 1, "trainer.num_workers")


class Lost(torch.utils.data.Dataset):
    """Ends its loading process: by a signal, or by an exit status."""

    def __init__(self, end):
        self.end = end

    def __getitem__(self, batch):
        if batch[0] == 2:
            os.kill(os.getpid(), self.end) if self.end else os._exit(3)
        return torch.ones(2)


@pytest.fixture
def _attentive(monkeypatch):
    """The reader looks after its loading processes all the time, not every five seconds."""
    monkeypatch.setattr(_MultiProcessingDataLoaderIter._try_get_data, "__defaults__", (0.05,))


@pytest.mark.usefixtures("_attentive")
@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGBUS, 0])
def test_a_lost_loading_process_is_one_line(end):
    with pytest.raises(
        UserError, match=r"^num_workers: a data loading process has ended .* run the same command again"
    ):
        list(load_batches(Lost(end), [[k] for k in range(4)], 1))


def test_validation_is_fixed_and_covers_all_times():
    indices = np.arange(10)
    batch = validation_batch(numbered(), (1, 2, 2), indices)
    assert same(batch, validation_batch(numbered(), (1, 2, 2), indices))
    assert torch.equal(validation_batch(numbered(), (1, 2, 2), indices[4:6])["noise"], batch["noise"][4:6])
    quantiles = torch.special.ndtr(batch["time_normal"]).sort().values
    torch.testing.assert_close(quantiles, (torch.arange(10) + 0.5) / 10, rtol=0, atol=0.06)
