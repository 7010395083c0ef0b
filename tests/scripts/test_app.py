"""The app: each control changes what is drawn, what it says is true, and a mistake costs one line
and no more.
"""

import asyncio
import functools
import json
import logging
import re
import shlex
import socket
import zipfile
from dataclasses import asdict
from pathlib import Path

import gradio as gr
import numpy as np
import pytest
from accelerate import Accelerator
from conftest import ROOT, refusal, run_inside, small_ddt, succeed

import scripts.app
from ddt.checkpoint import folder as ckpt
from ddt.errors import UserError
from ddt.model import DiT
from scripts.app import jobs as app_jobs
from scripts.app import page as app_page
from scripts.app.controls import Limits, Source, class_choices, defaults_of, request_of, sharing_choices
from scripts.app.jobs import Interrupted, Studio
from scripts.app.page import LAUNCH, build

pytestmark = pytest.mark.usefixtures("one_thread")
SAMPLER = {"solver": "euler", "num_steps": 6, "cfg_scale": 2.0, "cfg_interval": [0.3, 1.0], "last_step": None}
NETWORK = {"patch_size": 2, "hidden_size": 32, "num_heads": 2, "depth": 3, "num_classes": 5, "in_channels": 1}
LIMITS = Limits(max_images=6, max_steps=20)
FEW = {"Classes": [0, 2], "Pictures of each class": 1}  # what the tests begin with


def write_run(folder, model, sampler=SAMPLER, **network):
    """A checkpoint of a few random weights that draws pictures of 8×8 px."""
    config = {
        "step": 3,
        "network": {"_target_": f"ddt.model.{type(model).__name__}", **NETWORK, **network},
        "latent_shape": [1, 8, 8],
        "autoencoder": {"_target_": "ddt.autoencoder.Identity"},
        "sampler": sampler,
        "class_names": ["ant", "bee", "cat", "dog", "n02124075"],
    }
    ckpt.write_checkpoint(ckpt.checkpoint_folder(folder, 3), config, ema=model.state_dict())
    return ckpt.checkpoint_folder(folder, 3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("app") / "run", small_ddt(in_channels=1), encoder_depth=2)


def studio_of(folder, root):
    return Studio(Source(folder), LIMITS, root, Accelerator(cpu=True))


@pytest.fixture(scope="module")
def studio(folder, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        root = tmp_path_factory.mktemp("results")
        patch.setenv("GRADIO_TEMP_DIR", str(root))
        patch.setattr(app_jobs, "KEPT", 1000)
        yield studio_of(folder, root)


@pytest.fixture(scope="module")
def page(studio):
    return build(studio)


@pytest.fixture(autouse=True)
def accelerator(studio):
    studio.accelerator = Accelerator(cpu=True)  # an entry point in the same process resets that of the test before


def endpoint(page, name):
    return next(function for function in page.fns.values() if function.api_name == name)


def call(page, name, inputs=(), session="a"):
    """Do what the server does when an event of the page arrives; return what it sends back."""
    request = gr.Request(session_hash=session)
    return asyncio.run(page.process_api(endpoint(page, name), list(inputs), request=request))["data"]


def press(page, **changes):
    """Press Generate with fields changed, each by its label; return numbers, pictures, command and
    files.
    """
    fields = endpoint(page, "draw").inputs
    assert {*FEW, *changes} <= {field.label for field in fields}
    inputs = [{**FEW, **changes}.get(field.label, field.value) for field in fields]
    numbers, pictures, command, files = call(page, "draw", inputs)
    return numbers, pictures, command["value"], {Path(file["path"]).name: Path(file["path"]) for file in files["value"]}


@functools.cache
def remembered(page, *changes):
    return press(page, **dict(changes))


def pressed(page, **changes):
    """Press Generate, or return what came of it the last time."""
    return remembered(page, *changes.items())


def array(path):
    with np.load(path) as file:
        return file["arr_0"]


def settings(command):
    return dict(word.split("=", 1) for word in shlex.split(command)[2:] if not word.startswith("out="))


UNIFORM, FITTED = {"Encoder sharing": "uniform", "k": 3}, {"Encoder sharing": "dp", "Encoder runs": 2}
# field, its new value, with which others, what changes in the settings of sample.py
CONTROLS = [
    ("Classes", [1, 3], {}, {"classes": "[1,3]"}),
    ("Pictures of each class", 2, {}, {"seeds": "0-1"}),
    ("Seed", 7, {}, {"seeds": "7-7"}),
    ("Solver", "heun", {}, {"sampler": "heun"}),
    ("Steps", 5, {}, {"num_steps": "5"}),
    ("Guidance", 3, {}, {"cfg_scale": "3.0"}),
    ("Guide only between two times", False, {}, {"cfg_interval": "null"}),
    ("From t", 0.6, {}, {"cfg_interval": "[0.6,1.0]"}),
    ("To t", 0.6, {}, {"cfg_interval": "[0.3,0.6]"}),
    ("Time shift", 2, {}, {"timeshift": "2.0"}),
    ("Last step", "0.04", {}, {"last_step": "0.04"}),
    ("Encoder sharing", "uniform", {}, {"recompute": "uniform:5", "forecast_order": "0"}),
    ("Encoder sharing", "dp", {}, {"recompute": "dp:1", "forecast_order": "0"}),
    ("k", 2, UNIFORM, {"recompute": "uniform:2"}),
    ("Encoder runs", 3, FITTED, {"recompute": "dp:3"}),
    ("Between two runs", 1, UNIFORM, {"forecast_order": "1"}),
]


@pytest.mark.parametrize(("label", "value", "others", "changed"), CONTROLS, ids=[f"{c[0]} {c[1]}" for c in CONTROLS])
def test_each_control_alone_changes_the_run(page, label, value, others, changed):
    _, _, before, old = pressed(page, **others)
    _, _, after, new = press(page, **{**others, label: value})
    assert {k: v for k, v in settings(after).items() if settings(before).get(k) != v} == changed
    assert not np.array_equal(array(old["samples.npz"]), array(new["samples.npz"]))
    request = json.loads(new["receipt.json"].read_text())["request"]
    for key in {"num_steps", "cfg_scale", "timeshift", "recompute", "forecast_order"} & set(changed):
        assert str(request["sampler"][key]) == changed[key]


def test_no_control_is_forgotten(page):
    labels = {field.label for field in endpoint(page, "draw").inputs}
    assert labels == {case[0] for case in CONTROLS} | {"Side by side with sharing off"}


def test_side_by_side_shows_both_and_tells_the_difference(page):
    alone = pressed(page, **UNIFORM)
    numbers, pictures, command, files = press(page, **UNIFORM, **{"Side by side with sharing off": True})
    assert command == alone[2]
    assert ("With sharing" in alone[1], "Without sharing" in alone[1]) == (True, False)
    assert pictures.count("<img") == 2 * alone[1].count("<img") == 4
    assert "Without sharing" in pictures
    with zipfile.ZipFile(files["unshared.zip"]) as archive:
        plain = np.load(archive.open("samples.npz"))["arr_0"]
        receipt = json.loads(archive.read("receipt.json"))
    assert np.array_equal(plain, array(pressed(page)[3]["samples.npz"]))
    assert "recompute=null" in receipt["command"]
    ours = array(files["samples.npz"]).astype(int)
    assert np.array_equal(ours, array(alone[3]["samples.npz"]))
    assert f"<b>{np.abs(ours - plain).mean():.2f}</b>" in numbers
    times = json.loads(files["receipt.json"].read_text())["images_per_second"] / receipt["images_per_second"]
    assert f"<span>Speed by sharing</span><b>{times:.2f} ×</b>" in numbers


def test_numbers_are_those_of_the_receipt(page):
    """Guided at the four of six steps with t above 0.3: by hand 4·2 + 2 calls; with k = 3 the
    encoder at step 0, whose segment reaches the guided step 2, and at step 3.
    """
    numbers, _, _, files = pressed(page, **UNIFORM)
    receipt = json.loads(files["receipt.json"].read_text())
    assert receipt["recompute_steps"] == [0, 3]
    assert receipt["network_calls_an_image"] == {"encoder": 4.0, "decoder": 10.0}
    shown = re.findall(r"<span>([^<]*)</span><b>([^<]*)</b><span>([^<]*)</span>", numbers)
    assert shown[1:] == [("Encoder calls", "4", "60% of 10 saved"), ("Decoder calls", "10", "a picture")]
    assert shown[0][1] == f"{2 / receipt['images_per_second']:.2f} s"
    assert [m == "run" for m in re.findall(r'<rect [^>]*class="(\w+)"', numbers)] == [True, False, False] * 2


def test_pictures_are_named_and_there_to_be_loaded(page, studio):
    _, pictures, _, files = press(page, **{"Classes": [4, 0], "Pictures of each class": 2})
    assert re.findall(r'alt="([^"]*)"', pictures) == [f"{n}, seed {s}" for s in (0, 1) for n in ("Egyptian cat", "ant")]
    for path in re.findall(r'src="gradio_api/file=([^"]*)"', pictures):
        assert Path(path).is_relative_to(studio.root)
        assert Path(path).read_bytes()[:4] == b"\x89PNG"
    with zipfile.ZipFile(files["pictures.zip"]) as archive:
        assert archive.namelist() == [f"png/{k:06d}.png" for k in range(4)]


@pytest.mark.parametrize("changes", [{}, {"Solver": "sde", "Seed": 5, **FITTED}], ids=["checkpoint's", "fitted"])
def test_the_command_draws_the_same(page, tmp_path, monkeypatch, changes):
    _, _, command, files = pressed(page, **changes)
    monkeypatch.chdir(tmp_path)
    words = shlex.split(command)
    assert words[:2] == ["python", "sample.py"]
    succeed("sample", *words[2:])
    out = Path(words[-1].removeprefix("out="))
    assert array(out / "samples.npz").tobytes() == array(files["samples.npz"]).tobytes()
    ours, theirs = (json.loads(path.read_text()) for path in (files["receipt.json"], out / "receipt.json"))
    assert ours["request"] == theirs["request"]
    assert ours["recompute_steps"] == theirs["recompute_steps"]
    assert ours["command"] == command


WRONG = [
    ({"Classes": []}, "classes: none is chosen"),
    ({"Classes": [0, 1, 2], "Pictures of each class": 3}, "9 pictures, and this app draws at most 6"),
    ({"Pictures of each class": 0}, "num_images=0: must be at least 1"),
    ({"Pictures of each class": None}, "num_images=null: give a whole number"),
    ({"Seed": -1}, "seed=-1: must lie in 0.."),
    ({"Seed": 2**32}, f"seed={2**32}: must lie in 0.."),
    ({"Steps": 21}, "num_steps=21: this app takes at most 20"),
    ({"Steps": 0}, "num_steps=0: must lie in 1.."),
    ({"Steps": 2.5}, "num_steps=2.5: "),
    ({"Guidance": -1}, "cfg_scale=-1.0: "),
    ({"Guidance": 1e300}, "is not finite: try"),
    ({"From t": 0.9, "To t": 0.1}, "cfg_interval=[0.9,0.1]: needs 0 &lt;= lo"),
    ({"Last step": "<b>"}, "last_step=&lt;b&gt;: "),
    ({"Time shift": 0}, "timeshift=0.0: must be above 0"),
    ({"Encoder sharing": "uniform", "k": 0}, "recompute=uniform:0: choose 1..num_steps=6"),
    ({"Encoder sharing": "dp", "Encoder runs": 7}, "recompute=dp:7: the encoder runs at 1..num_steps=6"),
    ({"Solver": "sde", "Encoder sharing": "uniform", "Between two runs": 1}, "forecast_order=1: "),
    ({"Seed": 2**32 - 1, "Guidance": -1, "Pictures of each class": 1}, "cfg_scale=-1.0: "),
    ({"Solver": "adaptive"}, "adaptive"),
    ({"Classes": [9]}, "9"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG, ids=[str(case[0]) for case in WRONG])
def test_a_wrong_value_is_told_in_our_words_and_costs_nothing(page, studio, changes, message):
    folders = set(studio.root.glob("set-*"))
    with pytest.raises(gr.Error) as error:
        press(page, **changes)
    assert message in error.value.message
    assert "Traceback" not in error.value.message
    assert set(studio.root.glob("set-*")) == folders


def test_the_page_goes_on_after_a_wrong_value(page):
    with pytest.raises(gr.Error):
        press(page, **{"Steps": 0})
    assert press(page)[2] == pressed(page)[2]


def test_who_goes_round_the_page_meets_the_same_limits(studio):
    values = {**asdict(studio.defaults), "solver": "adaptive", "sharing": "off"}
    for change, message in (
        ({}, "sampler=adaptive: not offered"),
        ({"solver": "euler", "sharing": "x"}, "sharing=x: "),
    ):
        with pytest.raises(UserError, match=message):
            request_of({**values, **change}, studio.stored, LIMITS, studio.source)
    with pytest.raises(UserError, match="no_such: no such setting"):
        request_of({**values, "no_such": 1}, studio.stored, LIMITS, studio.source)


def test_a_schedule_is_fitted_once(studio, monkeypatch):
    fits = []
    resolve = app_jobs.sample_set.__globals__["resolve_recompute"]
    monkeypatch.setitem(
        app_jobs.sample_set.__globals__, "resolve_recompute", lambda *a: fits.append(a[2].recompute) or resolve(*a)
    )
    told = []
    values = {**asdict(studio.defaults), "sharing": "dp", "budget": 4, "timeshift": 1.5}
    first, again = (studio.draw({**values, "seed": seed}, lambda *t: told.append(t[1]), bool) for seed in (0, 1))
    assert fits == ["dp:4"]
    assert sum("fitting" in text for text in told) == 1
    assert len(first.drawn.receipt["recompute_steps"]) == 4
    assert first.drawn.receipt["recompute_steps"] == again.drawn.receipt["recompute_steps"]


def test_progress_counts_every_step_to_the_end(studio, monkeypatch):
    monkeypatch.setattr(studio, "source", Source(studio.source.folder, batch_size=2))
    told = []
    values = {**asdict(studio.defaults), "solver": "heun", "num_images": 1, "sharing": "uniform", "compare": True}
    studio.draw(values, lambda done, _: told.append(done), bool)
    assert told == sorted(told)
    assert (told[0], told[-1]) == (1 / (2 * 3 * 11), 1.0)  # two sets of three batches, Heun's 2·6 − 1 calls each


def test_stop_ends_a_request_and_leaves_nothing(studio):
    told, folders = [], set(studio.root.glob("set-*"))
    with pytest.raises(Interrupted):
        studio.draw(asdict(studio.defaults), lambda done, _: told.append(done), lambda: len(told) == 3)
    assert len(told) == 3
    assert set(studio.root.glob("set-*")) == folders
    studio.draw(asdict(studio.defaults), lambda *_: None, bool)


def test_stop_is_meant_for_ones_own_request_alone(page, studio, monkeypatch):
    seen = []

    def draw(values, tell, stopped):
        for session in ("b", "a"):
            call(page, "stop_soon", session=session)
            seen.append(stopped())
        raise Interrupted

    monkeypatch.setattr(gr, "Info", lambda text: seen.append(text))
    monkeypatch.setattr(studio, "draw", draw)
    call(page, "begin")
    inputs = [field.value for field in endpoint(page, "draw").inputs]
    sent = call(page, "draw", inputs)
    assert seen == [False, True, "Stopped; nothing of it was kept."]
    assert len(sent) == 4
    assert "value" not in str(sent)  # the last result stays
    start, stop = call(page, "begin")
    assert (start["interactive"], stop["interactive"]) == (False, True)
    monkeypatch.setattr(studio, "draw", lambda values, tell, stopped: seen.append(stopped()) or draw(None, None, bool))
    call(page, "draw", inputs)
    assert seen[3] is False  # a new request is not stopped by the last one's button


def test_the_disk_is_bounded(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(app_jobs, "KEPT", 2)
    studio = studio_of(folder, tmp_path)
    results = [studio.draw(asdict(studio.defaults), lambda *_: None, bool) for _ in range(3)]
    assert [result.drawn.folder.exists() for result in results] == [False, True, True]
    assert len(list(studio.root.glob("set-*"))) == 2


def test_the_weights_and_precision_of_the_start_draw_and_are_in_the_command(folder, tmp_path):
    ema = ckpt.read_weights(folder, "ema")
    raw = {key: 1.2 * value for key, value in ema.items()}
    ckpt.write_checkpoint(tmp_path / "both", ckpt.read_config(folder), ema=ema, model=raw)
    drawn = []
    for chosen in ({}, {"weights": "model"}, {"dtype": "bf16"}):
        studio = Studio(Source(tmp_path / "both", **chosen), LIMITS, tmp_path, Accelerator(cpu=True))
        result = studio.draw(asdict(studio.defaults), lambda *_: None, bool)
        said = settings(result.request.command)
        assert {key: said[key] for key in ("weights", "dtype") if key in said} == chosen
        assert result.drawn.receipt["request"]["dtype"] == chosen.get("dtype", "fp32")
        drawn.append(array(result.drawn.folder / "samples.npz"))
    assert not np.array_equal(drawn[0], drawn[1])


def test_a_model_without_encoder_is_not_offered_sharing(tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    folder = write_run(tmp_path / "run", DiT(**NETWORK))
    studio = studio_of(folder, tmp_path)
    page = build(studio)
    labels = {field.label for field in endpoint(page, "draw").inputs}
    assert labels == {case[0] for case in CONTROLS[:11]}
    numbers, _, command, _ = press(page)
    assert "recompute" not in command
    assert "saved" not in numbers
    with pytest.raises(UserError, match="no encoder to share"):
        request_of({**asdict(studio.defaults), "sharing": "uniform"}, studio.stored, LIMITS, studio.source)


def test_the_page_has_one_endpoint_and_calls_nobody(page, monkeypatch):
    public = [f.api_name for f in page.fns.values() if f.api_visibility == "public"]
    assert public == ["draw"]
    assert not page.analytics_enabled
    assert LAUNCH["share"] is False
    assert not any(
        isinstance(font, gr.themes.GoogleFont) for font in (*LAUNCH["theme"]._font, *LAUNCH["theme"]._font_mono)
    )
    assert endpoint(page, "draw").queue
    for path in (ROOT / "ddt").rglob("*.py"):
        assert "gradio" not in path.read_text(), path


def test_classes_of_one_name_are_told_apart():
    choices = class_choices(["n02012849", "n03126707", "seven", "n02124075"])
    assert choices == [("crane (0)", 0), ("crane (1)", 1), ("seven", 2), ("Egyptian cat", 3)]


@pytest.mark.parametrize(
    ("sampler", "expected"),
    [
        ({"recompute": "uniform:3", "forecast_order": 1}, {"sharing": "uniform", "every": 3, "forecast_order": 1}),
        ({"recompute": "dp:4"}, {"sharing": "dp", "budget": 4}),
        ({"recompute": [0, 2, 3]}, {"sharing": "checkpoint"}),
        ({"cfg_interval": None}, {"limit_guidance": False, "cfg_from": 0.3, "cfg_to": 1.0}),
        ({"cfg_interval": [0.1, 0.8]}, {"limit_guidance": True, "cfg_from": 0.1, "cfg_to": 0.8}),
        ({"num_steps": 250, "last_step": 0.04}, {"num_steps": 20, "last_step": 0.04}),
        ({"solver": "adaptive", "cfg_scale": 3.0}, {"solver": "euler", "cfg_scale": 3.0}),
    ],
)
def test_the_page_begins_with_the_checkpoints_sampler(studio, sampler, expected):
    stored = {**studio.stored, "sampler": SAMPLER | sampler}
    values = asdict(defaults_of(stored, LIMITS))
    assert expected.items() <= values.items()
    assert values["classes"] == [0, 1, 2, 3, 4]
    request = request_of(values, stored, LIMITS, studio.source)
    recompute = sampler.get("recompute")
    assert request.settings.recompute == recompute
    assert ("checkpoint" in sharing_choices(stored)) == isinstance(recompute, list)


@pytest.mark.parametrize("recompute", ["dp:30", "uniform:30"])
def test_stored_sharing_is_kept_within_the_limit_of_steps(studio, recompute):
    stored = {**studio.stored, "sampler": SAMPLER | {"num_steps": 50, "recompute": recompute}}
    request = request_of(asdict(defaults_of(stored, LIMITS)), stored, LIMITS, studio.source)
    assert (request.settings.num_steps, request.settings.recompute) == (20, f"{recompute.split(':')[0]}:20")


def test_many_classes_begin_with_a_few_spread_over_all(studio):
    stored = {**studio.stored, "network": {**studio.stored["network"], "num_classes": 1000}}
    assert defaults_of(stored, LIMITS).classes == [0, 250, 500, 750]


# the entry point


def test_it_says_what_is_missing_before_anything_is_loaded(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "there is no runs/demo; run bash scripts/demo.sh first" in refusal("scripts.app")
    run = f"ckpt={folder}"
    for change, message in (
        ("max_images=0", "max_images=0: must be at least 1"),
        ("max_queue=0", "max_queue=0: must be at least 1"),
        ("batch_size=0", "batch_size=0: must be at least 1"),
        ("port=0", "port=0: must lie in 1..65535"),
        ("host=", "host=: is empty; leave it out"),
        ("host=no.such.host.invalid", "host=no.such.host.invalid: no such address"),
        ("weights=model", "weights=model: "),
        ("dtype=fp16", "dtype=fp16: "),
        ("share=true", "share: no such setting"),
    ):
        text = refusal("scripts.app", run, change)
        assert message in text
        assert len(text.splitlines()) == 1
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"port={port}: Address already in use on host=127.0.0.1; choose another port=" in refusal(
            "scripts.app", run, f"port={port}"
        )
    monkeypatch.setattr(scripts.app.importlib.util, "find_spec", lambda name: None)
    assert "needs gradio; install it with pip install -e '.[app]'" in refusal("scripts.app", run)


def test_it_listens_where_it_is_told_and_draws_one_request_at_a_time(tmp_path, monkeypatch):
    told = {}

    class Page:
        def queue(self, **options):
            told.update(options)
            return self

        def launch(self, **options):
            told.update(options)
            raise KeyboardInterrupt

        def close(self, **_):
            told["closed"] = True

    monkeypatch.setattr(app_page, "build", lambda studio: Page())
    monkeypatch.setattr(scripts.app.signal, "signal", lambda *_: None)
    for key in ("GRADIO_ANALYTICS_ENABLED", "GRADIO_TEMP_DIR"):
        monkeypatch.setenv(key, "")
    scripts.app.serve(None, "127.0.0.1", 7860, 3, tmp_path)
    wanted = {"max_size": 3, "default_concurrency_limit": 1, "server_name": "127.0.0.1", "server_port": 7860}
    wanted |= {"share": False, "allowed_paths": [str(tmp_path)], "closed": True}
    assert {key: told.get(key) for key in wanted} == wanted


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_another_host_is_warned_of(folder, monkeypatch, host):
    served = []
    monkeypatch.setattr(scripts.app, "serve", lambda studio, *rest: served.append((studio.root, *rest)))
    monkeypatch.setattr(logging.getLogger("scripts.app"), "level", logging.INFO)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    done = run_inside("scripts.app", f"ckpt={folder}", f"host={host}", f"port={port}")
    assert done.returncode == 0, done.stderr
    assert ("there is no password" in done.stderr) == (host == "0.0.0.0")
    assert served[0][1:4] == (host, port, 16)
    assert not served[0][0].exists()  # with all that was drawn
