"""Every value of every key of every command is taken, or refused in a line: never a traceback, a
hang, or a thing left behind.

Commands are found in the code and their keys in conf/, so a new one is covered by itself; it needs
a line in `VALID`. An accepted command goes as far as `launch`, or as the work named in `WORK`.
"""

import contextlib
import dataclasses
import functools
import importlib
import io
import logging
import os
import random
import re
import shutil
import signal
import sys
import typing
from collections import Counter

import pytest
from accelerate.state import AcceleratorState
from conftest import GOLDEN, ROOT, picture_folder, succeed
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

from ddt.cli import CONF
from ddt.config import locate

pytestmark = pytest.mark.slow
FILES = [*(ROOT / f"{name}.py" for name in ("train", "sample", "evaluate")), *sorted((ROOT / "scripts").rglob("*.py"))]
DECORATOR = re.compile(r'@command\(\s*"(\w+)",\s*settings=(?:f?"([^"]+)"|(\w+))(?:, folder=CONF / "(\w+)")?')
SECONDS = 60  # for one command line, most of which end before any work
NESTED = 8  # changes of a key in a group; which, differs from key to key
LONGEST = 700  # characters of a line without the value it repeats

SMALL = ["model.hidden_size=24", "model.num_heads=2", "model.depth=2", "model.encoder_depth=1"]
PICTURES = ["data=folder", "data.root=pictures", "data.image_size=8", "data.channels=3"]
STUDY = ["ckpt=runs/r", "out=new", "num_steps=2", "reference=data:digits", "features=digits"]
VALID = {  # a short command line, by the name of its config
    "train": ["name=new", *SMALL, "trainer.warmup_steps=0"],
    "sample": ["ckpt=runs/r", "out=new", "num_samples=4", "num_steps=2"],
    "evaluate": ["samples=samples", "reference=data:digits", "features=digits", "out=new"],
    "cache_latents": [*PICTURES, "out=new", "num_workers=0"],
    "plot_run": ["runs=runs/r", "out=new.png"],
    "plot_report": [f"report={ROOT / 'docs/benchmarks/sharing_curve_digits.json'}", "out=new.png"],
    "posthoc_ema": ["run=runs/r", "std=0.07", "out=new"],
    "export": ["ckpt=runs/r", "format=hub", "out=new"],
    "convert_checkpoint": [
        f"released={GOLDEN / 'tiny.weights.safetensors'}", "encoder_depth=3", "resolution=256", "out=new",
    ],
    "reference_statistics": [*PICTURES, "out=new.npz", "features=dinov2"],
    "latent_statistics": [*PICTURES, "autoencoder=rae_mae_b", "out=new.safetensors"],
    "reconstruct": [*PICTURES, "autoencoder=identity", "split=train", "out=new"],
    "compare_metrics": ["metrics=metrics.json", "published={fid:1}"],
    "estimate": ["out=new.json"],
    "train_autoencoder": ["out=new", "steps=1", "batch_size=2", "block_out_channels=[8]", *PICTURES],
    "write_photos": ["out=new", "crops=5", "image_size=8"],
    "export_efficientnet_lite0": ["out=new.safetensors"],
    "app": ["ckpt=runs/r"],
    "benchmark": ["out=new", "model=nano", "parts=[ema]"],
    "kernels": ["out=new", "model=nano"],
    "ranks": ["out=new.json", "model=nano", "ranks=[2]"],
    "gpu_check": ["out=new", "device=cpu", "size=tiny"],
    "sweep": ["sweep=runs", "out=new", "metric=validation_loss", "x=model.depth"],
    "inside": ["ckpt=runs/r", "out=new", "num_steps=2", "loss_images=2", "seeds=0", "classes=0"],
    "sharing": [*STUDY, "budgets=[1]", "repeats=1", "num_samples=4"],
    "sharing_fit": ["ckpt=runs/r", "out=new.json", "budget=1", "num_steps=2"],
    "guidance": [*STUDY, "num_samples=4", "final_samples=4", "top=1"],
}  # fmt: skip
WORK = (  # where a command stops that starts no processes
    "scripts.app.__main__.serve", "scripts.benchmark.run.benchmark", "scripts.benchmark.all_checks.run_checks",
    "scripts.benchmark.traffic.report", "scripts.benchmark.many_ranks.report",
    "scripts.studies.sharing.curve.measure", "scripts.studies.photos.efficientnet_lite0.export",
    "scripts.studies.inside.run.load_generator", "scripts.studies.sharing.schedule.fit_schedule",
    "ddt.training.autoencoder.train_autoencoder",
)  # fmt: skip
NO_NUMBERS = ("x", "''", "[]", "{a:1}", "true", "'ü x'", "nan", "1e-300")
VALUES = (
    *NO_NUMBERS, "null", "-1", "0", "1e30", "1000000000000", "1.5", "[nan]", "[0,0]", "'~/q'", "???", "${nope}",
    "/dev/null/x", "a" * 300,
)  # fmt: skip


class Reached(BaseException):
    """The command was accepted."""


class Late(BaseException):
    """The command took too long."""


@dataclasses.dataclass(frozen=True)
class Found:
    """A command: the module of its `main`, its config, and what `@command` names as its settings, a
    class or a function of that module from the composed config to a class.
    """

    module: str
    folder: str
    config: str
    settings: str

    def compose(self):
        """Return the config of the valid command line."""
        with initialize_config_dir(str(CONF / self.folder), version_base="1.3"):
            return compose(self.config, overrides=VALID[self.config])

    @functools.cached_property
    def settings_class(self):
        """The class of its settings."""
        if "." in self.settings:
            return locate(self.settings)
        return locate(getattr(importlib.import_module(self.module), self.settings)(self.compose()))


def found_commands():
    for path in FILES:
        for config, settings, function, folder in DECORATOR.findall(path.read_text()):
            module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            yield Found(module, folder, config, settings.replace("{__name__}", module) or function)


COMMANDS = {found.config: found for found in found_commands()}


def test_every_command_is_tried():
    texts = [path.read_text() for path in FILES]
    assert len(COMMANDS) == sum(text.count("\n@command(") for text in texts) == len(VALID)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a run, samples, an evaluation and pictures."""
    root = tmp_path_factory.mktemp("place")
    picture_folder(root / "pictures", 8)
    periods = ["trainer.max_steps=4", "trainer.save_every=2", "trainer.validate_every=2", "trainer.preview_every=0"]
    emas = ["trainer.ema_powers=[0.05,0.1]", "trainer.snapshot_every=2", "trainer.global_batch_size=8"]
    (root / "metrics.json").write_text('{"fid": 1.5, "labels": {"fid": "FID"}, "receipt": {}}')
    (root / "home").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        succeed("train", "name=r", *SMALL, *periods, *emas, "trainer.log_every=1", "sampler.num_steps=2")
        succeed("sample", "ckpt=runs/r", "num_samples=8", "num_steps=2", "out=samples")
    return root


@pytest.fixture(autouse=True)
def _limits(place, monkeypatch):
    def reached(*_, **__):
        raise Reached

    def late(*_):
        raise Late

    monkeypatch.chdir(place)
    monkeypatch.setenv("HOME", str(place / "home"))
    monkeypatch.setattr("ddt.distributed.launch.launch", reached)
    for name in WORK:
        monkeypatch.setattr(importlib.import_module(name.rpartition(".")[0]), name.rpartition(".")[2], reached)
    before = signal.signal(signal.SIGALRM, late)
    yield
    signal.signal(signal.SIGALRM, before)


def keys_of(command):
    """The dotted keys of a command's composed config that it reads, inner nodes too; those of
    train.py's groups with train.py alone.
    """
    fields = {field.name for field in dataclasses.fields(command.settings_class)}
    if command.config != "train":
        fields -= {"model", "data", "autoencoder", "alignment", "objective", "optimizer", "sampler", "trainer"} & {
            path.stem for path in CONF.iterdir() if path.is_dir() and not command.folder
        }

    def walk(node, prefix=""):
        for name in node:
            inner = None if OmegaConf.is_missing(node, name) else node._get_node(name)
            yield f"{prefix}{name}"
            if isinstance(inner, DictConfig):
                yield from walk(inner, f"{prefix}{name}.")

    return [key for key in walk(command.compose()) if key.partition(".")[0] in fields]


def outcome(command, arguments):
    """Call a command; return "taken", its refusal, or what is wrong, and what it left behind."""
    before, said = set(os.listdir(".")), io.StringIO()
    signal.alarm(SECONDS)
    try:
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            patch.setattr(sys, "argv", [command.module, *arguments])
            importlib.import_module(command.module).main()
        result = "taken"
    except Reached:
        result = "taken"
    except Late:
        result = "WRONG: hangs"
    except SystemExit as exit_:
        result = exit_.code if isinstance(exit_.code, str) else f"WRONG: exit status {exit_.code}"
    except BaseException as error:
        result = f"WRONG: {type(error).__name__}: {error}"
    finally:
        signal.alarm(0)
        AcceleratorState._reset_state(reset_partial_state=True)
        GlobalHydra.instance().clear()
        logging.getLogger().handlers.clear()
        left = (set(os.listdir(".")) - before) | ({"runs/new"} & {f"runs/{name}" for name in os.listdir("runs")})
        for name in left:
            shutil.rmtree(name) if os.path.isdir(name) else os.unlink(name)
    return result, left


def takes_numbers_alone(command, key):
    """Whether a top-level key is a number in the command's dataclass."""
    hints = typing.get_type_hints(command.settings_class)
    parts = set(typing.get_args(hints.get(key)) or (hints.get(key),)) - {type(None)}
    return bool(parts) and parts <= {int, float}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_value_of_every_key_is_taken_or_refused_in_a_line(name):
    command, valid = COMMANDS[name], VALID[name]
    assert outcome(command, valid)[0] == "taken"
    tried, problems = Counter(), []
    for key in keys_of(command):
        changes = [*(f"{key}={value}" for value in VALUES), f"~{key}", f"+{key}=1", f"++{key}.x=1", f"{key}.x=1"]
        for change in random.Random(key).sample(changes, NESTED) if "." in key else changes:
            kept = [argument for argument in valid if argument.partition("=")[0] != key or change[0] in "+~"]
            result, left = outcome(command, [*kept, change])
            value = change.partition("=")[2]
            tried["taken" if result == "taken" else "refused"] += 1
            if result == "taken":
                wrong = value in NO_NUMBERS and takes_numbers_alone(command, key) and "accepted"
            elif result.startswith("WRONG"):
                wrong = result
            else:
                plain = result.replace(value.strip("'"), "")
                shapeless = "Traceback" in plain or len(plain) > LONGEST or plain.count("\n") > 2
                begun = "NaN or infinite" in result  # found by the work itself, which may be resumed
                wrong = (shapeless and f"unreadable: {result}") or (left and not begun and f"leaves {left}")
            if wrong:
                problems.append(f"{change[:80]}: {wrong[:300]}")
    print(name, dict(tried))
    assert not problems, "\n".join(problems)
