"""Custom rewards by name.

A name is "my_reward.py:brightness" in a file, or "my_package.module:Name" in a package. Names are checked without
running or importing the code; a file runs when the reward is created.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.util
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from diffalign.core.errors import UserError, one_line
from diffalign.core.files import expand_home
from diffalign.core.nearest import nearest

_NAME = re.compile(r"(?P<place>.+\.py|[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*):(?P<attribute>[A-Za-z_]\w*)")


class UnknownReward(UserError, ValueError):
    """Name of a reward that does not exist."""


def is_own(name: str) -> bool:
    """Return True if a name refers to a file or a module."""
    return ":" in name or name.endswith(".py")


def attribute_of(name: str) -> str:
    """Return the last part of a custom reward's name; return other names unchanged."""
    match = _NAME.fullmatch(name)
    return match["attribute"] if match else name


def digest(name: str) -> str | None:
    """Return the sha256 of a reward's file, or None if the name has no file."""
    match = _NAME.fullmatch(name)
    if match is None or not match["place"].endswith(".py"):
        return None
    return hashlib.sha256(expand_home(match["place"]).read_bytes()).hexdigest()


def check(name: str, *, setting: str = "rewards") -> None:
    """Check that the file or module exists, and that a file defines the name.

    Raises:
        UnknownReward: it does not; the message names the nearest defined name.
    """
    place, attribute = _split(name, setting)
    if not place.endswith(".py"):
        try:
            with _importable(Path.cwd()):
                spec = importlib.util.find_spec(place)
        # packages above the module run, and may raise any error
        except Exception:
            spec = None
        if spec is None:
            raise UnknownReward(
                f"{name}: there is no module {place!r} here. Install it, or name a file: my_reward.py:{attribute}",
                setting=setting,
            )
        return
    path = expand_home(place)
    try:
        tree = ast.parse(path.read_bytes(), filename=str(path))
    except OSError as error:
        raise UnknownReward(
            f"{name}: {path} cannot be read ({error.strerror}). Check the path; it is taken from the current folder.",
            setting=setting,
        ) from error
    except (SyntaxError, ValueError) as error:
        raise UnknownReward(
            f"{name}: {path} is no Python: {error}. Correct the file", setting=setting
        ) from error
    _check_attribute(name, _defined(tree), setting)


def load(name: str, *, setting: str = "rewards") -> Any:
    """Run the file or import the module of a checked name, and return its object.

    The object is a class, a function or an instance.

    Raises:
        UnknownReward: the object does not exist, or the import fails.
    """
    place, attribute = _split(name, setting)
    try:
        if place.endswith(".py"):
            module = _run(expand_home(place))
        else:
            with _importable(Path.cwd()):
                module = importlib.import_module(place)
    # a user's code may raise any error
    except Exception as error:
        raise UnknownReward(
            f"{name}: {place} raised {type(error).__name__} as it was imported: {_with_place(error)}",
            setting=setting,
        ) from error
    _check_attribute(name, vars(module), setting)
    return getattr(module, attribute)


def _with_place(error: BaseException) -> str:
    """Return an error's text in one line, with the place that raised it."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    place = f" ({trace.tb_frame.f_code.co_filename}, line {trace.tb_lineno})" if trace else ""
    return one_line(error, limit=300) + place


def _split(name: str, setting: str) -> tuple[str, str]:
    match = _NAME.fullmatch(name)
    if match is None:
        raise UnknownReward(
            f"{name}: expected FILE.py:NAME or PACKAGE.MODULE:NAME, where NAME is a Reward class or a function of "
            "images, prompts and metadata; see docs/rewards.md",
            setting=setting,
        )
    return match["place"], match["attribute"]


def _check_attribute(name: str, defined: Iterable[str], setting: str) -> None:
    place, attribute = _split(name, setting)
    names = [n for n in defined if not n.startswith("_")]
    if attribute in names:
        return
    some = ", ".join(sorted(names)[:8]) or "no names"
    hint = nearest(attribute, names, otherwise=f"it has {some}")
    raise UnknownReward(f"{name}: {place} has no {attribute!r}{hint}", setting=setting)


def _defined(tree: ast.Module) -> list[str]:
    """Return the names that a module's statements visibly define."""
    names: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.append(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names += [(a.asname or a.name).partition(".")[0] for a in node.names]
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.append(node.id)
    return names


def _run(path: Path) -> ModuleType:
    """Run a file as a module that can import from its folder."""
    path = path.resolve()
    key = f"diffalign_own_{hashlib.sha256(str(path).encode()).hexdigest()[:12]}"
    spec = importlib.util.spec_from_file_location(key, path)
    assert spec is not None and spec.loader is not None  # noqa: PT018 - a path that ends in .py has both
    module = importlib.util.module_from_spec(spec)
    sys.modules[key] = module
    try:
        with _importable(path.parent):
            spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[key]
        raise
    return module


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """Make modules of a folder importable in this block, as for a script in it."""
    sys.path.append(str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
