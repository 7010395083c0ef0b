"""From a published file to its numbers, in one command."""

import json
import logging

import numpy as np
import pytest
from conftest import GOLDEN, ROOT, refusal, small_vae, succeed
from hydra import compose, initialize_config_dir

from ddt.generation.image_set import image_set
from ddt.generation.load import SAMPLER_KEYS
from ddt.sampling.settings import SamplerSettings

pytestmark = pytest.mark.usefixtures("one_thread")


def preset(name):
    with initialize_config_dir(str(ROOT / "conf" / "sample"), version_base="1.3"):
        return compose("sample", overrides=[f"experiment={name}"])


@pytest.mark.parametrize(("name", "scale", "fid"), [("published_xl_256", 2.0, 1.26), ("published_xl_512", 3.0, 1.28)])
def test_the_presets_are_the_published_sampler(name, scale, fid):
    config = preset(name)
    given = {key: config[key] for key in SAMPLER_KEYS if config[key] != "checkpoint"}
    settings = SamplerSettings(solver=config.sampler, **given)
    assert settings == SamplerSettings(cfg_scale=scale, cfg_interval=[0.3, 1.0])
    assert (config.dtype, config.published.fid, config.num_samples) == ("bf16", fid, 50_000)
    images = image_set(1000, num_samples=config.num_samples)
    assert {images.classes.count(c) for c in range(0, 1000, 111)} == {50}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("published={fdi:1.2}", "published.fdi: no such setting; did you mean published.fid?"),
        ("num_samples=1", "num_samples=1: statistics need at least 2 images"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_before_drawing(arguments, tmp_path, change, message):
    assert refusal("sample", *arguments, change).startswith(message)
    assert not (tmp_path / "set").exists()


def test_unknown_metrics_are_named():
    line = refusal("sample", "ckpt=x", "reference=y", "published={fdi:1.2}")
    assert line == "published: fdi: no such metric; choose from fid, sfid, inception_score, precision, recall"


@pytest.fixture
def arguments(tmp_path, inception_weights):
    pictures = np.random.default_rng(0).integers(0, 256, (12, 32, 32, 3), dtype=np.uint8)
    np.savez(tmp_path / "reference.npz", arr_0=pictures)
    return [
        "experiment=published_xl_256",
        f"released={GOLDEN / 'tiny.weights.safetensors'}",
        "encoder_depth=3",
        f"ckpt={tmp_path / 'converted'}",
        f"out={tmp_path / 'set'}",
        f"autoencoder={small_vae(tmp_path / 'vae')}",
        f"reference={tmp_path / 'reference.npz'}",
        f"inception_weights={inception_weights}",
        "num_samples=7",
        "num_steps=2",
        "dtype=fp32",
    ]


def test_the_preset_converts_samples_evaluates_and_compares(arguments, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    succeed("sample", *arguments)
    assert np.load(tmp_path / "set" / "samples.npz")["arr_0"].shape == (7, 256, 256, 3)
    metrics = json.loads((tmp_path / "set" / "metrics.json").read_text())
    assert metrics["receipt"]["sampling"]["request"]["sampler"]["cfg_interval"] == [0.3, 1.0]
    (row,) = [line.split("|")[1:-1] for line in caplog.text.splitlines() if line.startswith("| fid ")]
    label = metrics["labels"]["fid"]
    assert [cell.strip() for cell in row[:3]] == ["fid", f"{metrics['fid']:.3f} ({label})", "1.260"]
    assert "- measured: 7 samples instead of 50,000" in caplog.text
    before = (tmp_path / "set" / "samples.npz").read_bytes()
    assert "was converted with encoder_depth=3" in refusal("sample", *arguments, "encoder_depth=4")
    (tmp_path / "set" / "metrics.json").unlink()
    succeed("sample", *arguments)  # after a kill during the evaluation: nothing is converted or drawn again
    assert json.loads((tmp_path / "set" / "metrics.json").read_text())["fid"] == metrics["fid"]
    assert (tmp_path / "set" / "samples.npz").read_bytes() == before


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("reference=nowhere.npz", "reference=nowhere.npz: no such file"),
        ("inception_weights=nowhere.pth", "inception_weights=nowhere.pth: no such file"),
        ("resolution=300", "resolution=300: published models exist at 256 and 512 px"),
        ("released=nowhere.ckpt", "released=nowhere.ckpt: no such file or folder"),
        ("encoder_depth=9", "encoder_depth=9"),
        ("recompute=[1]", "recompute=[1]: step 0 must be among them"),
        ("guide=nowhere", "nowhere: no such folder"),
    ],
)
def test_wrong_input_is_one_line_before_anything_is_written(arguments, tmp_path, argument, message):
    (line,) = refusal("sample", *arguments, argument).splitlines()
    assert message in line
    assert not (tmp_path / "converted").exists()
    assert not (tmp_path / "set").exists()
