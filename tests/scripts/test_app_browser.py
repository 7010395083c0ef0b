"""The app as a user meets it: in a browser, from the first look to the downloaded file."""

import io
import re
import socket
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
from conftest import ROOT, small_checkpoint
from test_app import CLASSES, SAMPLER

BROWSER = "/usr/bin/chromium"
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """The address of an app that runs as a user starts it."""
    folder = small_checkpoint(tmp_path_factory.mktemp("browser") / "model", sampler=SAMPLER, class_names=CLASSES)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "scripts.app", f"port={port}", f"ckpt={folder}", "max_images=12", "max_steps=3000"]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as app:
        said = next((line for line in app.stderr if line.startswith("open http")), "")
        assert str(port) in said
        yield f"http://127.0.0.1:{port}"
        app.terminate()
        app.communicate()  # what it still says, so that it is not held up


@pytest.fixture(scope="module")
def browser():
    assert Path(BROWSER).is_file(), f"no {BROWSER}: apt-get install chromium"
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright, playwright.chromium.launch(executable_path=BROWSER, args=FLAGS) as running:
        yield running


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
    page.get_by_role("button", name="Generate").wait_for()
    yield page
    page.wait_for_timeout(300)
    page.close()
    assert hosts - {""} == {urlsplit(address).netloc}
    assert errors == []


def captions(page, gallery):
    return page.locator(f"#{gallery} .caption-label").all_inner_texts()


def generate(page):
    page.get_by_role("button", name="Generate").click()
    page.wait_for_function("document.querySelectorAll('#images .caption-label').length > 0")
    page.get_by_role("button", name="Generate", disabled=False).wait_for()
    page.wait_for_function("[...document.querySelectorAll('#images img')].every(image => image.naturalWidth > 0)")
    return captions(page, "images")


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
    page.get_by_label("Steps").fill("5")
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
    page.get_by_label("k", exact=True).fill("3")
    beside.check()
    assert not runs.is_visible()
    assert generate(page) == captions(page, "unshared") == [*CLASSES[:4], "Egyptian cat"] * 2
    assert page.locator("#slider").is_visible()
    text = page.locator("#numbers").inner_text()
    assert "60% of its calls saved: ■□□■□□" in text
    assert "as fast with sharing" in text
    page.get_by_label("off", exact=True).check()
    beside.wait_for(state="hidden")
    page.get_by_label("Guide only between two times").uncheck()
    page.get_by_label("From t").wait_for(state="hidden")
    page.get_by_role("button", name="Generate").click()
    page.locator("#unshared").wait_for(state="hidden")
    assert not page.locator("#slider").is_visible()
    assert "saved" not in page.locator("#numbers").inner_text()


def test_a_wrong_value_is_reported_and_the_page_goes_on(page):
    page.get_by_label("Last step").fill("2")
    page.get_by_role("button", name="Generate").click()
    page.get_by_text("last_step=2.0: must lie between 0 and 1").wait_for()
    assert "Traceback" not in page.content()
    page.get_by_label("Last step").fill("")
    assert len(generate(page)) == 10


def test_stop_stops(page):
    page.get_by_label("Steps").fill("3000")
    stop = page.get_by_role("button", name="Stop")
    assert stop.is_disabled()
    page.get_by_role("button", name="Generate").click()
    page.get_by_text("sampling 10 images").first.wait_for()
    stop.click()
    page.get_by_text("Stopped; nothing of it was kept.").wait_for()
    page.get_by_label("Steps").fill("4")
    assert len(generate(page)) == 10
