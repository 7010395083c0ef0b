"""iREPA against the golden numbers of its authors' code, and in training."""

import pytest
import torch
from conftest import GOLDEN
from safetensors.torch import load_file

from ddt.errors import UserError
from ddt.objective.irepa import IREPA, ConvProjector, IREPALoss, spatial_norm

CLOSE = dict(rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def io():
    return load_file(GOLDEN / "rae" / "irepa.safetensors")


@pytest.fixture(scope="module")
def projector(io):
    found = ConvProjector(32, 20, (4, 4), 3)
    found.conv.load_state_dict({"weight": io["weight"], "bias": io["bias"]})
    return found


def test_target_projector_and_loss(io, projector):
    torch.testing.assert_close(spatial_norm(io["features"], 0.6), io["target"], **CLOSE)
    torch.testing.assert_close(projector(io["hidden"]), io["projected"], **CLOSE)
    loss = IREPALoss(projector, 8, 1.0, (4, 4), (4, 4), mean_share=0.6)
    assert loss.features_shape == (16, 20)
    torch.testing.assert_close(loss(io["hidden"], io["features"]), 1 + io["loss"][0], **CLOSE)


def test_tokens_of_a_grid_that_is_no_square_stay_in_their_places():
    """A convolution that passes its centre alone gives each token back."""
    projector = ConvProjector(6, 6, (2, 3), 3)
    with torch.no_grad():
        projector.conv.weight.zero_()
        projector.conv.bias.zero_()
        projector.conv.weight[range(6), range(6), 1, 1] = 1.0
    hidden = torch.randn(2, 6, 6)
    assert torch.equal(projector(hidden), hidden)


@pytest.mark.parametrize(("change", "key"), [({"kernel_size": 2}, "kernel_size"), ({"mean_share": 1.5}, "mean_share")])
def test_impossible_settings_are_named(change, key):
    with pytest.raises(UserError, match=f"alignment.{key}="):
        IREPA("test_vit.r160_in1k", **change)
