"""The network against the golden numbers of the release, and its properties."""

import pytest
import torch
from conftest import GOLDEN, ROOT, SHARING, SMALL, inputs, small_ddt, small_network
from omegaconf import OmegaConf
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode

import ddt
from ddt.errors import UserError
from ddt.model import build_network, network_class
from ddt.model.layers import Block
from ddt.objective.flow_matching import velocity_loss
from scripts.benchmark.golden import BF16_ERROR, CASES, GRADIENT_TOLERANCE, NETWORKS, TOLERANCE, case
from scripts.benchmark.golden import network as golden_network


@pytest.mark.parametrize(("name", "i"), CASES)
def test_network_matches_the_release(name, i):
    model, io = golden_network(name), case(name, i)
    z = model.encode(io["x"], io["t"], io["y"])
    torch.testing.assert_close(z, io["z"], **TOLERANCE)
    torch.testing.assert_close(model(io["x"], io["t"], io["y"]), io["v"], **TOLERANCE)
    torch.testing.assert_close(model.decode(io["x_shared"], z), io["v_shared"], **TOLERANCE)

    loss = (model(io["x"], io["t"], io["y"]) - io["target"]).square().mean()
    loss.backward()
    torch.testing.assert_close(loss, io["loss"], **TOLERANCE)
    settings = {"encoder_depth": len(model.encoder.blocks)}
    parameters = {model.release.published_name(name, settings): p for name, p in model.named_parameters()}
    norms = {k.removeprefix("gradnorm."): v for k, v in io.items() if k.startswith("gradnorm.")}
    assert len(norms) == len(parameters)
    for key, norm in norms.items():
        gradient = parameters[key].grad
        torch.testing.assert_close(gradient.norm(), norm, **GRADIENT_TOLERANCE, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize("name", NETWORKS)
def test_bf16_autocast_stays_near_the_release(name):
    model, io = golden_network(name), case(name, 0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        v = model(io["x"], io["t"], io["y"])
    assert v.dtype == torch.bfloat16
    for reference in ("v", "v_bf16"):
        error = (v.float() - io[reference].float()).square().mean().sqrt()
        assert 0 < error <= BF16_ERROR * io["v"].square().mean().sqrt()


def test_undivided_baseline_matches_the_release_and_has_no_encoder():
    model = ddt.load_released(GOLDEN / "baseline.weights.safetensors", encoder_depth=None)
    io = load_file(GOLDEN / "baseline.io.safetensors")
    assert isinstance(model, ddt.DiT)
    torch.testing.assert_close(model(io["x"], io["t"], io["y"]), io["v"], **TOLERANCE)
    x, t, y = inputs(channels=4)
    for call in (lambda: model.encode(x, t, y), lambda: model.decode(x, x), lambda: model.modulations(x)):
        with pytest.raises(UserError, match="DiT has no"):
            call()
    assert ddt.sample(model, x, y, num_steps=2).shape == x.shape


def test_parameter_counts_are_those_of_the_release(golden):
    counts = golden["param_counts"] | golden["baseline_param_counts"]
    assert len(counts) == 6
    for name, expected in counts.items():
        settings = OmegaConf.load(ROOT / "conf" / "model" / f"{name}.yaml")
        with torch.device("meta"):
            model = build_network({**settings, "in_channels": 4, "num_classes": 1000})
        assert sum(p.numel() for p in model.parameters()) == expected, name


def test_any_size_that_the_patch_divides():
    model = small_ddt()
    for height, width in ((2, 2), (4, 10), (12, 6)):
        x, t, y = inputs(height=height, width=width)
        assert model(x, t, y).shape == x.shape
        assert model.encode(x, t, y).shape == (3, height * width // 4, 32)
    with pytest.raises(UserError, match=r"model\.patch_size=2 does not divide the latent size 5×8"):
        model(*inputs(height=5))


@pytest.mark.parametrize("case", SHARING)
def test_forward_is_decode_of_encode_in_either_mode_and_no_sample_sees_another(case):
    model = small_network(case)
    x, t, y = inputs()
    v = model.train()(x, t, y)
    assert torch.equal(v, model.eval()(x, t, y))
    assert torch.equal(v, model.decode(x, model.encode(x, t, y)))
    torch.testing.assert_close(model(x[1:2], t[1:2], y[1:2]), v[1:2])
    assert not [name for name, _ in model.decoder.named_parameters() if "embedder" in name]  # time only through z_t


@pytest.mark.parametrize("model", [*SHARING, "dit"])
def test_the_hidden_layer_is_the_output_of_the_block_counted_from_one(model):
    if model == "dit":
        network = ddt.DiT(in_channels=2, patch_size=2, hidden_size=32, num_heads=2, depth=3, num_classes=5)
    else:
        network = small_network(model)
    x, t, y = inputs()
    blocks, outputs = network.blocks if model == "dit" else network.encoder.blocks, []
    for block in blocks:
        block.register_forward_hook(lambda _, __, output: outputs.append(output))
    for depth in range(1, len(blocks) + 1):
        outputs.clear()
        v, hidden = network.forward_with_hidden(x, t, y, depth)
        assert torch.equal(hidden, outputs[depth - 1])
        assert torch.equal(v, network(x, t, y))


@pytest.mark.parametrize("kind", [ddt.DDT, ddt.DiT, ddt.DiTDH])
def test_stacks_hold_all_blocks_in_order_and_the_label_table_is_named(kind):
    """Sharding, compiling and the estimate see the blocks that a family names, and no others."""
    depths = {"encoder_depth": 2} if kind.shares_encoder else {}
    network = kind(in_channels=2, patch_size=2, hidden_size=32, num_heads=2, depth=3, num_classes=5, **depths)
    assert network.all_blocks == [module for module in network.modules() if isinstance(module, Block)]
    assert network.get_parameter(network.label_table).shape == (6, 32)


@pytest.mark.parametrize(
    ("case", "changes", "dtype"),
    [
        ("ddt", {}, torch.bfloat16),
        *(
            pytest.param(case, changes, dtype, marks=pytest.mark.slow if dtype == torch.bfloat16 else ())
            for case, changes in (("ddt", {"decoder_block": "conv"}), ("ditdh", {}))
            for dtype in (torch.float32, torch.bfloat16)
        ),
        pytest.param("ddt", {}, torch.float32, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_activation_checkpointing_gives_the_same_gradients(case, changes, dtype):
    x, t, y = inputs()
    noise = torch.randn_like(x)
    gradients, flops, norms = {}, {}, {}
    for checkpointing in (False, True, "selective"):
        model = small_network(case, **changes, activation_checkpointing=checkpointing)
        norms[checkpointing] = 0
        for each in (*model.encoder.blocks, *model.decoder.blocks):
            each.norm1.register_forward_hook(lambda *_, key=checkpointing: norms.update({key: norms[key] + 1}))
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            loss = velocity_loss(model(x, t, y), x - noise).mean()
        with FlopCounterMode(display=False) as counter:  # recomputation included
            loss.backward()
        gradients[checkpointing] = [p.grad for p in model.parameters() if p.requires_grad]
        flops[checkpointing] = counter.get_total_flops()
    for checkpointing in (True, "selective"):
        assert all(map(torch.equal, gradients[False], gradients[checkpointing]))
    assert norms == {False: 3, True: 6, "selective": 6}
    assert flops["selective"] == flops[False] < flops[True]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "changes"),
    [("ddt", {}), ("ditdh", {}), *(("ddt", {"decoder_block": block}) for block in ("conv", "mlp"))],
    ids=str,
)
def test_compiles_as_one_graph(case, changes):
    model = small_network(case, **changes, depth=2, encoder_depth=1)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for height, width in ((8, 8), (4, 10)):
        x, t, y = inputs(height=height, width=width)
        torch.testing.assert_close(compiled(x, t, y), model(x, t, y))


def reach(block):
    """Which of the decoder's 5×5 output tokens change with one token of x_t at the same z_t."""
    model = small_ddt(decoder_block=block, encoder_depth=2, depth=3)
    x, t, y = inputs(height=10, width=10)
    z = model.encode(x, t, y)
    moved = x.clone()
    moved[:, :, 4:6, 4:6] += 1
    changed = (model.decode(moved, z) - model.decode(x, z)).abs().amax(dim=(0, 1))
    return changed.unflatten(0, (5, 2)).unflatten(2, (5, 2)).amax(dim=(1, 3)) > 1e-7


def test_decoder_blocks_mix_what_their_names_say():
    expected = torch.zeros(5, 5, dtype=torch.bool)
    expected[2, 2] = True
    assert torch.equal(reach("mlp"), expected)
    expected[1:4, 1:4] = True
    assert torch.equal(reach("conv"), expected)
    assert reach("attention").all()


def test_new_network_predicts_zero_and_adaln_can_start_at_zero():
    x, t, y = inputs()
    sizes = dict(in_channels=2, patch_size=2, hidden_size=32, num_heads=2, depth=3, encoder_depth=2, num_classes=5)
    release, zero = ddt.DDT(**sizes), ddt.DDT(**sizes, adaln_init="zero")
    assert not release(x, t, y).any()
    assert release.encoder.blocks[0].adaln.weight.any()
    dit = ddt.DiT(**{k: v for k, v in sizes.items() if k != "encoder_depth"}, adaln_init="zero")
    for network in (zero, dit):
        for name, parameter in network.named_parameters():
            if ".adaln." in name:
                assert not parameter.any(), name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder_depth": 0}, r"model\.encoder_depth=0 .* choose 1\.\.2"),
        ({"encoder_depth": 3}, r"model\.encoder_depth=3 .* choose 1\.\.2"),
        ({"num_heads": 3}, r"model\.num_heads=3 does not divide model\.hidden_size=32"),
        ({"num_heads": 16}, r"model\.num_heads=16 gives heads of width 2"),
        ({"patch_size": 0}, r"model\.patch_size=0: must be at least 1"),
        ({"decoder_hidden_size": 0}, r"model\.decoder_hidden_size=0: must be at least 1"),
        ({"decoder_hidden_size": 33}, r"model\.decoder_num_heads=2 does not divide model\.decoder_hidden_size=33"),
        ({"decoder_num_heads": 16}, r"model\.decoder_num_heads=16 gives heads of width 2"),
    ],
)
def test_impossible_sizes_are_named(changes, message):
    for kind in (ddt.DDT, ddt.DiTDH):
        with pytest.raises(UserError, match=message):
            kind(**(SMALL | changes))


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("kind", ["ddt.model.DDT", "ddt.model.DiT", "ddt.model.DiTDH"])
def test_capabilities_of_a_network(kind, wide):
    """What sharing, alignment and cost read of a network, in place of its class."""
    sizes = dict(in_channels=2, patch_size=2, hidden_size=32, num_heads=2, depth=3, num_classes=5)
    halves = {} if kind == "ddt.model.DiT" else {"encoder_depth": 2, "decoder_hidden_size": 48 if wide else None}
    model = build_network({"_target_": kind, **sizes, **halves})
    assert network_class({"_target_": kind}).shares_encoder == model.shares_encoder == bool(halves)
    assert model.num_alignable_blocks == (2 if halves else 3)
    assert [getattr(model, key) for key in ("in_channels", "patch_size", "hidden_size", "num_classes")] == [2, 2, 32, 5]
    if not model.shares_encoder:
        return
    z = torch.randn(3, 16, 32)
    computed = model.modulations(z)
    assert len(computed) == len(model.modulation_layers) == 2  # the decoder's block and its output layer
    c = model.condition(z)
    assert torch.equal(c, z) == (kind == "ddt.model.DDT" and not wide)
    assert all(torch.equal(m, layer(c)) for m, layer in zip(computed, model.modulation_layers, strict=True))
    assert len(model.modulations(z, max_bytes=computed[0].nbytes)) == 1
