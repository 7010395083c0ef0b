"""What the log rows say, and what a step costs."""

import pytest
import torch
from conftest import inputs, small_ddt

from ddt.distributed.prepare import make_accelerator
from ddt.flow import TrainingTimes
from ddt.model import DDT
from ddt.objective import FlowMatching
from ddt.objective.alignment import REPA
from ddt.objective.flow_matching import velocity_loss
from ddt.training.ema import EMA, ConstantDecay, PowerFunction, ema_rules, power_exponent
from ddt.training.meter import Meter
from ddt.training.stopping import Skips
from ddt.training.throughput import peak_of, training_flops

pytestmark = pytest.mark.usefixtures("one_thread")
GOOD, BAD = torch.tensor(0.0), torch.tensor(1.0)


def losses(*errors, t=None):
    errors = torch.tensor(errors)
    times = torch.full_like(errors, 0.55) if t is None else torch.tensor(t)
    return {"loss": errors.mean(), "fm_loss": errors.mean(), "t": times, "errors": errors}


def test_means_are_over_steps_and_skipped_steps_do_not_count():
    meter, accelerator = Meter(torch.device("cpu")), make_accelerator()
    for value, skipped in ((1.0, GOOD), (float("nan"), BAD), (3.0, GOOD)):
        meter.add(losses(value), 0.5)
        meter.add(losses(value + 1), 0.5)
        meter.end_step(torch.tensor(10 * value), 15.0, skipped)
    means = meter.means(accelerator)
    assert means == {"loss": 2.5, "fm_loss": 2.5, "fm_loss_by_t/0.5-0.6": 2.5, "grad_norm": 20.0, "clipped": 0.5}
    meter.reset()
    meter.add(losses(1.0), 1.0)
    meter.end_step(torch.tensor(0.0), None, BAD)
    assert meter.means(accelerator) == {}


def test_losses_stand_in_the_bin_of_their_time():
    meter = Meter(torch.device("cpu"))
    meter.add(losses(1.0, 2.0, 4.0, 8.0, t=[0.0, 0.09, 0.95, 1.0]), 1.0)
    meter.end_step(torch.tensor(1.0), None, GOOD)
    means = meter.means(make_accelerator())
    assert means["fm_loss_by_t/0.0-0.1"] == 1.5
    assert means["fm_loss_by_t/0.9-1.0"] == 6.0
    assert not any(f"/0.{k}-" in key for key in means for k in range(1, 9))


def test_a_meter_goes_on_where_it_was_and_with_fewer_processes():
    meter, accelerator = Meter(torch.device("cpu")), make_accelerator()
    meter.add(losses(1.0), 1.0)
    meter.end_step(torch.tensor(1.0), None, GOOD)
    state = meter.state(accelerator)
    again = Meter(torch.device("cpu"), 0, 1, state)
    assert again.means(accelerator) == meter.means(accelerator)
    two = {key: tuple(torch.cat([part, 3 * part]) for part in parts) for key, parts in state.items()}
    assert Meter(torch.device("cpu"), 1, 2, two).sums["loss"] == 3
    assert Meter(torch.device("cpu"), 0, 1, two).sums["loss"] == 2
    # one process at error 1, then two at 4: samples count alike
    meters = [Meter(torch.device("cpu"), rank, 2, state) for rank in range(2)]
    for other in meters:
        other.add(losses(4.0), 1.0)
        other.end_step(torch.tensor(1.0), None, GOOD)
    for key in ("loss", "fm_loss_by_t"):
        mean = sum(m.sums[key].sum() for m in meters) / sum(m.counts[key].sum() for m in meters)
        assert mean.item() == pytest.approx({"loss": 2.5, "fm_loss_by_t": 3.0}[key])


def test_errors_by_sample_are_those_of_the_loss():
    model = small_ddt()
    x, _, y = inputs(batch=6)
    generator = torch.Generator().manual_seed(3)
    noise, normal = torch.randn(x.shape, generator=generator), torch.randn(6, generator=generator)
    found = FlowMatching(model, label_dropout=0.0)(x, y, noise, normal, torch.ones(6))
    t = TrainingTimes().of(normal)
    assert torch.equal(found["t"], t)
    assert found["loss"].item() == pytest.approx(found["errors"].mean().item())
    one = FlowMatching(model, label_dropout=0.0)(x[2:3], y[2:3], noise[2:3], normal[2:3], torch.ones(1))
    assert one["loss"].item() == pytest.approx(found["errors"][2].item(), rel=1e-5)
    assert velocity_loss(x, x - noise).shape == (6,)


def test_skips_are_counted_and_start_again_after_a_good_step():
    skips = Skips(torch.device("cpu"))
    found = [skips.check(torch.tensor(norm)).item() for norm in (1.0, float("nan"), float("inf"), 2.0, float("-inf"))]
    assert found == [0, 1, 1, 0, 1]
    assert skips.state() == [3, 1]
    assert Skips(torch.device("cpu"), [3, 1]).state() == [3, 1]


def test_exponents_of_power_functions():
    assert power_exponent(0.05) == pytest.approx(16.97, abs=0.01)  # EDM2, section 3.1
    assert power_exponent(0.10) == pytest.approx(6.94, abs=0.01)
    gamma = power_exponent(0.2)
    assert (gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3)) == pytest.approx(0.04)


def test_a_power_function_average_has_its_closed_form():
    """Weights w_k = k: the average after n steps is Σ k·(k^g − (k−1)^g)/n^g, g = γ + 1."""
    model, n = torch.nn.Linear(1, 1, bias=False), 40
    averages = {std: EMA(model, PowerFunction(std)) for std in (0.05, 0.2)}
    for k in range(1, n + 1):
        torch.nn.init.constant_(model.weight, k)
        for average in averages.values():
            average.update(model.parameters(), k)
    for std, average in averages.items():
        g = power_exponent(std) + 1
        expected = sum(k * (k**g - (k - 1) ** g) for k in range(1, n + 1)) / n**g
        assert average.model.weight.item() == pytest.approx(expected, rel=1e-5)


def test_a_skipped_step_leaves_an_average_as_it_is():
    model = torch.nn.Linear(3, 3)
    ema = EMA(model, ConstantDecay(0.5))
    before = ema.model.weight.clone()
    torch.nn.init.ones_(model.weight)
    ema.update(model.parameters(), 1, skipped=BAD)
    assert torch.equal(ema.model.weight, before)
    ema.update(model.parameters(), 1, skipped=GOOD)
    torch.testing.assert_close(ema.model.weight, (before + 1) / 2)
    apart, norm = ema.distance(model.parameters()).sqrt().tolist()
    expected = torch.cat([(ema.model.weight - model.weight).flatten(), ema.model.bias - model.bias]).norm().item()
    assert apart == pytest.approx(expected, rel=1e-5)
    assert norm == pytest.approx(torch.cat([model.weight.flatten(), model.bias]).norm().item(), rel=1e-5)


def test_averages_are_named_after_what_they_are():
    rules = ema_rules(0.9999, (0.999, 0.99999), (0.05,))
    assert list(rules) == ["ema", "ema_0.999", "ema_0.99999", "power_0.05"]
    assert rules["ema"].rate(7) == pytest.approx(1e-4)
    assert rules["power_0.05"].rate(1) == 1


def test_training_costs_three_forwards():
    """XL: 131.5 GMAC a forward (method.md 2), and the projector at 256 tokens."""
    with torch.device("meta"):
        model = DDT(
            in_channels=4, patch_size=2, hidden_size=1152, num_heads=16, depth=28, encoder_depth=22, num_classes=9
        )
        plain = FlowMatching(model)
        projected = FlowMatching(
            model, alignment=REPA(target="vit_base_patch14_dinov2").build_loss(1152, 768, (16, 16), (16, 16))
        )
    assert training_flops(plain, (4, 32, 32)) == pytest.approx(6 * 131.5e9, rel=1e-3)
    projector = 256 * (1152 * 1152 * 2 + 1152 * 768)
    assert training_flops(projected, (4, 32, 32)) - training_flops(plain, (4, 32, 32)) == 6 * projector


def test_known_gpus():
    assert peak_of("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_of("NVIDIA A100-SXM4-80GB") == 312e12
    assert peak_of("NVIDIA H100 NVL") == 835e12
    assert peak_of("NVIDIA L4") == 121e12
    for other in ("Some other card", "NVIDIA L40", "NVIDIA A10G", "NVIDIA RTX A1000 Laptop GPU"):
        assert peak_of(other) is None
