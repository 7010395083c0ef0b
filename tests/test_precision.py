"""Precisions: what a device does not have is refused in one line."""

import os

import pytest
import torch
from conftest import refusal

from ddt.autoencoder.diffusers import KLAutoencoder
from ddt.errors import UserError
from ddt.precision import autocast, check_dtype, choose_dtype, deterministic, products, torch_dtype

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def old_gpu(monkeypatch):
    """A GPU that emulates bf16, as a T4 does."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)


def test_bf16_is_refused_on_gpus_without_it(old_gpu):
    with pytest.raises(UserError, match=r"^trainer.mixed_precision=bf16: .*; give trainer.mixed_precision=fp16"):
        check_dtype("trainer.mixed_precision", "bf16", CUDA)
    with pytest.raises(UserError, match=r"^dtype=bf16: .*dtype=fp16"):
        choose_dtype("bf16", CUDA)
    autoencoder = object.__new__(KLAutoencoder)  # without weights
    autoencoder.encode_dtype = "bf16"
    with pytest.raises(UserError, match=r"^autoencoder.encode_dtype=bf16"):
        autoencoder.to(CUDA)
    assert choose_dtype("bf16", CPU) == "bf16"
    assert [choose_dtype(None, device) for device in (CPU, CUDA)] == ["fp32", "fp32"]


def test_bf16_is_the_default_of_gpus_that_have_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    assert choose_dtype(None, CUDA) == "bf16"


def test_train_refuses_before_it_lists_images(old_gpu, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "trainer.mixed_precision=fp16" in refusal("train", "trainer.mixed_precision=bf16", "name=x")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_autocast_computes_in_its_type_and_fp32_ends_an_outer_one(dtype):
    x, outer = torch.ones(2, 2), torch.bfloat16
    with torch.autocast("cpu", dtype=outer), autocast(CPU, dtype):
        assert (x @ x).dtype == torch_dtype(dtype)


def test_algorithms_are_deterministic_where_asked_for(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    filled = torch.utils.deterministic.fill_uninitialized_memory
    with deterministic(False):
        assert not torch.are_deterministic_algorithms_enabled()
        assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    with deterministic(True):
        assert torch.are_deterministic_algorithms_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] in (":4096:8", ":16:8")  # what cuBLAS asks for
        assert not torch.utils.deterministic.fill_uninitialized_memory
        with pytest.raises(RuntimeError, match="deterministic"):
            torch.nn.functional.max_unpool2d(torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1, dtype=torch.int64), 2)
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory == filled


def test_products_run_in_tf32_on_a_gpu_where_asked_for():
    before = torch.get_float32_matmul_precision()
    for device, dtype, expected in ((CUDA, "tf32", "high"), (CUDA, "fp32", "highest"), (CPU, "tf32", before)):
        with products(device, dtype):
            assert torch.get_float32_matmul_precision() == expected
        assert torch.get_float32_matmul_precision() == before
    assert not torch.is_autocast_enabled("cpu")
    with autocast(CPU, "tf32"):
        assert torch.mm(torch.ones(2, 2), torch.ones(2, 2)).dtype == torch.float32
