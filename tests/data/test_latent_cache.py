"""Reading a latent cache: records at random, training from them, and refusals."""

import json
import math
import os
import pickle
import shutil

import numpy as np
import pytest
import torch
from conftest import picture, picture_folder, refusal, rows, small_vae, succeed

import ddt
from ddt.autoencoder import Identity, KLAutoencoder
from ddt.data import latent_cache
from ddt.data.images import ImageFolder
from ddt.data.latent_cache import LatentCache
from ddt.data.stream import TrainingStream, validation_batch
from ddt.errors import UserError
from ddt.files import sha256

SMALL = [
    "model.hidden_size=32",
    "model.depth=3",
    "model.encoder_depth=2",
    "sampler.num_steps=2",
    "trainer.global_batch_size=6",
    "trainer.max_steps=6",
    "trainer.log_every=2",
    "trainer.validate_every=6",
    "trainer.preview_every=0",
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Images, an autoencoder, and caches: float16 with images, float32, float32 mirrored."""
    root = tmp_path_factory.mktemp("latents")
    picture_folder(root / "pictures")
    small_vae(root / "vae", channels=3, levels=2, scaling_factor=0.5)
    source = [*online(root), "shard_size=4", "batch_size=3", "num_workers=0"]
    for name, options in {
        "half": ["store_images=true"],
        "single": ["dtype=float32"],
        "mirrored": ["flip=true", "dtype=float32"],
    }.items():
        succeed("scripts.cache_latents", *source, f"out={root / name}", *options)
    return root


def latents(place, name="half"):
    return ["data=latents", f"data.root={place / name}", "autoencoder=kl", f"autoencoder.source={place / 'vae'}"]


def online(place):
    return ["data=folder", f"data.root={place / 'pictures'}", "data.image_size=16", "data.holdout_every=5",
            "autoencoder=kl", f"autoencoder.source={place / 'vae'}"]  # fmt: skip


@pytest.mark.slow
def test_records_come_in_the_order_of_their_indices(place):
    cache = LatentCache(str(place / "half"))
    indices = np.array([16, 0, 7, 3, 7, 12])
    straight = np.zeros(6, dtype=bool)
    one_by_one = [cache.load_moments(np.array([i]), straight[:1])[0] for i in indices]
    assert np.array_equal(cache.load_moments(indices, straight), np.stack(one_by_one))
    stored = np.concatenate([np.load(p) for p in sorted((place / "half" / "moments").glob("*.npy"))])[:, 0]
    assert np.array_equal(cache.load_moments(indices, straight), stored[indices])
    held_out = LatentCache(str(place / "half"), "test")
    assert np.array_equal(held_out.load_moments(np.arange(5), straight[:5]), stored[17:])


def test_records_are_the_same_on_a_file_system_without_mmap(place, request):
    indices, flipped = np.array([9, 0, 3, 12]), np.array([True, False, True, True])
    mapped = LatentCache(str(place / "mirrored")).load_moments(indices, flipped)
    request.getfixturevalue("no_mmap")
    cache = LatentCache(str(place / "mirrored"))
    assert np.array_equal(cache.load_moments(indices, flipped), mapped)
    assert len(pickle.dumps(cache)) < 20_000
    half = LatentCache(str(place / "half"))
    images = ImageFolder(str(place / "pictures"), 16, holdout_every=5)
    assert np.array_equal(half.load(indices), images.load(indices))


def test_a_cache_travels_to_loading_processes_without_its_maps(place):
    cache = LatentCache(str(place / "half"))
    cache.load(np.array([0, 5]))
    assert len(pickle.dumps(cache)) < 20_000
    assert np.array_equal(pickle.loads(pickle.dumps(cache)).load(np.array([5])), cache.load(np.array([5])))


def test_stream_gives_the_draws_of_online_encoding(place):
    """Moments in place of images; noise, times and posterior noise are those of the positions."""
    shape, positions = (3, 8, 8), list(range(9, 21))
    cached = TrainingStream(LatentCache(str(place / "single")), 0, shape, posterior=True)[positions]
    images = ImageFolder(str(place / "pictures"), 16, holdout_every=5)
    straight = TrainingStream(images, 0, shape, posterior=True)[positions]
    for key in ("y", "noise", "time_normal", "dropout_uniform", "posterior_noise"):
        assert torch.equal(cached[key], straight[key])
    codec = KLAutoencoder(str(place / "vae"))
    torch.testing.assert_close(cached["moments"], codec.encode(straight["images"]), rtol=1e-5, atol=1e-5)
    assert "images" not in cached


def test_mirror_images_are_drawn_by_position(place):
    stream = TrainingStream(LatentCache(str(place / "mirrored")), 0, (3, 8, 8), posterior=True, aligned_until=math.inf)
    positions = list(range(200))
    batch = stream[positions]
    indices = np.array([stream.index(p) for p in positions])
    originals = ImageFolder(str(place / "pictures"), 16, holdout_every=5).load(indices)
    same = (batch["images"].numpy() == originals).all(axis=(1, 2, 3))
    mirrored = (batch["images"].numpy() == originals[..., ::-1]).all(axis=(1, 2, 3))
    assert (same ^ mirrored).all()
    assert 60 < mirrored.sum() < 140
    moments = KLAutoencoder(str(place / "vae")).encode(batch["images"])
    torch.testing.assert_close(batch["moments"], moments, rtol=1e-5, atol=1e-5)
    assert torch.equal(stream[[150]]["moments"][0], batch["moments"][150])
    held_out = validation_batch(LatentCache(str(place / "mirrored"), "test"), (3, 8, 8), np.arange(5))
    expected = ImageFolder(str(place / "pictures"), 16, "test", holdout_every=5).load(np.arange(5))
    encoded = KLAutoencoder(str(place / "vae")).encode(torch.from_numpy(expected))
    torch.testing.assert_close(held_out["moments"], encoded, rtol=1e-5, atol=1e-5)  # never mirrored


def test_alignment_reads_pixels_only_while_it_lasts(place):
    cache = LatentCache(str(place / "half"))
    stream = TrainingStream(cache, 0, (3, 8, 8), posterior=True, aligned_until=6)
    assert "images" in stream[[0, 1]]
    assert "images" not in stream[[6, 7]]


def test_pixels_come_from_the_files_where_the_cache_has_none(place, tmp_path):
    images = ImageFolder(str(place / "pictures"), 16, "test", holdout_every=5)
    cache = LatentCache(str(place / "single"), "test")
    cache.require_pixels()
    assert np.array_equal(cache.load(np.array([4, 1])), images.load(np.array([4, 1])))
    shutil.copytree(place / "pictures", tmp_path / "moved")
    moved = LatentCache(str(place / "single"), "test", source_root=str(tmp_path / "moved"))
    assert np.array_equal(moved.load(np.array([4, 1])), images.load(np.array([4, 1])))
    picture(99, 30, 30).save(tmp_path / "moved" / "class0" / "00.png")
    with pytest.raises(UserError, match=r"00\.png: is not the file that manifest\.csv was written of"):
        LatentCache(str(place / "single"), "test", source_root=str(tmp_path / "moved")).require_pixels()
    with pytest.raises(UserError, match=r"data\.source_root=.*gone: no such folder"):
        LatentCache(str(place / "single"), source_root=str(tmp_path / "gone")).require_pixels()


def test_training_from_the_cache_is_training_with_online_encoding(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, data in {"online": online(place), "single": latents(place, "single"), "half": latents(place)}.items():
        succeed("train", *SMALL, *data, f"name={name}")
    straight, single, half = (rows(tmp_path / "runs" / name) for name in ("online", "single", "half"))
    assert [row["step"] for row in straight] == [2, 4, 6, 6]
    for a, b, c in zip(straight, single, half, strict=True):
        for key in a:
            assert b[key] == pytest.approx(a[key], rel=2e-5)
            assert c[key] == pytest.approx(a[key], rel=1e-3)  # float16 moments
    config = json.loads((tmp_path / "runs/half/checkpoints/step_0000006/config.json").read_text())
    assert config["class_names"] == ["class0", "class1"]
    assert config["latent_shape"] == [3, 8, 8]
    assert config["autoencoder_fingerprint"] == KLAutoencoder(str(place / "vae")).fingerprint
    succeed("sample", "ckpt=runs/half", "num_samples=4")
    with np.load(tmp_path / "runs/half/checkpoints/step_0000006/samples/samples.npz") as samples:
        assert samples["arr_0"].shape == (4, 16, 16, 3)


def test_a_moved_cache_is_the_same_training(place, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    caplog.set_level("INFO")
    shutil.copytree(place / "half", tmp_path / "first")
    shutil.copytree(place / "vae", tmp_path / "vae")
    constant = [*SMALL, "trainer.lr_schedule=constant", "name=run"]
    succeed("train", *constant, *latents(tmp_path, "first"), "trainer.max_steps=2")
    (tmp_path / "first").rename(tmp_path / "second")
    succeed("train", *constant, *latents(tmp_path, "second"), "trainer.max_steps=4")
    assert "resuming at step 2 to step 4" in caplog.text
    assert "changed since the checkpoint: data.root" in caplog.text


def test_float16_moments_are_harmless(place):
    """Rounding to float16 moves latents by less than 1e-3 of their std, pixels by one level."""
    codec = KLAutoencoder(str(place / "vae"))
    generator = torch.Generator().manual_seed(0)
    mean = 30 * torch.randn(64, 4, 32, 32, generator=generator)  # SD-VAE's means reach about ±40
    logvar = -18 + 4 * torch.randn(64, 4, 32, 32, generator=generator)
    noise = torch.randn(64, 4, 32, 32, generator=generator)
    moments = torch.cat([mean, logvar], dim=1)
    difference = codec.sample(moments.half(), noise) - codec.sample(moments, noise)
    assert difference.square().mean().sqrt() < 1e-3 * codec.sample(moments, noise).std()
    images = torch.from_numpy(LatentCache(str(place / "half")).load(np.arange(17)))
    exact = codec.encode(images)
    decoded = [codec.decode(codec.sample(m, torch.zeros(17, 3, 8, 8))).int() for m in (exact, exact.half())]
    assert (decoded[0] - decoded[1]).abs().max() <= 1


@pytest.mark.slow
def test_another_cache_of_the_same_files_is_another_training(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    constant = [*SMALL, "trainer.lr_schedule=constant", "name=run"]
    succeed("train", *constant, *latents(place, "single"), "trainer.max_steps=2")
    message = refusal("train", *constant, *latents(place, "mirrored"), "trainer.max_steps=4")
    assert "another training (data.fingerprint: the list of images changed)" in message


def test_a_cache_offers_latents_and_is_not_cached_again(place):
    cache = LatentCache(str(place / "half"))
    assert cache.has_latents
    assert cache.cached_features is None
    again = [*latents(place), f"out={place / 'again'}"]
    assert refusal("scripts.cache_latents", *again) == "data: is a latent cache already; give the images"
    message = refusal("scripts.train_autoencoder", *latents(place)[:2], f"out={place / 'again'}")
    assert message == "data: is a latent cache already; give the images"


def test_dispersive_loss_needs_no_pixels(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    copy = tmp_path / "copy"
    shutil.copytree(place / "single", copy)
    index = json.loads((copy / "index.json").read_text())
    (copy / "index.json").write_text(json.dumps({**index, "source_root": str(tmp_path / "gone")}))
    data = ["data=latents", f"data.root={copy}", *latents(place)[2:]]
    succeed("train", *SMALL, *data, "name=run", "alignment=dispersive", "alignment.align_depth=1")
    assert "dispersive_loss" in rows(tmp_path / "runs/run")[0]


def test_foreign_and_incomplete_caches_are_refused(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small_vae(tmp_path / "other", channels=3, levels=2, scaling_factor=0.5, layers_per_block=2)
    foreign = [*latents(place)[:-1], f"autoencoder.source={tmp_path / 'other'}"]
    assert "was made by another autoencoder" in refusal("train", *SMALL, *foreign)
    assert "was made by another autoencoder" in refusal("train", *SMALL, *latents(place)[:2], "autoencoder=identity")
    assert "holds images of 16 px, not of data.image_size=256" in refusal(
        "train", *SMALL, "data=in256_latents", f"data.root={place / 'half'}", "alignment=none"
    )
    copy = tmp_path / "copy"
    shutil.copytree(place / "half", copy)
    moments, index = copy / "moments" / "00001.npy", json.loads((copy / "index.json").read_text())

    def refused():
        return refusal(
            "train", *SMALL, *latents(place)[2:], "data=latents", f"data.root={copy}", "trainer.num_workers=0"
        )

    labels = np.load(copy / "labels.npy")
    np.save(copy / "labels.npy", labels[::-1])
    assert "labels.npy: is damaged" in refused()
    np.save(copy / "labels.npy", labels)
    moments.write_bytes(bytes(10) + moments.read_bytes()[10:])
    assert refused() == f"{moments}: is damaged; run the command that made the cache again"
    moments.write_bytes(b"short")
    assert "00001.npy: is damaged" in refused()
    moments.unlink()
    assert "00001.npy: is missing" in refused()
    (copy / "index.json").write_text(json.dumps({**index, "complete": False}))
    assert refused().startswith(f"data.root={copy}: the cache is incomplete; run the command that makes it again")
    (copy / "index.json").write_text(json.dumps({**index, "format_version": 99}))
    assert "format version 99" in refused()
    (copy / "index.json").write_text("{")
    assert "index.json: is damaged; remove this file alone" in refused()
    assert not (tmp_path / "runs").exists()


def test_every_shard_is_compared_with_its_hash_once(place, tmp_path, monkeypatch):
    """Swapped and flipped ones are named before they are read; a marker saves the second time."""
    root = tmp_path / "copy"
    shutil.copytree(place / "half", root)
    cache, read = LatentCache(str(root)), []
    monkeypatch.setattr(latent_cache, "sha256", lambda path: read.append(path.name) or sha256(path))
    (root / ".verified.json").unlink(missing_ok=True)
    cache.check_contents(aligned=False, pixels=False)
    assert read == [f"{k:05d}.npy" for k in range(6)]
    cache.check_contents(aligned=False, pixels=False)
    assert len(read) == 6
    cache.check_contents(aligned=True, pixels=False)  # its images, too
    assert len(read) == 12
    for old, new in (("00000", "x"), ("00001", "00000"), ("x", "00001")):
        (root / "moments" / f"{old}.npy").rename(root / "moments" / f"{new}.npy")
    with pytest.raises(UserError, match=r"moments/00000\.npy: is damaged; run the command that made the cache again"):
        cache.check_contents(aligned=False, pixels=False)
    assert len(read) == 14
    shutil.copytree(place / "half", root, dirs_exist_ok=True)
    cache.check_contents(aligned=False, pixels=False)
    flipped = bytearray((root / "images" / "00003.npy").read_bytes())
    flipped[-1] ^= 1
    times = (root / "images" / "00003.npy").stat()
    (root / "images" / "00003.npy").write_bytes(flipped)
    os.utime(root / "images" / "00003.npy", ns=(times.st_atime_ns, times.st_mtime_ns))  # as rsync and cp -p do
    cache.check_contents(aligned=False, pixels=False)
    with pytest.raises(UserError, match=r"images/00003\.npy: is damaged"):
        cache.check_contents(aligned=False, pixels=True)


def test_a_cache_that_cannot_be_written_is_verified_each_time(place, tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    shutil.copytree(place / "half", tmp_path / "copy")
    (tmp_path / "copy" / ".verified.json").write_text("[1]")

    def refuse(*_):
        raise OSError("read-only file system")

    monkeypatch.setattr(latent_cache, "write_json", refuse)
    LatentCache(str(tmp_path / "copy")).check_contents(aligned=False, pixels=False)
    assert "cannot be written (read-only file system), so the next start verifies again" in caplog.text


def test_another_number_of_classes_than_expected_is_a_hint(place):
    (hint,) = LatentCache(str(place / "half"), num_classes=1000).hints
    assert hint.startswith("2 classes, where data.num_classes=1000 are expected")
    assert LatentCache(str(place / "half"), num_classes=2).hints == ()


def test_an_autoencoder_that_changed_since_training_is_refused_when_sampling(place, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(place / "vae", tmp_path / "vae")
    succeed(
        "train", *SMALL, *latents(place)[:2], "autoencoder=kl", f"autoencoder.source={tmp_path / 'vae'}", "name=run"
    )
    codec = KLAutoencoder(str(tmp_path / "vae"))
    with torch.no_grad():
        codec.network.decoder.conv_out.bias += 1
    codec.network.save_pretrained(tmp_path / "vae")
    assert "holds other weights than the run was trained with" in refusal("sample", "ckpt=runs/run", "num_samples=2")
    warning = "has other weights than the model was trained with"
    succeed("sample", "ckpt=runs/run", "num_samples=2", f"autoencoder={place / 'vae'}", "out=first")
    assert warning not in caplog.text
    succeed("sample", "ckpt=runs/run", "num_samples=2", f"autoencoder={tmp_path / 'vae'}", "out=second")
    assert warning in caplog.text
    shutil.rmtree(tmp_path / "vae")
    assert "autoencoder.source=" in refusal("sample", "ckpt=runs/run", "num_samples=2")
    assert ddt.load_model("runs/run").in_channels == 3
    assert Identity().fingerprint is None
