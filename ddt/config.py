"""Typed settings: plain values compared with the signature of what they are for, before anything is
built.
"""

import contextlib
import dataclasses
import difflib
import importlib
import importlib.util
import inspect
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.errors import PydanticSchemaGenerationError

from ddt.errors import UserError, brief
from ddt.version import DISTRIBUTION

Kind = typing.TypeVar("Kind")

WORDS = {  # beginnings of pydantic's kinds of errors
    "int_": "a whole number",
    "float_": "a number",
    "finite_number": "a finite number",
    "bool_": "true or false",
    "list_type": "a list such as [a,b]",
    "tuple_type": "a list such as [a,b]",
    "is_instance_of": "a list such as [a,b]",
    "dict_type": "settings such as {a:1}",
    "string_pattern": "epochs such as 80epochs",
    "string_": "text",
}
# of pyproject.toml, by package
EXTRAS = {"gradio": "app", "skimage": "photos", "pyarrow": "parquet", "submitit": "slurm", "tensorboard": "tensorboard"}
CONF = (Path(__file__).parent / "conf").resolve()  # of the repository, or of an installed package
LEAST_FLOAT, LARGEST_FLOAT = 1.2e-38, 3.4e38  # of normal float32 numbers
MOST_NAMES = 60  # in a line
CONVERSION = ConfigDict(coerce_numbers_to_str=True, allow_inf_nan=False)


def locate(target: str) -> Any:
    """Return the class or function that a dotted name such as `ddt.model.DDT` means; ImportError
    where there is none.
    """
    module, _, name = target.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (AttributeError, ValueError) as error:
        raise ImportError(f"{target} does not exist") from error


def require_packages(packages: typing.Iterable[str], key: str) -> None:
    """Raise UserError where a package that a setting needs is not installed; none is imported.

    packages: names of modules. A class that a config file names says its own as `packages`, so that
    they are looked for before any work, however late they are used.
    """
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise UserError(missing_package(package, key))


def missing_package(package: str, key: str) -> str:
    """Return the line on a missing package: the setting that needs it, and how to install it."""
    extra = f"[{EXTRAS[package]}]" if package in EXTRAS else ""
    checkout = (Path(__file__).parent.parent / "pyproject.toml").is_file()
    what = f"{'.' if checkout else DISTRIBUTION}{extra}"
    what = f"'{what}'" if extra else what
    return f"{key}: needs the package {package}; run pip install {'-e ' if checkout else ''}{what}"


def flat(node: Any, prefix: str = "") -> dict[str, Any]:
    """Return nested settings as dotted key → value."""
    if not isinstance(node, dict) or not node:
        return {prefix: node}
    return {
        inner: found
        for key, value in node.items()
        for inner, found in flat(value, f"{prefix}.{key}" if prefix else key).items()
    }


@dataclasses.dataclass(frozen=True)
class Choice:
    """The chosen file of a config group: what its `_target_` names, and settings of the right
    types.

    It is built when the arguments that settings cannot hold are known: `model.build(in_channels=4,
    num_classes=1000)`.
    """

    target: str
    settings: dict[str, Any]

    def build(self, **arguments: Any) -> Any:
        """Call the target with the settings and `arguments`."""
        return locate(self.target)(**self.settings, **arguments)

    def plain(self) -> dict[str, Any]:
        """Return the settings as checkpoints hold them, `_target_` among them."""
        return {"_target_": self.target, **self.settings}


def group_values(group: str, name: str) -> dict[str, Any]:
    """Return the values of conf/GROUP/NAME.yaml, over those of the files of the group that its
    defaults name (those of other groups are left out).
    """
    values = yaml.safe_load((CONF / group / f"{name}.yaml").read_text())
    below: dict[str, Any] = {}
    for other in values.pop("defaults", []):
        if isinstance(other, str) and other != "_self_":
            below |= group_values(group, other)
    return below | values


def group_choice(group: str, name: str) -> Choice:
    """Return the choice of conf/GROUP/NAME.yaml, as Hydra composes it where nothing is given."""
    values = group_values(group, name)
    choice, problems = check_choice(Choice(values.pop("_target_"), values), group)
    if problems:
        raise UserError("\n".join(problems))
    return choice


def parse(kind: type[Kind], values: dict[str, Any], prefix: str = "") -> Kind:
    """Build a settings dataclass of plain values, each compared with its annotation.

    A value for a field of another settings dataclass is a dict; one that names a `_target_` is
    built of what that names, or kept as a `Choice` where the field asks for one. Raises one
    UserError with a line for each problem, which names the key as `prefix.name`: an unknown key, a
    missing one, a value of another type, one that the dataclass itself refuses; for those of
    a choice, where there are no others.
    """
    found, problems = parsed(kind, values, prefix)
    if found is None:
        raise UserError("\n".join(problems))
    return checked_choices(found, prefix) if dataclasses.is_dataclass(found) else found


def checked_choices(settings: Any, prefix: str) -> Any:
    """Return settings whose choices are compared with what they name, one after another in the
    order of the fields: what that imports, torch in most cases, no mistake before it waits for.
    """
    changed: dict[str, Choice] = {}
    for field in dataclasses.fields(settings):
        choice = getattr(settings, field.name)
        if isinstance(choice, Choice):
            changed[field.name], problems = check_choice(choice, f"{prefix}.{field.name}" if prefix else field.name)
            if problems:
                raise UserError("\n".join(problems))
    return dataclasses.replace(settings, **changed) if changed else settings


def check_choice(choice: Choice, key: str) -> tuple[Choice, list[str]]:
    """Return a choice with its settings converted to what its target asks for, and the problems."""
    target, problems = find_target(choice.target, key)
    if problems:
        return choice, problems
    converted, problems = check_arguments(target, choice.settings, key)
    return Choice(choice.target, converted), problems


def find_target(name: str, key: str) -> tuple[Any, list[str]]:
    """Return what a `_target_` means, or None and why it cannot be had."""
    try:
        target = locate(name)
        require_packages(getattr(target, "packages", ()), key)
    except ModuleNotFoundError as error:
        return None, [missing_package(error.name or name, key)]
    except ImportError as error:
        return None, [f"{key}._target_={name}: cannot be imported ({error})"]
    except UserError as error:
        return None, [str(error)]
    return target, []


def parsed(kind: Callable[..., Kind], values: dict[str, Any], prefix: str) -> tuple[Kind | None, list[str]]:
    """Return what `parse` does, or None and the problems."""
    arguments, problems = check_call(kind, values, prefix)
    if problems:
        return None, problems
    try:
        return kind(**arguments), []
    except UserError as error:
        start = f"{prefix}." if prefix else ""
        return None, [line if line.startswith(start) else start + line for line in str(error).splitlines()]


def check_call(
    function: Callable[..., Any], values: dict[str, Any], prefix: str, late: str = ""
) -> tuple[dict[str, Any], list[str]]:
    """Return what `check_arguments` does; a missing argument but `late` is a problem, too."""
    arguments, problems = check_arguments(function, values, prefix)
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.default is inspect.Parameter.empty and name not in (*values, late):
            key = f"{prefix}.{name}" if prefix else name
            problems.append(f"{key}: not set; give {key}=…")
    return arguments, problems


def check_arguments(
    function: Callable[..., Any], arguments: dict[str, Any], prefix: str
) -> tuple[dict[str, Any], list[str]]:
    """Compare arguments with the names and annotations of a function or class.

    Returns the arguments converted to the annotated types ("400000" and 4e5 become the integer
    400000), and one line for each problem, which names the key as `prefix.name`. Arguments that are
    missing are not a problem here: some are known only at run time.
    """
    parameters = inspect.signature(function).parameters
    hints = typing.get_type_hints(function.__init__ if inspect.isclass(function) else function, include_extras=True)
    converted: dict[str, Any] = {}
    problems: list[str] = []
    for name, value in arguments.items():
        key = f"{prefix}.{name}" if prefix else name
        if name in parameters:
            converted[name], found = convert(value, hints.get(name, Any), key)
            problems += found
        else:
            problems.append(f"{key}: no such setting{did_you_mean(name, parameters)}")
    return converted, problems


def convert(value: Any, hint: Any, key: str) -> tuple[Any, list[str]]:
    """Return a value as its annotation wants it, and one line for each problem."""
    parts: tuple[Any, ...] = typing.get_args(hint) or (hint,)
    kinds: list[Any] = [part for part in parts if dataclasses.is_dataclass(part)]
    # nothing else may name code to call: a value may come from a checkpoint of others
    if isinstance(value, dict) and "_target_" in value and (kinds or any(map(is_protocol, parts))):
        return convert_node(value, kinds, key)
    if isinstance(value, dict) and kinds:
        if Choice in kinds:
            return None, [f"{key}={shown(value)}: has no _target_; choose a whole file of the group, not a part of one"]
        return parsed(kinds[0], value, key)
    try:
        adapter: TypeAdapter[Any] = TypeAdapter(hint, config=None if kinds else CONVERSION)
    except PydanticSchemaGenerationError:  # a run-time object, which no config holds
        return value, []
    try:
        converted = adapter.validate_python(value)
    except ValidationError as error:
        return value, [f"{key}={shown(value)}: {asked_for(error, hint)}"]
    if truth_as_number(value, converted):
        return value, [f"{key}={shown(value)}: give a number"]
    if not all(map(is_usual, numbers(converted))):
        return value, [f"{key}={shown(value)}: give a number that 64 bits (whole) or float32 (others) can hold"]
    return converted, []


def convert_node(node: dict[str, Any], kinds: list[Any], key: str) -> tuple[Any, list[str]]:
    """Return what a node with a `_target_` means: a `Choice`, not compared with its target yet,
    where that is among the `kinds` of the field, or else the one of them that it names (any where
    there are none: a protocol's class); None where `_target_` is null.
    """
    if node["_target_"] is None:
        return None, []
    settings = {name: value for name, value in node.items() if not name.startswith("_")}
    if Choice in kinds:
        return Choice(node["_target_"], settings), []
    target, problems = find_target(node["_target_"], key)
    if problems:
        return None, problems
    if kinds and target not in kinds:
        return None, [f"{key}._target_={node['_target_']}: is no settings of this group; choose a file of it"]
    return parsed(target, settings, key)


def is_protocol(hint: Any) -> bool:
    """Return whether a hint is a protocol, such as `FeatureSettings`."""
    return bool(getattr(hint, "_is_protocol", False))


def stored_choice(node: Any, kind: type, key: str, late: str) -> Choice:
    """Return the choice of a group that a checkpoint stores, its settings converted; `late` is the
    argument that `build` gets.

    It may be one of others, so it names none but the classes of ddt that are a `kind`; raise
    UserError, which names `key`, for anything else.
    """
    settings = dict(node) if isinstance(node, dict) else {}
    target, found = settings.pop("_target_", None), None
    if isinstance(target, str) and target.startswith("ddt."):
        with contextlib.suppress(ImportError):
            found = locate(target)
    known = inspect.isclass(found) and issubclass(found, kind) and not inspect.isabstract(found)
    if found is None or not known or late not in inspect.signature(found).parameters:
        raise UserError(
            f"{key}._target_={brief(str(target), 60)}: is no {kind.__name__} of this code, but the checkpoint names it"
        )
    converted, problems = check_call(found, settings, key, late)
    if problems:
        raise UserError(problems[0])
    return Choice(str(target), converted)


def shown(value: Any) -> str:
    """Return a value as it is written on the command line: null, true, [1,2]."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list | tuple):
        return f"[{','.join(map(shown, value))}]"
    if isinstance(value, dict):
        return f"{{{','.join(f'{key}:{shown(inner)}' for key, inner in value.items())}}}"
    return str(value)


def asked_for(error: ValidationError, hint: Any) -> str:
    """Return what a setting should have been given, from pydantic's errors on its annotation
    `hint`.
    """
    words: list[str] = []
    for each in error.errors():
        kind, context = each["type"], each.get("ctx", {})
        fixed = next((text for start, text in WORDS.items() if kind.startswith(start)), None)
        if kind in ("too_long", "too_short"):
            fixed = f"{context.get('max_length', context.get('min_length'))} values"
        elif kind == "missing":
            pairs = [part for part in (hint, *typing.get_args(hint)) if typing.get_origin(part) is tuple]
            fixed = f"{len(typing.get_args(pairs[0]))} values" if pairs else None
        elif kind == "literal_error":
            fixed = str(context["expected"])
        words.append(fixed or each["msg"][0].lower() + each["msg"][1:])
    if type(None) in typing.get_args(hint):
        words.append("null")
    return f"give {' or '.join(dict.fromkeys(words))}"


def truth_as_number(value: Any, converted: Any) -> bool:
    """Return whether true or false, alone or in a list, was converted to a number."""
    if isinstance(value, list | tuple) and isinstance(converted, list | tuple):
        return any(truth_as_number(a, b) for a, b in zip(value, converted, strict=False))
    return isinstance(value, bool) and not isinstance(converted, bool)


def numbers(value: Any) -> Iterator[int | float]:
    """Yield the numbers of a plain value, of nested ones too."""
    if isinstance(value, dict | list | tuple):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from numbers(inner)
    elif isinstance(value, int | float):
        yield value


def is_usual(number: float) -> bool:
    """Return whether a number is none of which a computation can only make 0, inf or an error."""
    if isinstance(number, int):
        return -(2**63) <= number < 2**63
    return number == 0 or LEAST_FLOAT <= abs(number) <= LARGEST_FLOAT


def did_you_mean(name: str, known: typing.Iterable[str]) -> str:
    """Return "; did you mean …?" with the closest known name, or the list of all (the first of
    many) where none is close.
    """
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1)
    if close:
        return f"; did you mean {close[0]}?"
    listed = sorted(known)
    if len(listed) > MOST_NAMES:
        listed[MOST_NAMES:] = [f"… ({len(known)} in all)"]
    return f"; choose from {', '.join(listed)}" if known else ""
