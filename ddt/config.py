"""Checking settings against the signature of what they are for, before anything is built."""

import difflib
import functools
import importlib
import inspect
import typing
from collections.abc import Callable
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.errors import PydanticSchemaGenerationError

from ddt.errors import UserError

WORDS = {  # beginnings of pydantic's kinds of errors
    "int_": "a whole number",
    "float_": "a number",
    "finite_number": "a finite number",
    "bool_": "true or false",
    "list_type": "a list such as [a,b]",
    "tuple_type": "a list such as [a,b]",
    "is_instance_of": "a list such as [a,b]",
    "dict_type": "settings such as {a:1}",
    "string_": "text",
}
CONVERSION = ConfigDict(coerce_numbers_to_str=True, allow_inf_nan=False)


def locate(target: str) -> Callable[..., Any]:
    """Return the class or function that a dotted name such as `ddt.model.DDT` means; ImportError where there is
    none.
    """
    module, _, name = target.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (AttributeError, ValueError) as error:
        raise ImportError(f"{target} does not exist") from error


def flat(node: Any, prefix: str = "") -> dict[str, Any]:
    """Return nested settings as dotted key → value."""
    if not isinstance(node, dict) or not node:
        return {prefix: node}
    return {
        inner: found
        for key, value in node.items()
        for inner, found in flat(value, f"{prefix}.{key}" if prefix else key).items()
    }


def build(node: dict[str, Any], **arguments: Any) -> Any:
    """Call what a node's `_target_` names with the node's values and `arguments`; None where `_target_` is null.

    With `_partial_: true` the call is left to be made, when the missing arguments are known.
    """
    if "_target_" not in node:
        raise UserError(f"{node}: has no _target_; choose a whole file of the group, not a part of one")
    if node["_target_"] is None:
        return None
    values = {name: value for name, value in node.items() if not name.startswith("_")} | arguments
    function = locate(node["_target_"])
    return functools.partial(function, **values) if node.get("_partial_") else function(**values)


def check_arguments(
    function: Callable[..., Any], arguments: dict[str, Any], prefix: str
) -> tuple[dict[str, Any], list[str]]:
    """Compare arguments with the names and annotations of a function or class.

    Returns the arguments converted to the annotated types ("400000" and 4e5 become the integer 400000), and one line
    for each problem, which names the key as `prefix.name`. Arguments that are missing are not a problem here: some
    are known only at run time.
    """
    parameters = inspect.signature(function).parameters
    hints = typing.get_type_hints(function.__init__ if inspect.isclass(function) else function)
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    converted: dict[str, Any] = {}
    problems: list[str] = []
    for name, value in arguments.items():
        key = f"{prefix}.{name}" if prefix else name
        if name not in parameters:
            if not takes_any:
                problems.append(f"{key}: no such setting{did_you_mean(name, parameters)}")
            continue
        converted[name] = value
        if name not in hints:
            continue
        try:
            adapter: TypeAdapter[Any] = TypeAdapter(hints[name], config=CONVERSION)
        except PydanticSchemaGenerationError:  # a run-time object, which no config holds
            continue
        try:
            converted[name] = adapter.validate_python(value)
        except ValidationError as error:
            problems.append(f"{key}={shown(value)}: {asked_for(error, hints[name])}")
        else:
            if truth_as_number(value, converted[name]):
                problems.append(f"{key}={shown(value)}: give a number")
    return converted, problems


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
    """Return what a setting should have been given, from pydantic's errors on its annotation `hint`."""
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
    """Tell whether true or false, or one in a list, was taken for a number."""
    if isinstance(value, list | tuple) and isinstance(converted, list | tuple):
        return any(truth_as_number(a, b) for a, b in zip(value, converted, strict=False))
    return isinstance(value, bool) and not isinstance(converted, bool)


def did_you_mean(name: str, known: typing.Iterable[str]) -> str:
    """Return "; did you mean …?" with the closest known name, or the list of all where none is close."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1)
    if close:
        return f"; did you mean {close[0]}?"
    return f"; choose from {', '.join(sorted(known))}" if known else ""
