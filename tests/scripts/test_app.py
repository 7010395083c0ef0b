"""The app: each control changes the samples, numbers are the receipt's, errors are one line."""

import asyncio
import dataclasses
import functools
import json
import logging
import re
import runpy
import shlex
import shutil
import socket
import sys
import threading
import tomllib
import zipfile
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import gradio as gr
import numpy as np
import pytest
import torch
import yaml
from accelerate import Accelerator
from conftest import ROOT, SMALL, refusal, run_inside, small_checkpoint, small_ddt, small_rae, succeed
from fastapi import FastAPI
from fastapi.testclient import TestClient
from packaging.requirements import Requirement

import ddt
from ddt.checkpoint import format as ckpt
from ddt.errors import UserError
from ddt.model import DiT, DiTDH
from ddt.sampling.cost import sampling_macs
from ddt.sampling.fitting import fit_schedule
from ddt.sampling.settings import SamplerSettings
from scripts.app import __main__ as app
from scripts.app import page as app_page
from scripts.app import studio as app_studio
from scripts.app.controls import class_choices, initial_controls, make_requests, sharing_choices
from scripts.app.guard import Guard, app_arguments
from scripts.app.page import LAUNCH, build_page
from scripts.app.settings import AppSettings
from scripts.app.studio import Interrupted, Studio
from scripts.app.view import summary

pytestmark = pytest.mark.usefixtures("one_thread")
SAMPLER = {"solver": "euler", "num_steps": 6, "cfg_scale": 2.0, "cfg_interval": [0.3, 1.0], "last_step": None}
CLASSES = ["ant", "bee", "cat", "dog", "n02124075"]
LIMITS = {"max_images": 6, "max_steps": 20}
FEW = {"Classes": ["ant", "cat"], "Images per class": 1}  # of each test


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return small_checkpoint(tmp_path_factory.mktemp("app") / "model", sampler=SAMPLER, class_names=CLASSES)


def open_studio(folder, root, **changes):
    return Studio(AppSettings(**{"ckpt": str(folder), **LIMITS, **changes}), root, Accelerator(cpu=True))


@pytest.fixture(scope="module")
def studio(folder, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        root = tmp_path_factory.mktemp("results")
        patch.setenv("GRADIO_TEMP_DIR", str(root))
        patch.setattr(app_studio, "MAX_KEPT", 1000)
        yield open_studio(folder, root)


@pytest.fixture(scope="module")
def page(studio):
    return build_page(studio)


@pytest.fixture(autouse=True)
def accelerator(studio):
    studio.accelerator = Accelerator(cpu=True)  # an entry point in this process has reset the last one


def endpoint(page, name):
    return next(function for function in page.fns.values() if function.api_name == name)


def call(page, function, inputs=()):
    """Handle an event as the server does, while its client waits; return its response."""
    page._queue.event_ids_to_events["event"] = SimpleNamespace(alive=True)
    return asyncio.run(page.process_api(function, list(inputs), event_id="event", request=gr.Request()))["data"]


def press(page, **changes):
    """Press Generate with fields changed, by label; return what the page shows."""
    fields = endpoint(page, "sample").inputs
    assert {*FEW, *changes} <= {field.label for field in fields}
    inputs = [{**FEW, **changes}.get(field.label, field.value) for field in fields]
    return shown(call(page, endpoint(page, "sample"), inputs))


def shown(outputs):
    """What the outputs of an event show."""
    numbers, slider, images, unshared, command, files = outputs
    images, unshared = (
        [(each["caption"], Path(each["image"]["path"])) for each in gallery.get("value", [])]
        for gallery in (images, unshared)
    )
    grids = [Path(each["path"]) for each in slider.get("value", [])]
    files = {Path(file["path"]).name: Path(file["path"]) for file in files["value"]}
    return SimpleNamespace(
        numbers=numbers, images=images, unshared=unshared, grids=grids, command=command["value"], files=files,
        speed=json.loads(files["receipt.json"].read_text())["images_per_second"],
    )  # fmt: skip


@functools.cache
def remembered(page, *changes):
    return press(page, **dict(changes))


def pressed(page, **changes):
    """Press Generate, or return the earlier result."""
    return remembered(page, *changes.items())


def array(path):
    with np.load(path) as file:
        return file["arr_0"]


def sample(studio, values=None, report=lambda *_: None):
    """The set of a request whose client waits."""
    return studio.sample(values or asdict(studio.controls), report, lambda: True).sets[0]


def settings(command):
    return dict(word.split("=", 1) for word in shlex.split(command)[2:] if not word.startswith("out="))


UNIFORM, FITTED = {"Encoder sharing": "uniform", "k": 3}, {"Encoder sharing": "dp", "Encoder runs": 2}
# field, its new value, with which others, what changes in the settings of sample.py
CONTROLS = [
    ("Classes", ["bee", "dog"], {}, {"classes": "[1,3]"}),
    ("Images per class", 2, {}, {"seeds": "0-1"}),
    ("Seed", 7, {}, {"seeds": "7-7"}),
    ("Solver", "heun", {}, {"sampler": "heun"}),
    ("Steps", 5, {}, {"num_steps": "5"}),
    ("Guidance", 3, {}, {"cfg_scale": "3.0"}),
    ("Guide from t", 0, {}, {"cfg_interval": "null"}),
    ("Guide from t", 0.6, {}, {"cfg_interval": "[0.6,1.0]"}),
    ("Guide to t", 0.6, {}, {"cfg_interval": "[0.3,0.6]"}),
    ("Time shift", 2, {}, {"timeshift": "2.0"}),
    ("Last step", "0.04", {}, {"last_step": "0.04"}),
    ("Encoder sharing", "uniform", {}, {"recompute": "uniform:5", "forecast_order": "0"}),
    ("Encoder sharing", "dp", {}, {"recompute": "dp:1", "forecast_order": "0"}),
    ("k", 2, UNIFORM, {"recompute": "uniform:2"}),
    ("Encoder runs", 3, FITTED, {"recompute": "dp:3"}),
    ("Between two runs", "a line", UNIFORM, {"forecast_order": "1"}),
]
COMPARE = "Side by side with sharing off"


@pytest.mark.parametrize(("label", "value", "others", "changed"), CONTROLS, ids=[f"{c[0]} {c[1]}" for c in CONTROLS])
def test_each_control_alone_changes_the_run(page, label, value, others, changed):
    before, after = pressed(page, **others), press(page, **{**others, label: value})
    old = settings(before.command)
    assert {k: v for k, v in settings(after.command).items() if old.get(k) != v} == changed
    assert not np.array_equal(array(before.files["samples.npz"]), array(after.files["samples.npz"]))
    request = json.loads(after.files["receipt.json"].read_text())["request"]
    for key in {"num_steps", "cfg_scale", "timeshift", "recompute", "forecast_order"} & set(changed):
        assert str(request["sampler"][key]) == changed[key]


def test_no_control_is_forgotten(page):
    assert {field.label for field in endpoint(page, "sample").inputs} == {case[0] for case in CONTROLS} | {COMPARE}


def test_side_by_side_shows_both_and_reports_the_difference(page):
    alone, plain = pressed(page, **UNIFORM), pressed(page)
    both = press(page, **UNIFORM, **{COMPARE: True})
    assert both.command == alone.command
    assert alone.unshared == alone.grids == []
    for shown, expected in ((both.images, alone.images), (both.unshared, plain.images)):
        assert [path.read_bytes() for _, path in shown] == [path.read_bytes() for _, path in expected]
        assert [caption for caption, _ in shown] == ["ant, seed 0", "cat, seed 0"]
    assert [path.read_bytes() for path in both.grids] == [
        each.files["receipt.json"].with_name("grid.png").read_bytes() for each in (plain, alone)
    ]
    with zipfile.ZipFile(both.files["unshared.zip"]) as archive:
        unshared = np.load(archive.open("samples.npz"))["arr_0"]
        receipt = json.loads(archive.read("receipt.json"))
    assert np.array_equal(unshared, array(plain.files["samples.npz"]))
    assert "recompute=null" in receipt["command"]
    ours = array(both.files["samples.npz"]).astype(int)
    assert f"differ by {np.abs(ours - unshared).mean():.2f} of 255" in both.numbers
    ratios = [both.speed / receipt["images_per_second"]]
    assert f"Measured: **{ratios[0]:.2f} × as fast**, the median of 1 comparison of these" in both.numbers
    for seed in (7, 8):
        again = press(page, **UNIFORM, **{COMPARE: True, "Seed": seed})
        with zipfile.ZipFile(again.files["unshared.zip"]) as archive:
            ratios.append(again.speed / json.loads(archive.read("receipt.json"))["images_per_second"])
    assert f"**{np.median(ratios):.2f} × as fast**, the median of 3 comparisons of these" in again.numbers


def test_numbers_are_those_of_the_receipt(page, studio):
    """Four of six steps are guided (t > 0.3): 4·2 + 2 decoder calls, 2·2 of the encoder (k = 3)."""
    result = pressed(page, **UNIFORM)
    receipt = json.loads(result.files["receipt.json"].read_text())
    assert receipt["recompute_steps"] == [0, 3]
    assert receipt["network_calls_an_image"] == {"encoder": 4.0, "decoder": 10.0}
    for name, value in (("Encoder", 4), ("Decoder", 10)):
        assert re.search(rf"\| {name} calls per image +\| +{value} +\|", result.numbers)
    assert f"{2 / receipt['images_per_second']:.2f} s" in result.numbers
    assert "2 of 6 steps: ■□□■□□" in result.numbers
    network, (_, height, width) = studio.generator.model, studio.generator.shape
    plain = SamplerSettings(**SAMPLER)
    shared, unshared = (
        sampling_macs(network, height, width, each) for each in (dataclasses.replace(plain, recompute=[0, 3]), plain)
    )
    assert f"## {1 - shared / unshared:.0%} fewer multiply-accumulates" in result.numbers
    assert f"{shared / 1e9:.3g} G per image instead of {unshared / 1e9:.3g} G" in result.numbers
    assert f"## {unshared / 1e9:.3g} G multiply-accumulates per image" in pressed(page).numbers


def test_images_are_captioned_and_can_be_downloaded(page, studio):
    result = press(page, **{"Classes": ["Egyptian cat", "ant"], "Images per class": 2})
    assert [caption for caption, _ in result.images] == [
        f"{name}, seed {seed}" for seed in (0, 1) for name in ("Egyptian cat", "ant")
    ]
    for _, path in result.images:
        assert path.is_relative_to(studio.root)
        assert path.read_bytes()[:4] == b"\x89PNG"
    assert sorted(result.files) == ["images.zip", "receipt.json", "samples.npz"]
    with zipfile.ZipFile(result.files["images.zip"]) as archive:
        assert {f"png/{k:06d}.png" for k in range(4)} <= set(archive.namelist())


@pytest.mark.parametrize("changes", [{}, {"Solver": "sde", "Seed": 5, **FITTED}], ids=["checkpoint's", "fitted"])
def test_the_command_samples_the_same(page, tmp_path, monkeypatch, changes):
    result = pressed(page, **changes)
    monkeypatch.chdir(tmp_path)
    words = shlex.split(result.command)
    assert words[:2] == ["python", "sample.py"]
    succeed("sample", *words[2:])
    out = Path(words[-1].removeprefix("out="))
    assert array(out / "samples.npz").tobytes() == array(result.files["samples.npz"]).tobytes()
    ours, theirs = (json.loads(path.read_text()) for path in (result.files["receipt.json"], out / "receipt.json"))
    assert ours["request"] == theirs["request"]
    assert ours["recompute_steps"] == theirs["recompute_steps"]
    assert ours["command"] == result.command


WRONG = [
    ({"Classes": []}, "Classes: none is chosen"),
    ({"Classes": ["ant", "bee", "cat"], "Images per class": 3}, "9 images, and this app samples at most 6"),
    ({"Classes": ["ant", "ant"]}, "Classes = [0,0]: names a number twice"),
    ({"Classes": ["x"]}, "Classes = [x]: give what it offers"),
    ({"Classes": [0]}, "Classes = [0]: give what it offers"),
    ({"Classes": [{"path": "https://example.org/x"}]}, "Classes = [{path:https"),
    ({"Images per class": 0}, "Images per class = 0: give a whole number from 1 to 6"),
    ({"Images per class": None}, "Images per class = null: give a whole number from 1 to 6"),
    ({"Seed": -1}, "Seed = -1: give a whole number from 0 to 4294967295"),
    ({"Seed": 2**32 - 1, "Images per class": 2}, "Seed = [4294967296]: a seed must lie in 0.."),
    ({"Seed": None}, "Seed = null: give a whole number"),
    ({"Steps": 21}, "Steps = 21: give a whole number from 1 to 20"),
    ({"Steps": 2.5}, "Steps = 2.5: give a whole number from 1 to 20"),
    ({"Steps": "<b>"}, "Steps = &lt;b&gt;: give a whole number"),
    ({"Guidance": 11}, "Guidance = 11: give a number from 0 to 10"),
    ({"Guide from t": 0.9, "Guide to t": 0.1}, "Guide from t, to t = [0.9,0.1]: needs 0 &lt;= lo"),
    ({"Time shift": 0}, "Time shift = 0.0: "),
    ({"Last step": "<b>"}, "Last step = &lt;b&gt;: "),
    ({"Encoder sharing": "uniform", "k": 0}, "k = 0: must lie in 1..6, the number of steps"),
    ({"Encoder sharing": "dp", "Encoder runs": 7}, "Encoder runs = 7: must lie in 1..6, the number of steps"),
    ({"Solver": "adaptive"}, "Solver = adaptive: give what it offers"),
    ({"Encoder sharing": "x"}, "Encoder sharing = x: give what it offers"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG, ids=[str(case[0]) for case in WRONG])
def test_a_wrong_value_is_reported_and_leaves_nothing(page, studio, changes, message):
    folders = set(studio.root.glob("set-*"))
    with pytest.raises(gr.Error) as error:
        press(page, **changes)
    assert message in error.value.message
    assert set(studio.root.glob("set-*")) == folders


def test_a_schedule_is_fitted_once(studio, monkeypatch):
    fits, reports = [], []
    monkeypatch.setattr(
        app_studio, "fit_schedule", lambda *a, **more: fits.append(a[2].recompute) or fit_schedule(*a, **more)
    )
    values = {**asdict(studio.controls), "sharing": "dp", "budget": 4, "timeshift": 1.5}
    first, again = (sample(studio, {**values, "seed": k}, lambda *r: reports.append(r[1])) for k in (0, 1))
    assert fits == ["dp:4"]
    assert sum("fitting" in text for text in reports) == 1
    assert len(first.receipt["recompute_steps"]) == 4
    assert first.receipt["recompute_steps"] == again.receipt["recompute_steps"]


def test_progress_counts_every_call_to_the_end(folder, tmp_path):
    studio, reports = open_studio(folder, tmp_path, batch_size=2), []
    values = {**asdict(studio.controls), "solver": "heun", "num_images": 1, "sharing": "uniform", "compare": True}
    sample(studio, values, lambda done, _: reports.append(done))
    calls = 2 * 3 * 11  # two sets of three batches, Heun's 2·6 − 1 calls each
    assert reports == [k / calls for k in range(1, calls + 1)]


@pytest.mark.parametrize("sharing", ["off", "dp"])
def test_what_nobody_waits_for_ends_at_the_next_step_and_leaves_nothing(folder, tmp_path, sharing):
    studio, asked = open_studio(folder, tmp_path), []
    values = {**asdict(studio.controls), "sharing": sharing, "timeshift": 3.0}
    sample(studio, values | {"sharing": "off"})  # warms up
    folders, evaluated = set(studio.root.glob("set-*")), []
    hook = studio.generator.model.encoder.register_forward_hook(lambda *_: evaluated.append(1))
    with hook, pytest.raises(Interrupted):
        studio.sample(values, lambda *_: None, lambda: asked.append(1) or len(asked) < 3)
    assert len(asked) == 3
    assert len(evaluated) == 3  # also where a schedule is being fitted
    assert set(studio.root.glob("set-*")) == folders
    sample(studio, values)


def test_an_event_is_wanted_until_it_is_cancelled_or_its_client_has_gone(page, studio, monkeypatch):
    seen, events, event = [], page._queue.event_ids_to_events, SimpleNamespace(alive=True)

    def sample(values, report, wanted):
        events["event"] = event
        seen.append(wanted())
        event.alive = False
        seen.append(wanted())
        event.alive = True
        seen.append(wanted())
        del events["event"]
        seen.append(wanted())
        raise Interrupted

    monkeypatch.setattr(studio, "sample", sample)
    with pytest.raises(gr.Error, match="stopped"):
        press(page)
    assert seen == [True, False, True, False]


def test_stop_cancels_what_runs_and_what_waits(page):
    """The browser cancels its events; gradio takes them out of the queue, too."""
    (cancel,) = [function for function in page.fns.values() if function.cancels]
    sampling = [number for number, function in page.fns.items() if function.name == "sample"]
    assert sorted(cancel.cancels) == sorted(sampling)
    assert len(sampling) == 2
    assert {page.fns[number].concurrency_id for number in sampling} == {"sample"}  # one at a time


def test_requests_of_two_threads_wait_for_each_other_and_closing_ends_both(folder, tmp_path):
    studio, started, ended = open_studio(folder, tmp_path), threading.Event(), []

    def run():
        with pytest.raises(Interrupted):
            studio.sample(asdict(studio.controls), lambda *_: started.set(), lambda: not started.wait(0.001) or True)
        ended.append(True)

    with studio.lock:
        threads = [threading.Thread(target=run) for _ in range(2)]
        for thread in threads:
            thread.start()
        assert not started.wait(0.2)
        studio.closed = True
    studio.close()
    for thread in threads:
        thread.join()
    assert ended == [True, True]
    assert list(studio.root.glob("set-*")) == []


def test_the_page_opens_with_a_set_that_is_sampled_once(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    monkeypatch.setattr(app_studio, "MAX_KEPT", 1)
    studio = open_studio(folder, tmp_path)
    page = build_page(studio)
    (opening,) = [function for function in page.fns.values() if ("load" in dict(map(reversed, function.targets)))]
    first = shown(call(page, opening))
    assert [caption for caption, _ in first.images][:2] == ["ant, seed 0", "bee, seed 0"]
    assert "classes=[0,1,2,3,4]" in first.command
    assert press(page).files != press(page).files  # the opening set is not one of those that go
    again = shown(call(page, opening))
    assert again.files == first.files
    assert all(path.exists() for path in again.files.values())


def test_a_cleaned_temporary_folder_costs_no_request(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(app_studio, "MAX_KEPT", 1)
    studio = open_studio(folder, tmp_path / "root")
    opened = studio.opening(lambda *_: None, lambda: True)
    for _ in range(2):
        sample(studio)
        shutil.rmtree(studio.root)
    assert sample(studio).folder.exists()
    again = studio.opening(lambda *_: None, lambda: True)
    assert again.sets[0].folder != opened.sets[0].folder
    assert again.sets[0].folder.exists()


def test_the_disk_is_bounded(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(app_studio, "MAX_KEPT", 2)
    studio = open_studio(folder, tmp_path)
    sets = [sample(studio) for _ in range(3)]
    assert [each.folder.exists() for each in sets] == [False, True, True]
    assert len(list(studio.root.glob("set-*"))) == 2


def test_weights_and_precision_are_used_and_are_in_the_command(folder, tmp_path):
    ema = ckpt.read_weights(folder, "ema")
    raw = {key: 1.2 * value for key, value in ema.items()}
    ckpt.write_checkpoint(tmp_path / "both", ckpt.read_config(folder), ema=ema, model=raw)
    images = []
    for chosen in ({}, {"weights": "model"}, {"dtype": "bf16"}):
        studio = open_studio(tmp_path / "both", tmp_path, **chosen)
        result = sample(studio)
        written = settings(result.request.command)
        assert {key: written[key] for key in ("weights", "dtype") if key in written} == chosen
        assert result.receipt["request"]["dtype"] == chosen.get("dtype", "fp32")
        images.append(array(result.folder / "samples.npz"))
    assert not np.array_equal(images[0], images[1])


def test_a_model_without_encoder_is_not_offered_sharing(tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    sizes = {"patch_size": 2, "hidden_size": 32, "num_heads": 2, "depth": 3, "num_classes": 5, "in_channels": 1}
    network = {"_target_": "ddt.model.DiT", **sizes}
    folder = small_checkpoint(
        tmp_path / "model", model=DiT(**sizes), network=network, sampler=SAMPLER, class_names=CLASSES
    )
    page = build_page(open_studio(folder, tmp_path))
    assert {field.label for field in endpoint(page, "sample").inputs} == {case[0] for case in CONTROLS[:11]}
    result = press(page)
    assert "recompute" not in result.command
    assert "saved" not in result.numbers


def test_a_model_with_base_head_is_offered_internal_guidance(tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    sizes = SMALL | {"in_channels": 1, "base_depth": 1}
    sampler = SAMPLER | {"internal_scale": 1.5, "internal_interval": [0.2, 0.7]}
    folder = small_checkpoint(
        tmp_path / "model", model=small_ddt(in_channels=1, base_depth=1), sampler=sampler, class_names=CLASSES,
        network={"_target_": "ddt.model.DDT", **sizes},
    )  # fmt: skip
    page = build_page(open_studio(folder, tmp_path))
    own = pressed(page)
    assert "internal_scale=1.5" in own.command
    assert "'internal_interval=[0.2,0.7]'" in own.command
    for label, value, changed in (
        ("Internal guidance", 2, {"internal_scale": "2.0"}),
        ("Guide internally from t", 0, {"internal_interval": "[0.0,0.7]"}),
        ("Guide internally from t", 0.6, {"internal_interval": "[0.6,0.7]"}),
        ("Guide internally to t", 1, {"internal_interval": "[0.2,1.0]"}),
    ):
        result = press(page, **{label: value})
        old = settings(own.command)
        assert {k: v for k, v in settings(result.command).items() if old.get(k) != v} == changed
        assert not np.array_equal(array(own.files["samples.npz"]), array(result.files["samples.npz"]))
    unguided = press(page, **{"Internal guidance": 1})
    assert json.loads(unguided.files["receipt.json"].read_text())["request"]["sampler"]["internal_scale"] == 1
    with pytest.raises(gr.Error) as error:
        press(page, **{"Guide internally from t": 0.9})
    assert "Guide internally from t, to t = [0.9,0.7]: needs 0 &lt;= lo" in error.value.message


@pytest.fixture(scope="module")
def ditdh(tmp_path_factory):
    """A folder with a small DiT^DH of RAE latents, its guide, and one of another autoencoder."""
    place = tmp_path_factory.mktemp("ditdh")
    sizes = {"in_channels": 64, "num_classes": 5, "patch_size": 1, "hidden_size": 32, "num_heads": 2, "depth": 3}
    sizes |= {"encoder_depth": 2, "decoder_hidden_size": 64, "decoder_num_heads": 2}
    settings = small_rae(place / "rae", 4, 2)
    torch.save({"mean": torch.ones(64, 4, 4)}, place / "stat.pt")
    other = {**settings, "statistics": str(place / "stat.pt")}
    sampler = {"num_steps": 3, "cfg_scale": 1.0, "cfg_interval": None, "last_step": None, "t_end": 0.999}
    for seed, (name, autoencoder) in enumerate({"model": settings, "guide": settings, "other": other}.items()):
        torch.manual_seed(seed)
        model = DiTDH(**sizes)
        for parameter in model.parameters():  # the output begins at 0
            torch.nn.init.normal_(parameter, std=0.1)
        small_checkpoint(
            place / name, model=model, network={"_target_": "ddt.model.DiTDH", **sizes}, latent_shape=[64, 4, 4],
            autoencoder=autoencoder, sampler=sampler, class_names=CLASSES,
        )  # fmt: skip
    return place


def test_a_guide_is_that_of_sample_py(ditdh, tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    studio = open_studio(ditdh / "model", tmp_path, guide=str(ditdh / "guide"))
    page = build_page(studio)
    assert f"guided by `{ditdh / 'guide'}`" in summary(studio)
    result = press(page, Guidance=1.42)
    receipt = json.loads(result.files["receipt.json"].read_text())
    assert receipt["request"]["guide"] == {"ema_sha256": ckpt.weights_sha256(ditdh / "guide", "ema"), "step": 7}
    assert receipt["network_calls_an_image"]["guide_decoder"] == 3
    assert settings(result.command)["guide"] == str(ditdh / "guide")
    assert "multiply-accumulates" not in result.numbers  # a guide is not counted
    alone = press(page)  # Guidance 1, as the checkpoint has it
    assert "multiply-accumulates" in alone.numbers
    assert "guide" not in settings(alone.command)
    receipt = json.loads(alone.files["receipt.json"].read_text())
    assert receipt["request"]["guide"] is None
    assert "guide_decoder" not in receipt["network_calls_an_image"]
    assert not np.array_equal(array(alone.files["samples.npz"]), array(result.files["samples.npz"]))
    for number, each in enumerate((result, alone)):
        out = tmp_path / f"out{number}"
        succeed("sample", *shlex.split(each.command)[2:-1], f"out={out}")
        assert (out / "samples.npz").read_bytes() == each.files["samples.npz"].read_bytes()


def test_a_guide_of_another_autoencoder_is_refused_at_the_start(ditdh, tmp_path):
    with pytest.raises(UserError, match=r"guide: has another autoencoder\.statistics than the model"):
        open_studio(ditdh / "model", tmp_path, guide=str(ditdh / "other"))
    with pytest.raises(UserError, match="nowhere: no such folder"):
        open_studio(ditdh / "model", tmp_path, guide=str(ditdh / "nowhere"))


def test_the_page_has_one_endpoint_and_calls_nobody(page):
    assert [f.api_name for f in page.fns.values() if f.api_visibility == "public"] == ["sample"]
    assert endpoint(page, "sample").queue
    assert not page.analytics_enabled
    fonts = (*LAUNCH["theme"]._font, *LAUNCH["theme"]._font_mono)
    assert not any(isinstance(font, gr.themes.GoogleFont) for font in fonts)


# --- what reaches the server


@pytest.fixture(scope="module")
def client(page):
    """The server of the page, without a port."""
    page.queue(api_open=False)
    server = gr.mount_gradio_app(FastAPI(), page, "/", app_kwargs=app_arguments(), theme=LAUNCH["theme"])
    with TestClient(server, raise_server_exceptions=False) as client:
        yield client


HTML = b"<script>alert(1)</script>"


@pytest.mark.parametrize("route", ["upload", "upload?upload_id=1", "process_recording", "component_server", "stream/x"])
def test_uploads_are_refused_and_leave_nothing(client, studio, route):
    before = set(studio.root.rglob("*"))
    for files in ({"files": ("x.html", HTML)}, {"video": ("x.mp4", HTML)}):
        answer = client.post(f"/gradio_api/{route}", files=files)
        assert answer.status_code == 403, answer.text
    for method in ("PUT", "DELETE", "PATCH"):
        assert client.request(method, f"/gradio_api/{route}").status_code == 403
    assert set(studio.root.rglob("*")) == before


def test_only_pictures_are_shown_and_the_rest_is_downloaded(client, page, studio):
    """A file of any name, should one get into the folder."""
    result = pressed(page)
    planted = [studio.root / "x.html", studio.root / "x.svg"]
    for path in planted:
        path.write_bytes(HTML)
    for path in (*planted, result.files["samples.npz"]):
        answer = client.get(f"/gradio_api/file={path}")
        assert answer.status_code == 200
        assert answer.headers["content-type"] == "application/octet-stream"
        assert answer.headers["content-disposition"].startswith("attachment")
    picture = client.get(f"/gradio_api/file={result.images[0][1]}")
    assert picture.headers["content-type"] == "image/png"
    assert picture.content == result.images[0][1].read_bytes()
    for path in planted:
        path.unlink()
    assert client.get("/gradio_api/file=/etc/passwd").status_code == 403


@pytest.mark.parametrize(
    "path", ["file=http://127.0.0.1:1/x", "file=HTTPS://x.org/", "file/http://x.org/", "proxy=x", "deep_link"]
)
def test_it_fetches_no_address_and_keeps_no_state(client, path):
    for method in ("GET", "HEAD"):
        assert client.request(method, f"/gradio_api/{path}").status_code == 403


def test_a_control_takes_no_file_by_its_address(client, page, monkeypatch):
    fetched = []
    monkeypatch.setattr("gradio.processing_utils.async_ssrf_protected_download", lambda *a, **k: fetched.append(a))
    monkeypatch.setattr("gradio.processing_utils.save_url_to_cache", lambda *a, **k: fetched.append(a))
    file = {"path": "https://example.org/x.html", "meta": {"_type": "gradio.FileData"}}
    fields = endpoint(page, "sample").inputs
    for wrong in (file, [file], [[file]]):
        with pytest.raises(gr.Error, match="give what it offers"):
            call(page, endpoint(page, "sample"), [wrong, *(field.value for field in fields[1:])])
    assert fetched == []


def test_what_the_page_asks_for_passes(client):
    """Its own answers, be they errors of these requests, come from gradio."""
    for path in ("", "config", "theme.css", "gradio_api/info"):
        assert client.get(f"/{path}").status_code == 200
    for route in ("queue/join", "call/none", "run/none", "cancel", "reset"):
        answer = client.post(f"/gradio_api/{route}", json={"data": []})
        assert answer.status_code not in (403, 411, 413), route
    assert client.post("/gradio_api/queue/join", content=bytes(2**20 + 1)).status_code == 413
    assert client.post("/gradio_api/queue/join", content=iter([b"{}"])).status_code == 411  # of unknown length


def test_classes_of_one_name_carry_their_label():
    choices = class_choices(["n02012849", "n03126707", "seven", "n02124075"])
    assert choices == ["crane (0)", "crane (1)", "seven", "Egyptian cat"]


@pytest.mark.parametrize(
    ("sampler", "expected", "recompute"),
    [
        ({"recompute": "uniform:3", "forecast_order": 1}, {"every": 3, "forecast": "a line"}, "uniform:3"),
        ({"recompute": "dp:4"}, {"sharing": "dp", "budget": 4}, "dp:4"),
        ({"recompute": [0, 2, 3]}, {"sharing": "checkpoint"}, [0, 2, 3]),
        ({"cfg_interval": None}, {"cfg_from": 0.0, "cfg_to": 1.0}, None),
        ({"cfg_interval": [0.1, 0.8]}, {"cfg_from": 0.1, "cfg_to": 0.8}, None),
        ({"num_steps": 250, "last_step": 0.04}, {"num_steps": 20, "last_step": 0.04}, None),
        ({"num_steps": 50, "recompute": "dp:30"}, {"num_steps": 20}, "dp:20"),
        ({"num_steps": 50, "recompute": "uniform:30"}, {"num_steps": 20}, "uniform:20"),
        ({"solver": "adaptive", "cfg_scale": 3.0}, {"solver": "euler", "cfg_scale": 3.0}, None),
        ({"last_step": None, "t_end": 0.9, "timeshift": 2.0}, {"last_step": None, "timeshift": 2.0}, None),
        ({"solver": "adaptive", "last_step": None, "t_end": 0.9}, {"solver": "euler", "last_step": None}, None),
    ],
)
def test_the_page_begins_with_the_checkpoints_sampler_within_the_limits(studio, sampler, expected, recompute):
    stored = {**studio.stored, "sampler": SAMPLER | sampler}
    values = asdict(initial_controls(stored, studio.settings))
    assert expected.items() <= values.items()
    assert values["classes"] == ["ant", "bee", "cat", "dog", "Egyptian cat"]
    (request,) = make_requests(values, stored, studio.settings)
    assert request.sampler.recompute == recompute
    assert request.sampler.t_end == sampler.get("t_end", 1.0)
    assert ("checkpoint" in sharing_choices(stored)) == isinstance(recompute, list)


def test_many_classes_begin_with_a_few_spread_over_all(studio):
    stored = {**studio.stored, "class_names": [f"class {k}" for k in range(1000)]}
    assert initial_controls(stored, studio.settings).classes == [f"class {k}" for k in (0, 250, 500, 750)]


# --- the entry point


def test_wrong_settings_are_one_line_before_anything_is_loaded(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "there is no runs/demo; run bash scripts/demo.sh first" in refusal("scripts.app.__main__")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for change, message in (
            ("max_images=0", "max_images=0: must be at least 1"),
            ("max_queue=0", "max_queue=0: must be at least 1"),
            ("batch_size=0", "batch_size=0: must be at least 1"),
            ("port=0", "port=0: must lie in 1..65535"),
            (f"port={port}", f"port={port}: Address already in use on host=127.0.0.1; choose another port="),
            ("host=", "host=: is empty; leave it out"),
            ("host=no.such.host.invalid", "host=no.such.host.invalid: no such address"),
            ("weights=model", "weights=model: "),
            ("dtype=int8", "dtype=int8: "),
            ("root_path=ddt", "root_path=ddt: give the path at which a proxy serves the page, such as /ddt"),
            ("root_path=/ddt/", "root_path=/ddt/: give the path"),
            ("share=true", "share: no such setting"),
        ):
            text = refusal("scripts.app.__main__", f"ckpt={folder}", change)
            assert message in text
            assert len(text.splitlines()) == 1
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "needs the package gradio; run pip install -e '.[app]'" in refusal("scripts.app.__main__", f"ckpt={folder}")


def test_it_listens_at_its_address_and_runs_one_request_at_a_time(tmp_path, monkeypatch):
    page = MagicMock()
    page.queue.return_value, page.launch.side_effect = page, KeyboardInterrupt
    monkeypatch.setattr(app_page, "build_page", lambda studio: page)
    monkeypatch.setattr(app.signal, "signal", lambda *_: None)
    for key in ("GRADIO_ANALYTICS_ENABLED", "GRADIO_TEMP_DIR"):
        monkeypatch.setenv(key, "")
    studio = MagicMock(root=tmp_path)
    app.serve(studio, AppSettings(ckpt=str(tmp_path), max_queue=3, root_path="/ddt"))
    page.queue.assert_called_once_with(max_size=3, default_concurrency_limit=1, api_open=False)
    given = page.launch.call_args.kwargs
    wanted = {"server_name": "127.0.0.1", "server_port": 7860, "share": False, "root_path": "/ddt"}
    assert wanted.items() <= given.items()
    assert "allowed_paths" not in given  # what gradio serves from there is shown, not downloaded
    assert [middleware.cls for middleware in given["app_kwargs"]["middleware"]] == [Guard]
    page.close.assert_called_once()
    studio.close.assert_called_once()


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_another_host_is_warned_of(folder, monkeypatch, host):
    served = []
    monkeypatch.setattr(app, "serve", lambda studio, settings: served.append((studio.root, settings)))
    monkeypatch.setattr(logging.getLogger(app.__name__), "level", logging.INFO)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    done = run_inside("scripts.app.__main__", f"ckpt={folder}", f"host={host}", f"port={port}")
    assert done.returncode == 0, done.stderr
    assert ("there is no password" in done.stderr) == (host == "0.0.0.0")
    ((root, settings),) = served
    assert (settings.host, settings.port, settings.max_queue) == (host, port, 16)
    assert not root.exists()  # with all that was sampled


# --- on Hugging Face Spaces


@pytest.mark.parametrize("variables", [{}, {"DDT_CHECKPOINT": "model"}])
def test_a_space_starts_the_app_of_its_model(monkeypatch, variables):
    called = []
    monkeypatch.setattr(app, "main", lambda: called.append(sys.argv[1:]))
    monkeypatch.setattr(sys, "argv", ["app.py"])
    monkeypatch.delenv("DDT_CHECKPOINT", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    runpy.run_path(str(ROOT / "spaces" / "app.py"), run_name="__main__")
    assert called == [[f"ckpt={variables.get('DDT_CHECKPOINT', 'ddt-xl-256')}", "host=0.0.0.0"]]
    assert "ddt-xl-256" in ddt.list_models()


def test_a_space_installs_what_the_app_needs():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    required = (ROOT / "spaces" / "requirements.txt").read_text().splitlines()
    assert required == [*project["dependencies"], *project["optional-dependencies"]["app"]]
    card = yaml.safe_load((ROOT / "spaces" / "README.md").read_text().split("---")[1])
    assert (ROOT / "spaces" / card["app_file"]).is_file()
    assert card["sdk"] == "gradio"
    assert card["sdk_version"] in Requirement(project["optional-dependencies"]["app"][0]).specifier
    assert len(card["short_description"]) <= 60  # the hub refuses longer ones
