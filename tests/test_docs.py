"""What the documents name exists, and the commands they show run."""

import itertools
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, copy_repository, run
from test_config import config

from ddt.config import build
from ddt.objective.alignment import check_depth
from scripts.options import command
from train import num_aligned_blocks

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
MARK = (
    r"# (needs|takes) \w"  # at the end of a line, or as the first line of a block: the command is not run by the test
)
PLACEHOLDER = r"[A-Z_]{2,}"  # NAME, PATH, IMAGENET/train: what a reader puts in


def name(page):
    return page.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#]+)\)", page.read_text())
    for link in links:
        assert link.startswith("https://") or (page.parent / link).is_file(), link


def test_functions_that_the_pages_name_exist():
    names = r"`((?:ddt|scripts)/[\w/]+\.py)`:\s+((?:`[\w.]+`(?:,\s+)?)+)"
    entries = [entry for page in PAGES for entry in re.findall(names, page.read_text())]
    assert len(entries) > 50
    for file, names in entries:
        text = (ROOT / file).read_text()
        for entry in re.findall(r"`([\w.]+)`", names):
            assert re.search(rf"^\s*(def|class) {entry.split('.')[-1]}\b|^{entry}\b", text, re.M), f"{file}: {entry}"


def test_messages_of_the_troubleshooting_page_are_those_of_the_code():
    """Each quoted message, but for what varies (…), stands in the source."""
    files = [*ROOT.glob("*.py"), *(ROOT / "ddt").rglob("*.py"), *(ROOT / "scripts").glob("*.py")]
    source = re.sub(r'"\s*\n\s*f?"', "", "\n".join(path.read_text() for path in files))  # a text over several lines
    first = re.findall(r"^\| ([^|]+) \|", (ROOT / "docs" / "troubleshooting.md").read_text(), re.M)
    messages = [text for cell in first for text in re.findall(r"`([^`]+)`", cell) if "…" in text or " " in text]
    own = [text for text in messages if not text.startswith(("CUDA", "accelerate", "srun python"))]
    assert len(own) > 20
    for message in own:
        for part in message.split("…"):
            assert part.strip(" ()") in source, message


def commands_of(page):
    """Return (command, whether it is marked as one that is not run) of each line of a page's bash
    blocks.
    """
    found = []
    for block in re.findall(r"^```bash\n(.*?)^```", page.read_text(), re.S | re.M):
        whole = re.match(MARK, block) is not None
        for line in block.replace("\\\n", " ").splitlines():
            if line.strip() and not line.startswith("#"):
                before, _, comment = line.partition("  #")
                found.append((before.strip(), whole or re.match(MARK, f"#{comment}") is not None))
    return found


def words_of(text):
    """Return the words of a command; those before a script, such as `torchrun --standalone`, are
    none of it.
    """
    return shlex.split(text)


def script_of(words):
    for word in words:
        if word.endswith((".py", ".sh", ".sbatch")):
            return ROOT / word
    return None


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_documented_scripts_settings_and_choices_exist(page):
    for text, _ in commands_of(page):
        words = words_of(text)
        script = script_of(words)
        if script is None:
            continue
        assert script.is_file(), text
        found = command(ROOT / "train.py" if script.suffix == ".sbatch" else script)
        if found is None:
            continue
        given = [word.split("=", 1) for word in words[words.index(name(script)) + 1 :] if "=" in word]
        chosen = found.with_arguments({key: value for key, value in given if key in found.groups})
        known = {*found.settings, *found.groups}
        for group in found.groups:
            known |= set(found.settings_of(group, chosen))
        for key, value in given:
            assert key in known or key.startswith(("hydra.", "hydra/")), f"{text}: no setting {key}"
            if key in found.groups and not re.search(PLACEHOLDER, value):
                assert set(value.split(",")) <= set(found.groups[key].choices), f"{text}: no such {key}"


def jobs_of(words):
    """Return the overrides of each job of a train.py command, one for each combination of a sweep's
    values.
    """
    sweep = "-m" in words
    overrides = [word for word in words if "=" in word]
    values = [[f"{key}={one}" for one in value.split(",")] if sweep else [f"{key}={value}"]
              for key, _, value in (override.partition("=") for override in overrides)]  # fmt: skip
    return itertools.product(*values)


def test_trainings_of_the_published_numbers_have_the_block_that_they_align():
    """They need ImageNet and GPUs, so no test runs them; a sweep over the encoder's depth is where
    this goes wrong.
    """
    lines = [shlex.split(text) for text, _ in commands_of(ROOT / "docs" / "reproduce.md")]
    jobs = [job for words in lines if "train.py" in words for job in jobs_of(words)]
    assert len(jobs) > 10
    for job in jobs:
        settings = config(*job)
        with torch.device("meta"):
            network = build(settings["model"])(in_channels=4, num_classes=1000)
        alignment = build(settings["alignment"])
        if alignment is not None:
            check_depth(alignment.align_depth, num_aligned_blocks(network))


def test_what_a_reader_must_put_in_is_marked():
    """A command with a placeholder cannot be run as it stands."""
    for page in PAGES:
        for text, marked in commands_of(page):
            values = [word.partition("=")[2] for word in words_of(text)]
            asks = any(re.match(PLACEHOLDER, value) for value in values) and not re.search(r"=(NAME|FOLDER)\b", text)
            assert marked or not asks, f"{name(page)}: {text}: add a comment `# needs …`"


def test_enough_commands_are_run():
    run_by_test = [text for page in PAGES for text, marked in commands_of(page) if not marked]
    assert len(run_by_test) > 40


def test_the_site_builds_without_a_warning(tmp_path):
    """Links, anchors and the pages' place in the navigation: validation in mkdocs.yml."""
    done = run("-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path / "site", NO_MKDOCS_2_WARNING="1")
    assert done.returncode == 0, done.stderr
    pages = [page.read_text() for page in (tmp_path / "site").rglob("*.html")]
    assert len(pages) >= len(PAGES) - 1
    equations = (tmp_path / "site" / "method.html").read_text()
    assert equations.count('<svg class="equation"') > 50
    for page in pages:  # equations are drawn, and nothing is fetched from elsewhere
        assert "arithmatex" not in page
        assert "<code>math" not in page
        assert not re.search(r'<(script|img)[^>]+src="?https?://|<link[^>]+stylesheet[^>]+href="?https?://', page)


@pytest.mark.slow
def test_documented_commands_run_in_order(tmp_path):
    """All pages in one copy of the repository, each command as a shell runs it."""
    copy = copy_repository(tmp_path / "copy")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    for page in PAGES:
        for text, marked in commands_of(page):
            if not marked:
                done = subprocess.run(
                    ["bash", "-c", text], cwd=copy, env={**os.environ, "PATH": path, "PYTHONPATH": str(copy)},
                    capture_output=True, text=True, timeout=900, check=False,
                )  # fmt: skip
                assert done.returncode == 0, f"{name(page)}: {text}\n{done.stderr[-2000:]}"
