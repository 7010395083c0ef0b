"""Processes start with the same weights and notice when they differ."""

import os

import pytest
import torch
from conftest import small_ddt
from diverging import diverge
from torch.nn.parallel import DistributedDataParallel

from ddt.distributed.launch import launch
from ddt.distributed.prepare import clip_gradients, decide_on_main, gradient_norm, make_accelerator
from ddt.errors import UserError
from ddt.objective import FlowMatching
from ddt.training.ema import EMA, ConstantDecay
from ddt.training.state import TrainingState

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.slow
def test_processes_start_alike_and_notice_when_they_diverge(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    launch(diverge, 2, tmp_path)
    first, second = ((tmp_path / str(rank)).read_text() for rank in range(2))
    assert first == second
    assert first.endswith("step 0: the processes hold different weights; nothing is saved")


def test_one_process_agrees_with_itself():
    assert "RANK" not in os.environ
    accelerator, objective = make_accelerator(), FlowMatching(small_ddt())
    emas = {"ema": EMA(objective.denoiser, ConstantDecay(0.9))}
    TrainingState(objective, torch.optim.AdamW(objective.parameters()), emas, accelerator).check_agreement()
    assert decide_on_main(accelerator, lambda: 3) == 3
    with pytest.raises(UserError, match="no"):
        decide_on_main(accelerator, lambda: (_ for _ in ()).throw(UserError("no")))


def test_gradients_lie_in_ddps_buckets():
    handler = make_accelerator().ddp_handler
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=torch.distributed.HashStore())
    try:
        model = DistributedDataParallel(torch.nn.Linear(3, 2), **handler.to_kwargs())
        model(torch.ones(1, 3)).sum().backward()
        places = {parameter.grad.untyped_storage().data_ptr() for parameter in model.parameters()}
    finally:
        torch.distributed.destroy_process_group()
    assert len(places) == 1


def test_the_norm_is_of_all_gradients_and_clipping_keeps_their_direction():
    parameters = [torch.nn.Parameter(torch.zeros(size)) for size in (3, 2, 1)]
    parameters[0].grad, parameters[1].grad = torch.tensor([1.0, 2.0, 2.0]), torch.tensor([0.0, 4.0])
    norm = gradient_norm(parameters)
    assert norm.item() == 5
    clip_gradients(parameters, norm, 10.0)
    assert parameters[1].grad.tolist() == [0, 4]
    clip_gradients(parameters, norm, 1.0)
    torch.testing.assert_close(parameters[0].grad, torch.tensor([0.2, 0.4, 0.4]))
    torch.testing.assert_close(parameters[1].grad, torch.tensor([0.0, 0.8]))
