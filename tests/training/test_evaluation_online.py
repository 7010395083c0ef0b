"""Evaluation while training: the numbers are those of sample.py and evaluate.py, and training does
not notice.
"""

import dataclasses
import json
import random

import numpy as np
import pytest
import torch
from conftest import refusal, rows, small_ddt, succeed, thinned

from ddt.autoencoder import Identity
from ddt.checkpoint.format import find_checkpoint, read_weights
from ddt.data.images import Digits
from ddt.distributed.prepare import make_accelerator
from ddt.generation.generator import Generator
from ddt.generation.image_set import image_set
from ddt.metrics.reference import data_reference
from ddt.metrics.settings import ClassifierSettings
from ddt.sampling.settings import SamplerSettings
from ddt.training.evaluation import GeneratedImages, OnlineSamples, online_evaluation

pytestmark = pytest.mark.usefixtures("one_thread")
SHORT = ["trainer.global_batch_size=8", "trainer.save_every=3", "trainer.log_every=3", "trainer.validate_every=0"]
SHORT += ["trainer.preview_every=0", "sampler.num_steps=2", "trainer.ema_decay=0.5"]
WATCHED = ["features=digits", "features.epochs=1", "trainer.eval_every=2", "trainer.eval_samples=70"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run that is watched, and the same unwatched."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        torch.manual_seed(5)
        succeed("train", *SHORT, *WATCHED, "name=watched", "trainer.max_steps=5")
        succeed("train", *SHORT, "name=unwatched", "trainer.max_steps=5")
    return folder / "runs"


def measured(run):
    return {row["step"]: row for row in rows(run) if "fd_digits_70" in row}


def test_training_does_not_notice(runs):
    watched, unwatched = (runs / name for name in ("watched", "unwatched"))
    assert [row for row in rows(watched) if "fd_digits_70" not in row] == rows(unwatched)
    for kind in ("model", "ema"):
        ours, theirs = (read_weights(find_checkpoint(run), kind) for run in (watched, unwatched))
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_each_row_says_how_many_samples_it_is_of(runs):
    found = measured(runs / "watched")
    assert list(found) == [2, 4, 5]
    names = {"fd_digits", "class_accuracy", "precision", "recall", "nearest_train_distance", "authenticity"}
    assert set(found[5]) == {"step", *(f"{name}_70" for name in names)}
    assert len({row["fd_digits_70"] for row in found.values()}) == 3


def test_numbers_are_those_of_the_commands(runs, tmp_path):
    """Sampling the checkpoint and evaluating the file gives what was logged."""
    run = runs / "watched"
    succeed("sample", f"ckpt={run}", "num_samples=70", "batch_size=8", f"out={tmp_path}")
    succeed("evaluate", f"samples={tmp_path}", "reference=data:digits", "features=digits", "features.epochs=1")
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    logged = measured(run)[5]
    for name in ("fd_digits", "class_accuracy", "precision", "recall", "nearest_train_distance", "authenticity"):
        assert logged[f"{name}_70"] == pytest.approx(metrics[name], rel=1e-9), name


@pytest.mark.slow
def test_processes_do_not_change_a_number(runs, monkeypatch):
    """Each of two draws half of the samples."""
    monkeypatch.chdir(runs.parent)
    arguments = [*SHORT, *WATCHED, "name=two", "trainer.max_steps=2", "trainer.num_processes=2"]
    succeed("train", *arguments, "trainer.micro_batch_size=4")
    (config,) = [json.loads((runs / "two" / "config.json").read_text())]
    assert config["num_processes"] == 2
    ours, theirs = measured(runs / "two")[2], measured(runs / "watched")[2]
    assert set(ours) == set(theirs)
    for name in ours:  # the losses of two processes agree to 1e-4 only, and so do the weights
        assert ours[name] == pytest.approx(theirs[name], rel=2e-3), name


def test_each_of_two_processes_draws_half(monkeypatch):
    """70 samples are fewer than what the classifier takes at once, and still both draw."""
    evaluation, asked = evaluation_of(70, 8), []
    monkeypatch.setattr("ddt.training.evaluation.extract", lambda *args: asked.append(args[4]))

    class Two:
        num_processes, is_main_process, device = 2, True, torch.device("cpu")

        def reduce(self, value, reduction):
            return value

    dataclasses.replace(evaluation, accelerator=Two())(small_ddt(in_channels=1, num_classes=10), 1)
    evaluation(small_ddt(in_channels=1, num_classes=10), 1)
    assert asked == [35, 70]


@pytest.mark.slow
def test_a_changed_evaluation_is_said(runs, monkeypatch, caplog):
    """Numbers of two kinds in one record would look like one curve."""
    monkeypatch.chdir(runs.parent)
    arguments = [*SHORT, *WATCHED, "name=changed", "trainer.lr_schedule=constant"]
    succeed("train", *arguments, "trainer.max_steps=3")
    receipt = json.loads((runs / "changed" / "evaluation.json").read_text())
    assert receipt["features"]["epochs"] == 1
    assert receipt["num_samples"] == 70
    succeed("train", *arguments, "trainer.max_steps=4")
    assert "the evaluation changed" not in caplog.text
    succeed("train", *arguments, "features.epochs=2", "trainer.max_steps=5")
    assert "the evaluation changed in features: its metrics do not compare" in caplog.text
    assert json.loads((runs / "changed" / "evaluation.json").read_text())["features"]["epochs"] == 2


def evaluation_of(num_samples, batch_size):
    train, test = Digits("train"), Digits("test")
    extractor = ClassifierSettings("digits", 1).extractor(torch.device("cpu"), train)
    return online_evaluation(
        data_reference("training images", train, test),
        extractor,
        OnlineSamples(Identity(), (1, 8, 8), SamplerSettings(num_steps=2), num_samples, batch_size, "fp32"),
        make_accelerator(),
    )


def test_samples_that_are_not_finite_are_not_measured(caplog):
    model = small_ddt(in_channels=1, num_classes=10)
    with torch.no_grad():
        next(model.parameters()).fill_(torch.nan)
    assert evaluation_of(12, 5)(model, 7) == {"not_finite_12": 1.0}  # so that it is known to have been done
    assert "step 7: samples are NaN or infinite" in caplog.text


def test_no_random_state_is_touched():
    """Those of torch, numpy and Python, and the flags that choose kernels, are as before."""
    evaluation = evaluation_of(24, 5)
    model = small_ddt(in_channels=1, num_classes=10)

    def state():
        _, keys, *position = np.random.get_state()  # noqa: NPY002, the state that others may draw from
        cudnn = torch.backends.cudnn
        return [torch.get_rng_state().tolist(), keys.tolist(), position, random.getstate(), cudnn.deterministic]

    before = state()
    first, second = evaluation(model, 1), evaluation(model, 2)
    assert state() == before
    assert first == second  # the same noise each time
    assert first["fd_digits_24"] > 0


def test_images_do_not_depend_on_how_they_are_drawn(tiny):
    settings = SamplerSettings(num_steps=2)
    generator = Generator(tiny, Identity(), (tiny.in_channels, 8, 8), settings, "fp32", torch.device("cpu"))
    images = image_set(tiny.num_classes, 11)

    def drawn(batch_size, at_once, world=1):
        source = GeneratedImages(generator, images, at_once)
        dealt = [list(source.batches(batch_size, rank, world)) for rank in range(world)]
        return np.concatenate([dealt[k % world][k // world] for k in range(-(-11 // batch_size))])

    whole = drawn(11, 11)
    assert whole.shape == (11, 8, 8, tiny.in_channels)
    for arguments in ((4, 4), (4, 3), (4, 4, 2), (2, 2, 3)):
        assert np.abs(drawn(*arguments).astype(int) - whole).max() <= 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    thinned(
        [
            (["trainer.eval_every=5"], "trainer.eval_every=5: needs features="),
            (["features=digits"], "features=digits: has no effect with trainer.eval_every=0"),
            (["reference=x.npz"], "reference=x.npz: has no effect without features="),
            ([*WATCHED, "data=fashion_mnist"], "features=digits: is the classifier of another data set"),
            ([*WATCHED, "reference=x.npz"], "reference=x.npz: features=digits compares with the training images"),
            (["features=inception", "trainer.eval_every=5", "reference=x.npz"], "reference=x.npz: no such file"),
            ([*WATCHED, "trainer.eval_samples=1"], "trainer.eval_samples=1: must lie in 2..1000000"),
            (
                [*WATCHED, "trainer.eval_samples=100000000000"],
                "trainer.eval_samples=100000000000: must lie in 2..1000000",
            ),
            ([*WATCHED, "inception_weights=x.pth"], "inception_weights=x.pth: has no effect with features=digits"),
            (["inception_weights=x.pth"], "inception_weights=x.pth: has no effect with features=none"),
            ([*WATCHED, "trainer.eval_every=-1"], "trainer.eval_every=-1: must be at least 0"),
            (["features=inceptoin"], "features=inceptoin: no such choice; did you mean inception?"),
        ],
        3,
    ),
)
def test_wrong_input_is_one_line(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = refusal("train", *arguments).splitlines()
    assert line[0].startswith(message)
    assert len(line) == 1
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_grey_images_are_refused_by_inception(inception_weights, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ["features=inception", "trainer.eval_every=5", f"inception_weights={inception_weights}"]
    assert "images of 1 channels, but features=inception reads 3" in refusal("train", *arguments)
    assert not (tmp_path / "runs").exists()
