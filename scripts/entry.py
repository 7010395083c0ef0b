"""What the Hydra entry points share: one-line errors, checked settings; what surrounds a job is in scripts/jobs.py."""

import contextlib
import importlib
import inspect
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.singleton import Singleton
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException

from ddt.config import check_arguments, did_you_mean, flat, locate
from ddt.errors import UserError, require
from ddt.survey import patch_size, survey
from scripts.jobs import Outcome, kept_environment, report, run_job
from scripts.options import CONF, PATHS, ROOT, command, help_text, read


def default_name(*, _root_: DictConfig) -> str:
    """Return DATA_MODEL of the chosen files, with data=folder folder_NAME_MODEL of the folder.

    Hydra keeps the choices in the configuration while it lays out a sweep, and apart from it while a job runs.
    """
    choices = (_root_.hydra if "hydra" in _root_ else HydraConfig.get()).runtime.choices
    if choices.data != "folder" or OmegaConf.is_missing(_root_.data, "root"):
        return f"{choices.data}_{choices.model}"
    folder = re.sub(r"[^\w.+-]", "_", Path(str(_root_.data.root)).resolve().name)
    return f"folder_{folder}_{choices.model}"


def found_in_folder(key: str, root: str) -> int:
    """Return the setting `key` of data, image_size or channels, as the images of a folder suggest it."""
    require(root != "", f"data.{key}: is found from the images; give it, or data.root=")
    return int(getattr(survey(root), key))


def found_patch_size(image_size: int, autoencoder: str) -> int:
    """Return the patch size for a folder of images: found from their size, where they are trained on as pixels."""
    return patch_size(int(image_size)) if autoencoder.endswith(".Identity") else 2


OmegaConf.register_new_resolver("default_name", default_name, replace=True)
OmegaConf.register_new_resolver("found_in_folder", found_in_folder, replace=True)
OmegaConf.register_new_resolver("found_patch_size", found_patch_size, replace=True)


@contextlib.contextmanager
def composing(folder: Path) -> Iterator[None]:
    """Let `hydra.compose` read another folder of configurations than that of the running command, for a while."""
    state = Singleton.get_state()
    GlobalHydra.instance().clear()
    try:
        with hydra.initialize_config_dir(str(folder), version_base="1.3"):
            yield
    finally:
        Singleton.set_state(state)


def known_keys(folder: Path, config_name: str, dotted: str) -> list[str]:
    """Return the settings beside the unknown one `dotted`, by composing the configuration without overrides of
    values.
    """
    choices = [arg for arg in sys.argv[1:] if "=" in arg and (folder / arg.split("=")[0]).is_dir() and "," not in arg]
    with composing(folder):
        try:
            node: Any = hydra.compose(config_name, overrides=choices)
        except HydraException:  # a choice is wrong too; the unknown key is named without a suggestion
            return []
    *parents, _ = dotted.split(".")
    for parent in parents:
        node = node.get(parent) if isinstance(node, DictConfig) else None
    if not isinstance(node, DictConfig):
        return []
    return [".".join([*parents, str(key)]) for key in node if not str(key).startswith("_")]


def one_line(error: Exception, folder: Path, config_name: str) -> str:
    """Return what Hydra says of a mistake on the command line as one line that names the key and the fix."""
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    text = lines[0].rstrip(".")
    if text.startswith("Could not override '"):
        key = text.split("'")[1]
        inner = re.search(r"Key '([^']+)' is not in struct", f"{error} {error.__cause__}")
        if inner is not None and inner[1] != key.rpartition(".")[2]:  # key={inner:…}
            key = f"{key}.{inner[1]}"
        return f"{key}: no such setting{did_you_mean(key, known_keys(folder, config_name, key))}"
    if "Could not find '" in text:
        group, _, choice = text.split("'")[-2].rpartition("/")
        options = sorted(path.stem for path in (folder / group).glob("*.yaml") if not path.stem.startswith("_"))
        return (
            f"{group}={choice}: no such choice{did_you_mean(choice, options)}" if group else f"{choice}: no such group"
        )
    return " ".join(lines)


def checked(cfg: DictConfig) -> dict[str, Any]:
    """Return the configuration as plain values of the right types.

    Every node with a `_target_` is compared with the target's signature. Raises one UserError with a line for each
    problem found.
    """
    written = flat(OmegaConf.to_container(cfg))  # missing_keys() would read what depends on a missing one
    problems = [f"{key}: not set; give {key}=…" for key in sorted(written) if written[key] == "???"]
    try:
        config: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]
    except InterpolationResolutionError as error:  # a setting that is found from one that is not set, or is wrong
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, UserError):
            cause = cause.__cause__ or cause.__context__
        if not problems and cause is None:
            raise
        raise UserError("\n".join(problems) or str(cause)) from error
    for key, node in config.items():
        if not isinstance(node, dict) or node.get("_target_") is None:
            continue
        special = {name: value for name, value in node.items() if name.startswith("_")}
        given = {name: value for name, value in node.items() if name not in special and value != "???"}
        try:
            arguments, found = check_arguments(locate(node["_target_"]), given, key)
        except ImportError as error:
            problems.append(f"{key}._target_={node['_target_']}: cannot be imported ({error})")
            continue
        config[key] = {**special, **arguments}
        problems += found
    if problems:
        raise UserError("\n".join(problems))
    return config


def arguments_for(
    function: Callable[..., Any], config: dict[str, Any], besides: Collection[str] = ()
) -> dict[str, Any]:
    """Return the settings that a function names as its arguments, but for `besides`, converted to their types.

    Raises one UserError with a line for each that is of no such type.
    """
    names = [name for name in inspect.signature(function).parameters if name not in besides]
    values, problems = check_arguments(function, {name: config[name] for name in names}, "")
    if problems:
        raise UserError("\n".join(problems))
    return values


def logging_setup() -> None:
    """Show the program's own messages as they are, and warnings on one line."""
    logging.basicConfig(
        level=logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING, format="%(message)s"
    )
    for chatty in ("httpx", "filelock", "torch", "accelerate", "timm"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"


def quoted(argument: str) -> str:
    """Return an argument whose value is a path in Hydra's quotes where it needs them, as a sweep's folders do."""
    key, equals, value = argument.partition("=")
    if {"-m", "--multirun"} & set(sys.argv):  # a comma separates the values of a sweep
        return argument
    if key not in PATHS or re.fullmatch(r"[\w./:+-]*", value, re.ASCII) or value[:1] in "'\"[$":
        return argument
    # a backslash is one but before a quote, where Hydra reads two as one
    escaped = re.sub(r'(\\*)("|$)', lambda match: match[1] * 2 + ('\\"' if match[2] else ""), value)
    return f'{key}{equals}"{escaped}"'


def top_level_keys(primary: Path) -> set[str]:
    """Return the settings and groups of a primary config and of those it builds on."""
    content = OmegaConf.load(primary)
    known = {str(key) for key in content} - {"defaults", "hydra"}
    for entry in content.defaults:
        if isinstance(entry, DictConfig):
            known |= {str(key) for key in entry if not str(key).startswith("override ")}
        elif entry != "_self_":
            known |= top_level_keys(primary.with_name(f"{entry}.yaml"))
    return known


def refuse_unknown(cfg: DictConfig, primary: Path) -> None:
    """Raise UserError for a top-level setting that the primary config does not have, as `+foo=1` makes one."""
    for override in HydraConfig.get().overrides.task:
        if override.startswith("~") and "/" not in override and override[1:] in OmegaConf.load(primary):
            raise UserError(f"{override}: a setting cannot be taken out; leave it out of the command for its default")
    known = top_level_keys(primary)
    for key in cfg:
        if key not in known:
            raise UserError(f"{key}: no such setting{did_you_mean(str(key), known)}")


def only_settings(*allowed: str) -> None:
    """Raise UserError for a setting on the command line that is none of `allowed`."""
    for override in HydraConfig.get().overrides.task:
        key = override.lstrip("+~").partition("=")[0].partition(".")[0]
        if key not in allowed:
            raise UserError(f"{override}: has no effect here; choose from {', '.join(allowed)}")


def entry_point(
    config_name: str, folder: Path = CONF, uses: Collection[str] | None = None
) -> Callable[[Callable[[DictConfig], None]], Callable[[], None]]:
    """Make a Hydra main of a function, with the primary config `folder/config_name.yaml`; a user's mistake ends it
    with status 1 and one line, without a traceback.

    uses: of a script whose configuration builds on train.py's, the settings and groups of train.py that mean something
    here; all others are refused. scripts/options.py reads these arguments from the source: write them out.
    """

    def decorate(task: Callable[[DictConfig], None]) -> Callable[[], None]:
        jobs = 0

        def checked_task(cfg: DictConfig) -> None:
            refuse_unknown(cfg, folder / f"{config_name}.yaml")
            if uses is not None:
                only_settings(*uses, *read(folder / f"{config_name}.yaml").settings)
            task(cfg)

        def job(cfg: DictConfig) -> Outcome | None:
            nonlocal jobs
            jobs += 1
            logging_setup()  # a launcher of Hydra's may have started this process
            return run_job(checked_task, cfg)

        run = hydra.main(version_base="1.3", config_path=str(folder), config_name=config_name)(job)

        def main() -> None:
            nonlocal jobs
            file = Path(inspect.getfile(task)).resolve()
            # all of conf/ is read for it, so nothing else waits for that
            described = command(file) if {"-h", "--help"} & set(sys.argv[1:]) else None
            if described is not None:
                print(help_text(described))
                return
            if task.__module__ == "__main__" and file.is_relative_to(ROOT):
                # again as a module with a name, whose functions other processes can import
                importlib.import_module(".".join(file.relative_to(ROOT).with_suffix("").parts)).main()
                return
            jobs = 0
            Outcome.known.clear()
            logging_setup()
            if config_name != "train" and {"-m", "--multirun"} & set(sys.argv):
                sys.exit("-m: only train.py sweeps over settings; call this command once for each value")
            sys.argv[1:] = [quoted(argument) for argument in sys.argv[1:]]
            chosen = os.environ.get("HYDRA_FULL_ERROR") == "1"  # the user wants Hydra's own errors
            # Hydra hands its errors to us instead of printing them; its launchers' processes find our modules
            path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
            try:
                with kept_environment(HYDRA_FULL_ERROR="1", PYTHONPATH=path):
                    run()
            except (HydraException, OmegaConfBaseException, ValueError) as error:
                if chosen or (jobs and not isinstance(error, (HydraException, OmegaConfBaseException))):
                    raise  # no mistake on the command line
                sys.exit(one_line(error, folder, config_name))
            except KeyboardInterrupt:
                sys.exit("interrupted; the same command goes on from what is complete")
            report()

        return main

    return decorate
