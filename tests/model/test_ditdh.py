"""DiT^DH against the numbers of RAE's public code on random weights; sizes, names, conversion."""

import json

import pytest
import torch
from conftest import ROOT, inputs, small_network, train_settings
from omegaconf import OmegaConf
from rae import CLOSE, RAE, golden, network, normal_of, shifted, weights

import ddt
from ddt.flow import TrainingTimes, dimension_timeshift, time_grid
from ddt.model import build_network
from ddt.model.layers import integer_rope_table, sincos_table
from ddt.objective import FlowMatching
from ddt.sampling.settings import SamplerSettings
from ddt.training.run import with_timeshift

pytestmark = pytest.mark.usefixtures("one_thread")
KEYS = json.loads((RAE / "published_keys.json").read_text())


def test_velocity_and_self_condition(tmp_path):
    io, model = golden("network"), network(tmp_path)
    assert isinstance(model, ddt.DiTDH)
    t = 1 - io["tau"]
    z = model.encode(io["x"], t, io["y"])
    torch.testing.assert_close(z, io["z"], **CLOSE)
    torch.testing.assert_close(model(io["x"], t, io["y"]), -io["v"], **CLOSE)
    torch.testing.assert_close(model.decode(io["x_other"], z), -io["v_shared"], **CLOSE)
    kept = model.modulations(z)
    torch.testing.assert_close(model.decode(io["x_other"], z, kept), -io["v_shared"], **CLOSE)


def test_halves_of_equal_width(tmp_path):
    io, model = golden("network_equal_width"), network(tmp_path, "network_equal_width", encoder_depth=2)
    torch.testing.assert_close(model(io["x"], 1 - io["tau"], io["y"]), -io["v"], **CLOSE)
    assert not [name for name in model.state_dict() if "projector" in name]


def test_loss_and_gradients(tmp_path):
    io, model = golden("training"), network(tmp_path)
    objective = FlowMatching(model, label_dropout=0.0, t_min=0.001, timeshift=2.0)
    found = objective(io["data"], io["labels"], io["eps"], normal_of(io["u_loss"]), torch.ones(3))
    torch.testing.assert_close(found["errors"], io["loss"], **CLOSE)
    found["loss"].backward()
    gradient = model.decoder.output.linear.weight.grad
    torch.testing.assert_close(gradient, io["grad_final_linear"], rtol=1e-4, atol=1e-6)
    gradient = model.encoder.input.proj.weight.grad
    torch.testing.assert_close(gradient, io["grad_s_embedder"].flatten(1), rtol=1e-4, atol=1e-6)
    assert model.encoder.t_embedder.W.grad is None  # frozen


def test_training_times():
    io = golden("training")
    for name, distribution in (("", "lognorm"), ("_uniform", "uniform")):
        t = TrainingTimes(distribution, 0.001, 2.0).of(normal_of(io[f"u{name}"]))
        torch.testing.assert_close(1 - t, io[f"times{name}"], rtol=1e-4, atol=1e-6)


def test_fixed_tables_are_those_of_the_files():
    state = weights()
    assert torch.equal(sincos_table(32, 4, 4)[0], state["pos_embed"][0])
    for half, head_dim in (("enc", 8), ("dec", 16)):
        for kind, table in zip(("cos", "sin"), integer_rope_table(head_dim, 4, 4), strict=True):
            torch.testing.assert_close(table.repeat_interleave(2, 1), state[f"{half}_feat_rope.freqs_{kind}"])


def test_tables_of_a_grid_that_is_no_square():
    """Row and column are distinguished: a token has the values of a square grid at its place."""
    square, wide = sincos_table(16, 5, 5)[0].unflatten(0, (5, 5)), sincos_table(16, 3, 5)[0].unflatten(0, (3, 5))
    assert torch.equal(wide, square[:3])
    for whole, part in zip(integer_rope_table(8, 5, 5), integer_rope_table(8, 3, 5), strict=True):
        assert torch.equal(part.unflatten(0, (3, 5)), whole.unflatten(0, (5, 5))[:3])
    model = small_network("ditdh")
    assert model(*inputs(height=4, width=10)).shape == (3, 2, 4, 10)


def true_size(name, channels=768):
    settings = OmegaConf.load(ROOT / "conf" / "model" / f"{name}.yaml")
    with torch.device("meta"):
        return build_network({**settings, "in_channels": channels, "num_classes": 1000}), dict(settings)


@pytest.mark.parametrize(
    ("name", "parameters", "files"),
    [
        ("s_ditdh", 196_357_204, {"DiTDH-S 256": 16, "DiTDH-S 512": 32}),
        ("b_ditdh", 294_099_028, {"DiTDH-B 256 (assumed)": 16}),
        ("xl_ditdh", 838_380_628, {"DiTDH-XL 256": 16, "DiTDH-XL 512": 32}),
    ],
)
def test_published_sizes_and_names(name, parameters, files):
    model, settings = true_size(name)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == parameters
    assert [key for key, p in model.named_parameters() if not p.requires_grad] == ["encoder.t_embedder.W"]
    release = model.release
    for file, side in files.items():
        state = {release.published_name(key, settings): value for key, value in model.state_dict().items()}
        state = release.write(state, settings, (768, side, side))
        assert {key: list(value.shape) for key, value in state.items()} == KEYS[file]
        assert release.recognizes(state)
        assert release.latent_size(state, settings, file) == side
        found = release.settings(state, None, None, file)
        assert {key: found[key] for key in found.keys() & settings.keys()} == {
            key: settings[key] for key in found.keys() & settings.keys()
        }
        assert (found["in_channels"], found["num_classes"]) == (768, 1000)


@pytest.mark.slow
def test_a_training_step_of_s_at_true_size():
    """DiT^DH-S on two latents of 768×16×16, by the settings of the published recipe."""
    settings = train_settings("model=s_ditdh", "data=in256_rae", "data.root=x")
    objective, _ = with_timeshift(settings.objective, settings.sampler, dimension_timeshift((768, 16, 16)))
    torch.manual_seed(0)
    model = settings.model.build(in_channels=768, num_classes=1000)
    built = objective.build(denoiser=model)
    assert built.times.timeshift == pytest.approx(48**0.5)
    optimizer = settings.optimizer.build(named_parameters=built.named_parameters())
    frequencies = model.encoder.t_embedder.W.clone()
    data, noise = torch.randn(2, 2, 768, 16, 16)
    batch = (data, torch.tensor([3, 999]), noise, torch.randn(2), torch.tensor([0.05, 0.95]))  # one label is dropped
    before = built(*batch)
    torch.testing.assert_close(before["loss"], (data - noise).square().mean())  # a new network predicts 0
    before["loss"].backward()
    moving = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert moving == {"decoder.output.linear.weight", "decoder.output.linear.bias"}  # all else is behind a 0
    assert torch.nn.utils.clip_grad_norm_(model.parameters(), settings.trainer.clip_norm).isfinite()
    optimizer.step()
    assert built(*batch)["loss"] < before["loss"]
    assert torch.equal(model.encoder.t_embedder.W, frequencies)


def test_a_new_network_predicts_zero_and_its_frequencies_are_frozen():
    model = ddt.DiTDH(2, 2, 32, 2, 3, 2, 5, 48, 4)
    assert not model(*inputs()).any()
    zero = {name for name, parameter in model.named_parameters() if not parameter.any()}
    biases = {f"{half}.input.proj.bias" for half in ("encoder", "decoder")}
    layers = {name for name, _ in model.named_parameters() if ".adaln." in name or ".output.linear." in name}
    assert zero == layers | biases


# --- sampling


SAMPLING = dict(num_steps=7, last_step=None, t_end=0.999, timeshift=2.0)


def test_grids():
    io = golden("sampling")
    for name, steps, shape in (
        ("grid_256_50", 49, (768, 16, 16)), ("grid_256_25", 24, (768, 16, 16)), ("grid_512_50", 49, (768, 32, 32)),
    ):  # fmt: skip
        grid = torch.tensor(time_grid(steps, None, dimension_timeshift(shape), t_end=0.999))
        torch.testing.assert_close(1 - grid, io[name], rtol=1e-4, atol=1e-6)
    assert 1 - time_grid(49, None, dimension_timeshift((768, 16, 16)), 0.999)[-1] == pytest.approx(0.0068873, rel=1e-4)
    torch.testing.assert_close(1 - torch.tensor(time_grid(**SAMPLING)), io["grid"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("recompute", [None, list(range(7))])
def test_trajectories(tmp_path, recompute):
    """Sharing at every step is no sharing. The interval of τ is [0.2, 0.9], both ends included."""
    io, model, guide = golden("sampling"), network(tmp_path), network(tmp_path, "sampling", "guide.")
    noise, y = io["noise"], io["labels"]
    common = dict(SAMPLING, recompute=recompute)
    plain = ddt.sample(model, noise, y, cfg_scale=1.0, **common)
    torch.testing.assert_close(plain, io["plain"], **CLOSE)
    first = {**SAMPLING, "num_steps": 1, "t_end": 0.999 / 7}
    torch.testing.assert_close(ddt.sample(model, noise, y, cfg_scale=1.0, **first), io["plain_step1"], **CLOSE)
    cfg = ddt.sample(model, noise, y, cfg_scale=1.7, cfg_interval=(0.1, 0.8), **common)
    torch.testing.assert_close(cfg, io["cfg"], **CLOSE)
    auto = ddt.sample(model, noise, y, cfg_scale=1.42, cfg_interval=None, guide=guide, **common)
    torch.testing.assert_close(auto, io["autoguidance"], **CLOSE)


def test_the_published_interval_guides_at_every_step(tmp_path):
    """τ in [0, 1], both ends included, is cfg_interval=null: (0, 1) leaves pure noise out."""
    counts = {}
    io = golden("sampling")
    every, open_ends = (SamplerSettings(**SAMPLING, cfg_interval=interval) for interval in (None, (0.0, 1.0)))
    assert all(every.guidance().active(t) for t in every.grid())
    assert [open_ends.guidance().active(t) for t in open_ends.grid()] == [False] + 7 * [True]
    ddt.sample(network(tmp_path), io["noise"], io["labels"], cfg_interval=None, counts=counts, **SAMPLING)
    assert counts == {"encoder": 14, "decoder": 14, "cached_bytes": 0}  # two halves of each of 7 steps


def test_one_euler_step_ends_at_t_end(tmp_path):
    io, model = golden("sampling"), network(tmp_path)
    t = torch.zeros(3)
    v = model(io["noise"], t, io["labels"])
    end = 1 - shifted(torch.tensor(0.001), 2.0)
    one = ddt.sample(model, io["noise"], io["labels"], **{**SAMPLING, "num_steps": 1}, cfg_scale=1.0)
    torch.testing.assert_close(one, io["noise"] + end * v, rtol=1e-5, atol=1e-5)
