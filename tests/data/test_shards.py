"""Shards: the same images, labels, training and cache as from a folder, and damage in one line."""

import io
import json
import pickle
import re
import tarfile

import numpy as np
import pyarrow
import pytest
from conftest import picture, refusal, rows, succeed, thinned
from pyarrow import parquet

from ddt.data import shards
from ddt.data.images import ImageFolder, ImageShards
from ddt.data.latent_cache import LatentCache
from ddt.data.shards import ShardsPlace
from ddt.errors import UserError

COUNT, PER_SHARD = 12, 5
LABELS = [k % 3 for k in range(COUNT)]


def png(k):
    file = io.BytesIO()
    picture(k).save(file, "png")
    return file.getvalue()


def write_tar(path, members):
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def sample(k, kind="cls", label=None):
    label = LABELS[k] if label is None else label
    label = json.dumps({"label": label}) if kind == "json" else str(label)
    return [(f"imgs/{k:04d}.png", png(k)), (f"imgs/{k:04d}.{kind}", label.encode())]


def write_parquet(path, numbers, labels=None, names=("cat", "dog", "owl")):
    images = [{"bytes": png(k), "path": f"{k}.png"} for k in numbers]
    table = pyarrow.table({"image": images, "label": labels or [LABELS[k] for k in numbers]})
    features = {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}}
    table = table.replace_schema_metadata({"huggingface": json.dumps(features)})
    parquet.write_table(table, path, row_group_size=2)


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    """The same pictures as a folder, as tar and as Parquet, all in one order."""
    base = tmp_path_factory.mktemp("shards")
    for kind in ("files", "tar", "parquet"):
        (base / kind).mkdir()
    for shard, start in enumerate(range(0, COUNT, PER_SHARD)):
        numbers = range(start, min(start + PER_SHARD, COUNT))
        kind = "json" if shard == 1 else "cls"
        write_tar(base / "tar" / f"train-{shard:03d}.tar", [m for k in numbers for m in sample(k, kind)])
        write_parquet(base / "parquet" / f"train-{shard:05d}-of-00003.parquet", numbers)
    for k in range(COUNT):
        (base / "files" / f"{k:04d}.png").write_bytes(png(k))
    (base / "labels.json").write_text(json.dumps({f"{k:04d}.png": label for k, label in enumerate(LABELS)}))
    return base


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_images_and_labels_are_those_of_the_folder(roots, kind):
    for split in ("train", "test"):
        folder = ImageFolder(str(roots / "files"), 16, split, holdout_every=5, labels=str(roots / "labels.json"))
        images = ImageShards(str(roots / kind), 16, split, holdout_every=5)
        assert images.labels.tolist() == folder.labels.tolist()
        assert images.class_names == (["0", "1", "2"] if kind == "tar" else ["cat", "dog", "owl"])
        order = np.random.default_rng(0).permutation(len(images.labels))
        again = pickle.loads(pickle.dumps(images))  # as a loading process gets it
        assert np.array_equal(again.load(order), folder.load(order))
    inferred = ImageShards(str(roots / kind), None, channels=None)
    assert (inferred.image_size, inferred.channels) == (32, 3)
    assert len(pickle.dumps(images.source)) < 500


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_the_fingerprint_is_of_labels_and_contents(roots, kind, tmp_path):
    def fingerprint(folder, changed=None):
        folder.mkdir()
        for file in (roots / kind).iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        first = min(folder.iterdir())
        if changed is not None and kind == "tar":
            renamed = [(f"imgs/0000.{name[-3:]}", content) for name, content in sample(changed)]
            write_tar(first, [*renamed, *(m for k in range(1, PER_SHARD) for m in sample(k))])
        elif changed is not None:
            write_parquet(first, [changed, *range(1, PER_SHARD)])
        return ImageShards(str(folder), 16, holdout_every=0).fingerprint

    plain = fingerprint(tmp_path / "a")
    assert plain == fingerprint(tmp_path / "b")
    other = fingerprint(tmp_path / "c", changed=3)  # another picture of the same class, under the same name
    assert other.partition("-")[0] == plain.partition("-")[0]
    assert other.partition("-")[2] != plain.partition("-")[2]
    names = tmp_path / "names.txt"
    names.write_text("x\ny\nz\n")
    named = ImageShards(str(roots / kind), 16, holdout_every=0, class_names=str(names))
    assert named.class_names == ["x", "y", "z"]
    assert named.fingerprint != plain


@pytest.mark.parametrize("kind", thinned(["tar", "parquet"], 2))
def test_training_and_cache_take_shards(roots, kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = ["data.image_size=16", "data.holdout_every=5"]
    small = ["model.hidden_size=32", "model.depth=3", "model.encoder_depth=2", "trainer.global_batch_size=4",
             "trainer.max_steps=2", "trainer.preview_every=0", "trainer.num_workers=1"]  # fmt: skip
    succeed("train", "data=shards", f"data.root={roots / kind}", *data, *small)
    succeed("train", "data=folder", f"data.root={roots / 'files'}", f"data.labels={roots / 'labels.json'}",
            "name=files", *data, *small)  # fmt: skip
    logged = rows(tmp_path / "runs" / f"shards_{kind}_nano")
    assert [row.get("loss") for row in logged] == [row.get("loss") for row in rows(tmp_path / "runs" / "files")]
    cache = ["scripts.cache_latents", "data=shards", f"data.root={roots / kind}", *data, "autoencoder=identity",
             "out=cache", "num_workers=1"]  # fmt: skip
    succeed(*cache)
    succeed(*cache)  # complete, and verified
    images, cached = ImageShards(str(roots / kind), 16, holdout_every=5), LatentCache(str(tmp_path / "cache"))
    everything = np.arange(len(images.labels))
    assert cached.names == images.names
    assert np.array_equal(cached.load(everything), images.load(everything))  # pixels of the shards


def test_a_pattern_chooses_a_split(tmp_path):
    for split, numbers in (("train", range(3)), ("validation", range(3, 5))):
        write_tar(tmp_path / f"{split}-0.tar", [m for k in numbers for m in sample(k)])
    with pytest.raises(UserError, match=rf"^data.root={tmp_path}: holds shards of the splits .*{tmp_path}/train-\*"):
        ShardsPlace(str(tmp_path)).list()
    assert len(ShardsPlace(f"{tmp_path}/train-*").list().names) == 3


def test_names_of_classes_and_what_is_not_read(tmp_path):
    members = [*sample(0, label="owl"), *sample(1, "json", label="cat"), ("imgs/0000.txt", b"x"), ("._a.png", b"x")]
    write_tar(tmp_path / "a.tar", members)
    (tmp_path / "readme.md").write_text("x")
    listed = ShardsPlace(str(tmp_path)).list()
    assert (listed.class_names, listed.labels.tolist()) == (["cat", "owl"], [1, 0])
    assert listed.left_out == {".txt": 1, "hidden": 1, ".md": 1}
    assert listed.names == ["a.tar/imgs/0000.png", "a.tar/imgs/0001.png"]


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data[:4000],  # within a picture
        lambda data: data.replace(b"imgs/0001.png", b"imgs/0001.pnG"),  # a header of a wrong checksum
        lambda data: data.rstrip(b"\0"),
        lambda data: b"x" * 2000,
        lambda data: b"",
    ],
)
def test_a_damaged_tar_is_named(tmp_path, change):
    path = tmp_path / "a.tar"
    write_tar(path, [m for k in range(3) for m in sample(k)])
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(UserError, match=r"a.tar: is damaged or no .tar file \(.+\); copy it again$") as error:
        ShardsPlace(str(tmp_path)).list()
    assert "\n" not in str(error.value)


def test_a_damaged_picture_is_named_or_skipped(tmp_path):
    write_tar(tmp_path / "a.tar", [("0.png", png(0)[:700]), ("0.cls", b"0"), ("1.png", png(1)), ("1.cls", b"0")])
    message = r"a.tar/0.png: not a readable image \([^<>]*\); replace or remove it$"
    with pytest.raises(UserError, match=message):
        ImageShards(str(tmp_path), 8, holdout_every=0).load(np.arange(2))
    assert message[:11] in refusal("train", "data=shards", f"data.root={tmp_path}", "data.holdout_every=0")
    first, second = ImageShards(str(tmp_path), 8, holdout_every=0, skip_broken=True).load(np.arange(2))
    assert np.array_equal(first, second)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("a.png", b"x")], r"a.tar/a.png: has no label; the tar needs a .cls"),
        ([("a.png", b"x"), ("a.json", b"{}")], r"a.tar/a.png: has no label"),
        ([("a.png", b"x"), ("a.json", b"{")], r"a.tar/a.json: holds no class"),
        ([("a.png", b"x"), ("a.cls", b"")], r"a.tar/a.cls: the class '' is no name or number"),
        ([*sample(0), *sample(1, label="x")], r"data.root=.*: holds names and numbers"),
        ([("a.txt", b"x")], r"data.root=.*: its 1 .tar files hold no images"),
    ],
)
def test_labels_that_are_missing_are_named(tmp_path, members, message):
    write_tar(tmp_path / "a.tar", members)
    with pytest.raises(UserError, match=message):
        ShardsPlace(str(tmp_path)).list()


def test_a_damaged_parquet_and_other_columns_are_named(tmp_path, monkeypatch):
    def refused(name, message):
        with pytest.raises(UserError, match=message) as error:
            ShardsPlace(str(tmp_path / name)).list()
        assert "\n" not in str(error.value)

    write_parquet(tmp_path / "a.parquet", range(4))
    content = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "cut.parquet").write_bytes(content[:-100])
    refused("cut.parquet", "cut.parquet: is damaged or no .parquet file")
    write_parquet(tmp_path / "none.parquet", range(3), labels=[0, None, 1])
    refused("none.parquet", r"none.parquet/1: has no label \(None\)")
    write_parquet(tmp_path / "high.parquet", range(3), labels=[0, 3, 1])
    refused("high.parquet", r"data.root=.*: labels out of 0..2: high.parquet/1 \(3\)")
    parquet.write_table(pyarrow.table({"img": [b"x"], "label": [0]}), tmp_path / "other.parquet")
    refused("other.parquet", "other.parquet: has no column image, but img, label")
    (tmp_path / "bits.parquet").write_bytes(content[:40] + bytes(200) + content[240:])
    with pytest.raises(UserError, match=r"bits\.parquet"):
        ImageShards(str(tmp_path / "bits.parquet"), 8, holdout_every=0).load(np.arange(4))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    refused("a.parquet", r"data.root=.*: needs the package pyarrow; run pip install -e '.\[parquet\]'")


def test_shards_that_name_their_classes_otherwise_are_refused(tmp_path):
    folder = tmp_path / "two"
    folder.mkdir()
    write_parquet(folder / "a.parquet", range(3))
    write_parquet(folder / "b.parquet", range(3), names=["dog", "cat", "owl"])
    with pytest.raises(UserError, match=r"b.parquet: has other class names than .*a.parquet; give data.class_names"):
        ImageShards(str(folder), 8, holdout_every=0)
    (tmp_path / "names.txt").write_text("cat\ndog\nowl\n")
    given = ImageShards(str(folder), 8, holdout_every=0, class_names=str(tmp_path / "names.txt"))
    assert given.class_names == ["cat", "dog", "owl"]
    for names in (["cat", "cat", "owl"], "ab", {"0": "cat"}, [1, 2]):
        write_parquet(tmp_path / "names.parquet", range(3), names=names)
        with pytest.raises(UserError, match=r"names.parquet: its metadata holds no list of different class names"):
            ImageShards(str(tmp_path / "names.parquet"), 8, holdout_every=0)


def test_folders_without_shards_or_of_two_kinds_are_named(tmp_path):
    for missing in ("no/such", "x-*", ""):
        with pytest.raises(UserError, match=rf"^data.root={re.escape(missing)}: no such folder or files"):
            ShardsPlace(missing).list()
    (tmp_path / "x.zip").write_text("x")
    with pytest.raises(UserError, match=r"^data.root=.*: holds no .tar or .parquet files \(not read: 1 .zip\)$"):
        ShardsPlace(str(tmp_path)).list()
    for name in ("a.tar", "a.parquet"):
        (tmp_path / name).write_text("x")
    with pytest.raises(UserError, match=r"holds .parquet and .tar files; give .*/\*.parquet"):
        ShardsPlace(str(tmp_path)).list()


def test_a_tar_is_scanned_once(tmp_path, monkeypatch):
    write_tar(tmp_path / "a.tar", [m for k in range(3) for m in sample(k)])
    opened, tar_open = [], tarfile.open
    monkeypatch.setattr(shards.tarfile, "open", lambda *a, **k: opened.append(a) or tar_open(*a, **k))
    images = [ImageShards(str(tmp_path), 8, split, holdout_every=2) for split in ("train", "test")]
    images[0].load(np.arange(1))
    assert len(opened) == 1
