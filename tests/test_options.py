"""What is said of the settings: `--help`, docs/options.md and completion know all of them, and explain each."""

import importlib
import shlex
import subprocess
import sys

import pytest
import yaml
from conftest import ROOT, run

import scripts.entry
from scripts.complete import candidates
from scripts.document_options import PAGE, page
from scripts.options import CONF, Setting, command, commands, help_text, inherited, read

COMMANDS = commands()


def test_every_primary_config_has_a_command():
    def is_primary(path):
        return path.parent.name in ("conf", "sample", "study", "export") and path.stem not in ("encoder_depth",)

    primaries = {p.stem for p in CONF.rglob("*.yaml") if is_primary(p)}
    assert {found.script.stem for found in COMMANDS} == primaries


@pytest.mark.parametrize("found", COMMANDS, ids=lambda found: found.name)
def test_help_names_every_setting_and_starts_nothing(found, monkeypatch, capsys):
    monkeypatch.setattr(scripts.entry, "run_job", lambda *_: pytest.fail("the job was started"))
    monkeypatch.setattr(sys, "argv", [found.name, "--help"])
    monkeypatch.setenv("COLUMNS", "100")
    importlib.import_module(".".join(found.script.relative_to(ROOT).with_suffix("").parts)).main()
    said = capsys.readouterr().out
    for key in [*found.settings, *found.groups]:
        assert f"  {key}=" in said
    for key in yaml.safe_load(primary_of(found).read_text()):
        assert key in ("defaults", "hydra") or f"  {key}=" in said
    indented = [line for line in said.splitlines() if line.startswith("  ") and " " in line.strip()]
    assert max(map(len, indented)) <= 100


def primary_of(found):
    (path,) = (
        p for p in CONF.rglob(f"{found.script.stem}.yaml") if p.parent.name in ("conf", "sample", "study", "export")
    )
    return path


def test_help_shows_what_the_default_data_set_chooses(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    text = help_text(command(ROOT / "train.py"))
    assert "trainer.max_steps=700" in text
    assert "xl_22en6de" in text
    assert max(map(len, text.splitlines()[1:])) <= 80


def test_a_script_shows_what_it_uses_of_the_configuration_of_training():
    found = command(ROOT / "scripts" / "cache_latents.py")
    assert set(found.groups) == {"data", "autoencoder", "alignment"}
    assert "out" in found.settings
    assert "init_from" not in found.settings
    assert "trainer" not in help_text(found)


def test_every_setting_is_explained():
    """Add a comment beside the setting in its file of conf/: units, and what null means."""
    groups = {group.folder: group for found in COMMANDS for group in found.groups.values() if not group.is_preset}
    missing = [f"{found.name}: {key}" for found in COMMANDS for key, s in found.settings.items() if not s.comment]
    for group in groups.values():
        for name, choice in group.choices.items():
            missing += [
                f"{group.name}={name}: {key}" for key, setting in choice.settings.items() if not setting.comment
            ]
            missing += [] if choice.head else [f"{group.name}={name}: a line at the head of the file"]
    assert not missing


def test_the_page_of_options_is_up_to_date():
    assert PAGE.read_text() == page(), "write it anew: python scripts/document_options.py"


def test_settings_are_read_with_their_comments(tmp_path):
    file = tmp_path / "file.yaml"
    file.write_text(
        "# what it is\ndefaults: [a]\nkey: 1_000 # it's # one\nnested:\n  inner: [1, '# no']\n"
        "last: '#' # yes\nhydra: {a: 1}\n"
    )
    expected = {"key": ("1_000", "it's # one"), "nested.inner": ("[1, '# no']", ""), "last": ("'#'", "yes")}
    assert read(file).settings == {key: Setting(*found) for key, found in expected.items()}
    assert inherited({"key": Setting("1", "old")}, {"key": Setting("2", "")}) == {"key": Setting("2", "old")}


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("python train.py model=x", ["model=xl_22en6de"]),
        ("python train.py trainer.max_s", ["trainer.max_steps="]),
        ("python train.py data.", []),
        ("python train.py data=folder data.r", ["data.root="]),
        ("python train.py model.adaln_init=", ["model.adaln_init=release", "model.adaln_init=zero"]),
        ("python sample.py experiment=", ["experiment=published_xl_256", "experiment=published_xl_512"]),
        ("python sample.py ckpt=scripts/sl", ["ckpt=scripts/slurm/"]),
        ("python scripts/cache_latents.py mod", []),
        ("sbatch scripts/slurm/train.sbatch init", ["init_from="]),
        ("python other.py mod", []),
    ],
)
def test_completion(line, expected, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert candidates(line) == expected


def test_completion_imports_nothing_heavy():
    code = "import sys; import scripts.complete; print({'torch', 'hydra', 'omegaconf', 'ddt'} & set(sys.modules))"
    done = run("-c", code)
    assert done.stdout.strip() == "set()", done.stderr


def test_bash_completes_a_word_after_the_equals_sign():
    """As readline calls it: the word begins after the last "="."""
    installed = run("scripts/complete.py").stdout
    line = "python train.py model=x"
    asked = f"COMP_WORDBREAKS='=' COMP_LINE={shlex.quote(line)} COMP_POINT={len(line)}"
    script = f'{installed}\n{asked}; _ddt_complete; echo "${{COMPREPLY[@]}}"'
    done = subprocess.run(["bash", "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout.strip(), done.stderr) == ("xl_22en6de", "")
