"""What the documents name exists, and the commands they show run."""

import re
import shlex

import pytest
from conftest import ROOT, copy_repository, run

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# they need a hub, ImageNet or your data, or half an hour
ELSEWHERE = (
    "MCG-NJU", "checkpoints/xl_256", "PATH", "IMAGENET", "CACHE", "FOLDER", "fashion_mnist", "photos",
    "experiment=encoder_depth", "runs/encoder_depth",
    "scripts/app.py",  # serves until it is ended: tests/test_app_browser.py
)  # fmt: skip


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#]+)\)", page.read_text())
    for link in links:
        assert link.startswith("https://") or (page.parent / link).is_file(), link


def test_functions_of_the_method_page_exist():
    entries = re.findall(r"`(ddt/[\w/]+\.py)`: ((?:`[\w.]+`(?:, )?)+)", (ROOT / "docs" / "method.md").read_text())
    assert len(entries) > 15
    for file, names in entries:
        text = (ROOT / file).read_text()
        for name in re.findall(r"`([\w.]+)`", names):
            assert re.search(rf"^\s*(def|class) {name.split('.')[-1]}\b|^{name}\b", text, re.M), f"{file}: {name}"


def documented_commands():
    for page in PAGES:
        for block in re.findall(r"```bash\n(.*?)```", page.read_text(), re.S):
            yield from (line.split("  #")[0].strip() for line in block.splitlines() if line.startswith("python "))


def test_documented_scripts_and_keys_exist():
    commands = list(documented_commands())
    assert len(commands) > 10
    for command in commands:
        assert (ROOT / shlex.split(command)[1]).is_file(), command


@pytest.mark.slow
def test_documented_commands_run_in_order(tmp_path):
    copy = copy_repository(tmp_path / "copy")
    commands = [c for c in documented_commands() if not any(word in c for word in ELSEWHERE)]
    assert len(commands) >= 7
    for command in commands:
        done = run(*shlex.split(command)[1:], cwd=copy, timeout=900, PYTHONPATH=str(copy))
        assert done.returncode == 0, f"{command}\n{done.stderr[-2000:]}"
