"""ADM's metrics against numbers of its own evaluator; see golden/eval/README.md."""

import json
import os
import tracemalloc
import urllib.error
import zipfile
from typing import ClassVar

import numpy as np
import pytest
import torch
from conftest import GOLDEN, picture
from PIL import Image

from ddt.data.images import ImageFolder
from ddt.errors import UserError
from ddt.metrics.comparability import labels, reasons_not_comparable
from ddt.metrics.features import FeatureSet, exact_arithmetic
from ddt.metrics.frechet import Moments, Statistics, frechet_distance
from ddt.metrics.images import FolderImages, NpzImages, open_images, pick
from ddt.metrics.inception import NUM_POOL, NUM_SPATIAL, InceptionFeatures, find_weights, load_network
from ddt.metrics.precision_recall import half_distances, precision_recall, single_distances, squared_distances
from ddt.metrics.reference import Reference, read_reference
from ddt.metrics.scores import Prepared, authenticity, inception_score, nearest, score
from ddt.metrics.settings import WEIGHTS_SHA256

EXPECTED = json.loads((GOLDEN / "eval" / "expected.json").read_text())
CASES = EXPECTED["cases"]
FEATURE_CASES = ["main_600x64", "uneven_350x500x64", "overflow_300x64", "rankdeficient_40x64", "inceptionlike_200x2048"]
pytestmark = pytest.mark.usefixtures("one_thread")


def arrays(case):
    with np.load(GOLDEN / "eval" / f"{case}.npz") as file:
        return dict(file)


def moments(features):
    result = Moments(features.shape[1])
    result.add(torch.as_tensor(features))
    return result


@pytest.mark.parametrize("case", [*FEATURE_CASES[:-1], pytest.param(FEATURE_CASES[-1], marks=pytest.mark.slow)])
def test_frechet_distance_is_adms(case):
    values, expected = arrays(case), CASES[case]
    fid = frechet_distance(moments(values["gen"]), moments(values["ref"]))
    assert fid == pytest.approx(expected["fid"], rel=expected["fid_rel_tol"])
    if "mu_ref" in values:  # as a reference file holds it, its mean in float32
        reference = Statistics(values["mu_ref"].astype(np.float64), values["sigma_ref"])
        fid = frechet_distance(moments(values["gen"]), reference)
        assert fid == pytest.approx(expected["fid"], rel=expected["fid_rel_tol"])


def of(mean, covariance):
    return Statistics(np.asarray(mean, dtype=np.float64), np.asarray(covariance, dtype=np.float64))


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e200], ids=str)
def test_a_distance_that_is_not_finite_is_none_and_not_zero(value):
    plain = of(np.zeros(3), np.eye(3))
    for broken in (of([0, value, 0], np.eye(3)), of([0, value, 0], np.diag([1, value, 1]))):
        for pair in ((plain, broken), (broken, plain)):
            assert frechet_distance(*pair) is None


@pytest.mark.parametrize("root", [np.nan, np.inf, -1.0, 2.9, 3.1, 1e84], ids=str)
def test_a_distance_by_a_wrong_root_is_none(monkeypatch, root):
    """Means at distance 2, covariances of trace 3: with their root, of trace 3, it is 4, and with
    none of any trace in 0..3 below 4 or above 10.
    """
    a, b = of([0, 0, 0], np.eye(3)), of([2, 0, 0], np.eye(3))
    assert frechet_distance(a, b) == pytest.approx(4)
    monkeypatch.setattr(
        "torch_fidelity.metric_fid.fid_statistics_to_metric",
        lambda *_, verbose: {"frechet_inception_distance": 4 + 6 - 2 * root},
    )
    found = frechet_distance(a, b)
    assert found == pytest.approx(4.2) if root == 2.9 else found is None


def test_rounding_below_zero_is_zero():
    values = arrays("rankdeficient_40x64")["gen"]
    assert 0 <= frechet_distance(moments(values), moments(values)) < 1e-6


def test_spatial_features_need_one_order():
    values, expected = arrays("sfid_500x5x5x7"), CASES["sfid_500x5x5x7"]
    gen, ref = (moments(values[key].reshape(500, -1)) for key in ("gen_nhwc", "ref_nhwc"))
    assert frechet_distance(gen, ref) == pytest.approx(expected["sfid"], rel=1e-6)
    other = moments(values["ref_nhwc"].transpose(0, 3, 1, 2).reshape(500, -1))
    wrong = expected["sfid_if_gen_is_NHWC_but_ref_flattened_NCHW"]
    assert frechet_distance(gen, other) == pytest.approx(wrong, rel=1e-6)


@pytest.mark.parametrize("split", [5000, 600, 250, 100])
def test_inception_score_is_adms(split):
    expected = CASES["is_600x1008"]
    probabilities = torch.from_numpy(arrays("is_600x1008")["logits"]).softmax(dim=1).numpy()
    assert inception_score(probabilities, split) == pytest.approx(expected[f"split_{split}"], rel=1e-5)


def test_inception_score_takes_chunks_in_order():
    expected = CASES["is_12000x16_recipe"]
    rng = np.random.RandomState(expected["seed"])  # the generator of the golden numbers
    logits = rng.standard_normal((12000, 16)) * 1.5 + 2 * np.eye(16)[np.arange(12000) * 16 // 12000]
    probabilities = torch.from_numpy(logits.astype(np.float32)).softmax(dim=1).numpy()
    score = inception_score(probabilities)
    assert score == pytest.approx(expected["split_5000"], rel=1e-5)
    shuffled = inception_score(probabilities[np.random.default_rng(0).permutation(12000)])
    assert shuffled > 1.02 * score  # rows grouped by class


def test_inception_score_in_closed_form():
    certain = np.eye(4, dtype=np.float32)[np.arange(12) % 4] * (1 - 4e-7) + 1e-7
    assert inception_score(certain) == pytest.approx(4, rel=1e-4)
    chunks = np.concatenate([certain[:4], certain[:1]])
    assert inception_score(chunks, split=4) == pytest.approx((4 + 1) / 2, rel=1e-4)  # a short chunk counts as much
    assert np.isnan(inception_score(np.eye(2, dtype=np.float32)))


@pytest.mark.parametrize("case", FEATURE_CASES)
@pytest.mark.parametrize("block", [10_000, 128])
def test_precision_and_recall_are_adms(case, block):
    values, expected = arrays(case), CASES[case]
    count = min(len(values["ref"]), len(values["gen"]))
    ref, gen = (torch.from_numpy(values[key]) for key in ("ref", "gen"))
    precision, recall = precision_recall(ref, gen, block=block)
    assert precision == pytest.approx(expected["precision"], abs=2 / count)
    assert recall == pytest.approx(expected["recall"], abs=2 / count)
    precision, recall = precision_recall(ref, gen, "float32", block=block)
    assert precision == pytest.approx(expected["precision_fp32"], abs=1 / count)
    assert recall == pytest.approx(expected["recall_fp32"], abs=1 / count)
    precision, recall = precision_recall(gen, ref, block=block)
    assert precision == pytest.approx(expected["swapped"]["precision"], abs=2 / count)
    assert recall == pytest.approx(expected["swapped"]["recall"], abs=2 / count)


def test_distances_round_as_adms():
    """Squared norms of 1600 as Inception's: float16, the default, rounds distances coarsely."""
    values = arrays("inceptionlike_200x2048")
    ref, gen = (torch.from_numpy(values[key]) for key in ("ref", "gen"))
    half, single = half_distances(ref, gen), single_distances(ref, gen)
    assert torch.equal(half, half.half().float())
    assert 1 < (half - single).abs().max() < 4
    np.testing.assert_allclose(single, torch.cdist(ref.double(), gen.double()).square(), rtol=1e-4)
    near = 16 + torch.from_numpy(np.random.default_rng(0).integers(0, 3, (30, 4)).astype(np.float32)) / 64
    far = near + 0.25  # squared distances of 0.25 between squared norms of 1024, where float16 steps by 1
    assert precision_recall(near, far, "float32") == (0, 0)
    assert min(precision_recall(near, far, "float16")) > 0.5
    assert precision_recall(near, far) == precision_recall(near, far, "float16")


def test_overflow_is_taken_in_float32_block_by_block():
    rng = np.random.default_rng(0)
    near = torch.from_numpy(rng.standard_normal((40, 8)).astype(np.float32))
    mixed = torch.cat([1e3 * near[:1], near])
    assert not half_distances(mixed, near).isfinite().all()
    assert torch.equal(squared_distances(mixed, near, "float16"), single_distances(mixed, near))
    assert torch.equal(squared_distances(near, near, "float16"), half_distances(near, near))
    assert not torch.equal(half_distances(near, near), single_distances(near, near))


def test_arithmetic_flags_are_restored():
    def flags():
        cudnn = torch.backends.cudnn
        return torch.get_float32_matmul_precision(), cudnn.allow_tf32, cudnn.benchmark, cudnn.deterministic

    def fail():
        with exact_arithmetic():
            assert flags() == ("highest", False, False, True)
            raise ZeroDivisionError

    outside = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        before = flags()
        with pytest.raises(ZeroDivisionError):
            fail()
        assert flags() == before
    finally:
        torch.set_float32_matmul_precision(outside)


def test_inception_features_are_tensorflows(inception_weights):
    values = arrays("e2e_random_inception")
    state = torch.get_rng_state()
    features = InceptionFeatures(inception_weights)
    assert torch.equal(state, torch.get_rng_state())
    result = features(torch.from_numpy(values["gen"][:5]).permute(0, 3, 1, 2))
    assert {name: value.shape[1] for name, value in result.items()} == features.spaces
    for name in ("pool", "spatial"):
        expected = values[f"gen_{name}"][:5]
        assert result[name].shape == expected.shape
        assert np.abs(result[name].numpy() - expected).max() <= 1e-5 * np.abs(expected).max()
    np.testing.assert_allclose(result["probabilities"], values["gen_softmax"][:5], atol=1e-5)
    assert {value.dtype for value in result.values()} == {torch.float32}
    (line,) = features.deviations()
    assert line.startswith("the Inception weights are neither published file")
    features.hashes["sha256"] = WEIGHTS_SHA256 + features.hashes["sha256"][8:]
    assert features.deviations() == []


def image_file(path, save=np.savez, **arrays):
    save(path, **arrays)
    return path


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_images_are_read_as_a_stream(tmp_path, save):
    images = np.random.default_rng(0).integers(0, 256, (301, 128, 128, 3), dtype=np.uint8)
    file = NpzImages(image_file(tmp_path / "x.npz", save, arr_1=np.zeros(301), arr_0=images), "samples")
    assert (len(file), file.size, file.channels) == (301, (128, 128), 3)
    tracemalloc.start()
    try:
        for start, batch in zip(range(0, 301, 20), file.batches(20), strict=True):
            assert np.array_equal(batch, images[start : start + 20])
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < images.nbytes / 3
    dealt = [list(file.batches(20, rank, 3)) for rank in range(3)]
    assert [len(batches) for batches in dealt] == [6, 5, 5]
    for k, start in enumerate(range(0, 301, 20)):
        assert np.array_equal(dealt[k % 3][k // 3], images[start : start + 20])
    assert np.array_equal(pick(file, [300, 3, 64, 3], 50), images[[300, 3, 64, 3]])


def test_damaged_images_are_named(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (9, 16, 16, 3), dtype=np.uint8)
    path = image_file(tmp_path / "x.npz", arr_0=images)
    content = bytearray(path.read_bytes())
    content[4000] ^= 255
    path.write_bytes(content)
    for rank, num_processes in ((0, 1), (2, 3)):  # the process that reads the last batch sees the checksum
        with pytest.raises(UserError, match=r"samples=.*x.npz: damaged or no npz file"):
            list(NpzImages(path, "samples").batches(4, rank, num_processes))
    with zipfile.ZipFile(tmp_path / "short.npz", "w") as archive, archive.open("arr_0.npy", "w") as file:
        np.lib.format.write_array_header_1_0(file, {"shape": (9, 16, 16, 3), "fortran_order": False, "descr": "|u1"})
        file.write(bytes(1000))
    with pytest.raises(UserError, match=r"short.npz: damaged"):
        list(NpzImages(tmp_path / "short.npz", "samples").batches(4))


def test_folders_of_images(tmp_path):
    for k in (10, 2, 1):
        picture(k, 8, 6).save(tmp_path / f"{k:03d}.png")
    (tmp_path / "notes.txt").write_text("no image")
    folder = open_images(tmp_path, "samples")
    assert (len(folder), folder.size) == (3, (6, 8))
    batches = list(folder.batches(2))
    assert [len(batch) for batch in batches] == [2, 1]
    assert np.array_equal(np.concatenate(batches), [np.asarray(picture(k, 8, 6)) for k in (1, 2, 10)])
    digest = folder.sha256
    reference = read_reference(tmp_path, {"fid": NUM_POOL}, "inception")
    assert (reference.statistics, reference.sha256) == ({}, digest)
    assert reference.identity()["statistics"] == "computed from its images"
    picture(3, 8, 6).save(tmp_path / "010.png")
    assert folder.sha256 != digest
    whole = (tmp_path / "010.png").read_bytes()
    (tmp_path / "010.png").write_bytes(whole[:-60])
    with pytest.raises(UserError, match=r"^samples=.*010.png: damaged"):
        list(open_images(tmp_path, "samples").batches(2))
    for content, message in (
        (picture(3, 9, 6), "is 9×6 px, 001.png 8×6"),
        (picture(3, 8, 6).convert("L"), "has 1 channels"),
        (picture(3, 8, 6).convert("RGBA"), "mode RGBA"),
    ):
        content.save(tmp_path / "010.png")
        with pytest.raises(UserError, match=rf"^samples=.*010.png: .*{message}"):
            FolderImages(tmp_path, "samples")
    (tmp_path / "010.png").write_text("no image")
    with pytest.raises(UserError, match=r"^samples=.*010.png: damaged or no image"):
        FolderImages(tmp_path, "samples")


def test_a_folder_holds_the_images_that_training_would_read(tmp_path, caplog):
    """Sub-folders and other suffixes too, no hidden files; what is left out is told in a line."""
    caplog.set_level("INFO")
    for k, name in enumerate(("cat/b.png", "cat/a.webp", "dog/x.PNG")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        picture(k, 8, 6).save(tmp_path / name)
    digest = open_images(tmp_path, "samples").sha256
    picture(3, 8, 6).save(tmp_path / "cat" / ".tmp-host-12-c.png")
    (tmp_path / "dog" / "._x.png").write_bytes(b"macOS")
    (tmp_path / "dog" / "labels.txt").touch()
    folder = open_images(tmp_path, "samples")
    listed = ImageFolder(str(tmp_path), 6, holdout_every=0)
    assert folder.names == listed.names == ["cat/a.webp", "cat/b.png", "dog/x.PNG"]
    assert folder.sha256 == digest
    assert caplog.messages == [f"samples={tmp_path}: not read: 1 .txt, 2 hidden"]
    (tmp_path / "cat" / "b.png").rename(os.fsdecode(os.fsencode(tmp_path) + b"/cat/\xe9.png"))
    assert open_images(tmp_path, "samples").sha256 != digest


def test_two_sets_in_a_folder_are_refused(tmp_path):
    """The file or the images: neither is taken silently."""
    images = np.zeros((2, 8, 8, 3), dtype=np.uint8)
    image_file(tmp_path / "other.npz", arr_0=images)
    with pytest.raises(UserError, match=r"^samples=.*: holds no samples\.npz; give one of its files: other\.npz$"):
        open_images(tmp_path, "samples")
    picture(0, 8, 6).save(tmp_path / "0.png")
    with pytest.raises(UserError, match=r"^samples=.*: holds other\.npz and 1 images \(0\.png\); give the file, or"):
        open_images(tmp_path, "samples")
    (tmp_path / "other.npz").rename(tmp_path / "samples.npz")
    with pytest.raises(UserError, match=r"^samples=.*: holds samples\.npz and 1 images"):
        open_images(tmp_path, "samples")
    for name in ("grid.png", "nearest.png"):  # which belong to it
        picture(0, 8, 6).save(tmp_path / name)
    (tmp_path / "0.png").unlink()
    assert isinstance(open_images(tmp_path, "samples"), NpzImages)


def test_a_rotation_that_is_not_applied_is_told(tmp_path, caplog):
    caplog.set_level("INFO")
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(0, 8, 6).save(tmp_path / "0.jpg", exif=exif)
    picture(0, 8, 6).save(tmp_path / "1.jpg")
    assert len(open_images(tmp_path, "reference")) == 2
    assert caplog.messages == [f"reference={tmp_path}: 1 images carry an EXIF rotation, which is not applied"]


def test_reference_files(tmp_path):
    images = np.zeros((3, 8, 8, 3), dtype=np.uint8)
    mean, covariance = np.ones(NUM_POOL, dtype=np.float32), np.eye(NUM_POOL, dtype=np.float32)
    spatial = {"mu_s": np.ones(NUM_SPATIAL), "sigma_s": np.eye(NUM_SPATIAL, dtype=np.float32)}

    def read(**arrays):
        distances = {"fid": NUM_POOL, "sfid": NUM_SPATIAL}
        return read_reference(image_file(tmp_path / "ref.npz", np.savez_compressed, **arrays), distances, "inception")

    whole = read(mu=mean, sigma=covariance, **spatial, arr_0=images)
    assert whole.statistics["fid"].mean.dtype == whole.statistics["fid"].covariance.dtype == np.float64
    assert whole.statistics["sfid"].mean.shape == (NUM_SPATIAL,)
    assert len(whole.images) == 3
    assert whole.identity()["statistics"] == "mu, sigma, mu_s, sigma_s of the file"
    alone = read(mu=mean, sigma=covariance)
    assert (alone.images, list(alone.statistics)) == (None, ["fid"])
    assert alone.identity()["statistics"] == "mu, sigma of the file"
    folder = image_file(tmp_path / "samples.npz", arr_0=images).parent
    assert len(read_reference(folder, {"fid": NUM_POOL}, "inception").images) == 3
    receipt = {"features": {"name": "dinov2"}, "count": 3, "total": 3}
    covariance[3, 3] = np.nan
    wrong = {
        "holds mu alone": dict(mu=mean),
        "holds sigma_s alone": dict(mu=mean, sigma=covariance, sigma_s=mean),
        "holds neither mu and sigma nor images": dict(labels=mean),
        r"mu must be .* \(2048,\), found float32 \(5,\)": dict(mu=mean[:5], sigma=covariance),
        r"sigma must be .*, found float32 \(2048,\)": dict(mu=mean, sigma=mean),
        "sigma holds NaN or infinite values": dict(mu=mean, sigma=covariance),
        "sigma is no covariance": dict(mu=mean, sigma=-np.eye(NUM_POOL)),
        "sigma is no covariance .not symmetric": dict(mu=mean, sigma=np.triu(np.ones((NUM_POOL, NUM_POOL)))),
        "holds mu_s and sigma_s without mu": dict(**spatial, arr_0=images),
        "holds one image": dict(arr_0=images[:1]),
        "arr_0 must be uint8 images": dict(arr_0=images.astype(float)),
        "was made with features=dinov2": dict(mu=mean, sigma=covariance, receipt=np.array(json.dumps(receipt))),
        "its receipt is damaged": dict(mu=mean, sigma=covariance, receipt=np.array("{")),
    }
    for message, content in wrong.items():
        with pytest.raises(UserError, match=rf"^reference=.*ref.npz: {message}"):
            read(**content)


class Six:
    """An extractor without a network: pool features of six dimensions, spatial ones of four."""

    name, channels, image_size, batch_size, own_classes = "inception", 3, None, 64, False
    rows, pr_space, nearest_space = ("pool", "probabilities"), "pool", "pool"
    spaces: ClassVar = {"pool": 6, "spatial": 4, "probabilities": 5}
    distances: ClassVar = {"fid": "pool", "sfid": "spatial"}
    other_weights = False

    def identity(self):
        return {"name": self.name, "weights": {"sha256": "0"}}

    def deviations(self):
        return ["the weights are other ones"] if self.other_weights else []


def feature_set(count, seed=0, classes=5):
    rng = np.random.default_rng(seed)
    pool, spatial = rng.standard_normal((count, 6)).astype(np.float32), rng.standard_normal((count, 4))
    probabilities = torch.from_numpy(rng.dirichlet(np.ones(classes), count).astype(np.float32))
    rows = {"pool": torch.from_numpy(pool), "probabilities": probabilities}
    return FeatureSet(count, rows, {"pool": moments(pool), "spatial": moments(spatial)})


def reference(statistics=(), images=None, receipt=None):
    return Reference("ref.npz", dict(zip(("fid", "sfid"), statistics, strict=False)), images, receipt=receipt)


def prepared(features, statistics=None):
    if statistics is None:
        statistics = {name: features.moments[space] for name, space in Six.distances.items()}
    return Prepared(reference(), statistics, features, {})


def test_the_files_statistics_come_first():
    ours, images, whole = feature_set(40), feature_set(30, seed=1), feature_set(200, seed=2)
    statistics = {"fid": whole.moments["pool"], "sfid": whole.moments["spatial"]}
    full = score(ours, None, prepared(images, statistics), Six(), "float16")
    assert full.metrics["fid"] == pytest.approx(frechet_distance(ours.moments["pool"], whole.moments["pool"]))
    assert full.metrics["sfid"] == pytest.approx(frechet_distance(ours.moments["spatial"], whole.moments["spatial"]))
    result = precision_recall(images.rows["pool"], ours.rows["pool"])
    assert (full.metrics["precision"], full.metrics["recall"]) == result
    assert full.reasons == {}
    of_images = score(ours, None, prepared(images), Six(), "float16").metrics
    assert of_images["fid"] == pytest.approx(frechet_distance(ours.moments["pool"], images.moments["pool"]))
    assert of_images["sfid"] == pytest.approx(frechet_distance(ours.moments["spatial"], images.moments["spatial"]))


def test_what_cannot_be_computed_is_null_with_a_reason():
    ours = feature_set(40)
    scores = score(ours, None, prepared(None, {"fid": ours.moments["pool"]}), Six(), "float16")
    assert scores.metrics["fid"] == pytest.approx(0, abs=1e-5)
    missing = {"sfid", "precision", "recall", "nearest_train_distance", "authenticity"}
    assert {key for key, value in scores.metrics.items() if value is None} == missing == set(scores.reasons)
    broken = {"fid": of([np.nan] * 6, np.eye(6)), "sfid": ours.moments["spatial"]}
    real = Prepared(reference(), broken, feature_set(30), {"fid": None, "nearest_train_distance": 1.0})
    scores = score(ours, None, real, Six(), "float16")
    assert {key for key, value in scores.metrics.items() if value is None} == {"fid", "fid_real"} == set(scores.reasons)
    ours.rows["probabilities"][0] = torch.eye(5)[0]
    reasons = score(ours, None, prepared(feature_set(3)), Six(), "float16").reasons
    assert set(reasons) == {"inception_score", "inception_score_shuffled", "precision", "recall"}


def test_nearest_vectors():
    """Against the plain formula, over several blocks; a copy is at distance 0 exactly."""
    rng = torch.Generator().manual_seed(0)
    training, vectors = (torch.randn(n, 3, generator=rng) for n in (9000, 1100))
    vectors[7] = training[8500]
    table = torch.cdist(vectors.double(), training.double())
    distances, which = nearest(vectors, training)
    assert torch.equal(which, table.argmin(dim=1))
    assert distances == pytest.approx(table.min(dim=1).values.numpy() / 3**0.5, rel=1e-4)
    assert (distances[7], which[7]) == (0, 8500)
    own = torch.tensor([0, 8999, 40])
    gaps, other = nearest(training[own], training, own=own)
    table = torch.cdist(training[own].double(), training.double())
    table[torch.arange(3), own] = torch.inf
    assert torch.equal(other, table.argmin(dim=1))
    assert gaps.min() > 0


def test_authenticity():
    training = torch.tensor([[0.0], [1.0], [10.0]])  # nearest others: at 1, 1 and 9
    samples = torch.tensor([[0.5], [2.5], [12.0], [-3.0], [0.0]])  # at 0.5, 1.5, 2, 3 and 0 of 0, 1, 10, 0 and 0
    assert authenticity(*nearest(samples, training), training) == 0.4


def test_reasons_not_comparable(tmp_path):
    statistics = Statistics(np.zeros(1), np.zeros((1, 1)))
    images = NpzImages(image_file(tmp_path / "x.npz", arr_0=np.zeros((3, 8, 8, 3), dtype=np.uint8)), "reference")
    adm = reference([statistics, statistics], images)
    images.shape = (10_000, *images.shape[1:])
    scores = {"inception_score": 300.0, "inception_score_shuffled": 301.0}
    extractor = Six()
    assert reasons_not_comparable(scores, 50_000, (8, 8), adm, extractor, "float16") == []
    by_class = {"inception_score": 68.0, "inception_score_shuffled": 300.0}
    (line,) = reasons_not_comparable(by_class, 50_000, (8, 8), adm, extractor, "float16")
    assert "68.00 in the file's, 300.00 shuffled" in line
    without = {"inception_score": None, "inception_score_shuffled": None}
    assert len(reasons_not_comparable(without, 10_000, (8, 8), adm, extractor, "float16")) == 1
    extractor.other_weights = True
    receipt = {"features": {"name": "inception"}, "count": 5, "total": 9, "split": "test", "size": [4, 4]}
    made = reference([statistics], receipt=receipt)
    lines = reasons_not_comparable(scores, 6, (8, 8), made, extractor, "float16")
    for part in (
        "validation images", "no more images than features", "6 samples instead of 50,000", "no more samples",
        "of a set of 9 images, not of ImageNet's 1,281,167", "made of 5 of 9 images", "images are of 4×4 pixels",
    ):  # fmt: skip
        assert any(part in line for line in lines), part
    lines = reasons_not_comparable(scores, 50_000, (16, 16), reference(images=images), extractor, "float32")
    (line,) = reasons_not_comparable(scores, 50_000, (8, 8), reference([statistics, statistics]), Six(), "float16")
    assert "does not say of what images its mu and sigma are" in line
    images.shape = (50, *images.shape[1:])
    (line,) = reasons_not_comparable(scores, 50_000, (8, 8), adm, Six(), "float16")
    assert "precision and recall of 50 reference images instead of 10,000" in line
    for part in ("no mu and sigma", "reference's images are of 8×8 pixels, the samples of 16×16", "weights", "float32"):
        assert any(part in line for line in lines), part
    extractor.own_classes = True
    assert reasons_not_comparable(scores, 50, (8, 8), adm, extractor, "float16") == ["the weights are other ones"]


def test_labels_say_what_a_number_is_of(tmp_path):
    statistics = Statistics(np.zeros(1), np.zeros((1, 1)))
    images = NpzImages(image_file(tmp_path / "x.npz", arr_0=np.zeros((30, 8, 8, 3), dtype=np.uint8)), "reference")
    metrics = {"fid": 1.0, "sfid": 1.0, "precision": 0.5, "nearest_train_distance_real": 1.0}

    def of(count, pr_dtype="float16", **arguments):
        return labels(metrics, count, reference(**arguments), Six(), pr_dtype)

    assert of(50_000, statistics=[statistics]) == {
        "fid": "FID-50K",
        "sfid": "sFID-50K",
        "precision": "precision of 50K samples",
        "nearest_train_distance_real": "nearest train distance, real images",
    }
    assert of(5000, statistics=[statistics])["fid"] == "FID-5K"
    assert of(1234, statistics=[statistics])["fid"] == "FID-1234"
    assert of(50_000, images=images)["fid"] == "FID-50K (of 30 reference images)"
    assert of(6, statistics=[statistics])["fid"] == "FID-6 (singular covariance)"
    assert of(6, statistics=[statistics])["sfid"] == "sFID-6"  # of four dimensions
    receipt = {"features": {"name": "inception"}, "count": 5000, "total": 5000, "split": "test"}
    assert of(50_000, statistics=[statistics], receipt=receipt)["fid"] == "FID-50K (validation images)"
    assert (
        of(50_000, statistics=[statistics], receipt=receipt)["precision"]
        == "precision of 50K samples (validation images)"
    )
    part = receipt | {"split": "train", "total": 9000}
    assert of(50_000, statistics=[statistics], receipt=part)["fid"] == "FID-50K (of 5,000 reference images)"
    few = of(1500, "float32", statistics=[statistics], images=images)
    assert few["precision"] == "precision of 1500 samples (of 30 reference images, float32)"
    assert few["fid"] == "FID-1500"


def test_weights_without_a_network(tmp_path, monkeypatch):
    def offline(*args, **kwargs):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(UserError) as error:
        find_weights()
    assert len(str(error.value).splitlines()) == 1
    for part in ("no route to host", "inception_weights=", "pt_inception-2015-12-05-6726825d.pth", "https://"):
        assert part in str(error.value)
    cached = tmp_path / "hub" / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth"
    cached.write_bytes(b"")
    assert find_weights() == cached


class Stranger:
    pass


def test_wrong_weights_are_named(tmp_path, inception_weights):
    path = tmp_path / "x.pth"
    cases = [({"fc.weight": torch.zeros(2)}, "is not this network"), (torch.zeros(3), "holds no state dict")]
    cases.append(({"fc.weight": Stranger()}, "holds more than weights, an object test_metrics.Stranger"))
    state = torch.load(inception_weights, weights_only=True)
    cases.append((state | {"head.weight": torch.zeros(2)}, r"is not this network .*Unexpected key.*head.weight"))
    for content, message in cases:
        torch.save(content, path)
        with pytest.raises(UserError, match=rf"^inception_weights=.*x.pth: {message}") as error:
            load_network(path)
        assert len(str(error.value).splitlines()) == 1
    path.write_text("no weights")
    with pytest.raises(UserError, match=r"x.pth: is text \(no weights\)"):
        load_network(path)
