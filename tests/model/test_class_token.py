"""A class token in the latents: the golden numbers of REG, and what holds for each network."""

import functools

import pytest
import torch
import torch.nn.functional as F
from conftest import SHARING, inputs, small_network
from rae import CLOSE, golden
from torch import nn

import ddt
from ddt.errors import UserError
from ddt.model import layers
from ddt.model.class_token import join_token, split_token, token_rows
from ddt.model.ddt import Encoding
from ddt.model.ditdh import STYLE, DHDecoder, DHEncoder, DiTDH
from ddt.objective import REG, FlowMatching

pytestmark = pytest.mark.usefixtures("one_thread")
NORMED = layers.Style(bias=True, qk_norm=True, rms_output=True, rotation=STYLE.rotation)


class InContextEncoder(DHEncoder):
    """The golden network's: no adaLN, no table, but tokens of time and class behind the others."""

    def __init__(self, *sizes, class_token):
        super().__init__(*sizes, style=NORMED, class_token=class_token)
        self.time_tokens, self.label_tokens = (nn.Parameter(torch.zeros(n, self.hidden_size)) for n in (4, 8))

    def forward(self, x_t, t, y, depths=()):
        t_emb = self.t_embedder(1 - t)[:, None]
        at = self.positions(x_t)._replace(table=None)
        h = self.tokens(x_t, at)
        count = h.shape[1]
        h = torch.cat([h, t_emb + self.time_tokens, self.y_embedder(y)[:, None] + self.label_tokens], dim=1)
        at = at._replace(cos=F.pad(at.cos, (0, 0, 0, 12), value=1.0), sin=F.pad(at.sin, (0, 0, 0, 12)))
        plain = torch.tensor([0.0, 0, 1, 0, 0, 1]).repeat_interleave(self.hidden_size)  # shifts, scales, gates
        for block in self.blocks:
            h = block(h, t_emb, at, plain)
        return Encoding(F.silu(t_emb + h[:, :count]), t_emb, [])


def ours(name):
    """Our name of a golden weight, and the place of its part where ours joins several."""
    joined = {"q": "qkv", "k": "qkv", "v": "qkv", "w1": "w12", "w2": "w12"}
    half, parts = "encoder", name.split(".")
    if parts[0] == "blocks":
        number = int(parts[1])
        half, number = ("encoder", number) if number < 4 else ("decoder", number - 4)
        part = parts[3].replace("adaln_modulation", "adaln") if len(parts) > 3 else ""
        if parts[2] in ("attn", "mlp") and part in joined:
            parts[3] = joined[part]
        place = {"attn": "mixer", "adaln_modulation": "adaln"}.get(parts[2], parts[2])
        tail = [each for each in parts[3:] if each != "1"]
        return ".".join([half, "blocks", str(number), place, *tail]), "qkvw1w2".find(part) if part in joined else 0
    short = {
        "s_embedder": "encoder.input", "x_embedder": "decoder.input", "s_projector": "decoder.projector",
        "t_embedder.learnable_tokens": "encoder.time_tokens", "ctx_embedder.learnable_tokens": "encoder.label_tokens",
        "t_embedder": "encoder.t_embedder", "ctx_embedder": "encoder.y_embedder",
        "final_layer.adaln_modulation.1": "decoder.output.adaln",
        "final_layer.cls_linear": "decoder.output.token_linear",
        "final_layer": "decoder.output",
        "cls_in_proj_enc": "encoder.token_input.proj", "cls_in_norm_enc": "encoder.token_input.norm",
        "cls_in_proj_dec": "decoder.token_input.proj", "cls_in_norm_dec": "decoder.token_input.norm",
    }  # fmt: skip
    start = next(each for each in short if name.startswith(each))
    return short[start] + name.removeprefix(start), 0


@functools.cache
def in_context():
    """The golden network of REG, its weights under our names."""
    model = DiTDH(12, 1, 32, 4, 6, 4, 7, decoder_hidden_size=64, class_token=20)
    model.encoder = InContextEncoder(12, 1, 32, 4, 4, 7, class_token=20)
    model.decoder = DHDecoder(12, 1, 32, 64, 4, 2, style=NORMED, class_token=20)
    joined = {}
    for name, value in golden("reg").items():
        if name.startswith("model.") and "rope" not in name:
            new, place = ours(name.removeprefix("model."))
            joined.setdefault(new, {})[place] = value.flatten(1) if new.endswith("input.proj.weight") else value
    state = {name: torch.cat([parts[k] for k in sorted(parts)]) for name, parts in joined.items()}
    unused = {f"encoder.blocks.{k}.adaln.{kind}" for k in range(4) for kind in ("weight", "bias")}
    missing, surplus = model.load_state_dict(state, strict=False)
    assert set(missing) == unused
    assert not surplus
    return model.eval()


def test_golden_velocities_of_image_and_token():
    io, model = golden("reg"), in_context()
    x_t = join_token(io["x"], io["cls"])
    with torch.no_grad():
        image, token = split_token(model(x_t, 1 - io["tau"], io["y"]), 20)
    torch.testing.assert_close(image, -io["v"], **CLOSE)
    torch.testing.assert_close(token, -io["v_cls"], **CLOSE)


def test_golden_losses():
    io = golden("reg")
    latents, noise = join_token(io["data"], io["cls_clean"]), join_token(io["eps"], io["eps_cls"])
    losses = REG(in_context(), timeshift=3.0)(latents, io["y"], noise, -io["normal"], torch.ones(3))
    torch.testing.assert_close(losses["errors"], io["loss"], **CLOSE)
    torch.testing.assert_close(0.03 * losses["token_loss"], io["loss_reg"][0], **CLOSE)
    torch.testing.assert_close(losses["loss"], io["loss"].mean() + io["loss_reg"][0], **CLOSE)


def test_a_token_is_what_was_joined():
    for channels, width, count, rows in ((3, 4, 12, 1), (3, 4, 13, 2), (2, 5, 1, 1)):
        image, token = torch.randn(2, channels, 3, width), torch.randn(2, count)
        latents = join_token(image, token)
        assert token_rows(count, channels, width) == rows
        assert latents.shape == (2, channels, 3 + rows, width)
        for found, expected in zip(split_token(latents, count), (image, token), strict=True):
            assert torch.equal(found, expected)
        assert latents[:, :, 3:].flatten(1)[:, count:].abs().sum() == 0


@pytest.mark.parametrize("case", SHARING)
def test_image_and_token_see_each_other_and_nothing_else(case):
    model = small_network(case, patch_size=1, class_token=7)
    x, t, y = inputs(height=4, width=4)
    token = torch.randn(3, 7)
    latents = join_token(x, token)
    with torch.no_grad():
        v, v_token = split_token(model(latents, t, y), 7)
        other_token, other_image = join_token(x, 2 * token), join_token(2 * x, token)
        assert (split_token(model(other_token, t, y), 7)[0] - v).abs().max() > 1e-4
        assert (split_token(model(other_image, t, y), 7)[1] - v_token).abs().max() > 1e-4
        noisy = latents.clone()
        noisy[:, 1, 4, 3] = 9.0  # behind the token's seven numbers
        output = model(noisy, t, y)
        assert torch.equal(output, join_token(v, v_token))
        assert model.encode(latents, t, y).shape == (3, 17, 32)


@pytest.mark.parametrize("case", SHARING)
def test_sharing_at_every_step_is_none_and_the_token_moves_while_z_stays(case):
    model = small_network(case, patch_size=1, class_token=7)
    y, noise = torch.arange(3), torch.randn(3, 2, 5, 4, generator=torch.Generator().manual_seed(0))
    settings = dict(num_steps=6, cfg_scale=2.0, cfg_interval=None, last_step=None)
    plain = ddt.sample(model, noise, y, **settings)
    torch.testing.assert_close(ddt.sample(model, noise, y, recompute=range(6), **settings), plain)
    held = ddt.sample(model, noise, y, recompute=[0], **settings)
    torch.testing.assert_close(ddt.sample(model, noise, y, recompute=[0], cache_bytes=0, **settings), held)
    for found in split_token(held - plain, 7):
        assert found.abs().max() > 1e-4
    assert torch.equal(plain[:, 1, 4, 3], noise[:, 1, 4, 3])  # what fills the rows up stays


def test_what_cannot_have_a_token_is_refused():
    for changes, line in (
        ({"patch_size": 2}, r"model\.patch_size=2: with a class token"),
        ({"decoder_block": "conv"}, r"model\.decoder_block=conv: a class token"),
        ({"base_depth": 1}, r"objective\.base_depth=1: a class token has no base head"),
        ({"class_token": -1}, r"model\.class_token=-1"),
    ):
        with pytest.raises(UserError, match=f"^{line}"):
            small_network("ddt", **{"patch_size": 1, "class_token": 7, **changes})
    with pytest.raises(UserError, match="give objective=reg"):
        FlowMatching(small_network("ddt", patch_size=1, class_token=7))
    with pytest.raises(UserError, match=r"^objective=reg: .*class_token=true"):
        REG(small_network("ddt"))


def test_validation_is_of_the_image_alone():
    io, model = golden("reg"), in_context()
    latents, noise = join_token(io["data"], io["cls_clean"]), join_token(io["eps"], io["eps_cls"])
    validated = REG(model, label_dropout=1.0, timeshift=3.0, token_weight=2.0).for_validation(model)
    losses = validated(latents, io["y"], noise, -io["normal"], torch.zeros(3))
    torch.testing.assert_close(losses["errors"], io["loss"], **CLOSE)
    torch.testing.assert_close(losses["loss"], losses["fm_loss"] + 2 * losses["token_loss"])
