"""Measures of Python source: functions, arguments, types, imports and repeated lines."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

Function = ast.FunctionDef | ast.AsyncFunctionDef
FLAG = re.compile(r"(?<![\w-])--[a-z][\w.-]+")
REPEAT = 6
"""Number of equal lines of code that count as a repeat."""


@dataclass(frozen=True)
class Source:
    """One file of Python.

    Attributes:
        path: the file.
        module: dotted name under which the file is imported.
    """

    path: Path
    module: str

    @cached_property
    def text(self) -> str:
        return self.path.read_text(encoding="utf-8")

    @cached_property
    def lines(self) -> list[str]:
        return self.text.splitlines()

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @cached_property
    def functions(self) -> list[Function]:
        """Functions and methods, nested ones among them."""
        return [node for node in ast.walk(self.tree) if isinstance(node, Function)]


def length(function: Function) -> int:
    """Return the number of lines of a function, with its decorators."""
    first = min([function.lineno, *(d.lineno for d in function.decorator_list)])
    return (function.end_lineno or first) - first + 1


def arguments(function: Function) -> list[ast.arg]:
    """Return the arguments of a function without `self` and `cls`."""
    a = function.args
    every = [*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, (a.vararg, a.kwarg))]
    return [arg for i, arg in enumerate(every) if not (i == 0 and arg.arg in ("self", "cls"))]


def is_typed(function: Function) -> bool:
    """Return whether every argument and the result have a type."""
    return function.returns is not None and all(a.annotation for a in arguments(function))


def takes_namespace(function: Function) -> bool:
    """Return whether an argument of a function is an `argparse.Namespace`."""
    return any(
        a.annotation is not None and "Namespace" in ast.unparse(a.annotation)
        for a in arguments(function)
    )


def class_names(sources: Iterable[Source]) -> set[str]:
    """Return the names of all classes of the files."""
    return {n.name for s in sources for n in ast.walk(s.tree) if isinstance(n, ast.ClassDef)}


def instance_checks(source: Source, classes: set[str]) -> int:
    """Count the calls of `isinstance` that name one of the classes."""
    calls = (
        node
        for node in ast.walk(source.tree)
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "isinstance"
    )
    return sum(
        any(
            getattr(n, "id", getattr(n, "attr", "")) in classes
            for argument in call.args[1:]
            for n in ast.walk(argument)
        )
        for call in calls
    )


def is_command_line(source: Source) -> bool:
    """Return whether the file parses a command line."""
    return any(
        isinstance(node, ast.Call) and ast.unparse(node.func).endswith("ArgumentParser")
        for node in ast.walk(source.tree)
    )


def flags(source: Source) -> list[str]:
    """Return the flags such as --output that strings name; docstrings do not count."""
    texts = [
        node.value
        for node in ast.walk(source.tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    ]
    return [
        flag
        for node in ast.walk(source.tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in texts
        for flag in FLAG.findall(node.value)
    ]


def repeated_share(sources: Iterable[Source]) -> float:
    """Return the share of code lines inside repeats of `REPEAT` lines, in percent.

    White space, blank lines and comments do not count.
    """
    files = []
    for source in sources:
        stripped = ("".join(line.split()) for line in source.lines)
        files.append([line for line in stripped if line and not line.startswith("#")])
    windows = Counter(window for lines in files for window in _windows(lines))
    repeated = total = 0
    for lines in files:
        inside: set[int] = set()
        for start, window in enumerate(_windows(lines)):
            if windows[window] > 1:
                inside |= set(range(start, start + REPEAT))
        repeated += len(inside)
        total += len(lines)
    return 100 * repeated / total if total else 0.0


def _windows(lines: Sequence[str]) -> Iterator[tuple[str, ...]]:
    for start in range(len(lines) - REPEAT + 1):
        yield tuple(lines[start : start + REPEAT])


def import_graph(sources: Iterable[Source], *, top_level: bool) -> dict[str, set[str]]:
    """Return the modules that each module imports, of the files themselves.

    Args:
        sources: the files.
        top_level: count only imports that run when the module is imported.
    """
    by_name = {source.module: source for source in sources}
    graph: dict[str, set[str]] = {}
    for module, source in by_name.items():
        nodes = _top_level(source.tree) if top_level else ast.walk(source.tree)
        names: set[str] = set()
        for node in nodes:
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                inner = {f"{node.module}.{alias.name}" for alias in node.names} & by_name.keys()
                # a package is meant only where a name is not one of its modules
                names |= inner if len(inner) == len(node.names) else inner | {node.module}
        graph[module] = (names & by_name.keys()) - {module}
    return graph


def _top_level(tree: ast.Module) -> Iterator[ast.stmt]:
    """Yield the statements of a module that run on import."""
    stack: list[ast.stmt] = list(tree.body)
    while stack:
        node = stack.pop()
        yield node
        if isinstance(node, ast.If) and "TYPE_CHECKING" not in ast.unparse(node.test):
            stack += node.body + node.orelse
        elif isinstance(node, ast.Try):
            stack += node.body + node.orelse + node.finalbody


def cycles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """Return the groups of modules that import each other in a circle."""
    reached = {module: _reachable(graph, module) for module in graph}
    groups = {
        tuple(sorted(n for n in reached[m] if m in reached[n])) for m in graph if m in reached[m]
    }
    return [list(group) for group in sorted(groups)]


def _reachable(graph: Mapping[str, set[str]], start: str) -> set[str]:
    seen: set[str] = set()
    stack = list(graph[start])
    while stack:
        module = stack.pop()
        if module not in seen:
            seen.add(module)
            stack += graph[module]
    return seen
