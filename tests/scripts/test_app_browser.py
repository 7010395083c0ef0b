"""The app as a user meets it: in a browser, from the first look to the downloaded file."""

import io
import re
import socket
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
from conftest import small_ddt
from test_app import write_run

from scripts.app_screenshot import chromium, served

BROWSER = "/usr/bin/chromium"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    folder = write_run(tmp_path_factory.mktemp("browser") / "run", small_ddt(in_channels=1), encoder_depth=2)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with served(port, f"ckpt={folder}", "max_images=12", "max_steps=3000") as address:
        yield address


@pytest.fixture
def page(address):
    """The opened page; at the end, nothing was asked of another host, and nothing failed in the
    browser.
    """
    assert Path(BROWSER).is_file(), f"no {BROWSER}: apt-get install chromium"
    hosts, errors = set(), []
    with chromium(BROWSER) as page:
        page.on("request", lambda request: hosts.add(urlsplit(request.url).netloc))
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(address)
        page.get_by_role("button", name="Generate").wait_for()
        yield page
        page.wait_for_timeout(300)
    assert hosts - {""} == {urlsplit(address).netloc}
    assert errors == []


def generate(page):
    page.get_by_role("button", name="Generate").click()
    page.wait_for_function("document.querySelectorAll('.pictures img').length > 0")
    page.get_by_role("button", name="Generate", disabled=False).wait_for()
    page.wait_for_function("[...document.querySelectorAll('.pictures img')].every(image => image.naturalWidth >= 128)")
    return page.locator(".pictures img").evaluate_all("images => images.map(image => image.alt)")


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


def test_a_user_chooses_by_name_draws_and_downloads(page):
    choose(page, "egyptian", "bee")
    page.get_by_label("Steps").fill("5")
    assert generate(page) == [f"{name}, seed {seed}" for seed in (0, 1) for name in ("Egyptian cat", "bee")]
    assert "classes=[4,1]" in command(page)
    assert "num_steps=5" in command(page)
    assert page.locator(".tile").count() == 3
    assert re.search(r"Time\s*\d+\.\d\d s", page.locator(".tiles").inner_text(), re.I)
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
    names = generate(page)
    assert len(names) == 2 * 10
    assert page.get_by_role("heading", name="Without sharing").is_visible()
    assert page.locator(".strip rect").count() == 6
    assert page.locator(".strip rect.run").count() == 2
    assert "60% of 10 saved" in page.locator(".tiles").inner_text()
    page.get_by_label("off", exact=True).check()
    beside.wait_for(state="hidden")
    page.get_by_label("Guide only between two times").uncheck()
    page.get_by_label("From t").wait_for(state="hidden")
    page.get_by_role("button", name="Generate").click()
    page.get_by_role("heading", name="Without sharing").wait_for(state="hidden")
    assert page.locator(".strip").count() == 0


def test_a_wrong_value_is_told_and_the_page_goes_on(page):
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
    page.get_by_text("drawing 10 pictures").first.wait_for()
    stop.click()
    page.get_by_text("Stopped; nothing of it was kept.").wait_for()
    page.get_by_label("Steps").fill("4")
    assert len(generate(page)) == 10
