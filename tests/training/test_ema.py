"""The EMA weights."""

import torch

from ddt.training.ema import EMA, ConstantDecay


def test_average_has_its_closed_form():
    """Weights w_k = k: after n updates ema = d^n·w_0 + (1−d)·Σ d^(n−k)·w_k."""
    model, decay, n = torch.nn.Linear(1, 1, bias=False), 0.9, 25
    torch.nn.init.zeros_(model.weight)
    ema = EMA(model, ConstantDecay(decay))
    for k in range(1, n + 1):
        with torch.no_grad():
            model.weight.fill_(k)
        ema.update(model, k)
    expected = (1 - decay) * sum(decay ** (n - k) * k for k in range(1, n + 1))
    torch.testing.assert_close(ema.model.weight.item(), expected, rtol=1e-5, atol=0)


def test_average_is_float32_apart_and_without_gradients():
    model = torch.nn.Linear(2, 2).bfloat16()
    ema = EMA(model, ConstantDecay(0.5))
    before = model.weight.clone()
    ema.model.weight.add_(1.0)
    assert torch.equal(model.weight, before)
    assert not any(p.requires_grad for p in ema.model.parameters())
    assert all(p.dtype == torch.float32 for p in ema.model.parameters())
