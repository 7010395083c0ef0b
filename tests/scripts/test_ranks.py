"""Many GPUs, simulated: what is counted is what the estimate says and what shards hold."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import refusal, run_inside, small_ddt, thinned

from ddt.checkpoint.format import join_shards
from ddt.data.stream import micro_batch_positions
from ddt.objective import FlowMatching
from ddt.training.estimate import exchanged_bytes
from scripts.benchmark import many_ranks
from scripts.benchmark.many_ranks import FLOAT, GATHER, SCATTER

COMMAND = "scripts.benchmark.ranks"
SETTINGS = SimpleNamespace(
    model=SimpleNamespace(build=lambda **sizes: small_ddt(in_channels=sizes["in_channels"])),
    images=2, channels=2, latent_size=8, tflops=1e-3, node=8, node_gbs=1.0, network_gbs=1.0,
)  # fmt: skip


def estimated(parallelism, ranks, micro=1):
    trainer = SimpleNamespace(parallelism=parallelism, micro_batches=lambda n: (1, micro), reshard_after_forward=True)
    recipe = SimpleNamespace(objective=FlowMatching(small_ddt()), gpus=ranks, trainer=trainer, half=True)
    return exchanged_bytes(recipe)


@pytest.mark.parametrize("ranks", thinned([2, 4], 2))
def test_bytes_sent_are_the_estimates(ranks):
    ddp, fsdp = many_ranks.simulate(SETTINGS, ranks)
    assert ddp.sent == pytest.approx(estimated("ddp", ranks))
    assert fsdp.sent == pytest.approx(estimated("fsdp", ranks), rel=2e-2)  # rows that do not divide are filled up
    assert fsdp.sent >= estimated("fsdp", ranks)


def test_each_block_is_gathered_twice_and_its_gradients_scattered_once():
    calls, _ = many_ranks.fsdp_calls(SETTINGS, 2)
    model = small_ddt()
    groups = len(model.all_blocks) + 1  # and what is in no block
    assert [name for name, _ in calls].count(GATHER) == 2 * groups
    assert sum(size for name, size in calls if name == SCATTER) >= FLOAT * sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(("rows", "ranks"), [(1152, 1024), (1152, 8), (5, 2), (1, 1024), (12, 4)])
def test_rows_are_given_out_as_torch_does(rows, ranks):
    expected = [len(chunk) for chunk in torch.chunk(torch.empty(rows), ranks)]
    assert many_ranks.rows_of(rows, ranks).tolist() == expected + [0] * (ranks - len(expected))


def test_shards_of_1024_ranks_are_joined_to_the_whole():
    whole = {"weight": torch.randn(1152, 3), "bias": torch.randn(5), "step": torch.tensor(7)}
    shards = []
    for rank in range(1024):
        begins = {key: many_ranks.rows_of(len(value), 1024)[: rank + 1] for key, value in whole.items() if value.ndim}
        parts = {key: whole[key][int(rows.sum() - rows[-1]) : int(rows.sum())] for key, rows in begins.items()}
        shards.append({**parts, "step": whole["step"]})
    joined = join_shards(shards)
    assert joined.keys() == whole.keys()
    assert all(torch.equal(joined[key], value) for key, value in whole.items())


def test_1024_ranks_read_the_images_that_one_does():
    size, micro, steps = 4096, 2, 3
    parts = [list(micro_batch_positions(0, steps, size, micro, rank, 1024)) for rank in range(1024)]
    each = size // (1024 * micro)
    for step in range(steps):
        found = [position for part in parts for batch in part[step * each : (step + 1) * each] for position in batch]
        assert sorted(found) == list(range(step * size, (step + 1) * size))
    resumed = [list(micro_batch_positions(2, steps, size, micro, rank, 1024)) for rank in range(1024)]
    assert resumed == [part[2 * each :] for part in parts]


def test_sending_is_hidden_behind_work_and_the_last_of_it_is_not():
    assert many_ranks.ddp_seconds([50, 50], compute=3.0, rate=100.0) == pytest.approx(3.5)
    assert many_ranks.ddp_seconds([50, 50], compute=3.0, rate=10.0) == pytest.approx(1 + 1 + 5 + 5)
    calls = [(GATHER, 10)] * 4 + [(SCATTER, 20)] * 2
    assert many_ranks.fsdp_seconds(calls, [10, 10], compute=6.0, rate=10.0) == pytest.approx(1 + 6 + 2)
    assert many_ranks.fsdp_seconds(calls, [10, 10], compute=6.0, rate=1e9) == pytest.approx(6.0)
    assert many_ranks.fsdp_seconds(calls, [10, 10], compute=6e-9, rate=10.0) == pytest.approx(8.0)


def test_blocks_of_two_widths_work_by_their_size_and_what_is_in_none_waits():
    calls = [(GATHER, 20), (GATHER, 10), (GATHER, 30)]  # the first is in no block
    calls += [(GATHER, 30), (SCATTER, 60), (GATHER, 10), (SCATTER, 20), (SCATTER, 20)]
    assert many_ranks.fsdp_seconds(calls, [10, 30], compute=12.0, rate=1e9) == pytest.approx(12.0)
    assert many_ranks.fsdp_seconds(calls, [10, 30], compute=12e-9, rate=10.0) == pytest.approx(20.0)


@pytest.mark.slow
def test_no_sending_is_hidden_more_than_wholly(tmp_path):
    """Of a decoder of another width, and where what is in no block is as large as a block."""
    out = tmp_path / "new" / "ranks.json"
    assert run_inside(COMMAND, "model=nano_ditdh", "ranks=[2]", "latent_size=8", f"out={out}").returncode == 0
    assert all(0 <= step["hidden"] <= 1 for step in json.loads(out.read_text())["steps"])


def test_shares_of_all_ranks_are_the_whole():
    objective = FlowMatching(small_ddt())
    total = sum(p.numel() for p in objective.parameters())
    for ranks in (2, 3, 1024):
        held = many_ranks.shares(objective, ranks)
        assert (len(held), held.sum()) == (ranks, total)
        assert np.all(np.diff(held) <= 0)


def test_the_command_writes_what_it_prints(tmp_path):
    out = tmp_path / "ranks.json"
    done = run_inside(COMMAND, "model=nano", "ranks=[2]", "latent_size=8", f"out={out}")
    assert done.returncode == 0
    steps = json.loads(out.read_text())["steps"]
    assert [(step["ranks"], step["parallelism"]) for step in steps] == [(2, "ddp"), (2, "fsdp")]
    assert all(0 <= step["hidden"] <= 1 for step in steps)
    assert steps[1]["most"] == pytest.approx(steps[0]["most"] / 2, rel=0.01)
    assert "SIMULATED" in done.stderr
    assert "exists already" in refusal(COMMAND, "model=nano", f"out={out}")
    for wrong, line in (("ranks=[1]", "ranks=1"), ("ranks=[]", "ranks=[]"), ("network_gbs=0", "network_gbs=0")):
        assert line in refusal(COMMAND, "model=nano", wrong)
