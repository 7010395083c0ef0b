"""The base head: a second output layer after a block of the encoder."""

import pytest
import torch
import torch.nn.functional as F
from conftest import SHARING, inputs, small_network

import ddt
from ddt.checkpoint.published import check_releasable
from ddt.errors import UserError
from ddt.model import build_network, load_network

pytestmark = pytest.mark.usefixtures("one_thread")


def base_by_hand(model, x, t, y, depth):
    """The base velocity from the encoder's parts, after `depth` blocks."""
    dh = isinstance(model, ddt.DiTDH)
    encoder, head = model.encoder, model.base_head
    at = encoder.positions(x)
    t_emb = encoder.t_embedder(1 - t if dh else t)[:, None]
    c = F.silu(t_emb + encoder.y_embedder(y)[:, None])
    h = encoder.input(x) + (0 if at.table is None else at.table)
    for block in encoder.blocks[:depth]:
        h = block(h, F.silu(c) if dh else c, at)
    z = F.silu(t_emb + h)
    shift, scale = head.adaln(F.silu(z) if dh else z).chunk(2, dim=-1)
    patches = head.linear(head.norm(z) * (1 + scale) + shift)  # (B, 16, 2·2²)
    grid = patches.unflatten(1, (4, 4)).unflatten(-1, (2, 2, 2)).permute(0, 3, 1, 4, 2, 5).reshape(x.shape)
    return -grid if dh else grid


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("case", SHARING)
def test_both_velocities_and_the_hidden_layer_come_from_one_forward(case, depth):
    model = small_network(case, base_depth=depth)
    x, t, y = inputs()
    v, base, hidden = model.forward_with_base(x, t, y, 1)
    assert torch.equal(v, model(x, t, y))
    assert torch.equal(hidden, model.forward_with_hidden(x, t, y, 1)[1])
    torch.testing.assert_close(base, base_by_hand(model, x, t, y, depth))


@pytest.mark.parametrize("case", SHARING)
def test_the_other_weights_start_as_without_it_and_the_base_velocity_at_zero(case):
    kind, sizes = SHARING[case]
    arguments = dict(in_channels=2, patch_size=2, hidden_size=32, num_heads=2, depth=3, encoder_depth=2, num_classes=5)
    states = []
    for depths in ({}, {"base_depth": 2}):
        torch.manual_seed(0)
        network = kind(**(arguments | sizes | depths))
        states.append(network.state_dict())
    head = {name for name in states[1] if name.startswith("base_head.")}
    assert head == states[1].keys() - states[0].keys() != set()
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert not network.forward_with_base(*inputs())[1].any()


def test_settings_rebuild_it_strictly():
    settings = {"_target_": "ddt.model.DDT", "in_channels": 2, "patch_size": 2, "hidden_size": 32, "num_heads": 2,
                "depth": 3, "encoder_depth": 2, "num_classes": 5}  # fmt: skip
    state = build_network({**settings, "base_depth": 1}).state_dict()
    assert load_network({**settings, "base_depth": 1}, state).base_depth == 1
    with pytest.raises(UserError, match=r"base_head.*: the model has no such weights"):
        load_network(settings, state)
    del state["base_head.linear.bias"]
    with pytest.raises(UserError, match=r"base_head\.linear\.bias are missing"):
        load_network({**settings, "base_depth": 1}, state)


@pytest.mark.parametrize("depth", [0, 3, -1])
@pytest.mark.parametrize("case", SHARING)
def test_a_depth_outside_the_encoder_is_refused(case, depth):
    with pytest.raises(UserError, match=rf"objective\.base_depth={depth}: .* choose 1\.\.2"):
        small_network(case, base_depth=depth)


def test_without_it_there_is_no_base_velocity():
    for network in (small_network("ddt"), ddt.DiT(2, 2, 32, 2, 3, 5)):
        with pytest.raises(UserError, match="no base head"):
            network.forward_with_base(*inputs())


@pytest.mark.parametrize("kind", ["DDT", "DiTDH"])
def test_the_published_format_has_no_place_for_it(kind):
    network = {"_target_": f"ddt.model.{kind}", "patch_size": 1, "hidden_size": 32, "base_depth": 2}
    with pytest.raises(UserError, match=r"objective\.base_depth=2: .*format=hub"):
        check_releasable(network)
