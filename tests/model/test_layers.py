"""Position tables, embeddings and norms."""

import pytest
import torch
from torch.nn.functional import rms_norm

from ddt.errors import UserError
from ddt.model.layers import RMSNorm, SwiGLU, positions, rope_table, rotate, timestep_embedding, turn


def test_rope_table_matches_the_release(golden):
    cos, sin = rope_table(16, height=3, width=5)
    torch.testing.assert_close(cos, torch.tensor(golden["rope_16_3x5"]["cos"]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(sin, torch.tensor(golden["rope_16_3x5"]["sin"]), rtol=1e-4, atol=1e-5)


def test_timestep_embedding_matches_the_release(golden):
    for t, expected in golden["timestep_embedding_dim8"].items():
        embedding = timestep_embedding(torch.tensor([float(t)]), dim=8)[0]
        torch.testing.assert_close(embedding, torch.tensor(expected), rtol=1e-4, atol=1e-6)


def test_rotation_keeps_norms_and_depends_on_the_distance_alone():
    cos, sin = rope_table(8, height=1, width=5)  # evenly spaced along x
    q, k = torch.randn(2, 8, generator=torch.Generator().manual_seed(0)).unbind(0)
    turned_q, turned_k = rotate(q.expand(5, 8), cos, sin), rotate(k.expand(5, 8), cos, sin)
    torch.testing.assert_close(turned_q.norm(dim=-1), q.norm().expand(5))
    products = turned_q @ turned_k.T
    torch.testing.assert_close(products[0, 2], products[2, 4], rtol=1e-4, atol=1e-5)
    assert not torch.isclose(products[0, 1], products[0, 3])


@pytest.mark.parametrize("normalised", [True, False])
def test_the_compiled_form_turns_alike(normalised):
    norm = RMSNorm(8) if normalised else torch.nn.Identity()
    for parameter in norm.parameters():
        torch.nn.init.uniform_(parameter, 0.5, 2)
    at = positions(8, 2, 3, torch.device("cpu"))
    x = torch.randn(2, 6, 5, 8, generator=torch.Generator().manual_seed(0))  # (B, N, heads, d)
    expected = rotate(norm(x.transpose(1, 2)), at.cos, at.sin).transpose(1, 2)
    torch.testing.assert_close(turn(x, norm, at), expected)


def test_range_of_positions_does_not_depend_on_the_grid():
    small, large = rope_table(8, 16, 16)[0], rope_table(8, 32, 32)[0]
    torch.testing.assert_close(small[-1], large[-1])


def test_head_width_must_suit_two_axes():
    with pytest.raises(UserError, match=r"model\.num_heads.*multiple of 4"):
        rope_table(6, 2, 2)


def test_position_table_is_cached_and_made_outside_of_inference_mode():
    with torch.inference_mode():
        first = positions(12, 7, 3, torch.device("cpu"))
    assert positions(12, 7, 3, torch.device("cpu")).cos is first.cos
    assert not first.cos.is_inference()  # otherwise training after sampling would fail


def test_rms_norm_is_computed_in_float32():
    norm = RMSNorm(64)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 1.5)
    x = (100 * torch.randn(64, 64)).bfloat16()
    assert norm(x).dtype == torch.bfloat16
    exact = rms_norm(x.double(), (64,), norm.weight.double(), 1e-6)
    assert (norm(x) == exact.bfloat16()).float().mean() > 0.99  # rounded once, at the end


def test_swiglu_width():
    assert SwiGLU(1152).w1.weight.shape == (3072, 1152)
    assert SwiGLU(768).w2.weight.shape == (768, 2048)
    assert not any(name.endswith("bias") for name, _ in SwiGLU(32).named_parameters())
