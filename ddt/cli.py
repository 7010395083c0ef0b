"""Commands: Hydra composes the settings, a mistake ends with one line, each job of a sweep is a
process of its own.

The only module that imports Hydra. Nothing here imports torch, so that `--help` and `--cfg job`
answer at once.
"""

import datetime
import hashlib
import inspect
import itertools
import logging
import os
import re
import shlex
import signal
import subprocess
import sys
import typing
from collections.abc import Callable, Iterable
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import hydra
from hydra._internal.hydra import Hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.singleton import Singleton
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ddt.config import (
    CONF,
    Choice,
    check_choice,
    convert,
    did_you_mean,
    flat,
    group_values,
    locate,
    missing_package,
    parse,
    parsed,
)
from ddt.errors import STOPPED_STATUS, Stopped, UserError, first_line, os_error_line, require
from ddt.files import is_run_name, write_text
from ddt.logs import logging_setup
from ddt.tables import markdown_table

# Logging and output folders are ours.
HYDRA = ("hydra/job_logging=none", "hydra/hydra_logging=none", "hydra.output_subdir=null", "hydra.run.dir=.")
# Settings whose values are paths, or lists of them. They may begin with ~, and hold characters that
# Hydra's grammar gives a meaning of their own.
PATHS = (
    "ckpt", "out", "samples", "reference", "inception_weights", "released", "run", "runs", "sweep", "init_from",
    "autoencoder", "guide", "recompute", "measured", "metrics", "features.weights",
    "data.root", "data.source_root", "data.labels", "data.class_names", "data_root", "autoencoder.source",
    "autoencoder.encoder_weights", "autoencoder.decoder", "autoencoder.statistics", "alignment.weights",
    "reconstruction.vgg_weights", "reconstruction.lpips_weights", "reconstruction.dino_weights",
)  # fmt: skip
CHOICE_FILES = ("data.labels", "data.class_names", "alignment.weights")  # of PATHS, looked for before torch is imported
LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what torchrun sets for each process
WITH_VALUE = {  # options of Hydra that another word follows
    "-c", "--cfg", "-p", "--package", "-cp", "--config-path", "-cn", "--config-name", "-cd", "--config-dir",
    "--experimental-rerun", "-i", "--info",
}  # fmt: skip
ECHO_SECONDS = 5  # to ask a launcher's store whether a message was printed


def default_name(*, _root_: DictConfig) -> str:
    """Return DATA_MODEL of the chosen files, with data=folder folder_NAME_MODEL of the folder (and
    so with data=shards); a split, such as A/train, is named after its parent too: A_train. Of a
    decoder's training it is DATA_AUTOENCODER.
    """
    # a sweep is laid out before Hydra takes its own part out of the configuration
    choices: Any = (_root_.hydra if "hydra" in _root_ else HydraConfig.get()).runtime.choices
    trained = choices.autoencoder if "decoder" in choices else choices.model
    if choices.data not in ("folder", "shards") or OmegaConf.is_missing(_root_.data, "root"):
        return f"{choices.data}_{trained}"
    from ddt.data.listing import is_split  # imports NumPy

    path = Path(str(_root_.data.root)).expanduser().resolve()
    name = f"{path.parent.name}_{path.name}" if is_split(path.name) else path.name
    folder = re.sub(r"[^\w.+-]", "_", name)
    return f"{choices.data}_{folder}_{trained}"


OmegaConf.register_new_resolver("default_name", default_name, replace=True)


def _mode_of_the_command_line(*_: object, **__: object) -> None:
    """Leave the choice between a run and a sweep to `-m`. Hydra composes all settings a second time
    to read `hydra.mode`, which no file of ours sets and commands refuse.
    """


Hydra.get_mode = _mode_of_the_command_line  # type: ignore[method-assign]


def command(
    config_name: str,
    settings: str | Callable[[DictConfig], str],
    folder: Path = CONF,
    outcome: Callable[[Path], float | None] | None = None,
) -> Callable[[Callable[[Any], None]], Callable[[], None]]:
    """Make a command of a function of its settings.

    config_name: the primary config, `folder/config_name.yaml`. settings: dotted name of the
    dataclass that the composed values are parsed to (`ddt.config.parse`), or a function that
    returns it, of the composed values; a field `choices` gets the names of the chosen files by
    group.
    outcome: what a sweeper may minimise, from the folder of a job of a sweep; None: `-m` is
    refused.

    A UserError, and an error of the system such as a full disk, ends the command with status 1 and
    its lines, without a traceback; `Stopped` with status 85.
    """

    def decorate(task: Callable[[Any], None]) -> Callable[[], None]:
        script = Path(inspect.getfile(task)).resolve()
        started = False
        arguments: list[str] = []  # as the user gave them
        measured: dict[Path, float | None] = {}  # of the jobs of a sweep, by run folder

        def job(cfg: DictConfig) -> float | None:
            nonlocal started
            started = True
            logging_setup()  # a launcher of Hydra's may have started this process
            if HydraConfig.get().mode == RunMode.MULTIRUN:
                run_dir = run_job(script, str(cfg.name))
                measured[run_dir] = None if outcome is None else outcome(run_dir)
                return measured[run_dir]
            sys.argv[1:] = arguments  # for receipts

            def composed() -> Any:
                try:
                    kind = settings if isinstance(settings, str) else settings(cfg)
                    check_inputs(cfg, kind)
                    return typed(cfg, kind)
                except (HydraException, OmegaConfBaseException) as error:
                    raise UserError(mistake(error, arguments, folder, config_name)) from error

            one_line_errors(lambda: task(composed()))
            return None

        run = hydra.main(version_base="1.3", config_path=str(folder), config_name=config_name)(job)

        def main() -> None:
            nonlocal started, arguments
            started = False
            measured.clear()
            logging_setup()
            arguments = sys.argv[1:]
            is_sweep = bool({"-m", "--multirun"} & set(arguments))
            if outcome is None and is_sweep:
                fail("-m: only train.py sweeps over settings; call this command once for each value")
            one_line_errors(check_launcher)
            path = "/".join(folder.parts[folder.parts.index("conf") :])
            summary = (sys.modules[task.__module__].__doc__ or task.__doc__ or "").partition("\n\n")[0]
            about = f"{summary} Every setting with its comment: {path}/{config_name}.yaml"
            name = script.parent.name if script.stem == "__main__" else script.stem
            ours = [*HYDRA, f"hydra.job.name={name}"]
            if outcome is not None:
                callback = {"_target_": f"{__name__}.OneFolderEach", "folder": folder, "config_name": config_name}
                ours += [quoted(f"+hydra.callbacks.sweep.{key}", str(value)) for key, value in callback.items()]
            options, overrides = options_and_overrides(arguments)  # argparse wants the overrides together
            if any(override.lstrip("+~").startswith("hydra.mode") for override in overrides):
                fail("hydra.mode: has no effect here; give -m for a sweep, nothing for a run")
            overrides = [quoted_path(override, is_sweep) for override in overrides]
            sys.argv[1:] = [*options, *ours, *overrides]
            own_errors = os.environ.get("HYDRA_FULL_ERROR")
            os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises its errors instead of printing them
            try:
                if {"-h", "--help"} & set(options):
                    sys.stdout.write(f"{' '.join(about.split())}\n{help_text(folder, config_name, overrides)}")
                else:
                    run()
                if measured:
                    logging.getLogger(__name__).info("%s", sweep_summary(measured))
            except JobFailed as failed:
                sys.exit(failed.report())
            except KeyboardInterrupt:
                fail("interrupted; run the same command again to resume from what is complete")
            except Exception as error:
                if started or own_errors == "1":
                    raise  # before, Hydra raises errors of any kind for what is no override
                fail(mistake(error, arguments, folder, config_name))
            finally:
                sys.argv[1:] = arguments
                del os.environ["HYDRA_FULL_ERROR"]
                if own_errors is not None:
                    os.environ["HYDRA_FULL_ERROR"] = own_errors

        return main

    return decorate


def help_text(folder: Path, config_name: str, overrides: list[str]) -> str:
    """Return the groups of a command with their files, and its composed settings.

    Hydra's own help lists the groups of all commands, and composes for a second.
    """
    composed = compose_apart(folder, config_name, overrides, with_hydra=True)
    groups = sorted(group for group in composed.hydra.runtime.choices if not group.startswith("hydra/"))
    del composed.hydra
    lines = [f"{group}: {', '.join(choices_of(folder, group))}" for group in groups]
    listed = ["", "== Groups (group=choice) ==", *lines] if lines else []
    return "\n".join([*listed, "", "== Settings (key=value) ==", OmegaConf.to_yaml(composed)])


def choices_of(folder: Path, group: str) -> list[str]:
    """Return the names of the files that a config group chooses from."""
    return sorted(path.stem for path in (folder / group).glob("*.yaml") if not path.stem.startswith("_"))


def options_and_overrides(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Return the options of a command line, such as `-m` and `--cfg job`, and its overrides."""
    options: list[str] = []
    overrides: list[str] = []
    for before, argument in itertools.pairwise(["", *arguments]):
        is_option = argument.startswith("-") or (before in WITH_VALUE and "=" not in argument)
        (options if is_option else overrides).append(argument)
    return options, overrides


def check_launcher() -> None:
    """Raise UserError where the environment holds a part of what a launcher of processes sets:
    processes would wait for others that do not exist.
    """
    given = [name for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE") if name in os.environ]
    missing = [name for name in LAUNCHER if name not in os.environ]
    require(
        not given or not missing,
        f"{', '.join(given)}: set in the environment without {', '.join(missing)}; unset it, or start by torchrun",
    )
    for name in given:
        value = os.environ[name]
        require(value.isdecimal(), f"{name}={value}: is no number; unset it, or start by torchrun")


def check_inputs(cfg: DictConfig, settings: str) -> None:
    """Raise UserError for a `data.root`, or a file of a choice, where there is nothing: before the
    settings are compared with what they name, which imports torch.
    """
    is_read = "data.root" not in getattr(locate(settings), "may_be_missing", ())
    for key in CHOICE_FILES:
        group = key.partition(".")[0]
        if OmegaConf.select(cfg, f"{group}._target_") is not None and (is_read or group != "data"):
            path = expand_paths(OmegaConf.select(cfg, key), key)
            missing = isinstance(path, str) and not Path(path).is_file()
            require(not missing, f"{key}={path}: no such file; give the path of one, or leave it out")
    data = cfg.get("data")
    if not isinstance(data, DictConfig) or not is_read:
        return
    root = None if OmegaConf.is_missing(data, "root") else expand_paths(data.get("root"), "data.root")
    if isinstance(root, str) and not set(root) & set("*?["):
        cached = str(data.get("_target_")).endswith("Cache")
        kind = "that scripts/cache_latents.py wrote" if cached else "with the images"
        require(Path(root).exists(), f"data.root={root}: no such folder; give the one {kind}")


def typed(cfg: DictConfig, settings: str) -> Any:
    """Return the composed configuration as the dataclass of a command, whose `may_be_missing` names
    the keys that need no value; raise one UserError with all problems.
    """
    kind: Any = locate(settings)
    fields: dict[str, Any] = kind.__dataclass_fields__
    names = [name for name in fields if name != "choices"]
    overrides: Any = OmegaConf.to_container(HydraConfig.get().overrides.task)
    given: list[str] = []
    for override, found in zip(overrides, OverridesParser.create().parse_overrides(overrides), strict=True):
        key = override.lstrip("+~").partition("=")[0]
        top = key.partition(".")[0].partition("@")[0]
        require(not override.startswith("~"), f"{override}: a setting cannot be removed; leave it out for its default")
        inner = flat(found.value(), key)
        given += inner
        private = next((k for k in inner if any(part.startswith("_") for part in k.split("."))), None)
        require(private is None, f"{private}: cannot be set; choose a whole file of the group, {top}=…")
        of_others = top in HydraConfig.get().runtime.choices and top not in cfg  # experiment, recipe
        if top not in names and not of_others:
            known = override[0] != "+" and top in cfg
            why = f"has no effect here; choose from {', '.join(names)}" if known else ""
            raise UserError(f"{key}: {why or f'no such setting{did_you_mean(key, names)}'}")
    written = {
        key: value for key, value in flat(OmegaConf.to_container(cfg)).items() if key.partition(".")[0] in fields
    }
    unread = [key for key in getattr(kind, "may_be_missing", ()) if written.get(key) == "???"]
    missing = [
        f"{key}: not set; give {key}=…" for key in sorted(written) if written[key] == "???" and key not in unread
    ]
    require(not missing, "\n".join(missing))
    values: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]
    values = {key: expand_paths(value, key) for key, value in values.items() if key in names}
    for group, _, name in (key.partition(".") for key in unread):
        del values[group][name]
    if "choices" in fields:
        values["choices"] = {
            group: name for group, name in HydraConfig.get().runtime.choices.items() if "/" not in group
        }
    no_numbers = wrong_numbers(kind, values, given)
    if no_numbers:
        raise UserError("\n".join([*parsed(kind, values, "")[1], *no_numbers]))
    return parse(kind, values)


def wrong_numbers(kind: Any, values: dict[str, Any], given: Iterable[str]) -> list[str]:
    """Return a line for each given setting of a choice that is no number where the chosen file of
    `conf/` has one: told before the choice's class is imported, and torch with it.
    """
    problems, hints = [], typing.get_type_hints(kind)
    for key in dict.fromkeys(given):
        group, _, name = key.partition(".")
        if Choice not in (hints.get(group), *typing.get_args(hints.get(group))):
            continue
        value = (values.get(group) or {}).get(name)
        choice = str(HydraConfig.get().runtime.choices.get(group))
        if isinstance(value, str) and (CONF / group / f"{choice}.yaml").is_file():  # not of another folder of settings
            file = group_values(group, choice)
            usual = file.get(group, file).get(name)
            if isinstance(usual, int | float) and not isinstance(usual, bool):
                problems += convert(value, type(usual), key)[1]
    return problems


def expand_paths(value: Any, key: str) -> Any:
    """Return the value of a setting with ~ at the beginning of its paths replaced by the home
    folder; raise UserError for an empty path and an unknown user.
    """
    if isinstance(value, dict):
        return {name: expand_paths(inner, f"{key}.{name}") for name, inner in value.items()}
    if key not in PATHS:
        return value
    if isinstance(value, list):
        return [expand_paths(inner, key) for inner in value]
    if not isinstance(value, str):
        return value
    require(value.strip() != "", f"{key}: not set; give {key}=…")
    path = os.path.expanduser(value)
    require(not path.startswith("~"), f"{key}={value}: there is no such home folder; write ./{value} for a file here")
    return path


def reference_data(reference: str) -> Choice | None:
    """Return the data set that `reference=data:NAME` names, None for a path; raise UserError for an
    unknown name and one that needs more settings.
    """
    if not reference.startswith("data:"):
        return None
    name = reference.removeprefix("data:")
    known = choices_of(CONF, "data")
    require(name in known, f"reference={reference}: give data:NAME, one of data:{', data:'.join(known)}")
    node = OmegaConf.masked_copy(compose_apart(CONF, "train", [f"data={name}"]), ["data"])
    missing = OmegaConf.missing_keys(node)
    require(
        not missing,
        f"reference={reference}: {', '.join(missing)} would have to be known; write a file of its statistics by "
        f"scripts/reference_statistics.py data={name}, and give that",
    )
    return as_choice(node, "data")


def as_choice(node: DictConfig, group: str) -> Choice:
    """Return the choice of a group in a composed config; raise UserError for wrong values."""
    values: dict[str, Any] = OmegaConf.to_container(node, resolve=True)  # type: ignore[assignment]
    choice, problems = convert(values[group], Choice, group)
    require(not problems, "\n".join(problems))
    assert choice is not None
    choice, problems = check_choice(choice, group)
    require(not problems, "\n".join(problems))
    return choice


def compose_apart(folder: Path, config_name: str, overrides: list[str], with_hydra: bool = False) -> DictConfig:
    """Compose a config, or one with Hydra's own part, without touching Hydra's state, which is that
    of the running command.
    """
    state = Singleton.get_state()
    GlobalHydra.instance().clear()
    try:
        with hydra.initialize_config_dir(str(folder), version_base="1.3"):
            return hydra.compose(config_name, overrides=overrides, return_hydra_config=with_hydra)
    finally:
        Singleton.set_state(state)


def one_line_errors(task: Callable[[], None]) -> None:
    """Call a task; a user's mistake ends the process with one line, printed once per machine."""
    try:
        task()
    except Stopped as stopped:
        if os.environ.get("RANK", "0") == "0":  # under a launcher all processes stop alike
            sys.stderr.write(f"{stopped}\n")
        sys.exit(STOPPED_STATUS)
    except (UserError, FloatingPointError) as error:
        fail(str(error))
    except OSError as error:  # a folder that cannot be written, a full disk
        fail(os_error_line(error))
    except MemoryError as error:  # of an array that a setting asks for
        fail(f"not enough memory ({first_line(error)}); choose smaller sizes")


def fail(message: str) -> NoReturn:
    """End this process with status 1 and a message, printed once per machine."""
    sys.exit(1 if is_echo(message) else message)


def is_echo(message: str) -> bool:
    """Return whether another process that the launcher started on this machine prints the same
    message. The store of torchrun (and accelerate launch) counts them: any may be the one that
    fails. Another launcher's processes have none: there the first of a machine speaks for all,
    until they have joined a process group.
    """
    if "LOCAL_RANK" not in os.environ:
        return False
    import torch

    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        names = [os.environ.get(name, "") for name in ("TORCHELASTIC_RESTART_COUNT", "GROUP_RANK")]
        key = "/".join(["ddt", *names, hashlib.sha256(message.encode()).hexdigest()])
        timeout = datetime.timedelta(seconds=ECHO_SECONDS)
        try:
            address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            return torch.distributed.TCPStore(*address, is_master=False, timeout=timeout).add(key, 1) > 1
        except (RuntimeError, ValueError):  # the launcher is gone
            return False
    return os.environ["LOCAL_RANK"] != "0" and not torch.distributed.is_initialized()


# --- a sweep


def sweep_summary(measured: dict[Path, float | None]) -> str:
    """Return what a sweep ends with: what each job measured last, and the command of the report."""
    folder = next(iter(measured)).parent
    rows = [[run.name, "–" if value is None else f"{value:.4g}"] for run, value in measured.items()]
    command = shlex.join(["python", "-m", "scripts.studies.sweep", f"sweep={folder}", f"out={folder}_report"])
    return f"{markdown_table(['job', 'measured last'], rows, 'lr')}\ntables and a figure: {command}"


class JobFailed(Exception):
    """A job of a sweep failed; Hydra runs the others and raises this in the end."""

    failures: list[str] = []  # noqa: RUF012  # of the jobs that this process started
    started = planned = 0  # jobs: submitit starts them elsewhere, and other sweepers plan none

    def report(self) -> str:
        """Return what a sweep ends with: a line for each job that failed."""
        failures, jobs = JobFailed.failures or [str(self)], max(JobFailed.started, JobFailed.planned, 1)
        JobFailed.failures, JobFailed.started, JobFailed.planned = [], 0, 0
        return "\n".join([f"{len(failures)} of {jobs} jobs failed:", *failures])


class OneFolderEach(Callback):
    """Ends a sweep before its first job where two of its jobs would share a run folder. Sweepers
    that choose each job by the results of earlier ones are not asked.
    """

    def __init__(self, folder: str, config_name: str) -> None:
        self.folder, self.config_name = Path(folder), config_name

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """See `Callback`."""
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            fail("-m: a sweep starts its own processes (trainer.num_processes); start it without a launcher")
        try:
            self.check(config.hydra)
        except (HydraException, OmegaConfBaseException):
            return  # Hydra raises it again when it composes the jobs

    def check(self, settings: DictConfig) -> None:
        """Compose the jobs that may share a folder, and compare their names."""
        sweeper = locate(settings.sweeper._target_)
        if not hasattr(sweeper, "split_arguments"):
            return
        given = [f"{key}={value}" for key, value in (settings.sweeper.params or {}).items()]
        overrides = OverridesParser.create().parse_overrides([*given, *settings.overrides.task])
        (jobs,) = sweeper.split_arguments(overrides, None)
        JobFailed.planned = len(jobs)
        unnamed = settings.job.config.override_dirname.exclude_keys
        groups: dict[frozenset[str], list[list[str]]] = {}
        for job in jobs:
            named = frozenset(override for override in job if override.partition("=")[0] not in unnamed)
            groups.setdefault(named, []).append(job)
        for group in groups.values():
            folders: dict[str, list[str]] = {}
            for job in group if len(group) > 1 else []:
                composed = compose_apart(self.folder, self.config_name, job, with_hydra=True)
                folder = f"{composed.hydra.sweep.dir}/{job_folder(composed.hydra.job.override_dirname)}"
                other = folders.setdefault(folder, job)
                if other is not job:
                    first, second = (
                        " ".join([override for override in one if override not in two] or one)
                        for one, two in ((other, job), (job, other))
                    )
                    fail(
                        f"-m: the jobs {first} and {second} would both be {folder}; start them one by one, each with a "
                        "name= of its own"
                    )


def job_folder(overrides: str) -> str:
    """Return the name of a job's folder in that of its sweep: its overrides, without the
    `exclude_keys` of conf/train.yaml, or their hash where they make no name of a folder.
    """
    return overrides if is_run_name(overrides) else hashlib.sha256(overrides.encode()).hexdigest()[:16]


def run_job(script: Path, name: str) -> Path:
    """Run one job of a sweep as the plain command that it is, in a process of its own; return its
    run folder. One that is named by a hash gets its overrides in `overrides.txt`.

    A job that stops on request ends the sweep with status 85; one that fails does not.
    """
    overrides = [override for override in HydraConfig.get().overrides.task if not override.startswith("name=")]
    named_by = HydraConfig.get().job.override_dirname
    folder = Path(HydraConfig.get().sweep.dir) / job_folder(named_by)
    arguments = [sys.executable, str(script), *overrides, quoted("name", f"{name}/{job_folder(named_by)}")]
    JobFailed.started += 1
    log = logging.getLogger(__name__)
    log.info("job: %s", shlex.join([script.name, *arguments[2:]]))
    status = wait_for(arguments)
    if folder.is_dir() and job_folder(named_by) != named_by:
        write_text(folder / "overrides.txt", "".join(f"{override}\n" for override in overrides))
    if status == STOPPED_STATUS:
        sys.exit(STOPPED_STATUS)
    if status != 0:
        failure = f"{' '.join(overrides)}: exit status {status}, see above"
        JobFailed.failures.append(failure)
        raise JobFailed(failure)
    return folder


def wait_for(arguments: list[str]) -> int:
    """Run a command and return its status. SIGTERM and SIGUSR1 are passed on; so is the SIGUSR2 by
    which submitit announces the time limit, as SIGUSR1, and when the command has saved and stopped,
    the job is queued again.
    """
    process = subprocess.Popen(arguments)
    received: list[int] = []

    def forward(signum: int, frame: FrameType | None) -> None:
        received.append(signum)
        process.send_signal(signal.SIGUSR1 if signum == signal.SIGUSR2 else signum)

    requeue: Any = signal.getsignal(signal.SIGUSR2)
    before = {number: signal.signal(number, forward) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)}
    try:
        while True:
            try:
                status = process.wait()
                break
            except KeyboardInterrupt:  # the terminal has sent it to the command too, which saves and stops
                continue
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if status == STOPPED_STATUS and signal.SIGUSR2 in received and callable(requeue):
        requeue(signal.SIGUSR2, None)
    return status


# --- what Hydra refuses


def quoted_path(argument: str, is_sweep: bool = False) -> str:
    """Return an argument whose value is a path in Hydra's quotes, where it needs them; a comma
    separates the values of a sweep.
    """
    key, _, value = argument.partition("=")
    if key not in PATHS or value[:1] in "'\"[$" or (is_sweep and re.search(r"['\"(]", value)):
        return argument
    pieces = value.split(",") if is_sweep else [value]
    plain = re.compile(r"[\w./:+-]*", re.ASCII)
    return f"{key}={','.join(piece if plain.fullmatch(piece) else quoted_value(piece) for piece in pieces)}"


def quoted(key: str, value: str) -> str:
    """Return an override whose value Hydra takes as it is."""
    return f"{key}={quoted_value(value)}"


def quoted_value(value: str) -> str:
    """Return a value in quotes, between which Hydra takes it as it is."""
    # a backslash is one but before a quote, where Hydra reads two as one
    escaped = re.sub(r'(\\*)("|$)', lambda match: match[1] * 2 + ('\\"' if match[2] else ""), value)
    return f'"{escaped}"'


def mistake(error: Exception, arguments: list[str], folder: Path, config_name: str) -> str:
    """Return a mistake on the command line as one line that names the key and the fix: Hydra says
    that there is one, and the overrides are compared with the groups and settings that exist.
    """
    try:
        overrides = OverridesParser.create().parse_overrides(options_and_overrides(arguments)[1])
    except HydraException as unreadable:
        return " ".join(str(unreadable).split())
    groups: dict[str, str] = {}
    for override in overrides:
        group = override.key_or_group
        if not (folder / group).is_dir() or override.is_sweep_override():
            continue
        name = override.get_value_element_as_str()
        known = choices_of(folder, group)
        if override.is_delete():
            return f"~{group}: a group cannot be removed; choose one of {', '.join(known)}"
        if name not in known and (group, name) != ("experiment", "null"):
            return f"{group}={name}: no such choice{did_you_mean(name, known)}"
        groups[group] = name
    try:
        composed = compose_apart(folder, config_name, [f"{group}={name}" for group, name in groups.items()])
    except HydraException as second:
        return first_line(second).rstrip(".")
    settings: Any = OmegaConf.to_container(composed)
    for override in overrides:
        key = override.key_or_group
        if key in groups or key.startswith("hydra"):
            continue
        node: Any = settings
        *parents, name = key.split(".")
        for parent in parents:
            node = node.get(parent) if isinstance(node, dict) else None
        beside = node if isinstance(node, dict) else {}
        value = override.value()
        inner = beside.get(name)
        unknown = [n for n in value if n not in inner] if isinstance(value, dict) and isinstance(inner, dict) else []
        if name in beside and not unknown:
            continue
        if unknown:
            parents, name, beside = [*parents, name], unknown[0], beside[name]
        known = [".".join([*parents, str(k)]) for k in beside if str(k)[:1] != "_"]
        full = ".".join([*parents, str(name)])
        others = choices_with(folder, override.key_or_group)
        if others and not unknown:
            chosen = f" of {parents[0]}={groups[parents[0]]}" if parents[0] in groups else ""
            return f"{full}: no such setting{chosen}; {parents[0]}={' or '.join(others)} has it"
        return f"{full}: no such setting{did_you_mean(full, known)}"
    cause = error.__cause__ or error
    if isinstance(cause, ModuleNotFoundError) and cause.name:  # of a launcher or a sweeper
        return missing_package(cause.name, "hydra")
    return f"Hydra: {' '.join(str(error).split()) or type(error).__name__}"


def choices_with(folder: Path, key: str) -> list[str]:
    """Return up to three files of a group that have its setting `key`, such as objective.t_min."""
    group, _, name = key.partition(".")
    found = []
    for path in sorted((folder / group).glob("[!_]*.yaml")) if name else []:
        values: Any = OmegaConf.to_container(OmegaConf.load(path))
        if name in values.get(group, values):
            found.append(path.stem)
    return found[:3]
