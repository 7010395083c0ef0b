"""Commands: a mistake is one line, each job of a sweep is a process, signals reach it."""

import hashlib
import os
import re
import signal
import sys
import textwrap
import threading
import time

import pytest
import torch
from conftest import refusal, run, thinned, train_settings
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf

from ddt.cli import CONF, LAUNCHER, PATHS, check_launcher, expand_paths, is_echo, mistake, quoted_path, wait_for
from ddt.config import flat
from ddt.errors import STOPPED_STATUS, UserError

SCRIPT = """
import dataclasses, os, sys
from pathlib import Path
from ddt.cli import command
from ddt.errors import Stopped, UserError

@dataclasses.dataclass(frozen=True)
class Settings:
    name: str
    seed: int
    rate: float | None
    text: str

def outcome(run_dir):
    return float(len(str(run_dir)))

@command("conf", settings="script.Settings", folder=Path(__file__).parent / "conf", outcome=outcome)
def main(settings):
    "Do what the seed says."
    with open("started", "a") as file:
        file.write(f"{settings.name} {settings.seed}\\n")
    outcomes = {
        0: UserError("key: wrong; right it"),
        1: FloatingPointError("the loss is NaN"),
        2: OSError(28, "No space left on device", "runs/x"),
        3: RuntimeError("unexpected"),
        5: Stopped("stopped at step 3; the same command resumes from there"),
    }
    if settings.seed in outcomes:
        raise outcomes[settings.seed]

if __name__ == "__main__":
    main()
"""
SCRIPT_CONF = """
name: sweep
seed: 9
rate: null
text: none
unused: 1
hydra:
  sweep: { dir: "runs/${name}", subdir: . }
"""


@pytest.fixture
def script(tmp_path):
    (tmp_path / "script.py").write_text(textwrap.dedent(SCRIPT))
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "conf.yaml").write_text(SCRIPT_CONF)

    def call(*arguments, **environment):
        return run(tmp_path / "script.py", *arguments, cwd=tmp_path, **environment)

    call.started = lambda: (tmp_path / "started").read_text().splitlines()
    return call


@pytest.fixture
def refused(script, tmp_path, monkeypatch):
    """Call the script in this process; return what it ends with."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield lambda *arguments: refusal("script", *arguments)
    del sys.modules["script"]  # another test writes its own


def test_failed_jobs_are_named_and_the_others_run(script):
    done = script("-m", "seed=0,1,2,3,4", "rate=1")
    assert done.returncode == 1
    assert script.started() == [f"sweep/rate=1,seed={seed} {seed}" for seed in range(5)]
    lines = done.stderr.splitlines()
    assert lines[-5:] == [
        "4 of 5 jobs failed:",
        *(f"seed={seed} rate=1: exit status 1, see above" for seed in range(4)),
    ]
    expected = ["key: wrong; right it", "the loss is NaN"]
    expected += ["runs/x: No space left on device; check the path and the disk", "RuntimeError: unexpected"]
    assert all(line in lines for line in expected)
    assert done.stderr.count("Traceback") == 1  # of the unexpected error alone


@pytest.mark.parametrize(
    ("arguments", "jobs", "folder"),
    thinned(
        [
            (["-m", "seed=6,6"], ("seed=6", "seed=6"), "digits_nano/seed=6"),
            (["seed=6", "-m", "trainer.micro_batch_size=4,8"], None, "digits_nano/seed=6"),
            (["-m", "name=x,y", "seed=6", "trainer.num_workers=1,2"], None, "x/seed=6"),
            (["-m", "data=folder", "data.root=a/b,c/b"], None, "folder_b_nano/data=folder"),
            (["-m", "experiment=fashion_mnist,photos", "name=x", "seed=1"], None, "x/seed=1"),
        ],
        2,
    ),
)
def test_jobs_of_one_folder_are_refused_before_the_first(tmp_path, monkeypatch, arguments, jobs, folder):
    monkeypatch.chdir(tmp_path)
    key, _, values = next(reversed([a for a in arguments if "," in a])).partition("=")
    first, second = jobs or (f"{key}={value}" for value in values.split(","))
    line = f"-m: the jobs {first} and {second} would both be runs/{folder}; start them one by one, each with a name= of"
    assert refusal("train", *arguments).startswith(line)
    assert not list(tmp_path.iterdir())


def test_a_split_is_named_after_its_folder_too(tmp_path):
    for path, name in (("A/train", "A_train"), ("B/train", "B_train"), ("B/Val", "B_Val"), ("cats", "cats")):
        assert train_settings("data=folder", f"data.root={tmp_path / path}").name == f"folder_{name}_nano"


@pytest.mark.slow
def test_a_long_name_of_a_job_is_hashed_and_its_overrides_are_written(script, tmp_path):
    texts = ["a" * 200, "uniform:5"]  # too long, and a character of no name
    given = ["a" * 200, r"uniform\:5"]  # as Hydra writes it
    expected = [hashlib.sha256(f"seed=7,text={text}".encode()).hexdigest()[:16] for text in given]
    for name in expected:
        (tmp_path / "runs" / "sweep" / name).mkdir(parents=True)  # as training does
    done = script("-m", "seed=7", f"text={','.join(texts)}")
    assert done.returncode == 0, done.stderr
    assert script.started() == [f"sweep/{name} 7" for name in expected]
    written = [(tmp_path / "runs" / "sweep" / name / "overrides.txt").read_text() for name in expected]
    assert written == [f"seed=7\ntext={text}\n" for text in given]


SWEEPER = """
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper

class Fake(Sweeper):
    def __init__(self, **_):
        pass

    def setup(self, **context):
        self.launcher = Plugins.instance().instantiate_launcher(**context)

    def sweep(self, arguments):
        (job,) = self.launcher.launch([["seed=6"]], 0)
        print("found", job.return_value)
"""


@pytest.mark.slow
def test_a_sweeper_that_chooses_by_results_gets_them(script, tmp_path):
    (tmp_path / "hydra_plugins" / "fake").mkdir(parents=True)
    (tmp_path / "hydra_plugins" / "fake" / "__init__.py").write_text(SWEEPER)
    folders = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    done = script("-m", "hydra.sweeper._target_=hydra_plugins.fake.Fake", PYTHONPATH=folders)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "found 17.0"  # characters of runs/sweep/seed=6


@pytest.mark.slow
def test_a_sweep_ends_with_what_its_jobs_measured_and_the_command_of_its_report(script):
    done = script("-m", "seed=6,17")
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stderr.splitlines()[-5:]]
    assert lines[2:4] == [
        ["|", "seed=6", "|", "17", "|"],
        ["|", "seed=17", "|", "18", "|"],
    ]  # characters of the folders
    assert done.stderr.endswith("python -m scripts.studies.sweep sweep=runs/sweep out=runs/sweep_report\n")


@pytest.mark.slow
def test_a_job_that_stops_on_request_ends_the_sweep(script):
    done = script("-m", "seed=4,5,6")
    assert done.returncode == STOPPED_STATUS
    assert script.started() == ["sweep/seed=4 4", "sweep/seed=5 5"]
    assert done.stderr.splitlines()[-1] == "stopped at step 3; the same command resumes from there"
    assert script("seed=5").returncode == STOPPED_STATUS


def test_a_sweep_under_a_launcher_is_refused_once(refused, monkeypatch):
    for key, value in {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(key, value)
    for rank, said in (("0", "-m: a sweep starts its own processes"), ("1", "1")):  # the status alone
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", rank)
        assert refused("-m", "seed=6,7").startswith(said)


@pytest.mark.parametrize(
    ("arguments", "line"),
    thinned(
        [
            (["seed=x"], "seed=x: give a whole number"),
            (["seed=true"], "seed=true: give a number"),
            (["sead=1"], "sead: no such setting; did you mean seed?"),
            (["+sead=1"], "sead: no such setting; did you mean seed?"),
            (["unused=2"], "unused: has no effect here; choose from name, seed, rate, text"),
            (["seed.x=1"], "seed.x: no such setting"),
            (["seed={_target_:os.getcwd}"], "seed._target_: cannot be set; choose a whole file of the group, seed=…"),
            (["seed=${nope}"], "Hydra: Interpolation key 'nope' not found full_key: seed object_type=dict"),
            (["~seed"], "~seed: a setting cannot be removed; leave it out for its default"),
            (["seed=???"], "seed: not set; give seed=…"),
            (["rate=x", "seed=y"], "seed=y: give a whole number\nrate=x: give a number or null"),
        ],
        2,
    ),
)
def test_a_mistake_ends_with_its_lines(refused, capsys, arguments, line):
    assert sorted(refused(*arguments).splitlines()) == sorted(line.splitlines())
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("environment", "line"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE: set in the environment without RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT"),
        ({"LOCAL_RANK": "0"}, "LOCAL_RANK: set in the environment without RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT"),
        ({"RANK": "0", "WORLD_SIZE": "x"}, "RANK, WORLD_SIZE: set in the environment without LOCAL_RANK, MASTER_ADDR"),
        (dict.fromkeys(LAUNCHER, "x"), "RANK=x: is no number; unset it"),
    ],
)
def test_a_part_of_a_launchers_environment_is_refused(tmp_path, monkeypatch, environment, line):
    monkeypatch.chdir(tmp_path)
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(UserError, match=re.escape(line)):
        check_launcher()
    if environment.get("LOCAL_RANK") in (None, "0"):
        assert refusal("sample", "ckpt=x").startswith(line)
    assert not list(tmp_path.iterdir())


def test_a_launchers_processes_print_a_message_once(monkeypatch):
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    for key, value in {**address, "LOCAL_RANK": "1", "TORCHELASTIC_USE_AGENT_STORE": "True"}.items():
        monkeypatch.setenv(key, value)
    assert [is_echo(message) for message in ("wrong", "wrong", "other")] == [False, True, False]
    monkeypatch.setenv("GROUP_RANK", "1")  # another machine, whose log is read by itself
    assert not is_echo("wrong")


def test_paths_begin_at_home_and_are_never_empty(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert expand_paths("~/runs/x", "ckpt") == "/home/me/runs/x"
    assert expand_paths(["~/a", "b"], "runs") == ["/home/me/a", "b"]
    assert expand_paths({"root": "~/imgs", "split": "~"}, "data") == {"root": "/home/me/imgs", "split": "~"}
    assert expand_paths(None, "out") is None
    for value, message in (
        ("", "out: not set; give out=…"),
        (" ", "out: not set"),
        ("~nobody-here/x", "out=~nobody-here/x: there is no such home"),
    ):
        with pytest.raises(UserError, match=message):
            expand_paths(value, "out")


def test_every_path_of_a_command_is_known_as_one():
    names = ("root", "source", "source_root", "data_root", "weights", "out", "ckpt", "reference", "init_from", "guide")
    paths = {line for name in names for line in PATHS if line.rpartition(".")[2] == name}
    keys = set()
    for path in CONF.rglob("*.yaml"):
        content = flat(OmegaConf.to_container(OmegaConf.load(path), resolve=False))
        group = "" if path.parent.name in ("conf", "sample", "study", "export") else f"{path.parent.name}."
        keys |= {group + key.removeprefix(group) for key in content if key.rpartition(".")[2] in names}
    assert {key for key in keys if key.partition(".")[0] not in ("hydra", "experiment")} - {"weights"} <= paths


def test_help_says_what_the_command_does_and_where_its_settings_are(script):
    done = script("--help")
    assert done.stdout.startswith("Do what the seed says. Every setting with its comment: conf/conf.yaml")
    assert "seed: 9" in done.stdout


@pytest.mark.parametrize("value", ["a b", r"a\b c", 'say "x"', r"a\"b", "ends with \\", r"C:\x y", "ü"])
def test_paths_come_through_as_they_are(value):
    (override,) = OverridesParser.create().parse_overrides([quoted_path(f"out={value}")])
    assert override.value() == value


def test_paths_of_a_sweep_are_quoted_one_by_one():
    parser = OverridesParser.create()
    (override,) = parser.parse_overrides([quoted_path("data.root=~/a b,plain/x,~c", is_sweep=True)])
    assert [getattr(value, "text", value) for value in override.sweep_iterator()] == ["~/a b", "plain/x", "~c"]


def test_a_launcher_without_its_package_is_one_line():
    error = HydraException("No module named 'submitit'")
    error.__cause__ = ModuleNotFoundError(name="submitit")
    assert mistake(error, [], CONF, "train") == "hydra: needs the package submitit; run pip install -e '.[slurm]'"


@pytest.mark.parametrize("name", ["sample", "evaluate"])
def test_only_training_sweeps(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    assert refusal(name, "-m", "ckpt=a,b").startswith("-m: only train.py sweeps")
    for mode in ("hydra.mode=MULTIRUN", "+hydra.mode=RUN"):
        assert refusal(name, mode) == "hydra.mode: has no effect here; give -m for a sweep, nothing for a run"
    assert not list(tmp_path.iterdir())


# --- signals of a job: from Slurm; submitit announces the time limit by SIGUSR2

CHILD = """
import signal, sys, time
from pathlib import Path
def stop(number, frame):
    Path("got").write_text(signal.Signals(number).name)
    sys.exit(int(sys.argv[1]))
signal.signal(signal.SIGUSR1, stop)
signal.signal(signal.SIGTERM, stop)
Path("ready").touch()
time.sleep(60)
"""


def send_when_ready(folder, number):
    def send():
        while not (folder / "ready").exists():
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    threading.Thread(target=send, daemon=True).start()


@pytest.mark.parametrize(
    ("number", "status", "received", "requeued"),
    [
        (signal.SIGUSR2, STOPPED_STATUS, "SIGUSR1", True),
        (signal.SIGUSR2, 1, "SIGUSR1", False),
        (signal.SIGTERM, STOPPED_STATUS, "SIGTERM", False),
        (signal.SIGUSR1, STOPPED_STATUS, "SIGUSR1", False),
    ],
)
def test_a_signal_reaches_the_job_and_submitit_requeues_what_has_saved(
    tmp_path, monkeypatch, number, status, received, requeued
):
    monkeypatch.chdir(tmp_path)
    queued = []
    before = signal.signal(signal.SIGUSR2, lambda *_: queued.append(True))
    try:
        send_when_ready(tmp_path, number)
        assert wait_for([sys.executable, "-c", CHILD, str(status)]) == status
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert (tmp_path / "got").read_text() == received
    assert bool(queued) == requeued
