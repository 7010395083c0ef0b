"""Every command, its settings and its groups, as conf/ and the scripts themselves describe them: for `--help`, shell
completion and docs/options.md. Nothing here imports torch or Hydra.
"""

import ast
import dataclasses
import functools
import re
import shutil
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
CONF = ROOT / "conf"
# settings whose values are files or folders
PATHS = (
    "ckpt", "out", "samples", "reference", "inception_weights", "released", "run", "runs", "init_from", "autoencoder",
    "guide", "recompute", "evaluator", "python", "graph", "measured", "metrics",
    "features.weights",
    "data.root", "data.source_root", "data_root", "autoencoder.source", "alignment.weights",
)  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """A setting as a file writes it: its value in YAML, and the comment beside it."""

    value: str
    comment: str


@dataclass(frozen=True)
class Content:
    """What a file of conf/ says: head comment, defaults list, settings by dotted key."""

    head: tuple[str, ...]
    defaults: tuple[Any, ...]
    comments: dict[str, str]  # of the entries of the defaults list
    settings: dict[str, Setting]


@dataclass(frozen=True)
class Choice:
    """A file of a group, with what it builds on: what it is, what it sets in its group, what it chooses elsewhere."""

    head: str
    target: str | None
    settings: dict[str, Setting]
    overrides: dict[str, str]  # group → choice


@dataclass(frozen=True)
class Group:
    """A folder of files of which a command takes one: its name on the command line, and its choices."""

    name: str
    folder: Path
    choices: dict[str, Choice]

    @property
    def is_preset(self) -> bool:
        """Whether its files only set what others define."""
        return all(choice.target is None for choice in self.choices.values()) and self.name == "experiment"


@dataclass(frozen=True)
class Command:
    """An entry point: its file, what it says of itself, its own settings, its groups with the file each one takes."""

    script: Path
    description: str
    usage: tuple[str, ...]
    settings: dict[str, Setting]
    groups: dict[str, Group]
    chosen: dict[str, str]  # group → choice, without arguments
    comments: dict[str, str]  # group → what the primary config says of it

    @property
    def name(self) -> str:
        """Its path from the repository's root."""
        return self.script.relative_to(ROOT).as_posix()

    def settings_of(self, group: str, chosen: dict[str, str]) -> dict[str, Setting]:
        """Return the settings of the file that is chosen of a group, by dotted key; none of a preset."""
        choice = self.groups[group].choices.get(chosen.get(group, ""))
        if choice is None or self.groups[group].is_preset:
            return {}
        return {f"{group}.{key}": setting for key, setting in choice.settings.items()}

    def with_arguments(self, chosen: dict[str, str]) -> dict[str, str]:
        """Return the file of each group, where some are chosen: data and experiment choose of other groups."""
        found = self.chosen | {group: choice for group, choice in chosen.items() if group in self.groups}
        for group in ("experiment", "data"):
            choice = self.groups[group].choices.get(found.get(group, "")) if group in self.groups else None
            if choice is not None:
                found |= {key: name for key, name in choice.overrides.items() if key not in chosen}
        return {group: choice for group, choice in found.items() if group in self.groups}


def summary(head: tuple[str, ...]) -> str:
    """Return the first line of a head comment that is no command, without what leads on to the next."""
    first = next((line for line in head if not line.startswith(("python ", "bash ", "@package"))), "")
    return first.removesuffix(" First:").rstrip(".")


@functools.cache
def read(path: Path) -> Content:
    """Read a file of conf/ with its comments."""
    text = path.read_text()
    lines = text.splitlines()
    head = tuple(line[1:].strip() for line in text[: re.search(r"^[^#]|\Z", text, re.M).start()].splitlines())  # type: ignore[union-attr]
    document = yaml.compose(text, Loader=yaml.SafeLoader)

    def beside(node: yaml.Node) -> str:
        found = re.match(r"\s*#\s*(.*)", lines[node.end_mark.line][node.end_mark.column :])
        return found[1].strip() if found else ""

    def walk(node: yaml.MappingNode, prefix: str) -> dict[str, Setting]:
        found = {}
        for key, value in node.value:
            if not prefix and key.value in ("defaults", "hydra"):
                continue
            dotted = f"{prefix}{key.value}"
            if isinstance(value, yaml.MappingNode) and not value.flow_style:
                found |= walk(value, f"{dotted}.")
            else:
                written = text[value.start_mark.index : value.end_mark.index]
                found[dotted] = Setting(" ".join(written.split()), beside(value))
        return found

    nodes = {key.value: value for key, value in document.value}
    defaults: list[Any] = []
    comments = {}
    for entry in nodes["defaults"].value if "defaults" in nodes else ():
        if isinstance(entry, yaml.MappingNode):
            ((key, value),) = entry.value
            defaults.append({key.value: value.value})
            comments[key.value] = beside(value)
        else:
            defaults.append(entry.value)
    return Content(head, tuple(defaults), comments, walk(document, ""))


def inherited(found: dict[str, Setting], own: dict[str, Setting]) -> dict[str, Setting]:
    """Return settings with the own values over those found before; a comment stays where the own value has none."""
    changed = {
        key: Setting(setting.value, setting.comment or (found[key].comment if key in found else ""))
        for key, setting in own.items()
    }
    return found | changed


def choice_of(path: Path, group: str) -> Choice:
    """Read a file of a group and the files of its group that it builds on."""
    content = read(path)
    settings: dict[str, Setting] = {}
    overrides: dict[str, str] = {}
    target = None
    for entry in content.defaults:
        if isinstance(entry, dict):
            ((key, value),) = entry.items()
            overrides[key.removeprefix("override /")] = value
        elif entry != "_self_":
            base = choice_of(path.parent / f"{entry.partition('@')[0]}.yaml", group)
            settings = inherited(settings, base.settings)
            overrides |= base.overrides
            target = base.target or target
    own = content.settings
    if "@package _global_" in content.head and group != "experiment":
        own = {key.removeprefix(f"{group}."): setting for key, setting in own.items()}
    if "_target_" in own and own["_target_"].value != "null":
        target = own["_target_"].value
    own = {key: setting for key, setting in own.items() if not key.startswith("_")}
    return Choice(summary(content.head), target, inherited(settings, own), overrides)


@functools.cache
def group_of(folder: Path) -> Group:
    """Read a group's files, but for the bases that are no choice."""
    files = [path for path in sorted(folder.glob("*.yaml")) if not path.stem.startswith("_")]
    return Group(folder.name, folder, {path.stem: choice_of(path, folder.name) for path in files})


def decorator_of(tree: ast.Module) -> ast.Call | None:
    """Return the call of `entry_point` that decorates a script's function, if one does."""
    for node in tree.body:
        for call in node.decorator_list if isinstance(node, ast.FunctionDef) else ():
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "entry_point":
                return call
    return None


@functools.cache
def command(script: Path) -> Command | None:
    """Read an entry point and its primary config; None where the script is no entry point of this repository."""
    if not script.is_file() or script.suffix != ".py" or not script.is_relative_to(ROOT):
        return None
    tree = ast.parse(script.read_text())
    call = decorator_of(tree)
    if call is None:
        return None
    config_name = ast.literal_eval(call.args[0])
    folder = CONF / ast.literal_eval(call.args[1].right) if len(call.args) > 1 else CONF  # type: ignore[attr-defined]
    uses = next((ast.literal_eval(keyword.value) for keyword in call.keywords if keyword.arg == "uses"), None)
    primary = read(folder / f"{config_name}.yaml")
    settings, chosen, comments = dict(primary.settings), {}, dict(primary.comments)
    for entry in primary.defaults:
        if isinstance(entry, str) and entry != "_self_":
            base = read(folder / f"{entry}.yaml")
            settings = base.settings | settings
            comments = base.comments | comments
            chosen |= {key: name for part in base.defaults if isinstance(part, dict) for key, name in part.items()}
        elif isinstance(entry, dict):
            chosen |= {key.removeprefix("override "): name for key, name in entry.items()}
    groups = {name: group_of((folder / name).resolve()) for name in chosen if "hydra" not in name}
    usage = tuple(line for line in primary.head if line.startswith(("python ", "bash ")))
    description = " ".join((ast.get_docstring(tree) or "").split("\n\n")[0].split())
    whole = Command(script, description, usage, settings, groups, chosen, comments)
    used = {*settings, *groups} if uses is None else {*uses, *primary.settings}
    return dataclasses.replace(
        whole,
        settings={key: setting for key, setting in settings.items() if key in used},
        groups={name: group for name, group in groups.items() if name in used},
        chosen=whole.with_arguments({}),
    )


def commands() -> list[Command]:
    """Return all entry points: those at the root, then those of scripts/."""
    files = [ROOT / "train.py", ROOT / "sample.py", ROOT / "evaluate.py", *sorted((ROOT / "scripts").glob("*.py"))]
    return [found for found in map(command, files) if found is not None]


# --- for people


def rows(pairs: list[tuple[str, str]], width: int, indent: str = "  ") -> list[str]:
    """Lay out names and what they mean in two columns, wrapped; a name that is too long stands alone."""
    column = min(max((len(name) for name, _ in pairs), default=0), 34)
    lines = []
    for name, text in pairs:
        first = indent + name.ljust(column + 2)
        if len(name) > column and text:
            lines += textwrap.wrap(name, width, initial_indent=indent, subsequent_indent=indent)
            first = indent + " " * (column + 2)
        rest = indent + " " * (column + 2)
        lines += textwrap.wrap(text, width, initial_indent=first, subsequent_indent=rest) or [first.rstrip()]
    return lines


def help_text(found: Command) -> str:
    """Return what `--help` prints: usage, settings with their defaults, groups with their choices."""
    width = min(shutil.get_terminal_size((100, 24)).columns, 120)
    lines = [*(found.usage or (f"python {found.name} [key=value …]",)), "", *textwrap.wrap(found.description, width)]
    if found.settings:
        lines += ["", "Settings (key=default; ??? has none and must be given)"]
        lines += rows([(f"{key}={setting.value}", setting.comment) for key, setting in found.settings.items()], width)
    if found.groups:
        lines += ["", "Groups: each takes one file of conf/; settings of its own are GROUP.key=value"]
        for name, group in found.groups.items():
            lines += ["", *rows([(f"{name}={found.chosen.get(name, 'null')}", found.comments.get(name, ""))], width)]
            if len(group.choices) > 12:
                lines += textwrap.wrap(" ".join(group.choices), width, initial_indent="    ", subsequent_indent="    ")
            else:
                pairs = [(key, choice.head) for key, choice in group.choices.items()]
                lines += rows(pairs, width, "    ")
    trainer = found.settings_of("trainer", found.chosen) if "trainer" in found.groups else {}
    if trainer:
        lines += ["", f"Settings of trainer={found.chosen['trainer']}"]
        lines += rows([(f"{key}={setting.value}", setting.comment) for key, setting in trainer.items()], width)
    more = [
        ("docs/options.md", "every setting of every group"),
        ("--cfg job", "print the whole configuration, and stop"),
    ]
    if found.name == "train.py":
        more += [("-m key=A,B", "a sweep: a run for each combination of the values, docs/sweeps.md")]
    more += [("--hydra-help", "what Hydra itself takes")]
    return "\n".join([*lines, "", "More", *rows(more, width)])
