"""The loss and its label dropout."""

import pytest
import torch
from conftest import inputs, small_ddt

from ddt.errors import UserError
from ddt.objective import FlowMatching
from ddt.objective.alignment import AlignmentLoss
from ddt.objective.flow_matching import velocity_loss


class Recorder(torch.nn.Module):
    """Stands in for the network: records its inputs, returns a fixed velocity."""

    num_classes = 5

    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def forward(self, x_t, t, y):
        self.x_t, self.t, self.y = x_t, t, y
        return self.answer


def batch(size=3):
    x, _, y = inputs(batch=size)
    generator = torch.Generator().manual_seed(7)
    noise = torch.randn(x.shape, generator=generator)
    return x, y, noise, torch.randn(size, generator=generator), torch.rand(size, generator=generator)


@pytest.mark.parametrize(("times", "function"), [("lognorm", torch.sigmoid), ("uniform", torch.special.ndtr)])
def test_loss_is_the_mean_squared_velocity_error_at_the_sampled_time(times, function):
    x, y, noise, time_normal, uniform = batch()
    network = Recorder(torch.full_like(x, 0.5))
    losses = FlowMatching(network, times, label_dropout=0.0)(x, y, noise, time_normal, uniform)
    t = function(time_normal)
    torch.testing.assert_close(network.t, t)
    torch.testing.assert_close(network.x_t, t[:, None, None, None] * x + (1 - t)[:, None, None, None] * noise)
    torch.testing.assert_close(losses["loss"], ((0.5 - (x - noise)) ** 2).mean())
    assert torch.equal(network.y, y)


def test_labels_are_dropped_where_the_uniform_number_is_below_the_rate():
    x, y, noise, time_normal, _ = batch(4)
    network = Recorder(x)
    uniform = torch.tensor([0.0, 0.0999, 0.1, 0.9])
    FlowMatching(network, label_dropout=0.1)(x, y, noise, time_normal, uniform)
    assert network.y.tolist() == [5, 5, *y[2:].tolist()]


@pytest.mark.parametrize("training", [True, False])
def test_loss_is_a_function_of_its_arguments(training):
    objective = FlowMatching(small_ddt()).train(training)
    losses = [objective(*batch(64))["loss"] for _ in range(2)]
    assert torch.equal(*losses)


def test_validation_is_the_objective_around_another_network_with_all_labels():
    x, y, noise, time_normal, _ = batch(4)
    trained, ema = Recorder(torch.zeros_like(x)), Recorder(torch.full_like(x, 0.5))
    objective = FlowMatching(trained, "uniform", 1.0, AlignmentLoss(torch.nn.Identity(), 1, 0.5, (2, 2), (2, 2)))
    losses = objective.for_validation(ema)(x, y, noise, time_normal, torch.zeros(4))
    assert torch.equal(ema.y, y)
    assert torch.equal(losses["errors"], velocity_loss(ema.answer, x, noise))
    assert torch.equal(losses["t"], torch.special.ndtr(time_normal))
    assert objective.denoiser is trained


def test_impossible_dropout_is_named():
    with pytest.raises(UserError, match=r"objective\.label_dropout=1\.5"):
        FlowMatching(small_ddt(), label_dropout=1.5)
