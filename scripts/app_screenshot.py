"""Take the picture of the app that stands in the README: start it, draw with sharing beside without, in Chromium.

python scripts/app_screenshot.py [ckpt=RUN_OR_CHECKPOINT] out=docs/images/app.png
Needs Chromium (apt-get install chromium) and Python's playwright, of the extra `dev`.
"""

import contextlib
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from omegaconf import DictConfig

from ddt.errors import UserError, require
from scripts.entry import ROOT, arguments_for, checked, entry_point

log = logging.getLogger(__name__)
SIZE = {"width": 1280, "height": 900}
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip


@contextlib.contextmanager
def served(port: int, *arguments: str) -> Iterator[str]:
    """Run the app as a user does, and end it; yield its address once it answers. Raises UserError with what it says."""
    command = [sys.executable, str(ROOT / "scripts" / "app.py"), f"port={port}", *arguments]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as app:
        assert app.stderr is not None
        try:
            said = []
            for line in app.stderr:
                said.append(line)
                if line.startswith("open http"):
                    break
            require("open http" in said[-1] if said else False, "".join(said).strip())
            yield f"http://127.0.0.1:{port}"
        finally:
            app.terminate()
            app.communicate()  # what it still says, so that it is not held up


@contextlib.contextmanager
def chromium(browser: str) -> Iterator[Any]:
    """Yield a page of playwright's in a headless Chromium; raise UserError where there is none."""
    require(Path(browser).is_file(), f"browser={browser}: no such file; apt-get install chromium, or give another")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError as error:
        raise UserError("scripts/app_screenshot.py: needs playwright; pip install -e '.[dev]'") from error
    with sync_playwright() as playwright, playwright.chromium.launch(executable_path=browser, args=FLAGS) as running:
        yield running.new_page(viewport=SIZE, color_scheme="light")


def take(ckpt: str | None, out: str, port: int, browser: str) -> None:
    """Draw ten digits by a fitted schedule beside the same without sharing, and write the picture of the page."""
    require(Path(out).suffix == ".png", f"out={out}: give a .png file")
    chosen = [] if ckpt is None else [f"ckpt={ckpt}"]
    with served(port, *chosen) as address, chromium(browser) as page:
        page.goto(address, wait_until="networkidle")  # loading it would take from what is timed
        page.get_by_label("fitted to the model").check()
        page.get_by_label("a line").check()
        page.get_by_label("Side by side with sharing off").check()
        page.get_by_role("button", name="Generate").click()
        page.get_by_role("heading", name="Without sharing").wait_for(timeout=600_000)
        page.wait_for_function("[...document.images].every(image => image.complete)")
        page.wait_for_timeout(1000)  # what fades in has faded in
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        page.screenshot(path=out, full_page=True)
    log.info("%s", out)


@entry_point("app_screenshot")
def main(cfg: DictConfig) -> None:
    """Check, draw, take."""
    take(**arguments_for(take, checked(cfg)))


if __name__ == "__main__":
    main()
