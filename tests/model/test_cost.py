"""Counted cost: against torch's own counter, and the sizes and speeds of method.md."""

import contextlib
import dataclasses

import pytest
import torch
from conftest import ROOT, SHARING, inputs, small_ddt, small_network, thinned
from omegaconf import OmegaConf
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import ddt
from ddt.errors import UserError
from ddt.model import build_network
from ddt.model.cost import network_macs
from ddt.sampling.cost import sampling_macs
from ddt.sampling.sample import sample_latents
from ddt.sampling.settings import SamplerSettings
from scripts.benchmark.plain import PlainDDT, plain_sample

pytestmark = pytest.mark.usefixtures("one_thread")
PUBLISHED = SamplerSettings()  # 250 steps, w = 2.0 on (0.3, 1.0), last_step 0.04


@contextlib.contextmanager
def counted():
    """Count the MACs of a block; attention as two products, which the counter knows anywhere."""
    result = []
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        yield result
    result.append(counter.get_total_flops() / 2)


def network(name, channels=4):
    """A published network, on the meta device."""
    settings = OmegaConf.load(ROOT / "conf" / "model" / f"{name}.yaml")
    with torch.device("meta"):
        return build_network({**settings, "in_channels": channels, "num_classes": 1000})


@pytest.mark.parametrize(
    ("case", "changes"),
    [
        *(("ddt", {"decoder_block": block}) for block in ("attention", "conv", "mlp")),
        *(("ddt", changes) for changes in ({"patch_size": 4}, {"depth": 5, "hidden_size": 40})),
        ("wide ddt", {}),
        ("ditdh", {}),
        ("ditdh", {"depth": 5, "patch_size": 1}),
        *((case, {"patch_size": 1, "class_token": 40}) for case in ("ddt", "ditdh")),
    ],
    ids=str,
)
def test_a_forward_costs_what_torch_counts(case, changes):
    model = small_network(case, **changes)
    x, t, y = inputs(batch=1, height=8, width=16)
    with counted() as encoder:
        z = model.encode(x, t, y)
    with counted() as decoder:
        model.decode(x, z)
    with counted() as modulations:
        kept = model.modulations(z)
    with counted() as rest:
        model.decode(x, z, kept)
    macs = network_macs(model, 8, 16)
    assert dataclasses.astuple(macs) == (*encoder, *decoder, *modulations, 0)
    assert macs.total == encoder[0] + decoder[0]
    assert rest[0] == macs.decoder - macs.modulations


def test_the_baseline_costs_what_torch_counts():
    model = ddt.DiT(in_channels=2, patch_size=2, hidden_size=32, num_heads=2, depth=3, num_classes=5)
    x, t, y = inputs(batch=1)
    with counted() as whole:
        model(x, t, y)
    assert dataclasses.astuple(network_macs(model, 8, 8)) == (0, *whole, 0, 0)
    with counted() as macs:
        ddt.sample(model, x, y, num_steps=10)
    assert macs == [sampling_macs(model, 8, 8, SamplerSettings(num_steps=10))]
    with pytest.raises(UserError, match="DiT has no encoder to share"):
        sampling_macs(model, 8, 8, SamplerSettings(recompute="uniform:2"))


@pytest.mark.parametrize(
    ("name", "total", "encoder", "decoder"),
    [("b_8en4de", 26.9, 15.3, 11.6), ("l_20en4de", 87.6, 67.2, 20.4), ("xl_22en6de", 131.5, 93.2, 38.3)],
)
def test_published_networks_have_their_published_size(name, total, encoder, decoder):
    """method.md 2; L is 0.1 above its table, which leaves the encoder's adaLN out."""
    model = network(name)
    macs = network_macs(model, 32, 32)
    assert [round(each / 1e9, 1) for each in (macs.total, macs.encoder, macs.decoder)] == [total, encoder, decoder]
    with counted() as whole:
        model(
            torch.empty(1, 4, 32, 32, device="meta"),
            torch.empty(1, device="meta"),
            torch.empty(1, dtype=torch.long, device="meta"),
        )
    assert whole == [macs.total]


@pytest.mark.parametrize(
    ("name", "encoder", "decoder", "half", "most"),
    [("s_ditdh", 6.1, 42.3, 1.28, 1.54), ("b_ditdh", 23.1, 42.5, 1.42, 1.89), ("xl_ditdh", 118.8, 42.7, 1.71, 2.99)],
)
def test_bounds_of_ditdh_are_those_of_the_docs(name, encoder, decoder, half, most):
    model = network(name, 768)
    macs = network_macs(model, 16, 16)
    assert [round(each / 1e9, 1) for each in (macs.encoder, macs.decoder)] == [encoder, decoder]
    found = [
        macs.total / (macs.decoder + (1 - ratio) * macs.encoder - ratio * macs.modulations) for ratio in (0.5, 0.8)
    ]
    assert [round(each, 2) for each in found] == [half, most]


def speeds(model, recompute):
    """Speeds over the release without sharing: its own, with cached modulations, skipping too."""
    shared = dataclasses.replace(PUBLISHED, recompute=recompute)
    release = sampling_macs(model, 32, 32, PUBLISHED, cached=False, skip_unconditional=False)
    ways = ((False, False), (True, False), (True, True))
    return [release / sampling_macs(model, 32, 32, shared, *way) for way in ways]


def ideal_speeds(model, ratio, unguided=78 / 250):
    """The same for any share of the steps, where the edges of interval and segments coincide."""
    macs = network_macs(model, 32, 32)
    shared = macs.decoder + (1 - ratio) * macs.encoder
    cached = shared - ratio * macs.modulations
    return [macs.total / each for each in (shared, cached, cached * (1 - unguided / 2))]


@pytest.mark.parametrize(
    ("name", "ratio", "expected"),
    [
        ("xl_22en6de", 0.0, [1.0, 1.0, 1.18]),
        ("xl_22en6de", 0.80, [2.31, 2.82, 3.34]),
        ("xl_22en6de", 0.87, [2.61, 3.36, 3.98]),
        ("b_8en4de", 0.80, [1.84, 2.34, 2.77]),
    ],
)
def test_ideal_speeds_are_those_of_the_method(name, ratio, expected):
    """method.md 4, to its two decimals."""
    assert [round(speed, 2) for speed in ideal_speeds(network(name), ratio)] == expected


@pytest.mark.parametrize(
    ("name", "recompute", "expected"),
    [
        ("xl_22en6de", None, [1.0, 1.0, 1.18]),
        ("xl_22en6de", "uniform:5", [2.31, 2.82, 3.33]),
        ("xl_22en6de", "uniform:8", [2.62, 3.37, 3.97]),
        ("xl_22en6de", [step * 250 // 33 for step in range(33)], [2.60, 3.34, 3.95]),
        ("l_20en4de", "uniform:5", [2.59, 3.10, 3.66]),
        ("b_8en4de", "uniform:5", [1.84, 2.34, 2.76]),
    ],
    ids=str,
)
def test_speeds_on_the_real_grid(name, recompute, expected):
    """Up to 0.03 below the ideal: segments that reach into the interval encode both halves."""
    assert [round(speed, 2) for speed in speeds(network(name), recompute)] == expected


RUNS = [
    SamplerSettings(num_steps=10),
    SamplerSettings(num_steps=10, recompute="uniform:4"),
    SamplerSettings(num_steps=10, recompute=[0, 1, 2, 7]),  # segments of one step cache nothing
    SamplerSettings(num_steps=10, recompute="uniform:3", cfg_interval=(0.2, 0.6)),
    SamplerSettings(num_steps=10, recompute="uniform:3", cfg_steps=[4, 9]),
    SamplerSettings(num_steps=10, recompute="uniform:3", cfg_scale=1.0),
    SamplerSettings(num_steps=6, recompute="uniform:3", solver="heun"),
    SamplerSettings(num_steps=6, recompute="uniform:2", solver="midpoint", timeshift=2.0),
    SamplerSettings(num_steps=6, recompute="uniform:2", solver="sde"),
    SamplerSettings(num_steps=6, recompute="uniform:2", last_step=None, t_end=0.9, timeshift=2.0),
]
# a wide DDT's own cost is that of a forward, above
CASES = [pytest.param(case, marks=pytest.mark.slow if case == "wide ddt" else ()) for case in SHARING]


@pytest.mark.parametrize("settings", thinned(RUNS, 3), ids=str)
@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_a_run_costs_what_torch_counts(case, settings, cached):
    model = small_network(case)
    x, _, y = inputs(batch=1)
    with counted() as macs:
        sample_latents(model, x, y, settings, cache_bytes=2**30 if cached else 0)
    assert macs == [sampling_macs(model, 8, 8, settings, cached)]


@pytest.mark.parametrize("settings", RUNS[:6], ids=str)
def test_plain_sampling_gives_the_same_and_costs_what_torch_counts(settings):
    model = small_ddt()
    plain = PlainDDT(model)
    x, _, y = inputs()
    latents = plain_sample(plain, x, y, settings)
    torch.testing.assert_close(latents, sample_latents(model, x, y, settings), rtol=1e-4, atol=1e-5)
    with counted() as macs:
        plain_sample(plain, x[:1], y[:1], settings)
    assert macs == [sampling_macs(model, 8, 8, settings, cached=False, skip_unconditional=False)]


@pytest.mark.parametrize(
    ("run", "interval"),
    [  # every third run by default, with one of the intervals
        pytest.param(run, interval, marks=() if (number % 3, number // 3 % 2) == (0, which) else pytest.mark.slow)
        for number, run in enumerate(RUNS)
        for which, interval in enumerate([None, (0.1, 0.6)])
    ],
    ids=str,
)
@pytest.mark.parametrize("case", CASES)
def test_internal_guidance_costs_the_base_head_where_it_guides(case, run, interval):
    model = small_network(case, base_depth=1)
    x, t, y = inputs(batch=1)
    with counted() as whole:
        model.forward_with_base(x, t, y)
    cost = network_macs(model, 8, 8)
    assert [cost.total + cost.base] == whole
    settings = dataclasses.replace(run, internal_scale=1.5, internal_interval=interval)
    with counted() as macs:
        sample_latents(model, x, y, settings)
    assert macs == [sampling_macs(model, 8, 8, settings)]


def test_cost_unknown_beforehand_is_refused():
    model = small_ddt()
    with pytest.raises(UserError, match=r"model\.patch_size=2 does not divide the latent size 8×7"):
        network_macs(model, 8, 7)
    with pytest.raises(UserError, match="solver=adaptive: chooses its own steps"):
        sampling_macs(model, 8, 8, SamplerSettings(solver="adaptive"))
    with pytest.raises(UserError, match="recompute=dp:3: is fitted"):
        sampling_macs(model, 8, 8, SamplerSettings(num_steps=9, recompute="dp:3"))
    with pytest.raises(UserError, match="sampler=heun: plain sampling knows euler only"):
        plain_sample(PlainDDT(model), *inputs()[::2], SamplerSettings(solver="heun"))
