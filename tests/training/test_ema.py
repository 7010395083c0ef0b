"""The EMA weights."""

import pytest
import torch
from conftest import small_network

from ddt.autoencoder.vit_decoder import ViTDecoder
from ddt.training.ema import EMA, ConstantDecay


def test_average_has_its_closed_form():
    """Weights w_k = k: after n updates ema = d^n·w_0 + (1−d)·Σ d^(n−k)·w_k."""
    model, decay, n = torch.nn.Linear(1, 1, bias=False), 0.9, 25
    torch.nn.init.zeros_(model.weight)
    ema = EMA(model, ConstantDecay(decay))
    for k in range(1, n + 1):
        with torch.no_grad():
            model.weight.fill_(k)
        ema.update(model.parameters(), k)
    expected = (1 - decay) * sum(decay ** (n - k) * k for k in range(1, n + 1))
    torch.testing.assert_close(ema.model.weight.item(), expected, rtol=1e-5, atol=0)


def test_all_named_parameters_are_averaged_and_buffers_are_those_of_the_start():
    """As the published EMA: frozen parameters too, such as the frequencies of DiT^DH."""
    for model in (small_network("ditdh"), ViTDecoder(6, 16, 1, 32, num_heads=2, grid=3, patch_size=4)):
        start = {name: value.clone() for name, value in model.state_dict().items()}
        ema = EMA(model, ConstantDecay(0.75))
        for value in model.state_dict().values():
            value.add_(1.0)
        ema.update(model.parameters(), 1)
        parameters = dict(model.named_parameters())
        for name, value in ema.model.state_dict().items():
            expected = start[name] + (0.25 if name in parameters else 0)
            torch.testing.assert_close(value, expected, msg=name)
    assert "decoder_pos_embed" in start.keys() - parameters.keys()


def test_average_is_float32_apart_and_without_gradients():
    model = torch.nn.Linear(2, 2).bfloat16()
    ema = EMA(model, ConstantDecay(0.5))
    before = model.weight.clone()
    ema.model.weight.add_(1.0)
    assert torch.equal(model.weight, before)
    assert not any(p.requires_grad for p in ema.model.parameters())
    assert all(p.dtype == torch.float32 for p in ema.model.parameters())


def test_a_compiled_run_on_a_gpu_updates_by_the_kernel(monkeypatch):
    from ddt.training import ema_kernel

    calls = []
    monkeypatch.setattr(ema_kernel, "lerp_", lambda *arguments: calls.append(arguments))
    model = torch.nn.Linear(2, 3)
    ema = EMA(model, ConstantDecay(0.75))
    ema.place(torch.device("cpu"), sharded=False, compiled=True)
    ema.update(model.parameters(), 1)
    assert calls == []  # a CPU has no such kernel
    ema.compiled = True  # as `place` finds on a GPU
    ema.update(model.parameters(), 1, skipped=torch.tensor(0.0))
    ((emas, weights, rate),) = calls
    assert all(a is b for a, b in zip(emas, ema.parameters, strict=True))
    assert all(a is b for a, b in zip(weights, model.parameters(), strict=True))
    assert rate == 0.25
    ema.update(model.parameters(), 1, skipped=torch.tensor(1.0))
    assert calls[1][2] == 0


def test_the_kernel_takes_no_tensors_that_it_would_misread():
    from ddt.training.ema_kernel import chunk_table

    ema = torch.zeros(2, 3)
    assert chunk_table([ema], [torch.zeros(2, 3)]).tolist()[0][2] == 6
    for other in (torch.zeros(2, 3).bfloat16(), torch.zeros(3, 2).T, torch.zeros(2, 2)):
        with pytest.raises(AssertionError):
            chunk_table([ema], [other])
