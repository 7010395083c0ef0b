"""The Triton kernels of compiled blocks, interpreted on a CPU; the card runs what is compiled."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from ddt.model import layers
from ddt.model.layers import FusedSwiGLU, SwiGLU


def test_kernels_agree_with_float64_and_blocks_with_those_without_them():
    script, environment = Path(__file__).with_name("kernels_in_python.py"), os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    assert len(rows) == 20
    for name, error, gradient_error, holds in rows:
        assert max(float(error), float(gradient_error)) < (1e-2 if "bfloat16" in name else 1e-5), name
        assert holds == "True", name


@pytest.mark.parametrize("kind", [SwiGLU, FusedSwiGLU])
def test_padded_products_change_no_number(monkeypatch, kind):
    torch.manual_seed(0)
    mlp = kind(20)  # 53 channels inside
    x = torch.randn(3, 20, requires_grad=True)
    expected = mlp(x)
    grads = torch.autograd.grad(expected.square().sum(), [x, *mlp.parameters()])
    monkeypatch.setattr(layers, "padding", lambda x, width: -width % 8)
    widths = []
    monkeypatch.setattr(layers.F, "silu", lambda a: (widths.append(a.shape[-1]), torch.sigmoid(a) * a)[1])
    padded = mlp(x)
    assert widths == [56]
    torch.testing.assert_close(padded, expected)
    for grad, value in zip(torch.autograd.grad(padded.square().sum(), [x, *mlp.parameters()]), grads, strict=True):
        torch.testing.assert_close(grad, value)
