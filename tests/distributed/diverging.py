"""Function of the processes of test_parallel.py."""

import os

import torch

from ddt.distributed.prepare import broadcast_weights, make_accelerator
from ddt.model import DDT
from ddt.objective import FlowMatching
from ddt.training.ema import EMA, ConstantDecay
from ddt.training.state import TrainingState


def diverge(folder):
    """Start with other weights on each process, broadcast them, and change one on the second."""
    rank = int(os.environ["RANK"])
    accelerator = make_accelerator()
    torch.manual_seed(rank)
    sizes = {"patch_size": 2, "hidden_size": 8, "num_heads": 2, "depth": 2, "encoder_depth": 1}
    objective = FlowMatching(DDT(in_channels=1, num_classes=2, **sizes))
    before = next(objective.parameters()).clone()
    broadcast_weights(objective, accelerator)
    assert (rank == 0) == torch.equal(before, next(objective.parameters()))
    emas = {"ema": EMA(objective.denoiser, ConstantDecay(0.9))}
    state = TrainingState(objective, torch.optim.AdamW(objective.parameters()), emas, accelerator)
    state.check_agreement()
    if rank == 1:
        with torch.no_grad():
            parameter = next(emas["ema"].model.parameters()).view(-1)
            parameter[0] = torch.nextafter(parameter[0], torch.tensor(9.0))
    try:
        state.check_agreement()
    except RuntimeError as error:
        (folder / str(rank)).write_text(str(error))
