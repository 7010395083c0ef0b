"""AdamW: steps that are left out, going on from a checkpoint, and what the groups' learning rate
does.
"""

import io
import math

import pytest
import torch
from conftest import inputs, small_ddt

from ddt.objective import FlowMatching
from ddt.training.optimizer import adamw

pytestmark = pytest.mark.usefixtures("one_thread")


class Run:
    """A small objective with its optimizer."""

    def __init__(self):
        self.objective = FlowMatching(small_ddt())
        self.optimizer = adamw(self.objective.named_parameters(), lr=0.01, betas=(0.9, 0.95), weight_decay=0.1)

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


def test_a_step_with_found_inf_changes_nothing():
    zero, one = torch.zeros(()), torch.ones(())
    straight, skipping = Run(), Run()
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


def test_the_first_step_can_be_left_out():
    straight, skipping = Run(), Run()
    skipping.step(1, torch.ones(()), bad=True)
    state = [value for key, value in skipping.tensors().items() if not key.endswith(" ")]
    assert len(state) == 3 * len(list(skipping.objective.parameters()))
    assert not any(value.any() for value in state)
    straight.step(2)
    skipping.step(2, torch.zeros(()))
    assert same(straight.tensors(), skipping.tensors())


def test_going_on_from_a_checkpoint_changes_nothing():
    straight, first, second = Run(), Run(), Run()
    for run in (straight, first):
        run.step(1)
    file = io.BytesIO()
    torch.save(first.optimizer.state_dict(), file)
    file.seek(0)
    second.objective.load_state_dict(first.objective.state_dict())
    second.optimizer.load_state_dict(torch.load(file, weights_only=True))
    for run in (straight, second):
        run.optimizer.param_groups[0]["lr"] = 0.005
        run.step(2)
    assert same(straight.tensors(), second.tensors())


def test_the_groups_hold_every_weight_by_name_and_their_lr_counts():
    run = Run()
    (group,) = run.optimizer.param_groups
    assert group["param_names"] == [name for name, _ in run.objective.named_parameters()]
    before = run.tensors()
    group["lr"] = 0.0
    run.step(1)
    after = run.tensors()
    assert all(torch.equal(after[key], value) for key, value in before.items())
