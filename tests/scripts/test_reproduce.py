"""From a published file to its numbers: scripts/reproduce.sh, and the sampler that it uses."""

import dataclasses
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from conftest import GOLDEN, ROOT, small_vae
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from ddt.config import parse
from ddt.generation.settings import SampleSettings
from ddt.model.published_ditdh import ReleasedDiTDH
from ddt.sampling.settings import SamplerSettings

REFERENCE = "the reference é.npz"


def reproduce(*arguments, cwd, **environment):
    """Run scripts/reproduce.sh in a folder; return the finished process."""
    return subprocess.run(
        ["bash", ROOT / "scripts" / "reproduce.sh", *map(str, arguments)],
        cwd=cwd, env={**os.environ, "PYTHON": sys.executable, **environment}, capture_output=True, text=True,
        timeout=600, check=False,
    )  # fmt: skip


@pytest.mark.parametrize(("name", "scale"), [("published_xl_256", 2.0), ("published_xl_512", 3.0)])
def test_the_presets_are_the_published_sampler(name, scale):
    with initialize_config_dir(str(ROOT / "conf" / "sample"), version_base="1.3"):
        values = OmegaConf.to_container(compose("sample", overrides=[f"experiment={name}"]))
    settings = parse(SampleSettings, values)
    anything_else = {"solver": "heun", "num_steps": 9, "cfg_scale": 7.0, "recompute": "uniform:3", "timeshift": 2.0}
    assert settings.resolve(anything_else, shares_encoder=True) == SamplerSettings(cfg_scale=scale)
    assert (settings.dtype, settings.num_samples) == ("bf16", 50_000)
    classes = settings.image_set(1000).classes
    assert {classes.count(c) for c in range(0, 1000, 111)} == {50}


@pytest.fixture
def place(tmp_path):
    """A folder with a reference, and a stand-in for Python that notes the commands; one that is
    asked to convert makes the folder.
    """
    (tmp_path / REFERENCE).touch()
    python = tmp_path / "python"
    python.write_text(
        f"""#!{sys.executable}
import json, pathlib, sys
name = pathlib.Path(sys.argv[1]).name
with open({str(tmp_path / "calls")!r}, "a") as file:
    file.write(json.dumps([name, *sys.argv[2:]]) + "\\n")
if name == "convert_checkpoint.py":
    folder = pathlib.Path(sys.argv[-1].removeprefix("out="))
    folder.mkdir(parents=True)
    (folder / "manifest.json").touch()
sys.exit(pathlib.Path("fails").exists() and name == pathlib.Path("fails").read_text())
"""
    )
    python.chmod(0o755)
    return tmp_path


def calls(place):
    """The commands since the last look, each as a list."""
    noted = [json.loads(line) for line in (place / "calls").read_text().splitlines()]
    (place / "calls").unlink()
    return noted


def test_the_chain_and_what_a_second_call_repeats(place):
    settings = ["num_processes=2", "batch_size=8", "inception_weights=w.pth"]
    done = reproduce("xl_512", REFERENCE, *settings, cwd=place, PYTHON=str(place / "python"))
    assert done.returncode == 0, done.stderr
    ckpt, out = "checkpoints/published_xl_512", "samples/published_xl_512"
    released = "released=MCG-NJU/DDT-XL-22en6de-R512"
    convert = ["convert_checkpoint.py", released, "encoder_depth=22", "resolution=512", f"out={ckpt}"]
    others = [
        ["sample.py", "experiment=published_xl_512", f"ckpt={ckpt}", "guide=null", f"out={out}", "num_processes=2",
         "batch_size=8"],
        ["evaluate.py", f"samples={out}", f"reference={REFERENCE}", "features=inception", "num_processes=2",
         "inception_weights=w.pth"],
        ["compare_metrics.py", f'metrics=["{out}"]',
         "published={fid:1.28,inception_score:305.1,precision:0.80,recall:0.63}"],
    ]  # fmt: skip
    assert calls(place) == [convert, *others]
    assert reproduce("xl_512", REFERENCE, *settings, cwd=place, PYTHON=str(place / "python")).returncode == 0
    assert calls(place) == others


@pytest.mark.parametrize("guided", [True, False])
def test_the_chain_of_a_model_with_a_guide(place, guided):
    """Without it, sampling is not guided at all: cfg_scale of the preset would be CFG."""
    unguided = [] if guided else ["guide=null"]
    done = reproduce("ditdh_xl_256", REFERENCE, *unguided, cwd=place, PYTHON=str(place / "python"))
    assert done.returncode == 0, done.stderr
    ckpt, guide = "checkpoints/published_ditdh_xl_256", "checkpoints/published_ditdh_s_256"
    out = "samples/published_ditdh_xl_256"
    converted = [["convert_checkpoint.py", "released=ditdh-xl-256", f"out={ckpt}"]]
    if guided:
        converted.append(["convert_checkpoint.py", "released=ditdh-s-256", f"out={guide}"])
    sample = ["sample.py", "experiment=published_ditdh_xl_256", f"ckpt={ckpt}"]
    sample += [f"guide={guide}", f"out={out}"] if guided else ["guide=null", f"out={out}", "cfg_scale=1"]
    evaluate = ["evaluate.py", f"samples={out}", f"reference={REFERENCE}", "features=inception"]
    published = "published={fid:1.13}" if guided else "published={fid:1.51}"
    assert calls(place) == [*converted, sample, evaluate, ["compare_metrics.py", f'metrics=["{out}"]', published]]


@pytest.mark.parametrize(("size", "scale"), [(256, 1.42), (512, 1.5)])
def test_the_presets_of_ditdh_are_the_published_sampler(size, scale):
    with initialize_config_dir(str(ROOT / "conf" / "sample"), version_base="1.3"):
        values = OmegaConf.to_container(compose("sample", overrides=[f"experiment=published_ditdh_xl_{size}"]))
    settings = parse(SampleSettings, values)
    anything_else = {"solver": "heun", "num_steps": 9, "cfg_scale": 7.0, "recompute": "uniform:3", "timeshift": 2.0}
    published = SamplerSettings(**ReleasedDiTDH().sampler((768, size // 16, size // 16)))
    found = settings.resolve(anything_else, shares_encoder=True)
    assert found.timeshift == pytest.approx(published.timeshift, rel=1e-8)
    assert dataclasses.replace(found, timeshift=1.0) == dataclasses.replace(published, cfg_scale=scale, timeshift=1.0)
    assert (settings.dtype, settings.num_samples) == ("fp32", 50_000)
    assert settings.guide == f"checkpoints/published_ditdh_s_{size}"


def test_a_failure_ends_the_chain(place):
    (place / "fails").write_text("sample.py")
    assert reproduce("xl_256", REFERENCE, cwd=place, PYTHON=str(place / "python")).returncode != 0
    assert [call[0] for call in calls(place)] == ["convert_checkpoint.py", "sample.py"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "usage: bash scripts/reproduce.sh xl_256|xl_512|ditdh_xl_256|ditdh_xl_512 REFERENCE_NPZ"),
        (["xl_128", REFERENCE], "usage: "),
        (["xl_256"], "usage: "),
        (["xl_256", "num_samples=7"], "usage: "),
        (["xl_256", REFERENCE, "fast"], "usage: "),
        (["ditdh_xl_512", REFERENCE, "guide=null"], "guide=null: no number of ditdh_xl_512 without its guide"),
        (["ditdh_xl_256", REFERENCE, "guide=null", "cfg_scale=1.42"], "cfg_scale=1.42: the published FID without a "),
        (["xl_256", "nowhere.npz"], "REFERENCE_NPZ=nowhere.npz: no such file; give ADM's reference npz"),
    ],
)
def test_wrong_input_is_one_line(place, arguments, message):
    done = reproduce(*arguments, cwd=place, PYTHON=str(place / "python"))
    assert done.returncode != 0
    assert not done.stdout
    (line,) = done.stderr.splitlines()
    assert line.startswith(message)
    assert not (place / "calls").exists()


@pytest.mark.slow
def test_a_published_file_becomes_numbers_beside_the_published_ones(tmp_path, inception_weights):
    pictures = np.random.default_rng(0).integers(0, 256, (12, 32, 32, 3), dtype=np.uint8)
    np.savez(tmp_path / "reference.npz", arr_0=pictures)
    arguments = [
        "xl_256",
        "reference.npz",
        f"released={GOLDEN / 'tiny.weights.safetensors'}",
        "encoder_depth=3",
        f"autoencoder={small_vae(tmp_path / 'vae')}",
        f"inception_weights={inception_weights}",
        "num_samples=7",
        "num_steps=2",
        "dtype=fp32",
    ]
    done = reproduce(*arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    out = tmp_path / "samples" / "published_xl_256"
    before = (out / "samples.npz").read_bytes()
    assert np.load(out / "samples.npz")["arr_0"].shape == (7, 256, 256, 3)
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["receipt"]["sampling"]["request"]["sampler"]["cfg_interval"] == [0.3, 1.0]
    said = done.stdout + done.stderr
    (row,) = [line.split("|")[1:-1] for line in said.splitlines() if line.startswith("| fid ")]
    assert [cell.strip() for cell in row[:3]] == ["fid", f"{metrics['fid']:.3f} ({metrics['labels']['fid']})", "1.260"]
    assert "7 samples instead of 50,000" in said
    (out / "metrics.json").unlink()
    again = reproduce(*arguments, cwd=tmp_path)  # after a kill during the evaluation
    assert again.returncode == 0, again.stderr
    assert "complete, nothing to do" in again.stderr
    assert json.loads((out / "metrics.json").read_text())["fid"] == metrics["fid"]
    assert (out / "samples.npz").read_bytes() == before
