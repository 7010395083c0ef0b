"""Optimizers: which weights each one moves, steps that are left out, and going on from a checkpoint."""

import io
import math

import pytest
import torch
import torch.distributed as dist
from conftest import inputs, refusal, small_ddt
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor, init_device_mesh

from ddt.errors import UserError
from ddt.objective import FlowMatching
from ddt.optimizer import adamw, muon

pytestmark = pytest.mark.usefixtures("one_thread")

SETTINGS = dict(lr=0.01, betas=(0.9, 0.95), weight_decay=0.1)
MAKERS = {"adamw": lambda named: adamw(named, **SETTINGS), "muon": lambda named: muon(named, momentum=0.9, **SETTINGS)}
both = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


class Run:
    """A small objective with its optimizer."""

    def __init__(self, make):
        self.objective = FlowMatching(small_ddt())
        self.optimizer = make(self.objective.named_parameters())

    def step(self, seed, found_inf=None, bad=False):
        """Make one step on the draws of `seed`, with gradients that are not finite where `bad`."""
        latents, _, y = inputs()
        generator = torch.Generator().manual_seed(seed)
        noise, time_normal = (torch.randn(shape, generator=generator) for shape in (latents.shape, (3,)))
        loss = self.objective(latents, y, noise, time_normal, torch.ones(3))["loss"]
        (loss * math.nan if bad else loss).backward()
        if found_inf is not None:
            self.optimizer.found_inf = found_inf
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def tensors(self):
        """Copies of all weights and all state tensors, by name."""
        kept = {}
        for name, parameter in self.objective.named_parameters():
            state = self.optimizer.state[parameter]
            kept |= {f"{name} {key}": value.clone() for key, value in {**state, "": parameter.detach()}.items()}
        return kept


def same(first, second):
    """Whether two dictionaries have the same keys and, bit for bit, the same tensors."""
    assert first.keys() == second.keys()
    return all(torch.equal(value.view(torch.int32), second[key].view(torch.int32)) for key, value in first.items())


@both
def test_a_step_without_finite_gradients_is_left_out(make):
    zero, one = torch.zeros(()), torch.ones(())
    straight, skipping = Run(make), Run(make)
    for seed in (1, 2):
        straight.step(seed)
        skipping.step(seed, zero)
    before = skipping.tensors()
    assert same(straight.tensors(), before)
    skipping.step(3, one, bad=True)
    assert same(skipping.tensors(), before)
    straight.step(4)
    skipping.step(4, zero)
    assert same(skipping.tensors(), straight.tensors())
    assert not any(torch.equal(value, before[key]) for key, value in skipping.tensors().items())


@both
def test_the_first_step_can_be_left_out(make):
    straight, skipping = Run(make), Run(make)
    skipping.step(1, torch.ones(()), bad=True)
    state = {key: value for key, value in skipping.tensors().items() if not key.endswith(" ")}
    assert state
    assert not any(value.any() for value in state.values())
    straight.step(2)
    skipping.step(2, torch.zeros(()))
    assert same(straight.tensors(), skipping.tensors())


@both
def test_going_on_from_a_checkpoint_changes_nothing(make):
    straight, first, second = Run(make), Run(make), Run(make)
    for run in (straight, first):
        run.step(1)
    file = io.BytesIO()
    torch.save(first.optimizer.state_dict(), file)
    file.seek(0)
    second.objective.load_state_dict(first.objective.state_dict())
    second.optimizer.load_state_dict(torch.load(file, weights_only=True))
    for run in (straight, second):
        for group in run.optimizer.param_groups:
            group["lr"] = 0.005
        run.step(2)
    assert same(straight.tensors(), second.tensors())


@both
def test_the_lr_of_the_groups_is_what_counts(make):
    run = Run(make)
    before = run.tensors()
    for group in run.optimizer.param_groups:
        group["lr"] = 0.0
    run.step(1)
    assert all(torch.equal(run.tensors()[key], value) for key, value in before.items())


def test_adamw_is_one_kernel_over_all_weights():
    run = Run(MAKERS["adamw"])
    assert run.optimizer.defaults["fused"]
    assert len(run.optimizer.param_groups[0]["params"]) == len(list(run.objective.parameters()))


def test_muon_moves_the_matrices_of_the_blocks():
    run = Run(MAKERS["muon"])
    names = run.optimizer.param_groups[0]["param_names"]
    linears = [(n, m) for n, m in run.objective.named_modules() if isinstance(m, nn.Linear) and ".blocks." in n]
    assert sorted(names) == sorted(f"{name}.weight" for name, _ in linears)
    assert len(names) == 3 * 6  # qkv, proj, w1, w2, w3 and adaln of three blocks
    run.step(1)
    for name, parameter in run.objective.named_parameters():
        assert set(run.optimizer.state[parameter]) == (
            {"momentum_buffer"} if name in names else {"step", "exp_avg", "exp_avg_sq"}
        )


def test_muon_steps_are_those_of_torch():
    """The gradients are set by hand, the same for both."""
    objective, copy = FlowMatching(small_ddt()), FlowMatching(small_ddt())
    optimizer = muon(objective.named_parameters(), momentum=0.9, **SETTINGS)
    chosen = set(optimizer.param_groups[0]["param_names"])
    named = dict(copy.named_parameters())
    matrices, others = ([p for n, p in named.items() if (n in chosen) == inside] for inside in (True, False))
    parts = (
        torch.optim.Muon(matrices, lr=0.01, weight_decay=0.1, momentum=0.9, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=0.01, weight_decay=0.1, betas=(0.9, 0.95), fused=True),
    )
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        for name, parameter in objective.named_parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
            named[name].grad = parameter.grad.clone()
        for one in (optimizer, *parts):
            one.step()
    assert all(torch.equal(parameter, named[name]) for name, parameter in objective.named_parameters())


def test_muon_and_adamw_move_a_matrix_by_alike_lengths():
    """One learning rate serves both: with match_rms_adamw a step of Muon is 0.2 lr for each weight (rms)."""
    run = Run(lambda named: muon(named, lr=0.01, betas=(0.9, 0.95), weight_decay=0.0, momentum=0.9))
    before = run.tensors()
    run.step(1)
    moved = {key: (value - before[key]).square().mean().sqrt() for key, value in run.tensors().items() if key in before}
    names = run.optimizer.param_groups[0]["param_names"]
    assert all(0.0005 < moved[f"{name} "] < 0.003 for name in names), moved
    assert 0.005 < moved["denoiser.decoder.output.linear.weight "] < 0.0101


@pytest.mark.parametrize("momentum", [-0.1, 1.0])
def test_a_momentum_that_cannot_be_is_refused(momentum):
    with pytest.raises(UserError, match=rf"optimizer\.momentum={momentum}: must lie in 0..1"):
        muon([("weight", nn.Parameter(torch.zeros(1)))], momentum=momentum, **SETTINGS)


def test_settings_are_checked_before_anything_is_trained():
    assert "optimizer.momentum=1.0" in refusal("train", "optimizer=muon", "optimizer.momentum=1.0", "name=never")


def given_steps(objective, optimizer):
    """Make four steps on random gradients, the third of them left out."""
    generator = torch.Generator().manual_seed(1)
    for step in range(4):
        for parameter in objective.parameters():
            gradient = torch.randn(parameter.shape, generator=generator) * (math.nan if step == 2 else 1)
            if isinstance(parameter, DTensor):
                gradient = distribute_tensor(gradient, parameter.device_mesh, parameter.placements)
            parameter.grad = gradient
        optimizer.found_inf = torch.tensor(float(step == 2))
        optimizer.step()


def sharded_steps(rank, folder, name):
    """Make the steps on one of two processes that share a network; save weights and optimizer."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    objective = fully_shard(FlowMatching(small_ddt()), mesh=init_device_mesh("cpu", (2,)))
    optimizer = MAKERS[name](objective.named_parameters())
    given_steps(objective, optimizer)
    saved = get_state_dict(objective, optimizer, options=StateDictOptions(full_state_dict=True))
    if rank == 0:
        torch.save(saved, folder / "sharded.pt")
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize(("name", "tolerance"), [("adamw", 1e-6), ("muon", 0.03)])
def test_sharded_weights_move_as_whole_ones(tmp_path, name, tolerance):
    """Muon works in bfloat16."""
    torch.multiprocessing.spawn(sharded_steps, (tmp_path, name), nprocs=2)
    weights, saved = torch.load(tmp_path / "sharded.pt", weights_only=True)
    objective, start = FlowMatching(small_ddt()), FlowMatching(small_ddt()).state_dict()
    optimizer = MAKERS[name](objective.named_parameters())
    given_steps(objective, optimizer)
    assert weights.keys() == start.keys() == saved["state"].keys()
    for key, parameter in objective.named_parameters():
        pairs = [(weights[key] - start[key], parameter - start[key])]
        pairs += [(saved["state"][key][kind], tensor) for kind, tensor in optimizer.state[parameter].items()]
        for sharded, whole in pairs:
            assert (sharded - whole).norm() <= tolerance * whole.norm(), key
