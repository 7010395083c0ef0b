"""Statistics of a data set in a file of ADM's format."""

import json

import numpy as np
import pytest
import torch
from conftest import picture_folder, refusal, run, succeed, thinned

from ddt.data.images import ImageFolder
from ddt.metrics.inception import InceptionFeatures

pytestmark = pytest.mark.usefixtures("one_thread")
SCRIPT = "scripts.reference_statistics"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("statistics")


@pytest.fixture(scope="module")
def arguments(place, inception_weights):
    root = picture_folder(place / "pictures", count=4)
    return ["data=folder", f"data.root={root}", "data.image_size=16", f"inception_weights={inception_weights}"]


@pytest.fixture(scope="module")
def written(place, arguments, one_thread):
    out = place / "ref.npz"
    succeed(SCRIPT, *arguments, f"out={out}", "num_kept=5", "features.batch_size=4")
    return out


def test_the_file_has_adms_arrays(place, written, inception_weights):
    images = ImageFolder(str(place / "pictures"), 16)
    pixels = images.load(np.arange(len(images.labels)))
    features = InceptionFeatures(inception_weights)(torch.from_numpy(pixels))
    with np.load(written, allow_pickle=False) as file:
        for pair, space in ((("mu", "sigma"), "pool"), (("mu_s", "sigma_s"), "spatial")):
            values = features[space].double().numpy()
            np.testing.assert_allclose(file[pair[0]], values.mean(axis=0), rtol=1e-4, atol=1e-6)
            np.testing.assert_allclose(file[pair[1]], np.cov(values, rowvar=False), rtol=1e-3, atol=1e-5)
        kept = file["arr_0"]
        made = json.loads(str(file["receipt"]))
    assert kept.shape == (5, 16, 16, 3)
    theirs = pixels.transpose(0, 2, 3, 1)
    assert all(any(np.array_equal(image, other) for other in theirs) for image in kept)
    assert (made["count"], made["kept"], made["split"]) == (len(pixels), 5, "train")
    assert made["transform"] == "RGB, ADM centre crop to 16 px"
    assert made["fingerprint"] == images.fingerprint
    assert made["features"]["name"] == "inception"
    assert len(made["features"]["weights"]["tensors_sha256"]) == 64
    assert made["data"]["image_size"] == 16
    assert made["command"].startswith("python scripts.reference_statistics.py data=folder data.root=")


@pytest.mark.slow
def test_it_is_a_reference(place, written, inception_weights):
    """The data set's own images are at distance 0 of it, in the labels stands what it is of."""
    images = ImageFolder(str(place / "pictures"), 16)
    pixels = images.load(np.arange(len(images.labels))).transpose(0, 2, 3, 1)
    np.savez(place / "own.npz", arr_0=pixels)
    command = [f"samples={place / 'own.npz'}", f"reference={written}", f"out={place / 'own'}"]
    succeed("evaluate", *command, f"inception_weights={inception_weights}")
    metrics = json.loads((place / "own" / "metrics.json").read_text())
    assert metrics["fid"] == pytest.approx(0, abs=1e-2)  # 20 images of 2048 features: the root of rounding errors
    assert metrics["sfid"] == pytest.approx(0, abs=1e-2)
    assert metrics["labels"]["fid"] == f"FID-{len(pixels)} (singular covariance)"
    identity = metrics["receipt"]["reference"]
    assert identity["statistics"] == "mu, sigma, mu_s, sigma_s of the file"
    assert identity["made"]["count"] == len(pixels)
    assert metrics["receipt"]["features"]["weights"]["tensors_sha256"]


@pytest.mark.slow
def test_other_weights_are_refused(place, written, inception_weights):
    state = torch.load(inception_weights, weights_only=True)
    state["fc.bias"][0] += 1
    torch.save(state, place / "other.pth")
    command = [f"samples={written}", f"reference={written}", f"out={place / 'x'}"]
    line = refusal("evaluate", *command, f"inception_weights={place / 'other.pth'}")
    assert line.startswith(f"reference={written}: was made with other weights of inception")


@pytest.mark.slow
def test_processes_do_not_change_a_number(place, arguments, written):
    out = place / "two.npz"
    result = run(
        "scripts/reference_statistics.py", *arguments, f"out={out}", "num_kept=5", "features.batch_size=4",
        "num_processes=2", OMP_NUM_THREADS="1",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    with np.load(written) as ours, np.load(out) as theirs:
        assert set(ours) == set(theirs)
        for name in set(ours) - {"receipt"}:
            np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-10, atol=1e-12, err_msg=name)


@pytest.mark.slow
def test_some_images_of_another_split(place, arguments):
    out = place / "some.npz"
    succeed(SCRIPT, *arguments, f"out={out}", "split=test", "num_images=2", "num_kept=0", "data.holdout_every=5")
    with np.load(out) as file:
        assert "arr_0" not in file
        made = json.loads(str(file["receipt"]))
    assert (made["count"], made["split"]) == (2, "test")


@pytest.mark.parametrize(
    ("settings", "message"),
    thinned(
        [
            (["out=x.txt"], "out=x.txt: give an .npz file"),
            (["num_images=1"], "num_images=1: statistics need at least 2"),
            (["num_kept=-1"], "num_kept=-1: must be at least 0"),
            (["split=val"], "split=val: "),
            (["features=digits"], "features=digits: a classifier is trained on the images themselves"),
            (["features=none"], "features=none: measures nothing"),
            (["data.root=no_such"], "data.root=no_such: no such folder"),
            (["model=nano"], "model: has no effect here; choose from data, features"),
            (["num_processes=0"], "num_processes=0: must be at least 1"),
            (["split=test", "data.holdout_every=0"], "split=test: data=folder holds 0 images of it"),
        ],
        3,
    ),
)
def test_wrong_input_is_one_line(arguments, settings, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (line,) = refusal(SCRIPT, *arguments, *settings).splitlines()
    assert line.startswith(message)
    assert not list(tmp_path.iterdir())


def test_files_are_not_written_over(arguments, written):
    before = written.read_bytes()
    assert "is not written over" in refusal(SCRIPT, *arguments, f"out={written}")
    assert written.read_bytes() == before
