"""Writing a latent cache: its content, interruptions, broken files and refusals."""

import csv
import errno
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, picture, picture_folder, refusal, run, run_inside, small_vae, succeed, thinned
from PIL import Image

from ddt.autoencoder import KLAutoencoder
from ddt.data import cache_writer as caching
from ddt.data.images import ImageFolder
from ddt.data.latent_cache import LatentCache, read_index
from ddt.errors import UserError
from ddt.files import lock_folder
from ddt.tensor_files import ArrayWriter

pytestmark = pytest.mark.usefixtures("one_thread")  # as in the processes here: another number rounds otherwise
SCRIPT = ROOT / "scripts" / "cache_latents.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return picture_folder(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    return small_vae(tmp_path_factory.mktemp("vae"), channels=3, levels=2, scaling_factor=0.5)


def arguments(folder, vae, out, *more):
    data = ["data=folder", f"data.root={folder}", "data.image_size=16", "data.holdout_every=5"]
    codec = ["autoencoder=kl", f"autoencoder.source={vae}"]
    return [*data, *codec, f"out={out}", "shard_size=4", "batch_size=3", "num_workers=0", *more]


def cached(folder, vae, out, *more):
    succeed("scripts.cache_latents", *arguments(folder, vae, out, *more))


def content(out):
    return {str(p.relative_to(out)): p.read_bytes() for p in sorted(out.rglob("*.npy"))}


@pytest.fixture(scope="module")
def cache(folder, vae, tmp_path_factory, one_thread):
    out = tmp_path_factory.mktemp("cache") / "photos"
    done = run_inside("scripts.cache_latents", *arguments(folder, vae, out, "store_images=true"))
    assert done.returncode == 0, done.stderr
    assert "22 images to encode: moments 0.0 MB, images 0.0 MB" in done.stderr
    return out


def test_records_are_the_autoencoders_moments_of_the_adm_crops(cache, folder, vae):
    for split, count in (("train", 17), ("test", 5)):
        stored, online = LatentCache(str(cache), split), ImageFolder(str(folder), 16, split, holdout_every=5)
        assert len(stored.labels) == count
        assert stored.labels.tolist() == online.labels.tolist()
        assert stored.names == online.names
        assert stored.class_names == ["class0", "class1"]
        everything, straight = np.arange(count), np.zeros(count, dtype=bool)
        assert np.array_equal(stored.load(everything), online.load(everything))
        moments = KLAutoencoder(str(vae)).encode(torch.from_numpy(online.load(everything))).numpy()
        actual = stored.load_moments(everything, straight)
        assert (actual.dtype, actual.shape) == (np.float16, (count, 6, 8, 8))
        np.testing.assert_allclose(actual, moments, rtol=2e-3, atol=2e-3)


def test_index_says_what_the_records_are_and_where_they_came_from(cache, vae):
    index = read_index(cache)
    assert index["complete"]
    assert index["count"] == 22
    assert index["splits"] == {"train": 17, "test": 5}
    assert index["arrays"]["moments"] == {"dtype": "float16", "shape": [1, 6, 8, 8]}
    assert index["autoencoder"]["fingerprint"] == KLAutoencoder(str(vae)).fingerprint
    assert index["transform"] == "RGB, ADM centre crop to 16 px"
    assert len(index["shards"]) == 6
    for shard in index["shards"]:
        for name, file in shard.items():
            assert (cache / name).stat().st_size == file["size"]
            assert len(file["sha256"]) == 64
    with (cache / "manifest.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows[0] == dict(
        path="class0/01.png", label="0", split="train", bytes=rows[0]["bytes"], width="24", height="20", mode="RGB",
        rotated="0",
    )  # fmt: skip


def test_a_complete_cache_is_verified_and_left_alone(cache, folder, vae, caplog):
    caplog.set_level("INFO")
    before = {p: p.stat().st_mtime_ns for p in cache.rglob("[!.]*") if p.is_file()}
    cached(folder, vae, cache, "store_images=true")
    assert "complete, 22 images; every checksum is right" in caplog.text
    assert {p: p.stat().st_mtime_ns for p in cache.rglob("[!.]*") if p.is_file()} == before


def test_a_flipped_bit_and_every_other_damage_is_reported_and_repaired(cache, folder, vae, tmp_path):
    out = tmp_path / "copy"
    shutil.copytree(cache, out)
    for name in ("images/00001.npy", "moments/00002.npy", "labels.npy"):
        data = bytearray((out / name).read_bytes())
        data[-5] ^= 4
        (out / name).write_bytes(data)
    message = refusal("scripts.cache_latents", *arguments(folder, vae, out, "store_images=true"))
    assert "00001.npy: damaged (3 of the cache's files are)" in message
    cached(folder, vae, out, "store_images=true")
    assert content(out) == content(cache)
    (out / "labels.npy").unlink()
    with pytest.raises(ValueError, match=r"labels\.npy: is missing"):
        LatentCache(str(out))


KILLED = """
import importlib, os
module, name, call = importlib.import_module({module!r}), {name!r}, {call}
owner = getattr(module, name.split(".")[0]) if "." in name else module
attribute, calls = name.split(".")[-1], []
original = getattr(owner, attribute)
def dying(*arguments, **options):
    calls.append(1)
    if len(calls) == call and not {after}:
        os._exit(9)
    result = original(*arguments, **options)
    if len(calls) == call:
        os._exit(9)
    return result
setattr(owner, attribute, dying)
from scripts import cache_latents
cache_latents.main()
"""
MOMENTS_TO_DIE = {
    "while the files are looked at": ("ddt.data.manifest", "inspect_image", 7, False),
    "with half a shard written": ("ddt.tensor_files", "ArrayWriter.append", 7, False),
    "with one of a shard's two files in place": ("pathlib", "Path.replace", 4, True),
    "before a shard's receipt": ("ddt.data.cache_writer", "receipt_path", 8, False),
    "before the last index": ("ddt.data.cache_writer", "sha256", 2, False),
}


@pytest.mark.slow
def test_killed_at_any_time_the_same_command_gives_the_same_bytes(cache, folder, vae, tmp_path):
    """One folder, killed at five places, each time resumed by the same command."""
    out = tmp_path / "killed"
    for when, (module, name, call, after) in MOMENTS_TO_DIE.items():
        code = KILLED.format(module=module, name=name, call=call, after=after)
        command = [sys.executable, "-c", code, *arguments(folder, vae, out, "store_images=true")]
        assert subprocess.run(command, cwd=ROOT, capture_output=True, check=False).returncode == 9, when
        with pytest.raises(ValueError, match=r"incomplete|holds no latent cache"):
            LatentCache(str(out))
    cached(folder, vae, out, "store_images=true")
    assert content(out) == content(cache)
    assert not list(out.glob("*/.tmp-*"))


@pytest.mark.slow
def test_two_processes_make_the_same_bytes(cache, folder, vae, tmp_path):
    out = tmp_path / "two"
    done = run(SCRIPT, *arguments(folder, vae, out, "store_images=true", "num_processes=2"), OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    assert content(out) == content(cache)
    assert read_index(out)["complete"]


@pytest.fixture(scope="module")
def pixels(tmp_path_factory):
    """A cache of ten image files without an autoencoder, and the options that made it."""
    root = tmp_path_factory.mktemp("pixels")
    picture_folder(root / "pictures", count=5)
    options = [
        "data=folder", f"data.root={root / 'pictures'}", "data.image_size=16", "data.channels=3",
        "data.holdout_every=5", "autoencoder=identity", "shard_size=4", "num_workers=0",
    ]  # fmt: skip
    succeed("scripts.cache_latents", *options, f"out={root / 'cache'}")
    return root / "cache", options


@pytest.mark.parametrize("name", ["index.json", "manifest.csv"])
def test_a_damaged_list_is_refused_and_removing_it_alone_rebuilds_it(pixels, tmp_path, monkeypatch, name):
    """In seconds: nothing is encoded again, and of the images the headers alone are read."""
    cache, options = pixels
    out = tmp_path / "copy"
    shutil.copytree(cache, out)
    path = out / name
    intact = path.read_bytes()
    told = f"{path}: is damaged; remove this file alone, and the command that made the cache writes it again in seconds"
    for damaged in (
        intact[: len(intact) // 2],
        bytes(len(intact)),
        intact.replace(b"class1", b"class0", 1),
        b"[1]",
        b"",
    ):
        path.write_bytes(damaged)
        with pytest.raises(UserError) as error:
            LatentCache(str(out))
        assert str(error.value) == told
    path.write_bytes(intact.replace(b"class1", b"class0", 1))
    assert refusal("scripts.cache_latents", *options, f"out={out}") == told
    path.unlink()
    for function in ("ddt.data.manifest.read_image", "ddt.data.cache_writer.encode_shard"):
        monkeypatch.setattr(function, None)
    succeed("scripts.cache_latents", *options, f"out={out}")
    assert path.read_bytes() == intact
    assert content(out) == content(cache)


def test_a_list_is_not_rebuilt_of_other_images(pixels, tmp_path):
    cache, options = pixels
    out, other = tmp_path / "copy", picture_folder(tmp_path / "other", count=6)
    shutil.copytree(cache, out)
    (out / "manifest.csv").unlink()
    message = refusal("scripts.cache_latents", *options, f"out={out}", f"data.root={other}")
    assert message == f"out={out}: was made of other images than the data holds now; give those, or choose another out="
    assert not list(out.glob("*manifest*"))


def test_shards_without_an_index_are_not_taken_for_those_of_another_cache(pixels, tmp_path):
    cache, options = pixels
    out = tmp_path / "copy"
    shutil.copytree(cache, out)
    (out / "index.json").unlink()
    succeed("scripts.cache_latents", *options, f"out={out}", "dtype=float32")
    straight = np.zeros(8, dtype=bool)
    stored = [LatentCache(str(folder)).load_moments(np.arange(8), straight) for folder in (cache, out)]
    assert [values.dtype for values in stored] == [np.float16, np.float32]
    np.testing.assert_allclose(*stored, atol=1e-3)


def test_a_class_that_loses_all_its_images_is_named(pixels, tmp_path):
    _, options = pixels
    root = picture_folder(tmp_path / "pictures", count=3)
    for path in (root / "class1").iterdir():
        path.write_bytes(b"broken")
    message = refusal(
        "scripts.cache_latents", *options, f"data.root={root}", f"out={tmp_path / 'out'}", "skip_broken=true"
    )
    assert message.endswith("none of the images of class1 can be read; replace them, or remove the sub-folder")
    assert not (tmp_path / "out" / "manifest.csv").exists()


def test_names_that_are_not_utf8_are_cached(pixels, tmp_path):
    _, options = pixels
    root, out = picture_folder(tmp_path / "pictures", count=2), tmp_path / "out"
    name = os.fsdecode(b"class0/caf\xe9,1.png")
    (root / "class0" / "01.png").rename(root / name)
    (root / "class1" / "00.png").write_bytes(b"broken")
    again = [*options, f"data.root={root}", "data.holdout_every=0", f"out={out}", "skip_broken=true"]
    succeed("scripts.cache_latents", *again)
    assert LatentCache(str(out)).names == ["class0/00.png", name, "class1/01.png"]
    intact = (out / "manifest.csv").read_bytes()
    assert b"caf\xe9" in intact
    (out / "manifest.csv").unlink()
    succeed("scripts.cache_latents", *again)
    assert (out / "manifest.csv").read_bytes() == intact


@pytest.mark.parametrize(
    ("setting", "instead"), [("data.horizontal_flip=true", "flip=true"), ("data.skip_broken=true", "skip_broken=true")]
)
def test_settings_of_training_from_files_are_refused(pixels, tmp_path, setting, instead):
    message = refusal("scripts.cache_latents", *pixels[1], f"out={tmp_path / 'out'}", setting)
    assert message == f"{setting}: has no effect here; give {instead}"


def test_an_applied_rotation_is_cached_and_read(tmp_path, pixels):
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "pictures").mkdir()
    for k in range(3):
        picture(k, 16, 16).save(tmp_path / "pictures" / f"{k}.jpg", exif=exif)
    options = [*pixels[1], f"data.root={tmp_path / 'pictures'}", "data.holdout_every=0"]
    for exif in ("ignore", "apply"):
        succeed("scripts.cache_latents", *options, f"data.exif={exif}", f"out={tmp_path / exif}")
    ignored, applied = (LatentCache(str(tmp_path / exif)) for exif in ("ignore", "apply"))
    assert ignored.fingerprint != applied.fingerprint
    folder = ImageFolder(str(tmp_path / "pictures"), 16, holdout_every=0, exif="apply")
    assert np.array_equal(applied.load(np.arange(3)), folder.load(np.arange(3)))  # of the image files
    assert np.array_equal(ignored.load(np.arange(3)), np.rot90(folder.load(np.arange(3)), axes=(2, 3)))
    moments = applied.load_moments(np.arange(3), np.zeros(3, dtype=bool)).astype(np.float32)
    np.testing.assert_allclose(moments, folder.load(np.arange(3)) / 127.5 - 1, atol=1e-2)


@pytest.mark.slow
def test_no_process_writes_into_another_cache(cache, folder, vae, tmp_path):
    """An incomplete cache stays untouched by another command on two processes."""
    out = tmp_path / "stopped"
    shutil.copytree(cache, out)
    for shard in range(1, 6):
        (out / "shards" / f"{shard:05d}.json").unlink()
        (out / "moments" / f"{shard:05d}.npy").unlink()
    (out / "index.json").write_text(json.dumps({**read_index(out), "complete": False, "shards": []}))
    before = content(out)
    other = small_vae(tmp_path / "other", channels=3, levels=2, scaling_factor=0.7)
    chosen = arguments(folder, other, out, "store_images=true", "num_processes=2")
    assert "holds another cache (fingerprint " in refusal("scripts.cache_latents", *chosen)
    assert content(out) == before
    assert len(list(out.glob("shards/*.json"))) == 1


def test_mended_files_are_read_again(tmp_path, vae):
    root = picture_folder(tmp_path / "pictures", count=3)
    image = root / "class0" / "01.png"
    good = image.read_bytes()
    image.write_bytes(good[:50])
    assert "1 of 6 images cannot be read" in refusal("scripts.cache_latents", *arguments(root, vae, tmp_path / "out"))
    image.write_bytes(good)
    cached(root, vae, tmp_path / "out")
    assert read_index(tmp_path / "out")["count"] == 6
    assert not (tmp_path / "out" / "broken.csv").exists()


def test_a_cache_goes_into_a_folder_of_its_own(folder, vae, tmp_path):
    before = sorted(folder.rglob("*"))
    message = refusal("scripts.cache_latents", *arguments(folder, vae, folder))
    assert f"out={folder}: holds class0, class1, not written by this command" in message
    message = refusal("scripts.cache_latents", *arguments(folder, vae, folder / "class9"))
    assert "lies among the images of data.root" in message
    assert refusal("scripts.cache_latents", *arguments(folder, vae, "")).startswith("out: not set")
    assert sorted(folder.rglob("*")) == before
    with lock_folder(tmp_path, "taken"):
        message = refusal("scripts.cache_latents", *arguments(folder, vae, tmp_path))
    assert message == f"out={tmp_path}: another process is writing this cache; wait for it"


def test_files_that_are_no_images_by_name_are_counted(tmp_path, vae, caplog):
    caplog.set_level("INFO")
    root = picture_folder(tmp_path / "pictures", count=3)
    (root / "class0" / "notes.txt").write_text("")
    (root / "class0" / "film.gif").write_text("")
    elsewhere = picture_folder(tmp_path / "elsewhere", count=2, classes=1)
    (root / "class1" / "more").symlink_to(elsewhere / "class0")
    cached(root, vae, tmp_path / "out")
    assert "hint: not read: 1 .gif, 1 .txt" in caplog.text
    assert read_index(tmp_path / "out")["count"] == 8  # those behind the link too


def test_flip_stores_the_mirror_image_too(folder, vae, tmp_path):
    cached(folder, vae, tmp_path / "flip", "flip=true", "dtype=float32")
    stored, online = LatentCache(str(tmp_path / "flip")), ImageFolder(str(folder), 16, holdout_every=5)
    indices = np.array([3, 0, 16])
    moments = stored.load_moments(indices, np.array([True, False, True]))
    pixels = online.load(indices)
    pixels[[0, 2]] = pixels[[0, 2]][..., ::-1]
    expected = KLAutoencoder(str(vae)).encode(torch.from_numpy(pixels)).numpy()
    np.testing.assert_allclose(moments, expected, rtol=1e-5, atol=1e-5)


def test_another_cache_in_the_folder_is_refused(cache, folder, vae):
    for option in ("flip=true", "dtype=float32", "store_images=false"):
        message = refusal("scripts.cache_latents", *arguments(folder, vae, cache, "store_images=true", option))
        assert message.startswith(f"out={cache}: holds another cache (arrays")
        assert len(message.splitlines()) == 1


def broken_folder(root):
    """Every kind of file that ImageNet and people's disks have."""
    for name in ("good", "bad"):
        (root / name).mkdir(parents=True)
    good = root / "good"
    picture(1).convert("L").save(good / "grey.png")
    picture(2).convert("CMYK").save(good / "cmyk.jpg")
    picture(3).convert("P").save(good / "palette.png")
    picture(4).convert("RGBA").save(good / "alpha.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(5).save(good / "rotated.jpg", exif=exif)
    deep = np.random.default_rng(6).integers(0, 2**16, (20, 24), dtype=np.uint16)
    Image.fromarray(deep).save(good / "deep.png")
    palette = picture(7).convert("P")
    palette.save(good / "see_through.png", transparency=bytes(range(200)))
    picture(8, 300, 200).save(root / "bad" / "truncated.jpg")
    data = (root / "bad" / "truncated.jpg").read_bytes()
    (root / "bad" / "truncated.jpg").write_bytes(data[: len(data) // 2])
    (root / "bad" / "text.png").write_text("not a picture")
    (root / "bad" / "empty.jpg").write_bytes(b"")
    return root


def test_broken_images_are_all_listed_and_refused(tmp_path, vae):
    root = broken_folder(tmp_path / "pictures")
    options = ["data.holdout_every=0", "num_workers=2"]
    message = refusal("scripts.cache_latents", *arguments(root, vae, tmp_path / "out", *options))
    assert "3 of 10 images cannot be read, the first is bad/empty.jpg" in message
    assert "skip_broken=true" in message
    assert len(message.splitlines()) == 1
    with (tmp_path / "out" / "broken.csv").open(newline="") as file:
        assert [row["path"] for row in csv.DictReader(file)] == ["bad/empty.jpg", "bad/text.png", "bad/truncated.jpg"]
    assert not (tmp_path / "out" / "manifest.csv").exists()
    assert not (tmp_path / "out" / "moments").exists()


def test_skipped_on_request_and_what_is_converted_is_said(tmp_path, vae, caplog):
    caplog.set_level("INFO")
    root = broken_folder(tmp_path / "pictures")
    picture(9).save(root / "bad" / "fine.png")
    cached(root, vae, tmp_path / "out", "data.holdout_every=0", "skip_broken=true", "store_images=true")
    assert "3 images that cannot be read are left out" in caplog.text
    assert "hint: converted to RGB: 1 CMYK, 1 I;16, 1 L, 1 P, 1 P+transparency, 1 RGBA" in caplog.text
    assert "hint: 2 images are transparent" in caplog.text
    assert "1 images carry an EXIF rotation, which is not applied" in caplog.text
    stored = LatentCache(str(tmp_path / "out"))
    assert stored.labels.tolist() == [0] + [1] * 7
    online = ImageFolder(str(root), 16, holdout_every=0)
    online.names = stored.names
    assert np.array_equal(stored.load(np.arange(8)), online.load(np.arange(8)))


@pytest.mark.parametrize(("number", "text"), [(errno.ENOSPC, "the disk is full"), (errno.EIO, "Input/output error")])
def test_a_disk_that_refuses_to_write_is_one_line_and_finished_shards_stay(
    folder, vae, tmp_path, monkeypatch, cache, number, text
):
    out, writes = tmp_path / "full", []
    original = ArrayWriter.write

    def failing(self, data):
        writes.append(len(data))
        if len(writes) > 12:
            raise OSError(number, os.strerror(number))
        original(self, data)

    with monkeypatch.context() as patch:
        patch.setattr(ArrayWriter, "write", failing)
        message = refusal("scripts.cache_latents", *arguments(folder, vae, out, "store_images=true"))
    assert text in message
    assert "run the same command again" in message
    assert len(message.splitlines()) == 1
    assert len(list(out.glob("shards/*.json"))) == 2
    assert not list(out.rglob(".tmp-*"))
    cached(folder, vae, out, "store_images=true")
    assert content(out) == content(cache)


def test_a_disk_too_small_is_refused_before_anything_is_encoded(folder, vae, tmp_path, monkeypatch):
    usage = caching.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(caching.shutil, "disk_usage", lambda _: usage._replace(free=68_000_000))
    out = tmp_path / "small"
    message = refusal("scripts.cache_latents", *arguments(folder, vae, out, "data.image_size=256", "store_images=true"))
    assert "but the disk has 68.0 MB free; choose another out=" in message
    assert not (out / "moments").exists()


def test_moments_beyond_float16_are_refused(folder, vae, tmp_path, monkeypatch):
    original = KLAutoencoder.encode
    monkeypatch.setattr(KLAutoencoder, "encode", lambda self, images: original(self, images) * 1e9)
    message = refusal("scripts.cache_latents", *arguments(folder, vae, tmp_path / "out"))
    assert "values beyond float16; cache with dtype=float32" in message


def test_a_file_that_changed_since_the_manifest_is_named(folder, vae, tmp_path):
    root = picture_folder(tmp_path / "pictures", count=3)
    out, image = tmp_path / "out", root / "class0" / "01.png"
    changed = f"{image}: is not the file that manifest.csv was written of"
    cached(root, vae, out)
    picture(5, 40, 40).save(image)
    assert refusal("scripts.cache_latents", *arguments(root, vae, out)).startswith(changed)  # complete
    (out / "shards" / "00000.json").unlink()
    (out / "index.json").write_text(json.dumps({**read_index(out), "complete": False, "shards": []}))
    assert refusal("scripts.cache_latents", *arguments(root, vae, out)).startswith(changed)
    image.unlink()
    image.symlink_to(root / "gone.png")
    assert refusal("scripts.cache_latents", *arguments(root, vae, out, "num_workers=1")).startswith(changed)
    picture(5).save(root / "class1" / "new.png")
    message = refusal("scripts.cache_latents", *arguments(root, vae, out))
    assert "manifest.csv: lists other images than the data holds now" in message


@pytest.mark.parametrize(
    ("option", "message"),
    thinned(
        [
            ("model=nano", "model: has no effect here"),
            ("trainer.max_steps=3", "trainer.max_steps: has no effect here"),
            ("shard_size=0", "shard_size=0: must be at least 1"),
            ("dtype=float8", "dtype=float8: give 'float16' or 'float32'"),
            ("store_features=true", "store_features=true: needs an alignment with a target"),
            ("out=README.md", "out=README.md: is a file"),
            ("num_workers=-1", "num_workers=-1: must be at least 0"),
            ("+flop=true", "flop: no such setting; did you mean flip?"),
            ("data=photos_latents", "data.root=cache/photos: holds no latent cache"),
        ],
        3,
    ),
)
def test_wrong_input_is_one_line(tmp_path, monkeypatch, option, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "README.md").write_text("")
    (line,) = refusal("scripts.cache_latents", "data=digits", option).splitlines()
    assert line.startswith(message)
