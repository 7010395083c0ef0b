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
    prediction = "v"
    class_token = 0

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


def test_a_predicted_latent_is_compared_as_the_velocity_that_leads_to_it():
    x, y, noise, _, uniform = (part.double() if part.is_floating_point() else part for part in batch(5))
    t = torch.tensor([0.01, 0.5, 0.94, 0.96, 0.999], dtype=torch.float64)
    output = torch.randn(x.shape, generator=torch.Generator().manual_seed(8))
    network = Recorder(output)
    losses = FlowMatching(network, label_dropout=0.0, prediction="x")(x, y, noise, torch.logit(t), uniform)
    weights = torch.tensor([0.99, 0.5, 0.06, 0.05, 0.05], dtype=torch.float64) ** -2
    expected = weights * (output.double() - x).square().mean((1, 2, 3))
    torch.testing.assert_close(losses["errors"], expected, rtol=1e-9, atol=0)
    torch.testing.assert_close(losses["loss"], expected.mean(), rtol=1e-9, atol=0)
    exact = FlowMatching(Recorder(x.float()), prediction="x").for_validation(Recorder(x.float()))
    assert exact(x.float(), y, noise.float(), torch.logit(t).float(), uniform)["loss"] == 0


def test_a_target_below_the_floor_is_the_usual_velocity():
    x, y, noise, time_normal, uniform = batch(4)
    v = FlowMatching(Recorder(torch.zeros_like(x)), label_dropout=0.0)
    inputs = x, y, noise, time_normal.clamp(max=2.9), uniform  # t ≤ 0.948
    expected = v(*inputs)["errors"]
    network = Recorder(None)
    objective = FlowMatching(network, label_dropout=0.0, prediction="x")
    network.forward = lambda x_t, t, y: x_t  # the clean latent that a velocity of zero means
    torch.testing.assert_close(objective(*inputs)["errors"], expected, rtol=1e-4, atol=1e-5)


def test_the_network_is_marked_with_its_prediction():
    network = small_ddt()
    assert network.prediction == "v"
    objective = FlowMatching(network, prediction="x")
    assert network.prediction == "x"
    assert objective.for_validation(small_ddt(prediction="x")).prediction == "x"
    with pytest.raises(UserError, match=r"^objective\.prediction=v: the network predicts x"):
        FlowMatching(network)


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
    assert torch.equal(losses["errors"], velocity_loss(ema.answer, x - noise))
    assert torch.equal(losses["t"], torch.special.ndtr(time_normal))
    assert objective.denoiser is trained


def test_impossible_dropout_is_named():
    with pytest.raises(UserError, match=r"objective\.label_dropout=1\.5"):
        FlowMatching(small_ddt(), label_dropout=1.5)


def test_the_loss_of_a_base_head_is_added():
    x, y, noise, time_normal, _ = batch()
    network, undropped = small_ddt(base_depth=1), torch.ones(3)
    losses = FlowMatching(network, base_depth=1, base_weight=0.3)(x, y, noise, time_normal, undropped)
    t = torch.sigmoid(time_normal)
    x_t = t[:, None, None, None] * x + (1 - t)[:, None, None, None] * noise
    final, base = (((v - (x - noise)) ** 2).mean() for v in network.forward_with_base(x_t, t, y)[:2])
    torch.testing.assert_close(losses["loss"], final + 0.3 * base)
    torch.testing.assert_close(losses["base_loss"], base)
    torch.testing.assert_close(losses["errors"].mean(), final)
    losses["loss"].backward()
    assert all(p.grad is not None and p.grad.any() for p in network.base_head.parameters())
    network.zero_grad()
    losses = FlowMatching(network, base_depth=1)(x, y, noise, time_normal, undropped)
    gradient = torch.autograd.grad(losses["loss"] - losses["fm_loss"], network.encoder.input.proj.weight)[0]
    assert gradient.any(), "both train the encoder"


def test_a_base_head_and_an_alignment_add_up():
    x, y, noise, time_normal, uniform = batch()
    network = small_ddt(base_depth=1)
    alignment = AlignmentLoss(torch.nn.Identity(), 2, 0.5, (4, 4), (4, 4))
    features = torch.randn(3, 16, network.hidden_size)
    losses = FlowMatching(network, alignment=alignment, base_depth=1)(x, y, noise, time_normal, uniform, features)
    total = losses["fm_loss"] + losses["base_loss"] + 0.5 * losses[alignment.name]
    torch.testing.assert_close(losses["loss"].detach(), total)
    alone = FlowMatching(network, base_depth=1)(x, y, noise, time_normal, uniform)
    torch.testing.assert_close(alone["base_loss"], losses["base_loss"])
    assert "base_loss" not in FlowMatching(network, base_depth=1).for_validation(network)(
        x, y, noise, time_normal, uniform
    )
