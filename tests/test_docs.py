"""What the documents name exists, and the commands that they show run."""

import contextlib
import functools
import io
import itertools
import os
import pkgutil
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import nbformat
import pytest
import yaml
from conftest import ROOT, copy_repository, run, run_inside
from hydra import compose, initialize_config_dir
from nbclient import NotebookClient

import ddt

DOCS = ROOT / "docs"
NOTEBOOK = DOCS / "digits.ipynb"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md")), NOTEBOOK]
# At the end of a line, on the line above it, or as the first line of a block, for all of it: these
# commands are not run by the test.
MARK = r"# (needs|takes) \w"
PLACEHOLDER = r"[A-Z][A-Z_]+\d*\b"  # NAME, PATH, IMAGENET/train: what a reader replaces


def name(page):
    return page.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        assert link.startswith("https://") or (page.parent / link).is_file(), link


@pytest.mark.parametrize("page", [page for page in PAGES if page.suffix == ".md"], ids=name)
def test_prose_is_wrapped_at_100_columns(page):
    """Code, tables, headings and pictures are not, nor a line that is one word."""
    prose = re.sub(r"^\s*```.*?^\s*```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    lines = [line for line in prose.splitlines() if not re.match(r"\s*(\||<|!\[|#)", line)]
    assert [line for line in lines if len(line) > 100 and " " in line.strip()] == []


def test_every_public_name_is_on_the_page_of_python():
    listed = re.findall(r"^::: ddt\.(?:\w+\.)*(\w+)$", (DOCS / "api.md").read_text(), re.MULTILINE)
    assert set(ddt.__all__) - {"__version__"} <= set(listed)


def test_every_image_is_shown():
    text = "".join(page.read_text() for page in PAGES)
    assert [path.name for path in (DOCS / "images").iterdir() if path.name not in text] == []


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_named_files_exist(page):
    """Paths of the repository, but those of an earlier commit (`scripts/x.py` as of commit …)."""
    text = re.sub(r"`[^`]+`\s+as\s+of\s+commit", "", page.read_text())
    paths = re.findall(r"(?<![\w/.-])(?:conf|ddt|scripts|tests)/[\w/.-]*\w", text)
    missing = [path for path in paths if not re.search(PLACEHOLDER, path) and not (ROOT / path).exists()]
    assert missing == []


def test_pages_that_the_code_names_exist():
    files = [
        *ROOT.glob("*.py"),
        *(path for folder in ("conf", "ddt", "scripts") for path in (ROOT / folder).rglob("*")),
    ]
    text = "\n".join(path.read_text() for path in files if path.suffix in {".py", ".sh", ".sbatch", ".yaml"})
    assert [page for page in re.findall(r"docs/\w+\.md", text) if not (ROOT / page).is_file()] == []


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_named_objects_exist(page):
    """Dotted names: `ddt.sample`, `ddt.pipeline.DDTPipeline.from_pretrained`."""
    for dotted in set(re.findall(r"(?<![\w./])ddt(?:\.[A-Za-z]\w*)+", page.read_text())) - {"ddt.json"}:
        pkgutil.resolve_name(dotted)


def test_functions_that_the_pages_name_exist():
    """`file.py`: `function`, `Class.method`, …"""
    names = r"`((?:ddt|scripts)/[\w/]+\.py)`:\s+((?:`[\w.]+`(?:,\s+)?)+)"
    entries = [entry for page in PAGES for entry in re.findall(names, page.read_text())]
    assert len(entries) > 40
    for file, names in entries:
        text = (ROOT / file).read_text()
        for entry in re.findall(r"`([\w.]+)`", names):
            assert re.search(rf"^\s*(def|class) {entry.split('.')[-1]}\b|^{entry}\b", text, re.M), f"{file}: {entry}"


def test_messages_of_the_troubleshooting_page_are_those_of_the_code():
    """Each quoted message, but for what varies (…), stands in the source."""
    files = [*ROOT.glob("*.py"), *(ROOT / "ddt").rglob("*.py"), *(ROOT / "scripts").rglob("*.py")]
    # a text over several lines is joined
    source = re.sub(r'"\s*\n\s*f?"', "", "\n".join(path.read_text() for path in files))
    first = re.findall(r"^\| ([^|]+) \|", (DOCS / "troubleshooting.md").read_text(), re.M)
    messages = [text for cell in first for text in re.findall(r"`([^`]+)`", cell) if "…" in text or " " in text]
    own = [text for text in messages if not text.startswith(("CUDA", "accelerate", "srun python"))]
    assert len(own) > 20
    for message in own:
        for part in message.split("…"):
            assert part.strip(" ()") in source, message


# --- commands


def code_of(notebook):
    return [cell.source for cell in nbformat.read(notebook, as_version=4).cells if cell.cell_type == "code"]


def commands_of(page):
    """Return (command, whether it is marked as one that is not run) of each command of a page's
    bash blocks, or of a notebook, which has a test of its own that runs it.
    """
    if page == NOTEBOOK:
        lines = [line.strip() for source in code_of(NOTEBOOK) for line in source.splitlines()]
        return [(line[1:], True) for line in lines if line.startswith("!")]
    commands = []
    for block in re.findall(r"^```bash\n(.*?)^```", page.read_text(), re.S | re.M):
        lines = block.replace("\\\n", "").splitlines()
        whole = re.match(MARK, block) is not None
        for above, line in zip(["", *lines], lines, strict=False):
            if line.strip() and not line.startswith("#"):
                before, _, comment = line.partition("  #")
                marked = any(re.match(MARK, text) for text in (above, f"#{comment}"))
                commands.append((" ".join(before.split()), whole or marked))
    return commands


COMMANDS = {page: commands_of(page) for page in PAGES}


def script_of(words):
    """Return the file that a command runs and its arguments; None where it is none of ours."""
    for k, word in enumerate(words):
        if word.endswith((".py", ".sh", ".sbatch")):
            return ROOT / word, words[k + 1 :]
        if word == "-m" and words[k + 1].startswith("scripts."):
            module = ROOT / words[k + 1].replace(".", "/")
            return module / "__main__.py" if module.is_dir() else module.with_suffix(".py"), words[k + 2 :]
    return None


def jobs_of(arguments):
    """Return the overrides of each job of a command: of a sweep, one for each combination."""
    overrides = [word for word in arguments if "=" in word and word[0] not in "$-"]
    sweep = "-m" in arguments
    values = [[f"{key}={one}" for one in value.split(",")] if sweep else [f"{key}={value}"]
              for key, _, value in (override.partition("=") for override in overrides)]  # fmt: skip
    return list(itertools.product(*values))


@functools.cache
def composed(script, choices):
    """Return the settings of a command as `--cfg job` shows them, of the chosen files of its
    groups, and its error.
    """
    module, shown = ".".join(script.relative_to(ROOT).with_suffix("").parts), io.StringIO()
    with contextlib.redirect_stdout(shown):
        done = run_inside(module, *choices, "--cfg", "job")
    return (yaml.safe_load(shown.getvalue()), "") if done.returncode == 0 else ({}, done.stderr)


def is_group(key):
    return (ROOT / "conf" / key).is_dir()


def has_setting(settings, key):
    """Tell whether the composed settings have a key such as `trainer.max_steps`."""
    for part in key.split("."):
        if not isinstance(settings, dict) or part not in settings:
            return False
        settings = settings[part]
    return True


def unknown_settings(text):
    """Return what a documented command names that does not exist."""
    found = script_of(shlex.split(text))
    if found is None:
        return []
    script, arguments = found
    if not script.is_file():
        return [script.relative_to(ROOT).as_posix()]
    if script.suffix == ".sbatch":
        script = ROOT / "train.py"
    if script.suffix != ".py" or "ddt.cli" not in script.read_text():
        return []
    unknown = []
    for job in jobs_of(arguments):
        keys = [override.partition("=")[0] for override in job]
        choices = [override for key, override in zip(keys, job, strict=True) if is_group(key)]
        settings, error = composed(script, tuple(sorted(choices)))
        given = [key for key in keys if not is_group(key) and not key.startswith("hydra")]
        unknown += [error] if error else [key for key in given if not has_setting(settings, key)]
    return unknown


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_documented_scripts_settings_and_choices_exist(page):
    unknown = {text: unknown_settings(text) for text, _ in COMMANDS[page]}
    assert {text: names for text, names in unknown.items() if names} == {}


@pytest.mark.slow
def test_trainings_of_the_published_numbers_have_the_block_that_they_align():
    """They need ImageNet and GPUs, so no test runs them; a sweep over the encoder's depth is where
    this goes wrong.
    """
    lines = [shlex.split(text) for text, _ in COMMANDS[DOCS / "imagenet.md"]]
    jobs = [job for words in lines if "train.py" in words for job in jobs_of(words)]
    assert len(jobs) > 10
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        for job in jobs:
            settings = compose("train", overrides=list(job))
            blocks = settings.model.get("encoder_depth", settings.model.depth)
            assert settings.alignment.get("align_depth", 0) <= blocks, job


def test_what_a_reader_must_replace_is_marked():
    """A command with a placeholder cannot be run as it stands."""
    for page in PAGES:
        for text, marked in COMMANDS[page]:
            values = [word.partition("=")[2] for word in shlex.split(text)]
            asks = any(re.match(PLACEHOLDER, value) for value in values)
            assert marked or not asks, f"{name(page)}: {text}: add a comment `# needs …`"


def test_enough_commands_are_run():
    assert len([text for page in PAGES for text, marked in COMMANDS[page] if not marked]) > 40


@pytest.mark.slow
def test_documented_commands_run_in_order(tmp_path):
    """All pages in one copy of the repository, each command as a shell runs it. Installed is `ddt`
    alone: no command finds `scripts` but from the copy.
    """
    copy = copy_repository(tmp_path / "copy")
    installed = tmp_path / "site-packages"
    installed.mkdir()
    (installed / "ddt").symlink_to(copy / "ddt")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    for page in PAGES:
        for text, marked in COMMANDS[page]:
            if not marked:
                done = subprocess.run(
                    ["bash", "-c", text], cwd=copy, env={**os.environ, "PATH": path, "PYTHONPATH": str(installed)},
                    capture_output=True, text=True, timeout=900, check=False,
                )  # fmt: skip
                assert done.returncode == 0, f"{name(page)}: {text}\n{done.stderr[-2000:]}"


# --- the notebook


def test_the_notebook_is_stored_without_outputs_and_clones_the_repository():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.id for cell in code if cell.outputs or cell.execution_count is not None] == []
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert f'REPOSITORY = "{project["urls"].get("Repository", "")}"' in code[0].source
    for name in ("train.py", "sample.py", "evaluate.py"):
        assert any(name in text for text, _ in COMMANDS[NOTEBOOK]), name


@pytest.mark.slow
def test_the_notebook_runs(tmp_path, monkeypatch):
    """From its folder, as Jupyter opens it, with a shorter training and fewer samples."""
    copy = copy_repository(tmp_path / "copy")
    notebook = nbformat.read(copy / "docs" / NOTEBOOK.name, as_version=4)
    for cell in notebook.cells:
        cell.source = cell.source.replace("name=notebook", "name=notebook trainer.max_steps=20")
        cell.source = cell.source.replace("num_samples=1000", "num_samples=100")
    monkeypatch.setenv("PATH", os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    monkeypatch.setenv("PYTHONPATH", str(copy))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    client = NotebookClient(
        notebook, timeout=900, kernel_name="python3", resources={"metadata": {"path": str(copy / "docs")}}
    )
    client.execute()
    outputs = {cell.id: cell.outputs for cell in notebook.cells if cell.cell_type == "code"}
    for name in ("grid", "compare", "python"):
        assert any("image/png" in output.get("data", {}) for output in outputs[name]), name
    assert any("80% saved" in output.get("text", "") for output in outputs["compare"])
    (table,) = outputs["table"]
    assert len(re.findall(r"^\| .* \| 0\.\d{3} \| \d+\.\d \|$", table["data"]["text/markdown"], re.M)) == 3


# --- the site


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("docs") / "site"
    done = run("-m", "mkdocs", "build", "--strict", "--site-dir", folder, NO_MKDOCS_2_WARNING="1")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
def test_search_works_from_the_disk(site, browser):
    page = browser.new_page()
    page.goto(f"file://{site}/index.html")
    page.locator("[data-md-component=search-query]").press_sequentially("autoguidance")
    page.locator(".md-search-result__item").first.wait_for()
    assert "guid" in page.locator(".md-search-result__item").first.inner_text().lower()
    page.close()


@pytest.mark.slow
def test_the_site_builds_without_a_warning(site):
    """Links, anchors, included settings and the pages' place in the navigation: mkdocs.yml."""
    pages = [page.read_text() for page in site.rglob("*.html")]
    assert len(pages) >= len(PAGES) - 1
    assert (site / "method.html").read_text().count("<math ") > 50
    scripts = [
        (page, source)
        for page in site.rglob("*.html")
        if page.name != "404.html"  # which a server may show for any path
        for source in re.findall(r'<script[^>]* src="([^"?]+)', page.read_text())
    ]
    assert len(scripts) > len(pages)
    missing = [source for page, source in scripts if not (page.parent / source).is_file()]
    assert missing == []  # the search's, which reads the index from the disk, too
    for page in pages:  # equations are converted, and nothing is fetched from elsewhere
        assert "arithmatex" not in page
        assert "<code>math" not in page
        assert "--8&lt;--" not in page
        assert not re.search(r'<(script|img)[^>]+src="?https?://|<link[^>]+stylesheet[^>]+href="?https?://', page)
