"""One file of a class and of all that it needs of this project: the code of a shared folder.

diffusers copies, and downloads from a hub, one file for a component and none beside it, so such a
file can import nothing of its folder. `merge` copies the definitions that a class reaches, as they
are written, module by module.
"""

import ast
import dataclasses
import functools
import graphlib
import importlib.util
import symtable
import sys
from collections.abc import Iterator
from pathlib import Path

PACKAGE = "ddt"
LEFT_OUT = ("ddt.model.kernels",)  # modules that functions import, and that the shared code has not
CHANGED = {"USES_KERNELS": "USES_KERNELS = False"}  # so it never asks for them
NOTE = """\
Made from the modules named below of the project DDT{version}: change them, not this file.
Copyright (c) 2026 The DDT repository contributors. SPDX-License-Identifier: MIT
"""
TAIL = """
# the text of this file, for `save_pretrained`: diffusers keeps that of all local folders in one place
{name}.code = staticmethod(functools.partial(str, Path(__file__).read_text(encoding="utf-8")))
"""


@dataclasses.dataclass(frozen=True)
class Definition:
    """A function, class or constant of a module. used: names that running it needs, of its module;
    annotated: those in annotations alone.
    """

    text: str
    is_class: bool
    used: frozenset[str]
    annotated: frozenset[str]


@dataclasses.dataclass(frozen=True)
class Module:
    """A module of this project. ours: imported name → its module and name there; others: imported
    name → the statements.
    """

    docstring: str
    definitions: dict[str, Definition]
    ours: dict[str, tuple[str, str]]
    others: dict[str, set[str]]


class Annotations(ast.NodeTransformer):
    """Takes the annotations out of a syntax tree, and collects the names in them."""

    def __init__(self) -> None:
        self.names: set[str] = set()

    def collect(self, node: ast.expr | None) -> None:
        """Add the names of an annotation, which may be a string."""
        for inner in ast.walk(node) if node else ():
            if isinstance(inner, ast.Name):
                self.names.add(inner.id)
            elif isinstance(inner, ast.Constant) and isinstance(inner.value, str) and inner.value.isidentifier():
                self.names.add(inner.value)

    def visit_arg(self, node: ast.arg) -> ast.AST:
        self.collect(node.annotation)
        return ast.arg(node.arg)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        self.collect(node.returns)
        node.returns = None
        return self.generic_visit(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        self.collect(node.annotation)
        node.annotation = ast.Constant(None)
        return self.generic_visit(node)


def global_names(table: symtable.SymbolTable) -> Iterator[str]:
    """Yield the names that code reads of its module."""
    at_top = table.get_type() == "module"
    yield from (s.get_name() for s in table.get_symbols() if s.is_referenced() and (at_top or s.is_global()))
    for child in table.get_children():
        yield from global_names(child)


def define(node: ast.stmt, lines: list[str]) -> Definition:
    """Return the definition of a top-level statement, with the comment above it."""
    decorators = getattr(node, "decorator_list", [])
    first = min(each.lineno for each in (node, *decorators)) - 1
    copied = dict(enumerate(lines[first : node.end_lineno], start=first))
    for inner in ast.walk(node):
        if isinstance(inner, ast.ImportFrom) and str(inner.module).partition(".")[0] == PACKAGE:
            names = [f"{inner.module}.{alias.name}" for alias in inner.names]
            assert set(names) <= set(LEFT_OUT), f"{names}: a function imports it; import it at the top of the module"
            bound = inner.names[0].asname or inner.names[0].name
            copied[inner.lineno - 1] = f"{' ' * inner.col_offset}{bound}: Any = None  # {names[0]} is not in this file"
    while lines[first - 1].startswith("# ") and not lines[first - 1].startswith("# ---"):
        first -= 1
        copied = {first: lines[first], **copied}
    annotations = Annotations()
    stripped = ast.unparse(ast.fix_missing_locations(annotations.visit(node)))
    used = frozenset(global_names(symtable.symtable(stripped, "", "exec")))
    is_class = isinstance(node, ast.ClassDef)
    return Definition("\n".join(copied.values()), is_class, used, frozenset(annotations.names) - used)


@functools.cache
def read(name: str) -> Module:
    """Read a module of this project, which is not imported."""
    spec = importlib.util.find_spec(name)
    assert spec is not None, name
    assert spec.origin is not None, name
    source = Path(spec.origin).read_text(encoding="utf-8")
    tree, lines = ast.parse(source), source.splitlines()
    module = Module(ast.get_docstring(tree) or "", {}, {}, {})
    for node in [inner for each in tree.body for inner in (each.body if isinstance(each, ast.If) else [each])]:
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if str(node.module).partition(".")[0] == PACKAGE:
                    module.ours[alias.asname or alias.name] = (str(node.module), alias.name)
                else:
                    renamed = f" as {alias.asname}" if alias.asname else ""
                    module.others[alias.asname or alias.name] = {f"from {node.module} import {alias.name}{renamed}"}
        elif isinstance(node, ast.Import):
            for alias in node.names:
                renamed = f" as {alias.asname}" if alias.asname else ""
                bound = alias.asname or alias.name.partition(".")[0]  # by `import importlib.util` too: importlib
                module.others.setdefault(bound, set()).add(f"import {alias.name}{renamed}")
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            module.definitions[node.name] = define(node, lines)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = [inner.id for target in targets for inner in ast.walk(target)
                     if isinstance(inner, ast.Name) and isinstance(inner.ctx, ast.Store)]  # fmt: skip
            module.definitions.update(dict.fromkeys(names, define(node, lines)))
    return module


def find(module: str, name: str) -> tuple[str, str]:
    """Return module and name of the definition that a name in a module means."""
    while name not in read(module).definitions:
        assert name in read(module).ours, f"{module}.{name}: is no definition; import what is used of it by name"
        module, name = read(module).ours[name]
    return module, name


class Merge:
    """The definitions that a class reaches, by module, in the order of a file."""

    def __init__(self, module: str, name: str) -> None:
        self.kept: set[tuple[str, str]] = set()
        self.before: dict[str, set[str]] = {}  # module → those whose definitions it needs
        self.types: set[str] = set()  # classes that are in annotations alone
        self.keep(*find(module, name))
        seen: set[tuple[str, str]] = set()
        while self.kept - seen:  # annotations may name types, which name others
            for home, kept in sorted(self.kept - seen):
                seen.add((home, kept))
                for each in read(home).definitions[kept].annotated & self.known(home):
                    found = find(home, each)
                    if found in self.kept or not read(found[0]).definitions[found[1]].is_class:
                        self.need(home, each)
                    else:
                        self.types.add(found[1])

    def known(self, module: str) -> set[str]:
        """Return the names in a module that mean definitions of this project."""
        return read(module).definitions.keys() | read(module).ours.keys()

    def need(self, module: str, name: str) -> None:
        """Keep what a name in a module means, before that module's definitions."""
        home, found = find(module, name)
        if home != module:
            self.before[module].add(home)
        self.keep(home, found)

    def keep(self, module: str, name: str) -> None:
        """Keep a definition, and all that it needs."""
        if (module, name) not in self.kept:
            self.kept.add((module, name))
            self.before.setdefault(module, set())
            for each in read(module).definitions[name].used & self.known(module):
                self.need(module, each)

    def imports(self) -> list[str]:
        """Return the import statements of other packages, those of Python first."""
        found = {"import functools", "from pathlib import Path", "from typing import Any"}  # of the note and the tail
        for home, name in self.kept:
            definition, others = read(home).definitions[name], read(home).others
            for each in (definition.used | definition.annotated) & others.keys():
                found |= others[each]
        imported: dict[str, list[str]] = {}  # by module
        for text in sorted(text for text in found if text.startswith("from ")):
            _, package, _, name = text.split(maxsplit=3)
            imported.setdefault(package, []).append(name)
        bound = [name.split()[-1] for names in imported.values() for name in names]
        twice = {name for name in bound if bound.count(name) > 1}
        assert not twice, f"{twice}: is imported from two packages"
        texts = sorted(text for text in found if text.startswith("import "))
        texts += [f"from {package} import {', '.join(names)}" for package, names in imported.items()]
        of_python = [text.split()[1].partition(".")[0] in sys.stdlib_module_names for text in texts]
        first, second = (
            [text for text, each in zip(texts, of_python, strict=True) if each == mine] for mine in (True, False)
        )
        return [*first, "", *second]

    def sections(self) -> Iterator[tuple[str, list[str]]]:
        """Yield each module and the text of its definitions."""
        names = [name for _, name in self.kept]
        twice = {name for name in names if names.count(name) > 1} | (self.types & set(names))
        assert not twice, f"{twice}: two modules define it; rename one"
        before = {module: sorted(self.before[module]) for module in sorted(self.before)}
        for module in graphlib.TopologicalSorter(before).static_order():
            texts = {CHANGED.get(name, each.text): None for name, each in read(module).definitions.items()
                     if (module, name) in self.kept}  # fmt: skip
            yield module, list(texts)


@functools.cache
def merge(module: str, name: str, version: str = "") -> str:
    """Return the text of a file of the class `name` of a module, which imports nothing of this
    project.

    The class gets an attribute `code`, a function that returns this text. version: of the project.
    """
    merged = Merge(module, name)
    parts = [f'"""{read(module).docstring}\n\n{NOTE.format(version=version and f" {version}")}"""\n']
    parts += merged.imports()
    if merged.types:
        parts += ["", "# types of arguments that have their code elsewhere"]
        parts += [f"{each} = Any" for each in sorted(merged.types)]
    for source, texts in merged.sections():
        parts += ["", "", f"# --- {source}"]
        for text in texts:
            parts += ["", "", text] if "\n" in text else ["", text]
    return "\n".join([*parts, "", TAIL.format(name=name)])
