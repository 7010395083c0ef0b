"""Alignment in training: logging, resuming, its last step, caches, a step of the real networks."""

import json
import math

import pytest
import timm
import torch
from conftest import picture_folder, refusal, rows, small_vae, succeed
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file

from ddt.autoencoder.diffusers import SD_VAE
from ddt.data.latent_cache import LatentCache
from ddt.objective.alignment import REPA
from ddt.training import loop

VIT = "test_vit"  # of 300,000 weights
SMALL = [
    "model.hidden_size=32",
    "model.depth=3",
    "model.encoder_depth=2",
    "model.patch_size=4",
    "sampler.num_steps=2",
    "trainer.global_batch_size=6",
    "trainer.log_every=1",
    "trainer.validate_every=0",
    "trainer.preview_every=0",
    "trainer.lr_schedule=constant",
    "trainer.num_workers=0",
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Images of 32 px and random weights of a small ViT."""
    root = tmp_path_factory.mktemp("alignment")
    picture_folder(root / "pictures", count=6)
    torch.manual_seed(0)
    save_file(timm.create_model(VIT, num_classes=0).state_dict(), root / "vit.safetensors")
    return root


def options(place, *more):
    return [
        *SMALL, "data=folder", f"data.root={place / 'pictures'}", "data.image_size=32", "data.holdout_every=0",
        "alignment=repa_dinov2_b", f"alignment.target={VIT}", f"alignment.weights={place / 'vit.safetensors'}",
        "alignment.align_depth=2", *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def straight(place):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        succeed("train", *options(place, "name=straight", "trainer.max_steps=6"))
    return place / "runs" / "straight"


def test_both_losses_are_logged_and_add_up(straight):
    for row in rows(straight):
        assert row["loss"] == pytest.approx(row["fm_loss"] + 0.5 * row["repa_loss"], rel=1e-5)
        assert 0 < row["repa_loss"] < 2
        assert row["alignment_cosine"] == pytest.approx(1 - row["repa_loss"])
    config = json.loads((straight / "checkpoints/step_0000006/config.json").read_text())
    assert len(config["run"]["alignment"]["fingerprint"]) == 64


def test_the_denoiser_alone_is_saved_as_model(straight):
    for name in ("ema", "model"):
        keys = load_file(straight / f"checkpoints/step_0000006/{name}.safetensors")
        assert not any("projector" in key or "target" in key for key in keys)
    state = torch.load(straight / "checkpoints/step_0000006/train_state.pt", weights_only=True)
    assert sorted(state["alignment"]) == [f"projector.{i}.{k}" for i in (0, 2, 4) for k in ("bias", "weight")]
    assert len(state["optimizer"]["state"]) == len(keys) + 6


@pytest.mark.slow
def test_resuming_continues_the_same_projector(place, straight, monkeypatch):
    monkeypatch.chdir(place)
    for steps in (3, 6):
        succeed("train", *options(place, "name=resumed", f"trainer.max_steps={steps}"))
    assert rows(place / "runs/resumed") == rows(straight)
    states = [
        torch.load(place / f"runs/{name}/checkpoints/step_0000006/train_state.pt", weights_only=True)["alignment"]
        for name in ("straight", "resumed")
    ]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_other_weights_of_the_target_are_another_training(place, straight, tmp_path, monkeypatch):
    monkeypatch.chdir(place)
    torch.manual_seed(1)
    save_file(timm.create_model(VIT, num_classes=0).state_dict(), tmp_path / "other.safetensors")
    other = [o for o in options(place, "name=straight", "trainer.max_steps=8") if "weights" not in o]
    assert "alignment.fingerprint" in refusal("train", *other, f"alignment.weights={tmp_path / 'other.safetensors'}")


@pytest.mark.parametrize("num_processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_alignment_ends_at_a_given_step(place, straight, num_processes, monkeypatch):
    """On two processes too, where each waits for the gradient of every weight."""
    name = f"until{num_processes}"
    chosen = options(
        place, f"name={name}", "trainer.max_steps=5", "alignment.until_step=3", f"trainer.num_processes={num_processes}"
    )
    monkeypatch.chdir(place)
    succeed("train", *chosen)
    logged = rows(place / "runs" / name)
    assert ["repa_loss" in row for row in logged] == [True, True, True, False, False]
    assert all(row["loss"] == row["fm_loss"] for row in logged[3:])
    assert logged[0]["loss"] == pytest.approx(rows(straight)[0]["loss"], rel=1e-4)


def test_a_row_that_spans_the_end_is_a_mean_over_the_aligned_steps(place, straight, monkeypatch):
    monkeypatch.chdir(place)
    chosen = options(place, "name=spans", "trainer.max_steps=4", "alignment.until_step=2", "trainer.log_every=4")
    succeed("train", *chosen)
    (row,) = rows(place / "runs/spans")
    first = rows(straight)[:2]
    assert row["repa_loss"] == pytest.approx(sum(r["repa_loss"] for r in first) / 2, rel=1e-5)


@pytest.mark.slow
def test_a_run_with_irepa_resumes_with_its_convolution(place, monkeypatch):
    monkeypatch.chdir(place)
    chosen = ["alignment=irepa_dinov2_b" if "=repa" in option else option for option in options(place)]
    for name, parts in (("irepa", (4,)), ("irepa_resumed", (2, 4))):
        for steps in parts:
            succeed("train", *chosen, f"name={name}", f"trainer.max_steps={steps}")
    logged = rows(place / "runs/irepa")
    assert logged == rows(place / "runs/irepa_resumed")
    assert all(row["loss"] == pytest.approx(row["fm_loss"] + row["repa_loss"], rel=1e-5) for row in logged)
    state = torch.load(place / "runs/irepa/checkpoints/step_0000004/train_state.pt", weights_only=True)
    assert state["alignment"]["projector.conv.weight"].shape[2:] == (3, 3)


def test_dispersive_loss_needs_no_target(place, monkeypatch):
    monkeypatch.chdir(place)
    data = options(place)[: len(SMALL) + 4]
    succeed("train", *data, "name=dispersive", "alignment=dispersive", "alignment.align_depth=1", "trainer.max_steps=3")
    for row in rows(place / "runs/dispersive"):
        assert row["loss"] == pytest.approx(row["fm_loss"] + 0.5 * row["dispersive_loss"], rel=1e-5)
        assert row["dispersive_loss"] < 0
    message = refusal("train", *data, "name=one", "alignment=dispersive", "alignment.align_depth=1",
                      "trainer.micro_batch_size=1")  # fmt: skip
    assert "trainer.micro_batch_size=1" in message


def test_the_undivided_baseline_aligns_any_of_its_blocks(place, monkeypatch):
    monkeypatch.chdir(place)
    chosen = [o for o in options(place) if "encoder_depth" not in o and "align_depth" not in o]
    dit = ["model=dit_b", "model.num_heads=2", "alignment.align_depth=3", "name=dit", "trainer.max_steps=1"]
    succeed("train", *dit, *chosen)
    assert "repa_loss" in rows(place / "runs/dit")[0]


def test_features_from_the_cache_are_those_of_the_target(place, straight, monkeypatch, caplog):
    monkeypatch.chdir(place)
    caplog.set_level("INFO")
    vae = small_vae(place / "vae", channels=3, levels=2)
    shared = [o for o in options(place) if o.startswith(("data", "alignment")) and "align_depth" not in o]
    cache = [*shared, "autoencoder=kl", f"autoencoder.source={vae}", "out=cache", "dtype=float32", "num_workers=0"]
    succeed("scripts.cache_latents", *cache, "store_features=true", "flip=true", "store_images=true")
    assert "features" in caplog.text.split("images to encode")[1].split("are free")[0]  # its bytes, before it starts
    stored = LatentCache("cache")
    images = torch.from_numpy(stored.load(torch.arange(4).numpy()))
    target = REPA(VIT, str(place / "vit.safetensors")).build_target(32)
    for mirrored in (False, True):
        flipped = torch.full((4,), mirrored).numpy()
        expected = target(images.flip(-1) if mirrored else images)
        features = torch.from_numpy(stored.load_features(torch.arange(4).numpy(), flipped))
        torch.testing.assert_close(features.float(), expected, rtol=2e-3, atol=2e-3)
    training = [o for o in options(place) if not o.startswith("data") and "weights" not in o]
    training += [
        "data=latents",
        "data.root=cache",
        "autoencoder=kl",
        f"autoencoder.source={vae}",
        "trainer.max_steps=2",
    ]
    succeed("train", *training, "name=features")  # alignment.weights are not needed
    succeed("train", *training, "name=pixels", "data.cached_features=false",
            f"alignment.weights={place / 'vit.safetensors'}")  # fmt: skip
    for a, b in zip(rows(place / "runs/features"), rows(place / "runs/pixels"), strict=True):
        assert a["repa_loss"] == pytest.approx(b["repa_loss"], rel=1e-3)
    torch.manual_seed(1)
    save_file(timm.create_model(VIT, num_classes=0).state_dict(), place / "other.safetensors")
    chosen = [*training, "name=other", f"alignment.weights={place / 'other.safetensors'}"]
    assert "is not the file that the cached features" in refusal("train", *chosen)
    succeed("train", *training, "name=named", f"alignment.weights={place / 'vit.safetensors'}")
    assert rows(place / "runs/named") == rows(place / "runs/features")
    other = [o for o in training if "alignment.target" not in o]
    message = refusal("train", *other, "name=other", "alignment.target=resnet18")
    assert f"holds features of {VIT}, but alignment.target=resnet18" in message


@pytest.mark.slow
def test_one_step_of_ddt_b_with_the_real_networks(tmp_path, monkeypatch):
    """SD-VAE and DINOv2-B of true size with random weights, DDT-B/2, two pictures of 256 px."""
    monkeypatch.chdir(tmp_path)
    picture_folder(tmp_path / "pictures", count=1)
    torch.manual_seed(0)
    AutoencoderKL.from_config(SD_VAE).save_pretrained(tmp_path / "vae")
    dino = "vit_base_patch14_dinov2.lvd142m"
    save_file(timm.create_model(dino, num_classes=0).state_dict(), tmp_path / "dino.safetensors")
    chosen = ["model=b_8en4de", "data=in256", f"data.root={tmp_path / 'pictures'}", "name=real",
              f"autoencoder.source={tmp_path / 'vae'}", f"alignment.weights={tmp_path / 'dino.safetensors'}",
              "trainer.max_steps=1", "trainer.global_batch_size=2", "trainer.num_workers=0", "trainer.log_every=1",
              "trainer.preview_every=0", "trainer.validate_every=0"]  # fmt: skip
    built, original = [], loop.build_run
    monkeypatch.setattr(loop, "build_run", lambda settings: built.append(original(settings)) or built[0])
    succeed("train", *chosen)
    (row,) = rows(tmp_path / "runs/real")
    assert all(math.isfinite(row[key]) for key in ("loss", "fm_loss", "repa_loss"))
    assert row["repa_loss"] == pytest.approx(1, abs=0.2)  # a random projector is orthogonal to the features
    config = json.loads((tmp_path / "runs/real/checkpoints/step_0000001/config.json").read_text())
    assert config["latent_shape"] == [4, 32, 32]
    assert built[0].alignment.target.grid == (16, 16)
    assert sum(p.numel() for p in built[0].objective.denoiser.parameters()) == 130_262_800 - 998 * 768
    assert [p.shape for p in built[0].objective.alignment.projector.parameters()][::2] == [(768, 768)] * 3
