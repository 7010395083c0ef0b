"""Commands: Hydra composes the settings, a mistake ends with one line, each job of a sweep is a
process of its own.

The only module that imports Hydra. Nothing here imports torch, so that `--help` and `--cfg job`
answer at once.
"""

import inspect
import logging
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.singleton import Singleton
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ddt.config import Choice, convert, did_you_mean, flat, locate, parse
from ddt.errors import STOPPED_STATUS, Stopped, UserError, first_line, os_error_line, require
from ddt.logs import logging_setup

ROOT = Path(__file__).resolve().parent.parent
CONF = ROOT / "conf"
# Logging and output folders are ours.
HYDRA = ("hydra/job_logging=none", "hydra/hydra_logging=none", "hydra.output_subdir=null", "hydra.run.dir=.")
# Settings whose values are paths, which may hold characters that Hydra's grammar gives a meaning of
# their own.
PATHS = (
    "ckpt", "out", "samples", "reference", "inception_weights", "released", "run", "runs", "init_from", "autoencoder",
    "guide", "recompute", "measured", "metrics", "features.weights",
    "data.root", "data.source_root", "data_root", "autoencoder.source", "alignment.weights",
)  # fmt: skip


def default_name(*, _root_: DictConfig) -> str:
    """Return DATA_MODEL of the chosen files, with data=folder folder_NAME_MODEL of the folder."""
    # a sweep is laid out before Hydra takes its own part out of the configuration
    choices: Any = (_root_.hydra if "hydra" in _root_ else HydraConfig.get()).runtime.choices
    if choices.data != "folder" or OmegaConf.is_missing(_root_.data, "root"):
        return f"{choices.data}_{choices.model}"
    folder = re.sub(r"[^\w.+-]", "_", Path(str(_root_.data.root)).resolve().name)
    return f"folder_{folder}_{choices.model}"


OmegaConf.register_new_resolver("default_name", default_name, replace=True)


def command(
    config_name: str, settings: str, folder: Path = CONF, sweeps: bool = False
) -> Callable[[Callable[[Any], None]], Callable[[], None]]:
    """Make a command of a function of its settings.

    config_name: the primary config, `folder/config_name.yaml`. settings: dotted name of the
    dataclass that the composed values are parsed to (`ddt.config.parse`); a field `choices` gets
    the names of the chosen files by group.
    sweeps: whether `-m` is allowed.

    A UserError, and an error of the system such as a full disk, ends the command with status 1 and
    its lines, without a traceback; `Stopped` with status 85.
    """

    def decorate(task: Callable[[Any], None]) -> Callable[[], None]:
        script = Path(inspect.getfile(task)).resolve()
        started = False
        arguments: list[str] = []  # as the user gave them

        def job(cfg: DictConfig) -> None:
            nonlocal started
            started = True
            logging_setup()  # a launcher of Hydra's may have started this process
            if HydraConfig.get().mode == RunMode.MULTIRUN:
                run_job(script, str(cfg.name))
            else:
                sys.argv[1:] = arguments  # for receipts
                one_line_errors(lambda: task(typed(cfg, settings)))

        run = hydra.main(version_base="1.3", config_path=str(folder), config_name=config_name)(job)

        def main() -> None:
            nonlocal started, arguments
            started = False
            logging_setup()
            if not sweeps and {"-m", "--multirun"} & set(sys.argv):
                sys.exit("-m: only train.py sweeps over settings; call this command once for each value")
            arguments = sys.argv[1:]
            path = "/".join(folder.parts[folder.parts.index("conf") :])
            summary = (sys.modules[task.__module__].__doc__ or task.__doc__ or "").partition("\n\n")[0]
            about = f"{summary} Every setting with its comment: {path}/{config_name}.yaml"
            name = script.parent.name if script.stem == "__main__" else script.stem
            ours = [*HYDRA, f"hydra.job.name={name}", quoted("hydra.help.header", " ".join(about.split()))]
            # beside the other overrides, for argparse wants them together
            first = next((i for i, argument in enumerate(arguments) if "=" in argument), len(arguments))
            sys.argv[1:] = [*arguments[:first], *ours, *map(quoted_path, arguments[first:])]
            own_errors = os.environ.get("HYDRA_FULL_ERROR")
            os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises its errors instead of printing them
            try:
                run()
            except JobFailed as failed:
                sys.exit(failed.report())
            except (HydraException, OmegaConfBaseException, ValueError) as error:
                if own_errors == "1" or (started and not isinstance(error, HydraException | OmegaConfBaseException)):
                    raise  # Hydra raises ValueError, too, for what is no override
                sys.exit(mistake(error, arguments, folder, config_name))
            except KeyboardInterrupt:
                sys.exit("interrupted; run the same command again to resume from what is complete")
            finally:
                sys.argv[1:] = arguments
                del os.environ["HYDRA_FULL_ERROR"]
                if own_errors is not None:
                    os.environ["HYDRA_FULL_ERROR"] = own_errors

        return main

    return decorate


def typed(cfg: DictConfig, settings: str) -> Any:
    """Return the composed configuration as the dataclass of a command, whose `may_be_missing` names
    the keys that need no value; raise one UserError with all problems.
    """
    kind: Any = locate(settings)
    fields: dict[str, Any] = kind.__dataclass_fields__
    names = [name for name in fields if name != "choices"]
    for override in HydraConfig.get().overrides.task:
        key = override.lstrip("+~").partition("=")[0]
        top = key.partition(".")[0].partition("@")[0]
        require(not override.startswith("~"), f"{override}: a setting cannot be removed; leave it out for its default")
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
    values = {key: value for key, value in values.items() if key in names}
    for group, _, name in (key.partition(".") for key in unread):
        del values[group][name]
    if "choices" in fields:
        values["choices"] = {
            group: name for group, name in HydraConfig.get().runtime.choices.items() if "/" not in group
        }
    return parse(kind, values)


def reference_data(reference: str) -> Choice | None:
    """Return the data set that `reference=data:NAME` names, None for a path; raise UserError for an
    unknown name and one that needs more settings.
    """
    if not reference.startswith("data:"):
        return None
    name = reference.removeprefix("data:")
    known = sorted(path.stem for path in (CONF / "data").glob("*.yaml"))
    require(name in known, f"reference={reference}: give data:NAME, one of data:{', data:'.join(known)}")
    node = OmegaConf.masked_copy(compose_apart(CONF, "train", [f"data={name}"]), ["data"])
    missing = OmegaConf.missing_keys(node)
    require(
        not missing,
        f"reference={reference}: {', '.join(missing)} would have to be known; write a file of its statistics by "
        f"scripts/reference_statistics.py data={name}, and give that",
    )
    values: dict[str, Any] = OmegaConf.to_container(node, resolve=True)  # type: ignore[assignment]
    data, problems = convert(values["data"], Choice, "data")
    require(not problems, "\n".join(problems))
    return data


def compose_apart(folder: Path, config_name: str, overrides: list[str]) -> DictConfig:
    """Compose a config without touching Hydra's state, which is that of the running command."""
    state = Singleton.get_state()
    GlobalHydra.instance().clear()
    try:
        with hydra.initialize_config_dir(str(folder), version_base="1.3"):
            return hydra.compose(config_name, overrides=overrides)
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
        sys.exit(1 if is_echo() else str(error))
    except OSError as error:  # a folder that cannot be written, a full disk
        sys.exit(1 if is_echo() else os_error_line(error))


def is_echo() -> bool:
    """Return whether another process of this machine prints the same error, before they join a
    process group.
    """
    if os.environ.get("LOCAL_RANK", "0") == "0":
        return False
    import torch

    return not torch.distributed.is_initialized()


# --- a sweep


class JobFailed(Exception):
    """A job of a sweep failed; Hydra runs the others and raises this in the end."""

    failures: list[str] = []  # noqa: RUF012  # of the jobs that this process started
    jobs = 0

    def report(self) -> str:
        """Return what a sweep ends with: a line for each job that failed."""
        failures, jobs = JobFailed.failures or [str(self)], max(JobFailed.jobs, 1)
        JobFailed.failures, JobFailed.jobs = [], 0
        return "\n".join([f"{len(failures)} of {jobs} jobs failed:", *failures])


def sweep_job_name(name: str) -> str:
    """Return NAME/OVERRIDES, the `name=` of the present job; its run folder is runs/NAME/OVERRIDES.

    OVERRIDES leaves out the `exclude_keys` of conf/train.yaml.
    """
    return f"{name}/{HydraConfig.get().job.override_dirname}"


def run_job(script: Path, name: str) -> None:
    """Run one job of a sweep as the plain command that it is, in a process of its own.

    A job that stops on request ends the sweep with status 85; one that fails does not.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        line = "-m: a sweep starts its own processes (trainer.num_processes); leave torchrun or accelerate launch out"
        sys.exit(line if os.environ.get("RANK", "0") == "0" else 1)
    overrides = [override for override in HydraConfig.get().overrides.task if not override.startswith("name=")]
    arguments = [sys.executable, str(script), *overrides, quoted("name", sweep_job_name(name))]
    JobFailed.jobs += 1
    log = logging.getLogger(__name__)
    log.info("job: %s", shlex.join([script.name, *arguments[2:]]))
    status = wait_for([*arguments, "hydra.mode=RUN"])
    if status == STOPPED_STATUS:
        sys.exit(STOPPED_STATUS)
    if status != 0:
        failure = f"{' '.join(overrides)}: exit status {status}, see above"
        JobFailed.failures.append(failure)
        raise JobFailed(failure)


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


def quoted_path(argument: str) -> str:
    """Return an argument whose value is a path in Hydra's quotes, where it needs them."""
    key, _, value = argument.partition("=")
    if {"-m", "--multirun"} & set(sys.argv) or key not in PATHS:  # a comma separates the values of a sweep
        return argument
    return argument if re.fullmatch(r"[\w./:+-]*", value, re.ASCII) or value[:1] in "'\"[$" else quoted(key, value)


def quoted(key: str, value: str) -> str:
    """Return an override whose value Hydra takes as it is."""
    # a backslash is one but before a quote, where Hydra reads two as one
    escaped = re.sub(r'(\\*)("|$)', lambda match: match[1] * 2 + ('\\"' if match[2] else ""), value)
    return f'{key}="{escaped}"'


def mistake(error: Exception, arguments: list[str], folder: Path, config_name: str) -> str:
    """Return a mistake on the command line as one line that names the key and the fix: Hydra says
    that there is one, and the overrides are compared with the groups and settings that exist.
    """
    try:
        overrides = OverridesParser.create().parse_overrides([a for a in arguments if "=" in a and a[0] != "-"])
    except HydraException:
        return " ".join(str(error).split())
    groups: dict[str, str] = {}
    for override in overrides:
        group, name = override.key_or_group, override.get_value_element_as_str()
        if not (folder / group).is_dir() or "," in name:
            continue
        known = sorted(path.stem for path in (folder / group).glob("*.yaml") if not path.stem.startswith("_"))
        if name not in known and (group, name) != ("experiment", "null"):
            return f"{group}={name}: no such choice{did_you_mean(name, known)}"
        groups[group] = name
    try:
        composed = compose_apart(folder, config_name, [f"{group}={name}" for group, name in groups.items()])
    except HydraException as second:
        return first_line(second).rstrip(".")
    for override in overrides:
        key = override.key_or_group
        if key in groups or key.startswith("hydra"):
            continue
        node: Any = composed
        *parents, name = key.split(".")
        for parent in parents:
            node = node.get(parent) if isinstance(node, DictConfig) else None
        exists = isinstance(node, DictConfig) and name in list(node)  # `in node` would leave out what is not set
        inner = override.value() if exists and not OmegaConf.is_missing(node, name) else None
        unknown = [n for n in inner if n not in node[name]] if isinstance(inner, dict) and node.get(name) else []
        if exists and not unknown:
            continue
        if unknown:
            parents, name, node = [*parents, name], unknown[0], node[name]
        beside = (
            [".".join([*parents, str(k)]) for k in node if str(k)[0] != "_"] if isinstance(node, DictConfig) else []
        )
        full = ".".join([*parents, name])
        return f"{full}: no such setting{did_you_mean(full, beside)}"
    return " ".join(str(error).split())
