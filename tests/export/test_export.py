"""Exports: all that sampling needs, a model card, written atomically."""

import email.message
import json
import re
import shutil

import numpy as np
import pytest
import torch
from conftest import GOLDEN, refusal, run_inside, small_checkpoint, small_ddt, small_vae
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file

import ddt
from ddt.checkpoint import format as ckpt
from ddt.class_names import imagenet_synsets
from ddt.errors import UserError
from ddt.export import ExportSettings, export
from ddt.export.export import class_labels, find_picture, open_source, read_metrics, shorten_paths
from ddt.export.model_card import Card
from ddt.files import sha256
from ddt.sampling.schedules import write_schedule
from ddt.version import DISTRIBUTION

pytestmark = pytest.mark.usefixtures("one_thread")
RUN = {
    "name": "x",
    "seed": 3,
    "init_from": "/home/me/other/step_0000001",
    "data": {
        "_target_": "ddt.data.images.ImageFolder",
        "root": "/home/me/birds",
        "image_size": 16,
        "fingerprint": "f00",
    },
    "alignment": {"_target_": None, "weights": "/home/me/w.pth"},
    "optimizer": {"_target_": "ddt.training.optimizer.adamw", "lr": 0.001},
    "trainer": {"global_batch_size": 4, "lr_schedule": "constant", "mixed_precision": "fp32"},
}
PIXELS = {"_target_": "ddt.autoencoder.Identity"}
CARD = {"network": {"_target_": "ddt.model.DDT"}, "sampler": {}, "export": {}}


def hub(folder, out, **arguments):
    export(ExportSettings(str(folder), "hub", str(out), **arguments))
    return out


def sampled(checkpoint, out):
    done = run_inside("sample", f"ckpt={checkpoint}", f"out={out}", "num_processes=1", "num_samples=3")
    assert done.returncode == 0, done.stderr
    with np.load(out / "samples.npz") as file:
        return file["arr_0"]


def evaluation(folder, weights_sha256, **changes):
    """A metrics.json of samples of some weights, with their receipt and grid beside it."""
    folder.mkdir(exist_ok=True)
    request = {
        "checkpoint": {"ema_sha256": weights_sha256},
        "guide": None,
        "dtype": "fp32",
        "sampler": {"solver": "heun"},
    }
    content = {
        "fid": 12.3456,
        "class_accuracy_real": 0.98,
        "labels": {"fid": "FID-5K (validation images)", "class_accuracy_real": "class accuracy of real images"},
        "comparable": False,
        "not_comparable_because": ["5,000 samples instead of 50,000"],
        "receipt": {
            "samples": {"sha256": "5" * 64},
            "reference": {},
            "features": {},
            "sampling": {"request": request, "samples_sha256": "5" * 64},
        },
    }
    (folder / "metrics.json").write_text(json.dumps({**content, **changes}))
    (folder / "samples.npz").write_bytes(b"images")
    receipt = {"request": request, "samples_sha256": sha256(folder / "samples.npz")}
    (folder / "receipt.json").write_text(json.dumps(receipt))
    Image.new("RGB", (4, 4)).save(folder / "grid.png")
    return folder


def test_the_folder_of_a_hub_is_a_checkpoint(tmp_path):
    folder = small_checkpoint(tmp_path / "checkpoint", run=RUN)
    out = tmp_path / "new" / "exported"
    done = run_inside("scripts.export", f"ckpt={folder}", "format=hub", f"out={out}")
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in out.iterdir()) == [
        "README.md",
        "config.json",
        "manifest.json",
        "model.safetensors",
    ]
    assert [path.name for path in out.parent.iterdir()] == ["exported"]
    assert load_file(out / "model.safetensors").keys() == ddt.load_model(folder).state_dict().keys()
    assert np.array_equal(sampled(out, tmp_path / "a"), sampled(folder, tmp_path / "b"))
    receipts = [json.loads((tmp_path / name / "receipt.json").read_text())["request"] for name in "ab"]
    assert receipts[0] == receipts[1]
    again = hub(out, tmp_path / "again")
    assert ckpt.read_config(again) == ckpt.read_config(out)
    content = bytearray((out / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (out / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=r"model\.safetensors: damaged"):
        ddt.load_model(out)


def test_a_local_autoencoder_goes_along(tmp_path):
    vae = small_vae(tmp_path / "vae", levels=2, scaling_factor=0.5)
    folder = small_checkpoint(tmp_path / "checkpoint", vae=vae, run={**RUN, "autoencoder": {"source": vae}})
    before = sampled(folder, tmp_path / "before")
    out = hub(folder, tmp_path / "exported")
    shutil.rmtree(vae)
    out = out.rename(tmp_path / "elsewhere")
    assert np.array_equal(sampled(out, tmp_path / "after"), before)
    texts = [path.read_text() for path in out.rglob("*") if path.suffix in (".json", ".md")]
    assert len(texts) == 4
    assert not any(str(tmp_path) in text or "/home/me" in text for text in texts)
    listed = ckpt.read_manifest(out).files
    assert "autoencoder/diffusion_pytorch_model.safetensors" in listed
    assert ckpt.weights_names(out) == ["ema"]
    with pytest.raises(UserError, match=r"autoencoder\.source=.*no such file or folder"):
        open_source(folder, "hub")


def test_another_autoencoder_than_in_training_is_refused(tmp_path):
    folder = small_checkpoint(tmp_path / "checkpoint", vae=small_vae(tmp_path / "vae", levels=2))
    shutil.rmtree(tmp_path / "vae")
    moved = small_vae(tmp_path / "vae", levels=2, scaling_factor=0.5)
    with pytest.raises(UserError, match="holds other weights than the run was trained with"):
        open_source(folder, "hub")
    out = hub(folder, tmp_path / "exported", autoencoder=moved)
    stored = ckpt.read_config(out)
    assert stored["autoencoder"]["source"] == str(out / "autoencoder")
    assert ddt.autoencoder.build_autoencoder(stored["autoencoder"]).fingerprint == stored["autoencoder_fingerprint"]


def test_an_autoencoder_of_the_hub_stays_a_name(tmp_path):
    named = {"_target_": "ddt.autoencoder.KLAutoencoder", "source": "stabilityai/sd-vae-ft-ema", "revision": "abc"}
    model = small_ddt(in_channels=4)
    source = {"file": "model.ckpt", "sha256": "0" * 64}
    folder = small_checkpoint(tmp_path / "checkpoint", model=model, autoencoder=named, source=source, step=None)
    out = hub(folder, tmp_path / "exported")
    assert ckpt.read_config(out)["autoencoder"] == named
    text = unpadded((out / "README.md").read_text())
    assert "| published file | model.ckpt |" in text
    assert "| resolution | 64×64 |" in text
    assert "does not say what it was trained on" in text


def test_the_name_of_the_weights_is_in_the_receipt(tmp_path):
    base = small_checkpoint(tmp_path / "base")
    ema = ckpt.read_weights(base, "ema")
    raw = {key: value + 1 for key, value in ema.items()}
    ckpt.write_checkpoint(tmp_path / "both", ckpt.read_config(base), ema=ema, model=raw)
    out = hub(tmp_path / "both", tmp_path / "exported", weights="model")
    assert torch.equal(ddt.load_model(out).decoder.output.linear.bias, raw["decoder.output.linear.bias"])
    assert ckpt.weights_receipt(out, "ema")["weights"] == "raw"
    assert ckpt.weights_receipt(hub(out, tmp_path / "again"), "ema")["weights"] == "raw"
    export(ExportSettings(str(tmp_path / "both"), "diffusers", str(tmp_path / "pipeline"), weights="model"))
    written = load_file(tmp_path / "pipeline" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert torch.equal(written["network.decoder.output.linear.bias"], raw["decoder.output.linear.bias"])
    for weights, state in (("ema", ema), ("model", raw)):
        out = tmp_path / f"{weights}.safetensors"
        export(ExportSettings(str(tmp_path / "both"), "released", str(out), weights=weights))
        sums = [sorted(value.sum().item() for value in each.values()) for each in (load_file(out), state)]
        assert sums[0][0] == sums[1][0]
        assert sums[0][-1] == sums[1][-1]
    with pytest.raises(UserError, match=r"weights=ema_0\.9: .* choose from ema, model"):
        open_source(tmp_path / "both", "hub", weights="ema_0.9")


def test_a_schedule_file_becomes_its_steps(tmp_path):
    path = tmp_path / "schedule.json"
    write_schedule(path, {"recompute_steps": [0, 2], "time_grid": [0.0, 0.25, 0.5, 0.75, 1.0], "guidance": {}})
    sampler = {"num_steps": 4, "cfg_interval": None, "last_step": None, "recompute": str(path)}
    out = hub(small_checkpoint(tmp_path / "checkpoint", sampler=sampler), tmp_path / "exported")
    assert ckpt.read_config(out)["sampler"]["recompute"] == [0, 2]


def unpadded(text):
    """Text whose tables have no padding."""
    return re.sub(" +", " ", text)


def test_the_card_describes_the_model(tmp_path):
    folder = small_checkpoint(tmp_path / "checkpoint", run=RUN)
    sha256 = ckpt.weights_sha256(folder, "ema")
    metrics = evaluation(tmp_path / "set", sha256)
    parameters = sum(value.numel() for value in ckpt.read_weights(folder, "ema").values())
    arguments = [f"ckpt={folder}", f"metrics={metrics}", "license=mit"]
    for form in ("hub", "diffusers"):
        done = run_inside("scripts.export", *arguments, f"format={form}", f"out={tmp_path / form}")
        assert done.returncode == 0, done.stderr
        card = ModelCard.load(tmp_path / form / "README.md")
        assert card.data.license == "mit"
        assert card.data.library_name == {"hub": "ddt", "diffusers": "diffusers"}[form]
        assert {"ddt", "arxiv:2504.05741"} <= set(card.data.tags)
        (result,) = card.data.eval_results
        assert (result.metric_type, result.metric_value) == ("fid", 12.3456)
        assert result.metric_name == "FID-5K (validation images)"
        for line in (
            "| FID-5K (validation images) | 12.3456 |",
            "| class accuracy of real images | 0.9800 |",
            "Not comparable with published numbers: 5,000 samples instead of 50,000.",
            "Sampled with solver heun, fp32.",
            "| steps | 7 of 4 images each, 28 images seen |",
            "| seed | 3 |",
            "| started from | step_0000001 |",
            "| classes | 5: a, b, c, d, e |",
            "| precision | fp32 |",
            "| num_steps | 4 |",
            f"| parameters | {parameters:,} |",
            f'("{form}"',
            f'"made_from_sha256": "{sha256}"',
            "![samples of this model](samples.png)",
        ):
            assert line in unpadded(card.text), line
        assert (tmp_path / form / "samples.png").read_bytes() == (metrics / "grid.png").read_bytes()
    hub(folder, tmp_path / "plain")
    plain = ModelCard.load(tmp_path / "plain" / "README.md")
    assert plain.data.license is None
    assert "Not stated: ask whoever shared this model." in plain.text
    assert "Not measured for this card." in plain.text
    assert "samples.png" not in plain.text


def test_the_card_links_to_the_repository(tmp_path, monkeypatch):
    config = {**CARD, "class_names": list("ab"), "latent_shape": [1, 8, 8], "autoencoder": PIXELS}
    described = email.message.Message()
    for url in ("Paper, https://arxiv.org/abs/2504.05741", "Repository, https://example.org/ddt"):
        described["Project-URL"] = url
    for form in ("ddt", "diffusers"):
        assert "example.org" not in Card("x").render(form, config, 1).text
        with monkeypatch.context() as patch:
            patch.setattr("importlib.metadata.metadata", {DISTRIBUTION: described}.__getitem__)
            assert "[the project DDT](https://example.org/ddt)" in Card("x").render(form, config, 1).text


def test_the_card_names_imagenet(tmp_path):
    config = {
        "class_names": imagenet_synsets(),
        "latent_shape": [4, 32, 32],
        "autoencoder": {"_target_": "ddt.autoencoder.KLAutoencoder", "source": "a/b"},
        "source": {},
    }
    card = Card("x").render("ddt", {**CARD, **config}, parameters=1)
    assert "| classes | 1000: tench, goldfish" in unpadded(card.text)
    assert card.data.datasets == ["ILSVRC/imagenet-1k"]
    assert class_labels(imagenet_synsets())["0"] == "tench, Tinca tinca"


def test_the_card_names_the_guide(tmp_path):
    metrics = json.loads((evaluation(tmp_path / "set", "0" * 64) / "metrics.json").read_text())
    config = {**CARD, "class_names": list("ab"), "latent_shape": [1, 8, 8], "autoencoder": PIXELS}
    assert "Guided away" not in Card("x", metrics).render("ddt", config, 1).text
    metrics["receipt"]["sampling"]["request"]["guide"] = {"ema_sha256": "1" * 64, "step": 1}
    assert f"Guided away from the weights `{'1' * 64}`." in Card("x", metrics).render("ddt", config, 1).text


def test_the_card_shows_samples_of_these_weights_alone(tmp_path):
    folder = small_checkpoint(tmp_path / "run" / "checkpoints" / "step_0000007")
    evaluation(tmp_path / "run" / "samples", ckpt.weights_sha256(folder, "ema"))
    done = run_inside("scripts.export", f"ckpt={tmp_path / 'run'}", "format=hub", f"out={tmp_path / 'out'}")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "samples.png").read_bytes() == (tmp_path / "run" / "samples" / "grid.png").read_bytes()
    (tmp_path / "run" / "samples" / "samples.npz").write_bytes(b"others")
    assert find_picture([tmp_path / "run" / "samples"], ckpt.weights_sha256(folder, "ema")) is None
    evaluation(tmp_path / "others", "0" * 64)
    places = [tmp_path / "nowhere", tmp_path / "others"]
    assert find_picture(places, ckpt.weights_sha256(folder, "ema")) is None


def test_paths_are_shortened_to_their_last_name():
    values = {"data": {"root": "/home/me/birds", "size": 8}, "init_from": "MCG-NJU/DDT-XL", "name": "a/b", "x": ["/y"]}
    values["autoencoder"] = {"decoder": "decoders/dinov2/model.pt", "statistics": "/home/me/stat.pt"}
    expected = {
        **values,
        "data": {"root": "birds", "size": 8},
        "autoencoder": {**values["autoencoder"], "statistics": "stat.pt"},
    }
    assert shorten_paths(values) == expected


@pytest.mark.parametrize("form", ["hub", "diffusers", "released"])
def test_an_export_is_never_written_over(tmp_path, form):
    settings = ExportSettings(str(small_checkpoint(tmp_path / "checkpoint")), form, str(tmp_path / "out.ckpt"))
    export(settings)
    before = sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*"))
    with pytest.raises(UserError, match="exists already and is not written over"):
        export(settings)
    assert sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*")) == before


@pytest.mark.parametrize("form", ["hub", "diffusers"])
def test_an_interrupted_export_leaves_nothing(tmp_path, form, monkeypatch):
    folder = small_checkpoint(tmp_path / "checkpoint")

    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Card, "write", fail)
    with pytest.raises(KeyboardInterrupt):
        export(ExportSettings(str(folder), form, str(tmp_path / "new" / "exported")))
    assert list((tmp_path / "new").iterdir()) == []


def test_the_published_names_of_a_converted_file(tmp_path):
    model = ddt.load_released(GOLDEN / "tiny.weights.safetensors", 3)
    network = dict(_target_="ddt.model.DDT", in_channels=4, patch_size=2, hidden_size=64, num_heads=4, depth=5)
    network |= {"encoder_depth": 3, "num_classes": 10}
    folder = small_checkpoint(tmp_path / "checkpoint", model=model, network=network)
    done = run_inside("scripts.export", f"ckpt={folder}", "format=released", f"out={tmp_path / 'out.safetensors'}")
    assert done.returncode == 0, done.stderr
    assert "encoder_depth=3, patch_size=2" in done.stderr
    golden, found = load_file(GOLDEN / "tiny.weights.safetensors"), load_file(tmp_path / "out.safetensors")
    assert found.keys() == golden.keys()
    assert all(torch.equal(found[key], golden[key]) for key in golden)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("module")
    evaluation(folder / "of_others", "0" * 64)
    evaluation(folder / "without", "0" * 64, receipt={"samples": {}, "reference": {}, "features": {}})
    sampling = {"request": {"checkpoint": {"ema_sha256": "1" * 64}}}
    for name, of, evaluated in (("replaced", "5" * 64, "6" * 64), ("unbound", None, None)):
        receipt = {"samples": {"sha256": evaluated}, "sampling": {**sampling, "samples_sha256": of}}
        evaluation(folder / name, "1" * 64, receipt=receipt)
    return small_checkpoint(folder / "checkpoint")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["format=foo"], "format=foo: give 'hub', 'diffusers' or 'released'"),
        (["format=hub", "ckpt=nowhere"], "nowhere: no such folder"),
        (["format=hub", "autoencoder=a/b"], "autoencoder=a/b: this model samples pixels"),
        (["format=hub", "push=name"], "push=name: no name of a model; write owner/name"),
        (["format=hub", "weight=ema"], "weight: no such setting; did you mean weights?"),
    ],
)
def test_mistakes_are_one_line(checkpoint, arguments, message):
    there = checkpoint.parent
    chosen = [argument.format(there=there) for argument in arguments]
    before = sorted(there.iterdir())
    for key, default in (("ckpt", checkpoint), ("out", there / "out")):
        if not any(argument.startswith(f"{key}=") for argument in chosen):
            chosen.append(f"{key}={default}")
    said = refusal("scripts.export", *chosen)
    assert message in said
    assert "\n" not in said
    assert sorted(there.iterdir()) == before


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("nowhere", "metrics=nowhere: no such file"),
        ("checkpoint", "metrics=checkpoint: the folder has no metrics.json"),
        ("of_others", "does not say that its samples were generated with"),
        ("without", "does not say that its samples were generated with"),
        ("replaced", "of other samples than those of its receipt"),
        ("unbound", "of other samples than those of its receipt"),
        ("checkpoint/config.json", "is no evaluation"),
        ("of_others/grid.png", "damaged or no JSON"),
    ],
)
def test_metrics_of_other_weights_are_refused(checkpoint, file, message, monkeypatch):
    monkeypatch.chdir(checkpoint.parent)
    with pytest.raises(UserError, match=message):
        read_metrics(file, "1" * 64)


@pytest.mark.parametrize("key", ["push", "license", "autoencoder", "metrics"])
def test_the_published_format_holds_weights_alone(tmp_path, key):
    chosen = dict(ckpt=str(tmp_path), format="released", out=str(tmp_path / "x.ckpt"))
    ExportSettings(**chosen)
    with pytest.raises(UserError, match=f"{key}=a/b: has no effect with format=released"):
        ExportSettings(**{**chosen, key: "a/b"})
    with pytest.raises(UserError, match=r"is to be one file; give a name that ends in \.ckpt or \.safetensors"):
        ExportSettings(**{**chosen, "out": str(tmp_path / "x")})
