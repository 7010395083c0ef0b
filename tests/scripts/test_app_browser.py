"""The app as a user meets it: in a browser, from the first look to the downloaded file."""

import contextlib
import io
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import numpy as np
import pytest
from conftest import ROOT, small_checkpoint
from test_app import CLASSES, SAMPLER

pytestmark = pytest.mark.slow


@contextlib.contextmanager
def started(folder, variables, *settings):
    """The process and address of an app that runs as a user starts it."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "scripts.app", f"port={port}", f"ckpt={folder}", "max_images=12", "max_steps=3000"]
    with subprocess.Popen(
        [*command, *settings], cwd=ROOT, stderr=subprocess.PIPE, text=True, env=os.environ | variables,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as app:  # fmt: skip
        said = next((line for line in app.stderr if line.startswith("open http")), "")
        assert str(port) in said
        yield app, f"http://127.0.0.1:{port}"
        app.terminate()
        app.communicate()  # what it still says, so that it is not held up


@pytest.fixture(scope="module")
def folder_of_model(tmp_path_factory):
    return small_checkpoint(tmp_path_factory.mktemp("browser") / "model", sampler=SAMPLER, class_names=CLASSES)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("temporary")


@pytest.fixture(scope="module")
def address(folder_of_model, root):
    with started(folder_of_model, {"TMPDIR": str(root)}) as (_, address):
        yield address


@pytest.fixture
def page(address, browser):
    """The opened page; at the end, nothing was asked of another host, and nothing failed in the
    browser.
    """
    hosts, errors = set(), []
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.on("request", lambda request: hosts.add(urlsplit(request.url).netloc))
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(address)
    sampled(page)  # it opens with a set
    yield page
    page.wait_for_timeout(300)
    page.close()
    assert hosts - {""} == {urlsplit(address).netloc}
    assert errors == []


def captions(page, gallery):
    return page.locator(f"#{gallery} .caption-label").all_inner_texts()


def sampled(page, before=""):
    """Wait for another result than that of the command `before`; return its captions."""
    page.wait_for_function(
        "before => ![before, undefined].includes(document.querySelector('#command textarea')?.value)", arg=before
    )
    page.wait_for_function("[...document.querySelectorAll('#images img')].every(image => image.naturalWidth > 0)")
    return captions(page, "images")


def generate(page):
    """Press Generate with values other than those shown, and wait for the result."""
    before = command(page)
    page.get_by_role("button", name="Generate").click()
    return sampled(page, before)


def fill(page, label, value):
    """Type a number beside a slider, or into a field, whose label its explanation follows."""
    beside = page.get_by_label(f"number input for {label}", exact=True)
    field = beside.or_(page.get_by_label(re.compile(rf"^\s*{label}\b"))).first
    field.fill(value)
    field.blur()


def choose(page, *names):
    field = page.get_by_label("Classes")
    page.get_by_role("button", name="Clear").first.click()
    for name in names:
        field.click()
        field.fill(name)
        field.press("Enter")
    page.get_by_role("heading", name="DDT").click()


def command(page):
    return page.locator("#command textarea").input_value()


def test_a_user_chooses_by_name_samples_and_downloads(page):
    choose(page, "egyptian", "bee")
    fill(page, "Steps", "5")
    assert generate(page) == [f"{name}, seed {seed}" for seed in (0, 1) for name in ("Egyptian cat", "bee")]
    assert "classes=[4,1]" in command(page)
    assert "num_steps=5" in command(page)
    assert re.search(r"Time\s*\d+\.\d\d s", page.locator("#numbers").inner_text())
    with page.expect_download() as download:
        page.locator("a[download='samples.npz']").click()
    content = np.load(io.BytesIO(Path(download.value.path()).read_bytes()))
    assert content["arr_0"].shape == (4, 8, 8, 1)
    assert content["arr_1"].tolist() == [4, 1, 4, 1]


def test_sharing_shows_its_fields_and_both_sets(page):
    runs, beside = page.get_by_label("Encoder runs"), page.get_by_label("Side by side")
    assert not beside.is_visible()
    page.get_by_label("fitted to the model").check()
    runs.wait_for()
    page.get_by_label("every k-th step").check()
    fill(page, "k", "3")
    beside.check()
    assert not runs.is_visible()
    width = page.locator("#numbers").bounding_box()["width"]
    names = [f"{name}, seed {seed}" for seed in (0, 1) for name in (*CLASSES[:4], "Egyptian cat")]
    assert generate(page) == captions(page, "unshared") == names
    assert page.locator("#slider").is_visible()
    text = page.locator("#numbers").inner_text()
    assert "fewer multiply-accumulates" in page.locator("#numbers h2").inner_text()
    assert "The encoder ran at 2 of 6 steps: ■□□■□□" in text
    assert "the median of 1 comparison" in text
    places = [page.locator("#images .caption-label").nth(k).evaluate("e => e.parentElement.offsetLeft") for k in (0, 5)]
    assert places[0] == places[1]  # of one class
    assert page.locator("#numbers").bounding_box()["width"] == width
    page.get_by_label("off", exact=True).check()
    beside.wait_for(state="hidden")
    page.get_by_role("button", name="Generate").click()
    page.locator("#unshared").wait_for(state="hidden")
    assert not page.locator("#slider").is_visible()
    assert "fewer" not in page.locator("#numbers").inner_text()


def test_a_wrong_value_is_reported_in_the_controls_words_and_the_page_goes_on(page):
    assert not page.get_by_label("Last step").is_visible()
    page.get_by_role("button", name="Advanced").click()
    fill(page, "Last step", "2")
    page.get_by_role("button", name="Generate").click()
    page.get_by_text("Last step = 2.0: must lie between 0 and 1").wait_for()
    assert "Traceback" not in page.content()
    fill(page, "Last step", "0.1")
    assert len(generate(page)) == 10


def test_the_die_chooses_another_seed(page):
    seed = page.get_by_label("Seed")
    page.locator("#dice").click()
    page.wait_for_function("document.querySelector('input[aria-label=Seed]').value != '0'")
    assert generate(page)[0] == f"ant, seed {seed.input_value()}"


@pytest.fixture
def folder(address, root):
    """Where the app keeps its sets."""
    (folder,) = root.glob("ddt-app-*")
    return folder


def wait_until(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def start_long(page):
    fill(page, "Steps", "3000")
    page.get_by_role("button", name="Generate").click()
    page.get_by_text("sampling 10 images").first.wait_for()


def unfinished(folder):
    return [path for path in folder.glob("set-*") if not (path / "samples.npz").exists()]


def test_stop_ends_the_request(page, folder):
    start_long(page)
    assert len(unfinished(folder)) == 1
    page.get_by_role("button", name="Stop").click()
    wait_until(lambda: not unfinished(folder))
    fill(page, "Steps", "4")
    assert len(generate(page)) == 10


def test_stop_takes_a_request_out_of_the_queue_and_a_closed_tab_ends_its_own(page, address, browser, folder):
    other = browser.new_page()
    other.goto(address)
    sampled(other)
    start_long(other)
    fill(page, "Steps", "7")
    page.get_by_role("button", name="Generate").click()
    page.get_by_text("queue").first.wait_for()
    page.get_by_role("button", name="Stop").click()
    page.get_by_text("queue").first.wait_for(state="hidden")
    count = len(list(folder.glob("set-*")))
    other.close()
    wait_until(lambda: not unfinished(folder))
    page.wait_for_timeout(1000)
    assert len(list(folder.glob("set-*"))) == count - 1  # nothing waited
    fill(page, "Steps", "4")
    assert "num_steps=4" in (generate(page), command(page))[1]


def test_a_client_calls_and_cancels(address, folder):
    from gradio_client import Client

    client = Client(address, verbose=False, download_files=False)
    described = client.view_api(return_format="dict", print_info=False)["named_endpoints"]
    assert list(described) == ["/sample"]
    types = {each["parameter_name"]: each["python_type"]["type"] for each in described["/sample"]["parameters"]}
    assert {types[key] for key in ("num_images", "seed", "num_steps", "every", "budget")} == {"int"}
    assert {types[key] for key in ("cfg_scale", "cfg_from", "cfg_to", "timeshift")} == {"float"}
    assert (types["last_step"], types["compare"]) == ("str", "bool")
    assert types["classes"] == f"list[Literal{[*CLASSES[:4], 'Egyptian cat']}]"
    values = {"classes": ["bee"], "num_images": 1, "seed": 3, "num_steps": 2, "cfg_scale": 1.5, "last_step": "0.25"}
    result = client.predict(**values, forecast="a line", sharing="uniform", every=2, api_name="/sample")
    assert "classes=[1]" in str(result)
    assert "fewer multiply-accumulates" in result[0]
    job = client.submit(num_steps=3000, api_name="/sample")
    wait_until(lambda: unfinished(folder))
    job.cancel()
    wait_until(lambda: not unfinished(folder))


def test_a_phone_scrolls_to_the_result(address, browser):
    page = browser.new_page(viewport={"width": 390, "height": 844})
    page.goto(address)
    sampled(page)
    fill(page, "Steps", "3")
    page.evaluate("window.scrollTo(0, 0)")
    generate(page)
    page.wait_for_function("document.querySelector('#numbers').getBoundingClientRect().top < 500")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.close()


def test_ctrl_c_ends_it_while_it_samples(folder_of_model, tmp_path):
    with started(folder_of_model, {"TMPDIR": str(tmp_path)}) as (app, address):
        from gradio_client import Client

        client = Client(address, verbose=False, download_files=False)
        client.submit(num_steps=3000, api_name="/sample")
        wait_until(lambda: list(tmp_path.glob("ddt-app-*/set-*")))
        app.send_signal(signal.SIGINT)
        said = app.stderr.read()
        assert app.wait() == 0
    assert "closed" in said
    assert "Traceback" not in said
    assert list(tmp_path.glob("ddt-app-*")) == []


def test_a_proxy_serves_it_at_a_path(folder_of_model):
    with started(folder_of_model, {}, "root_path=/ddt") as (_, address):
        config = httpx.get(f"{address}/config").json()
        assert config["root"] == f"{address}/ddt"
        for prefix in ("", "/ddt"):  # proxies that strip the path, and those that do not
            assert httpx.get(f"{address}{prefix}/gradio_api/info").status_code == 200
            assert httpx.get(f"{address}{prefix}/gradio_api/file=http://example.org").status_code == 403
            assert httpx.post(f"{address}{prefix}/gradio_api/upload").status_code == 403
            assert httpx.post(f"{address}{prefix}/gradio_api/queue/join", json={}).status_code == 422
